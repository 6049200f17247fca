//! The maps of ports and model-specific registers that a guest may access by itself (APM Vol. 2, sections 15.10 and 15.11).

use alloc::boxed::Box;
use bivisor_x86::msr::number;

/// Words of the I/O permissions map: 12 KiB.
const IO_WORDS: usize = 0x3000 / 8;
/// Words of the MSR permissions map: 8 KiB.
const MSR_WORDS: usize = 0x2000 / 8;

/// One bit per port.
#[repr(C, align(4096))]
pub struct IoPermissions([u64; IO_WORDS]);

impl IoPermissions {
    /// No port: all of them are the machine's.
    pub fn none() -> Box<Self> {
        Box::new(Self([u64::MAX; IO_WORDS]))
    }
}

/// Two bits per register: reads, writes.
#[repr(C, align(4096))]
pub struct MsrPermissions([u64; MSR_WORDS]);

/// Registers that VMRUN, VMLOAD and VMSAVE switch, and in which every value that the processor takes is harmless.
const GUESTS_OWN: [u32; 10] = [
    number::FS_BASE,
    number::GS_BASE,
    number::KERNEL_GS_BASE,
    number::STAR,
    number::LSTAR,
    number::CSTAR,
    number::SFMASK,
    number::SYSENTER_CS,
    number::SYSENTER_ESP,
    number::SYSENTER_EIP,
];

impl MsrPermissions {
    /// The registers that the guest has for its own, and no others.
    pub fn guests_own() -> Box<Self> {
        let mut map = Box::new(Self([u64::MAX; MSR_WORDS]));
        GUESTS_OWN.into_iter().for_each(|msr| map.allow(msr));
        map
    }

    fn allow(&mut self, msr: u32) {
        let Some(bit) = position(msr) else { return };
        if let Some(word) = self.0.get_mut(bit / 64) {
            *word &= !(0b11 << (bit % 64));
        }
    }
}

/// The bit for reading a register; the one for writing follows. `None`: it is on no map and always intercepted.
fn position(msr: u32) -> Option<usize> {
    let vector = match msr >> 13 {
        0 => 0,
        0x6_0000 => 1,
        0x6_0008 => 2,
        _ => return None,
    };
    Some(vector * 0x800 * 8 + (msr & 0x1fff) as usize * 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_where_the_manual_puts_them() {
        assert_eq!(position(0), Some(0));
        assert_eq!(position(0x1fff), Some(0x3ffe));
        assert_eq!(position(0xc000_0080), Some(0x820 * 8));
        assert_eq!(position(0xc001_0114), Some(0x1000 * 8 + 0x228));
        assert_eq!((position(0x2000), position(0x4000_0000), position(0xc002_0000)), (None, None, None));
    }

    #[test]
    fn only_the_guests_own_are_open() {
        let map = MsrPermissions::guests_own();
        let bits = |msr| position(msr).map(|bit| map.0[bit / 64] >> (bit % 64) & 0b11);
        assert_eq!(bits(number::LSTAR), Some(0));
        assert_eq!(bits(number::SYSENTER_EIP), Some(0));
        for msr in [number::EFER, number::TSC, number::TSC_AUX, number::PAT, 0xc001_0114, 0xc001_0117, 0x1b] {
            assert_eq!(bits(msr), Some(0b11), "{msr:#x}");
        }
        let open: u32 = map.0.iter().map(|word| word.count_zeros()).sum();
        assert_eq!(open as usize, 2 * GUESTS_OWN.len());
        assert!(IoPermissions::none().0.iter().all(|word| *word == u64::MAX));
    }
}
