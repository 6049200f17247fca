//! CPUID of one recorded processor, an AMD EPYC of the Zen 3 generation as a cloud offers it. Tests and the
//! table in the documentation are built from it, so that they say the same on every machine.

use super::Leaf;

const fn leaf(function: u32, registers: [u32; 4]) -> Leaf {
    Leaf { function, index: None, registers }
}

const fn sub(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
    Leaf { function, index: Some(index), registers }
}

/// The recorded leaves; every other one is zero.
pub const REFERENCE_HOST: &[Leaf] = &[
    leaf(0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    leaf(1, [0x00a0_0f11, 0x0102_0800, 0xfffa_3203, 0x178b_fbff]),
    leaf(6, [4, 0, 0, 0]),
    sub(7, 0, [0, 0x219c_05ab, 0x0040_069c, 0x8800_0000]),
    sub(0xd, 0, [0x207, 0x988, 0x988, 0]),
    sub(0xd, 1, [0xf, 0x370, 0x1800, 0]),
    sub(0xd, 2, [0x100, 0x240, 0, 0]),
    leaf(0x8000_0000, [0x8000_0022, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    leaf(0x8000_0001, [0x00a0_0f11, 0x4000_0000, 0x00c0_03f3, 0x2fd3_fbff]),
    leaf(0x8000_0002, [0x2044_4d41, 0x4359_5045, 0, 0]),
    leaf(0x8000_0005, [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140]),
    leaf(0x8000_0006, [0x4800_2200, 0x6800_4200, 0x0200_6140, 0x0800_9140]),
    leaf(0x8000_0007, [0, 0, 0, 0x100]),
    leaf(0x8000_0008, [0x0030_3030, 0x130a_d205, 0x7001, 0]),
    leaf(0x8000_0019, [0xf040_f040, 0xf040_0000, 0, 0]),
    leaf(0x8000_001a, [6, 0, 0, 0]),
    sub(0x8000_001d, 0, [0x121, 0x01c0_003f, 0x3f, 0]),
    sub(0x8000_001d, 1, [0x122, 0x01c0_003f, 0x3f, 0]),
    sub(0x8000_001d, 2, [0x143, 0x01c0_003f, 0x3ff, 2]),
    sub(0x8000_001d, 3, [0x4163, 0x03c0_003f, 0x7fff, 1]),
    leaf(0x8000_0021, [0x1800_0265, 0, 6, 0]),
];
