//! The fields of the virtual-machine control structure (SDM Vol. 3D, appendix B), and the way to them.
#![allow(unsafe_code)]

use core::arch::asm;

/// The type with all its values.
macro_rules! fields {
    ($($name:ident = $number:literal,)*) => {
        /// A field, as VMREAD and VMWRITE know it. The number says its width (bits 13 and 14) and whose it is (bits 10 and 11).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u32)]
        #[allow(missing_docs)]
        pub enum Field {
            $($name = $number,)*
        }

        #[cfg(test)]
        const ALL: &[Field] = &[$(Field::$name,)*];
    };
}

fields! {
    Vpid = 0x0000,

    GuestEsSelector = 0x0800,
    GuestCsSelector = 0x0802,
    GuestSsSelector = 0x0804,
    GuestDsSelector = 0x0806,
    GuestFsSelector = 0x0808,
    GuestGsSelector = 0x080a,
    GuestLdtrSelector = 0x080c,
    GuestTrSelector = 0x080e,

    HostEsSelector = 0x0c00,
    HostCsSelector = 0x0c02,
    HostSsSelector = 0x0c04,
    HostDsSelector = 0x0c06,
    HostFsSelector = 0x0c08,
    HostGsSelector = 0x0c0a,
    HostTrSelector = 0x0c0c,

    MsrBitmap = 0x2004,
    TscOffset = 0x2010,
    EptPointer = 0x201a,
    GuestPhysicalAddress = 0x2400,
    VmcsLinkPointer = 0x2800,
    GuestDebugctl = 0x2802,
    GuestPat = 0x2804,
    GuestEfer = 0x2806,
    GuestPdpte0 = 0x280a,
    GuestPdpte1 = 0x280c,
    GuestPdpte2 = 0x280e,
    GuestPdpte3 = 0x2810,
    HostPat = 0x2c00,
    HostEfer = 0x2c02,

    PinControls = 0x4000,
    PrimaryControls = 0x4002,
    ExceptionBitmap = 0x4004,
    Cr3TargetCount = 0x400a,
    ExitControls = 0x400c,
    ExitStoreCount = 0x400e,
    ExitLoadCount = 0x4010,
    EntryControls = 0x4012,
    EntryLoadCount = 0x4014,
    EntryInterruptionInfo = 0x4016,
    EntryErrorCode = 0x4018,
    SecondaryControls = 0x401e,
    InstructionError = 0x4400,
    ExitReason = 0x4402,
    ExitInterruptionInfo = 0x4404,
    VectoringInfo = 0x4408,
    VectoringErrorCode = 0x440a,
    InstructionLength = 0x440c,
    GuestEsLimit = 0x4800,
    GuestCsLimit = 0x4802,
    GuestSsLimit = 0x4804,
    GuestDsLimit = 0x4806,
    GuestFsLimit = 0x4808,
    GuestGsLimit = 0x480a,
    GuestLdtrLimit = 0x480c,
    GuestTrLimit = 0x480e,
    GuestGdtrLimit = 0x4810,
    GuestIdtrLimit = 0x4812,
    GuestEsRights = 0x4814,
    GuestCsRights = 0x4816,
    GuestSsRights = 0x4818,
    GuestDsRights = 0x481a,
    GuestFsRights = 0x481c,
    GuestGsRights = 0x481e,
    GuestLdtrRights = 0x4820,
    GuestTrRights = 0x4822,
    GuestInterruptibility = 0x4824,
    GuestActivity = 0x4826,
    GuestSysenterCs = 0x482a,
    HostSysenterCs = 0x4c00,

    Cr0Mask = 0x6000,
    Cr4Mask = 0x6002,
    Cr0Shadow = 0x6004,
    Cr4Shadow = 0x6006,
    ExitQualification = 0x6400,
    GuestCr0 = 0x6800,
    GuestCr3 = 0x6802,
    GuestCr4 = 0x6804,
    GuestEsBase = 0x6806,
    GuestCsBase = 0x6808,
    GuestSsBase = 0x680a,
    GuestDsBase = 0x680c,
    GuestFsBase = 0x680e,
    GuestGsBase = 0x6810,
    GuestLdtrBase = 0x6812,
    GuestTrBase = 0x6814,
    GuestGdtrBase = 0x6816,
    GuestIdtrBase = 0x6818,
    GuestDr7 = 0x681a,
    GuestRsp = 0x681c,
    GuestRip = 0x681e,
    GuestRflags = 0x6820,
    GuestPendingDebug = 0x6822,
    GuestSysenterEsp = 0x6824,
    GuestSysenterEip = 0x6826,
    HostCr0 = 0x6c00,
    HostCr3 = 0x6c02,
    HostCr4 = 0x6c04,
    HostFsBase = 0x6c06,
    HostGsBase = 0x6c08,
    HostTrBase = 0x6c0a,
    HostGdtrBase = 0x6c0c,
    HostIdtrBase = 0x6c0e,
    HostSysenterEsp = 0x6c10,
    HostSysenterEip = 0x6c12,
    HostRsp = 0x6c14,
    HostRip = 0x6c16,
}

