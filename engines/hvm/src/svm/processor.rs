//! What SVM asks of a processor of the host.
#![allow(unsafe_code)]

use alloc::boxed::Box;

use bivisor_machine::engine::EngineError;
use bivisor_x86::msr::number::{EFER, VM_CR};
use bivisor_x86::registers::Efer;
use bivisor_x86::state::{XCR0_AVX, XCR0_SSE, XCR0_X87};

use crate::host::{cpuid, enable_xsave, read_msr, write_msr};
use crate::page::{Page, PhysicalMap, physical_of};

const VM_HSAVE_PA: u32 = 0xc001_0117;
/// VM_CR: EFER.SVME can't be set.
const SVMDIS: u64 = 1 << 4;

/// What is different between processors with SVM (APM Vol. 3, CPUID Fn8000_000A), and matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Nested paging.
    pub nested_paging: bool,
    /// TLB entries of one guest can be flushed.
    pub flush_by_asid: bool,
    /// Address space numbers, the host's zero included.
    pub asids: u32,
    /// RDTSCP and IA32_TSC_AUX.
    pub tsc_aux: bool,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: bool,
    /// The state components that guests may have.
    pub xcr0: u64,
}

impl Features {
    /// The features by CPUID, given as a function of leaf and sub-leaf.
    ///
    /// # Errors
    /// The processor lacks what guests can't do without, in words.
    pub fn new(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Result<Self, EngineError> {
        let refuse = |what: &str| Err(EngineError(alloc::format!("this processor has no {what}")));
        let extended = if cpuid(0x8000_0000, 0)[0] >= 0x8000_000a { cpuid(0x8000_0001, 0) } else { [0; 4] };
        if extended[2] & 1 << 2 == 0 {
            return refuse("AMD-V (SVM)");
        }
        let [_, asids, _, svm] = cpuid(0x8000_000a, 0);
        if svm & 1 == 0 {
            return refuse("nested paging");
        }
        if cpuid(1, 0)[2] & 1 << 26 == 0 {
            return refuse("XSAVE");
        }
        let components = u64::from(cpuid(0xd, 0)[0]);
        Ok(Self {
            nested_paging: true,
            flush_by_asid: svm & 1 << 6 != 0,
            asids,
            tsc_aux: extended[3] & 1 << 27 != 0,
            spec_ctrl: cpuid(0x8000_0008, 0)[1] & 1 << 14 != 0,
            xcr0: components & (XCR0_X87 | XCR0_SSE | XCR0_AVX),
        })
    }
}

/// A processor that is ready to enter guests.
pub struct SvmProcessor {
    features: Features,
    /// Where VMRUN keeps the host's registers. Only the processor knows of it.
    _host_save: Box<Page>,
}

impl SvmProcessor {
    /// Switches SVM and XSAVE on, on the current processor, for good.
    ///
    /// # Errors
    /// The processor can't do it, or its firmware has forbidden it.
    ///
    /// # Safety
    /// At privilege level 0, and on behalf of whoever owns the processor. The value must live as long as guests are entered.
    pub unsafe fn enable(map: &dyn PhysicalMap) -> Result<Self, EngineError> {
        let features = Features::new(cpuid)?;
        let host_save = Page::zeroed();
        // SAFETY: at level 0 (the caller's promise); a processor with SVM has these registers, and the page is one that
        // nothing else uses. CR4.OSXSAVE and XCR0 are as CPUID allows, and only make instructions available.
        unsafe {
            if read_msr(VM_CR) & SVMDIS != 0 {
                return Err(EngineError("AMD-V is switched off in the firmware's set-up".into()));
            }
            write_msr(EFER, read_msr(EFER) | Efer::SVME.bits());
            write_msr(VM_HSAVE_PA, physical_of(map, &*host_save));
            enable_xsave(features.xcr0);
        }
        Ok(Self { features, _host_save: host_save })
    }

    /// What the processor has.
    pub fn features(&self) -> &Features {
        &self.features
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amd(function: u32, _: u32) -> [u32; 4] {
        match function {
            0x8000_0000 => [0x8000_0021, 0, 0, 0],
            0x8000_0001 => [0, 0, 1 << 2, 1 << 27],
            0x8000_000a => [1, 0x8000, 0, 1 | 1 << 6],
            1 => [0, 0, 1 << 26, 0],
            0xd => [0x207, 0, 0, 0],
            _ => [0; 4],
        }
    }

    #[test]
    fn features_are_read_from_cpuid() {
        let features = Features::new(amd).unwrap();
        assert!(features.nested_paging && features.flush_by_asid && features.tsc_aux);
        assert!(!features.spec_ctrl);
        assert_eq!((features.asids, features.xcr0), (0x8000, 7));
    }

    #[test]
    fn what_is_missing_is_named() {
        let without = |leaf: u32, register: usize| {
            let error = Features::new(move |function, index| {
                let mut registers = amd(function, index);
                if function == leaf {
                    registers[register] = 0;
                }
                registers
            });
            error.map(|_| ()).map_err(|error| error.0)
        };
        assert_eq!(without(0x8000_0001, 2), Err("this processor has no AMD-V (SVM)".into()));
        assert_eq!(without(0x8000_000a, 3), Err("this processor has no nested paging".into()));
        assert_eq!(without(1, 2), Err("this processor has no XSAVE".into()));
        assert_eq!(without(0x8000_0000, 0), Err("this processor has no AMD-V (SVM)".into()));
    }
}
