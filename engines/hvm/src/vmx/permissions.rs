//! The map of model-specific registers that a guest may access by itself (SDM Vol. 3C, section 25.6.9).

use alloc::boxed::Box;
use bivisor_x86::msr::number;

/// Words of the map: 4 KiB, in four parts.
const WORDS: usize = 512;
/// Bits of a part. Reads of low registers, of high ones, writes of low ones, of high ones.
const PART: usize = 0x2000;

/// One bit per register and direction; what is set ends the run.
#[repr(C, align(4096))]
pub struct MsrBitmap([u64; WORDS]);

/// Registers that are switched, and in which every value that the processor takes is harmless.
const READ_AND_WRITTEN: [u32; 3] = [number::FS_BASE, number::GS_BASE, number::KERNEL_GS_BASE];
/// Registers that are there with the guest's values, so that only a change has to be heard of.
const READ: [u32; 7] = [
    number::STAR,
    number::LSTAR,
    number::CSTAR,
    number::SFMASK,
    number::SYSENTER_CS,
    number::SYSENTER_ESP,
    number::SYSENTER_EIP,
];

impl MsrBitmap {
    /// The registers that the guest has for its own, and no others.
    pub fn guests_own() -> Box<Self> {
        let mut map = Box::new(Self([u64::MAX; WORDS]));
        for msr in READ_AND_WRITTEN {
            map.allow(msr, false);
            map.allow(msr, true);
        }
        READ.into_iter().for_each(|msr| map.allow(msr, false));
        map
    }

    fn allow(&mut self, msr: u32, write: bool) {
        let Some(bit) = position(msr, write) else { return };
        if let Some(word) = self.0.get_mut(bit / 64) {
            *word &= !(1 << (bit % 64));
        }
    }
}

/// The bit of a register; `None`: it is not on the map, and always ends the run.
fn position(msr: u32, write: bool) -> Option<usize> {
    let high = match msr >> 13 {
        0 => 0,
        0x6_0000 => 1,
        _ => return None,
    };
    Some((usize::from(write) * 2 + high) * PART + (msr & 0x1fff) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_where_the_manual_puts_them() {
        assert_eq!(position(0, false), Some(0));
        assert_eq!(position(0xc000_0080, false), Some(1024 * 8 + 0x80));
        assert_eq!(position(0x174, true), Some(2048 * 8 + 0x174));
        assert_eq!(position(0xc000_1fff, true), Some(4096 * 8 - 1));
        assert_eq!((position(0x2000, false), position(0xc001_0015, true)), (None, None));
    }

    #[test]
    fn only_the_guests_own_are_open() {
        let map = MsrBitmap::guests_own();
        let exits = |msr, write| position(msr, write).map(|bit| map.0[bit / 64] >> (bit % 64) & 1);
        assert_eq!((exits(number::LSTAR, false), exits(number::LSTAR, true)), (Some(0), Some(1)));
        assert_eq!((exits(number::FS_BASE, false), exits(number::FS_BASE, true)), (Some(0), Some(0)));
        for msr in [number::EFER, number::TSC, number::TSC_AUX, number::PAT, 0x1b, 0x3a, 0x480] {
            assert_eq!((exits(msr, false), exits(msr, true)), (Some(1), Some(1)), "{msr:#x}");
        }
        let open: u32 = map.0.iter().map(|word| word.count_zeros()).sum();
        assert_eq!(open as usize, 2 * READ_AND_WRITTEN.len() + READ.len());
    }
}