/// A control structure whose fields can be accessed.
pub trait Vmcs {
    /// Reads a field.
    fn read(&self, field: Field) -> u64;
    /// Writes a field. Narrow ones take the low bits.
    fn write(&mut self, field: Field, value: u64);
}

/// The processor's current control structure.
pub(super) struct Current(());

impl Current {
    /// # Safety
    /// As long as the value lives, this processor is in VMX root operation at level 0, and a control structure is current
    /// that nobody else accesses. Entering with what is written is up to whoever does that.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Vmcs for Current {
    fn read(&self, field: Field) -> u64 {
        let value: u64;
        // SAFETY: the promise of `new`. VMREAD of a field that the processor lacks fails, and leaves the register as it is.
        unsafe {
            asm!(
                "vmread {}, {}", inout(reg) 0u64 => value, in(reg) u64::from(field as u32),
                options(nostack)
            );
        }
        value
    }

    fn write(&mut self, field: Field, value: u64) {
        // SAFETY: the promise of `new`. VMWRITE of a field that the processor lacks fails, which has no effect.
        unsafe {
            asm!("vmwrite {}, {}", in(reg) u64::from(field as u32), in(reg) value, options(nostack));
        }
    }
}

/// A control structure of the tests.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Written(pub(super) alloc::collections::BTreeMap<Field, u64>);

#[cfg(test)]
impl Vmcs for Written {
    fn read(&self, field: Field) -> u64 {
        self.0.get(&field).copied().unwrap_or(0)
    }
    fn write(&mut self, field: Field, value: u64) {
        let mask = match field as u32 >> 13 & 3 {
            0 => 0xffff,
            2 => 0xffff_ffff,
            _ => u64::MAX,
        };
        self.0.insert(field, value & mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn numbers_say_what_the_fields_are() {
        const EXIT: [&str; 4] = ["GuestPhysical", "Exit", "Instruction", "Vectoring"];
        let controls = ["ExitControls", "ExitStoreCount", "ExitLoadCount"];
        for field in ALL {
            let (number, name) = (*field as u32, format!("{field:?}"));
            let owner = match &*name {
                name if controls.contains(&name) => 0,
                "VmcsLinkPointer" => 2,
                name if EXIT.iter().any(|start| name.starts_with(start)) => 1,
                name if name.starts_with("Guest") => 2,
                name if name.starts_with("Host") => 3,
                _ => 0,
            };
            assert_eq!(number >> 10 & 3, owner, "{name}");
            let width = match &*name {
                "Vpid" => 0,
                name if name.ends_with("Selector") => 0,
                "MsrBitmap" | "TscOffset" => 1,
                name if name.ends_with("Limit") || name.ends_with("Rights") || name.ends_with("Cs") => 2,
                name if name.ends_with("Count") || name.ends_with("Code") => 2,
                name if name.ends_with("Base") || name.contains("Cr") => 3,
                name if name.ends_with("Pat") || name.ends_with("Efer") || name.contains("Pdpte") => 1,
                _ => continue,
            };
            assert_eq!(number >> 13 & 3, width, "{name}");
            assert_eq!(number & 1, 0, "{name}");
        }
    }
}
