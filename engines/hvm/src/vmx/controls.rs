//! What is asked of the processor while guests execute, in the words of its capability registers (SDM Vol. 3D, appendix A;
//! Vol. 3C, sections 25.6 to 25.8).

use alloc::format;
use bitflags::bitflags;
use bivisor_machine::engine::EngineError;

/// Capability registers by number.
#[allow(missing_docs)]
pub mod capability {
    pub const BASIC: u32 = 0x480;
    pub const PIN: u32 = 0x481;
    pub const PRIMARY: u32 = 0x482;
    pub const EXIT: u32 = 0x483;
    pub const ENTRY: u32 = 0x484;
    pub const CR0_FIXED0: u32 = 0x486;
    pub const CR0_FIXED1: u32 = 0x487;
    pub const CR4_FIXED0: u32 = 0x488;
    pub const CR4_FIXED1: u32 = 0x489;
    pub const SECONDARY: u32 = 0x48b;
    pub const EPT_VPID: u32 = 0x48c;
    pub const TRUE_PIN: u32 = 0x48d;
    pub const TRUE_PRIMARY: u32 = 0x48e;
    pub const TRUE_EXIT: u32 = 0x48f;
    pub const TRUE_ENTRY: u32 = 0x490;
}

bitflags! {
    /// Pin-based controls.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Pin: u32 {
        const EXTERNAL_INTERRUPT_EXITING = 1 << 0;
        const NMI_EXITING = 1 << 3;
        const VIRTUAL_NMIS = 1 << 5;
    }
    /// Primary processor-based controls.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Primary: u32 {
        const INTERRUPT_WINDOW_EXITING = 1 << 2;
        const TSC_OFFSETTING = 1 << 3;
        const HLT_EXITING = 1 << 7;
        const MWAIT_EXITING = 1 << 10;
        const RDPMC_EXITING = 1 << 11;
        const CR8_LOAD_EXITING = 1 << 19;
        const CR8_STORE_EXITING = 1 << 20;
        const NMI_WINDOW_EXITING = 1 << 22;
        const MOV_DR_EXITING = 1 << 23;
        const UNCONDITIONAL_IO_EXITING = 1 << 24;
        const MSR_BITMAPS = 1 << 28;
        const MONITOR_EXITING = 1 << 29;
        const SECONDARY_CONTROLS = 1 << 31;
    }
    /// Secondary processor-based controls.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Secondary: u32 {
        const EPT = 1 << 1;
        const RDTSCP = 1 << 3;
        const VPID = 1 << 5;
        const WBINVD_EXITING = 1 << 6;
        const UNRESTRICTED_GUEST = 1 << 7;
        const INVPCID = 1 << 12;
    }
    /// Controls of the way out.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Exit: u32 {
        const SAVE_DEBUG = 1 << 2;
        const HOST_64_BIT = 1 << 9;
        const LOAD_PAT = 1 << 19;
        const LOAD_EFER = 1 << 21;
    }
    /// Controls of the way in.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Entry: u32 {
        const LOAD_DEBUG = 1 << 2;
        const LONG_MODE_GUEST = 1 << 9;
        const LOAD_PAT = 1 << 14;
        const LOAD_EFER = 1 << 15;
    }
    /// IA32_VMX_EPT_VPID_CAP.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct EptVpid: u64 {
        const FOUR_LEVELS = 1 << 6;
        const WRITE_BACK = 1 << 14;
        const LARGE_PAGES = 1 << 16;
        const INVEPT = 1 << 20;
        const INVEPT_ALL = 1 << 26;
        const INVVPID = 1 << 32;
        const INVVPID_SINGLE = 1 << 41;
    }
}

/// IA32_VMX_BASIC: the TRUE capability registers exist.
const TRUE_CONTROLS: u64 = 1 << 55;
/// IA32_VMX_BASIC: type of memory for control structures; 6 is write-back.
const MEMORY_TYPE_SHIFT: u32 = 50;
const WRITE_BACK: u64 = 6;
/// IA32_VMX_BASIC: what a control structure begins with.
const REVISION: u64 = 0x7fff_ffff;

/// The values for all control fields that never change, and what the processor wants of control registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// What a control structure begins with.
    pub revision: u32,
    /// Pin-based controls.
    pub pin: u32,
    /// Primary processor-based controls, without windows.
    pub primary: u32,
    /// Secondary processor-based controls.
    pub secondary: u32,
    /// Controls of the way out.
    pub exit: u32,
    /// Controls of the way in, for a guest that is not in long mode.
    pub entry: u32,
    /// CR0: bits that must be one, and bits that may be one.
    pub cr0: (u64, u64),
    /// CR4: bits that must be one, and bits that may be one.
    pub cr4: (u64, u64),
}

/// A control field from its capability register, whose low half has the bits that must be one, and whose high half those that
/// may be.
fn adjust(capability: u64, required: u32, wanted: u32, what: &str) -> Result<u32, EngineError> {
    let (ones, allowed) = (capability as u32, (capability >> 32) as u32);
    let missing = required & !allowed;
    if missing != 0 {
        return Err(EngineError(format!("this processor's VT-x lacks {what} of mask {missing:#x}")));
    }
    Ok(required | wanted & allowed | ones)
}

