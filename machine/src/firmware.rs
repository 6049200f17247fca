//! What a PC's firmware leaves in processors and devices before it starts an operating system.

use bivisor_x86::state::CpuState;

use crate::device::PortIo;
use crate::devices::pic;
use crate::memory::{LOW_RAM_END, PAGE_SIZE};

/// Memory types (SDM Vol. 3A, table 12-2).
const UNCACHED: u64 = 0;
const WRITE_BACK: u64 = 6;
/// IA32_MTRR_DEF_TYPE: MTRRs and fixed ranges enabled.
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_FIXED_ENABLED: u64 = 1 << 10;
/// IA32_MTRR_PHYSMASKn: the range counts.
const MTRR_VALID: u64 = 1 << 11;
/// Registers of fixed ranges below 640 KiB (512 KiB in 64 KiB pieces, 128 KiB in 16 KiB pieces), and the one of
/// the 128 KiB of video memory after them.
const FIXED_BELOW_VIDEO: usize = 2;

/// Sets the memory types: RAM write-back, device memory uncached (SDM Vol. 3A, section 12.11). Linux compares the
/// processors' settings, and uses no PAT where MTRRs are off.
pub fn set_memory_types(state: &mut CpuState, physical_bits: u32) {
    let msr = &mut state.msr;
    msr.mtrr_def_type = MTRR_ENABLED | MTRR_FIXED_ENABLED | WRITE_BACK;
    msr.mtrr_fixed = [u64::from_le_bytes([WRITE_BACK as u8; 8]); 11];
    msr.mtrr_fixed[FIXED_BELOW_VIDEO] = u64::from_le_bytes([UNCACHED as u8; 8]);
    // The hole from the end of low RAM to 4 GiB is one range, as its size is a power of two.
    let addresses = (1u64 << physical_bits.clamp(32, 52)) - PAGE_SIZE;
    msr.mtrr_variable[0] = LOW_RAM_END | UNCACHED;
    msr.mtrr_variable[1] =
        LOW_RAM_END & u64::from(u32::MAX) | (addresses & !u64::from(u32::MAX)) | MTRR_VALID;
}

/// Initializes the PIC as a BIOS does, with the vectors of real mode. Nothing is masked: no BIOS handles interrupts
/// here, so whoever lets them in wants to have them.
pub fn set_up_pic(ports: &dyn PortIo) {
    const EDGE_CASCADE_ICW4: u32 = 0x11;
    const MODE_8086: u32 = 0x01;
    for (port, vector, cascade) in [(pic::MASTER, 0x08, 1 << 2), (pic::SLAVE, 0x70, 2)] {
        ports.port_write(port, 1, EDGE_CASCADE_ICW4);
        for word in [vector, cascade, MODE_8086] {
            ports.port_write(port + 1, 1, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_hole_is_uncached() {
        let mut state = CpuState::default();
        set_memory_types(&mut state, 40);
        let (base, mask) = (state.msr.mtrr_variable[0], state.msr.mtrr_variable[1]);
        assert_eq!(mask, 0xff_c000_0800);
        let uncached = |address: u64| address & mask & !0xfff == base & mask & !0xfff;
        for (address, expected) in [
            (0, false),
            (0xbfff_f000, false),
            (0xc000_0000, true),
            (0xffff_f000, true),
            (0x1_0000_0000, false),
            (0x1_c000_0000, false),
        ] {
            assert_eq!(uncached(address), expected, "{address:#x}");
        }
    }
}