impl Controls {
    /// The controls on a processor whose capability registers `read` reads.
    ///
    /// # Errors
    /// It lacks what guests can't do without, in words.
    pub fn new(read: impl Fn(u32) -> u64) -> Result<Self, EngineError> {
        let basic = read(capability::BASIC);
        if basic >> MEMORY_TYPE_SHIFT & 0xf != WRITE_BACK {
            return Err(EngineError(
                "this processor's VT-x wants control structures in uncached memory".into(),
            ));
        }
        let either = |plain, exact| read(if basic & TRUE_CONTROLS != 0 { exact } else { plain });
        let pin = Pin::EXTERNAL_INTERRUPT_EXITING | Pin::NMI_EXITING | Pin::VIRTUAL_NMIS;
        let primary = Primary::all() - Primary::INTERRUPT_WINDOW_EXITING - Primary::NMI_WINDOW_EXITING;
        let secondary = Secondary::EPT | Secondary::UNRESTRICTED_GUEST | Secondary::WBINVD_EXITING;
        let entry = Entry::all() - Entry::LONG_MODE_GUEST;
        let has = EptVpid::from_bits_retain(read(capability::EPT_VPID));
        let needed = EptVpid::FOUR_LEVELS
            | EptVpid::WRITE_BACK
            | EptVpid::LARGE_PAGES
            | EptVpid::INVEPT
            | EptVpid::INVEPT_ALL;
        if !has.contains(needed) {
            let missing = needed - has;
            return Err(EngineError(format!("this processor's nested paging lacks {missing:?}")));
        }
        // Without numbers for address spaces, whatever is cached of a guest's goes with each entry.
        let numbered = has.contains(EptVpid::INVVPID | EptVpid::INVVPID_SINGLE);
        let wanted = Secondary::RDTSCP
            | Secondary::INVPCID
            | if numbered { Secondary::VPID } else { Secondary::empty() };
        Ok(Self {
            revision: (basic & REVISION) as u32,
            pin: adjust(either(capability::PIN, capability::TRUE_PIN), pin.bits(), 0, "pin controls")?,
            primary: adjust(
                either(capability::PRIMARY, capability::TRUE_PRIMARY),
                primary.bits(),
                0,
                "primary controls",
            )?,
            secondary: adjust(
                read(capability::SECONDARY),
                secondary.bits(),
                wanted.bits(),
                "secondary controls",
            )?,
            exit: adjust(
                either(capability::EXIT, capability::TRUE_EXIT),
                Exit::all().bits(),
                0,
                "exit controls",
            )?,
            entry: adjust(
                either(capability::ENTRY, capability::TRUE_ENTRY),
                entry.bits(),
                Entry::LONG_MODE_GUEST.bits(),
                "entry controls",
            )? & !Entry::LONG_MODE_GUEST.bits(),
            cr0: (read(capability::CR0_FIXED0), read(capability::CR0_FIXED1)),
            cr4: (read(capability::CR4_FIXED0), read(capability::CR4_FIXED1)),
        })
    }

    /// Whether address spaces have numbers.
    pub fn has_vpid(&self) -> bool {
        self.secondary & Secondary::VPID.bits() != 0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A processor that can do everything, and insists on what the first ones did.
    pub(in crate::vmx) fn able(register: u32) -> u64 {
        const ALL: u64 = 0xffff_ffff << 32;
        match register {
            capability::BASIC => 0x12 | 6 << MEMORY_TYPE_SHIFT | TRUE_CONTROLS,
            capability::PIN | capability::TRUE_PIN => ALL | 0x16,
            capability::PRIMARY => ALL | 0x0401_e172,
            capability::TRUE_PRIMARY => ALL | 0x0400_6172,
            capability::EXIT => ALL | 0x3_6dff,
            capability::TRUE_EXIT => ALL | 0x3_6dfb,
            capability::ENTRY => ALL | 0x11ff,
            capability::TRUE_ENTRY => ALL | 0x11fb,
            capability::SECONDARY => ALL,
            capability::EPT_VPID => EptVpid::all().bits(),
            capability::CR0_FIXED0 => 0x8000_0021,
            capability::CR0_FIXED1 | capability::CR4_FIXED1 => 0xffff_ffff,
            capability::CR4_FIXED0 => 0x2000,
            _ => 0,
        }
    }

    fn without(register: u32, bit: u32) -> Result<Controls, EngineError> {
        Controls::new(|asked| able(asked) & if asked == register { !(1 << bit) } else { u64::MAX })
    }

    #[test]
    fn values_follow_the_capabilities() {
        let controls = Controls::new(able).unwrap();
        assert_eq!((controls.revision, controls.pin), (0x12, 0x3f));
        // CR3 is the guest's: bits 15 and 16 are ones only for those who don't know better.
        assert_eq!(controls.primary, 0xb598_6dfa & !(1 << 15 | 1 << 16) | 0x0400_6172);
        assert_eq!((controls.secondary, controls.entry), (0x10ea, 0xd1ff));
        assert_eq!(controls.exit & 0x28_0204, 0x28_0204);
        assert!(controls.has_vpid());
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = without(capability::SECONDARY, 32 + 7).unwrap_err();
        assert!(error.0.contains("secondary controls of mask 0x80"), "{error}");
        assert!(without(capability::EPT_VPID, 16).unwrap_err().0.contains("LARGE_PAGES"));
        assert!(without(capability::BASIC, 51).unwrap_err().0.contains("uncached"));
    }

    #[test]
    fn what_is_only_wanted_may_be_missing() {
        assert!(!without(capability::EPT_VPID, 41).unwrap().has_vpid());
        assert_eq!(without(capability::SECONDARY, 32 + 12).unwrap().secondary, 0xea);
        let plain = without(capability::BASIC, 55).unwrap();
        assert_eq!(plain.primary & (1 << 15 | 1 << 16), 1 << 15 | 1 << 16);
    }
}
