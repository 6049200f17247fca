//! What VT-x asks of a processor of the host.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use bivisor_machine::engine::EngineError;
use bivisor_x86::msr::number;
use bivisor_x86::registers::Cr4;
use bivisor_x86::state::{CpuState, XCR0_AVX, XCR0_SSE, XCR0_X87};

use super::controls::Controls;
use super::field::Current;
use super::host_state::HostState;
use super::memory_type::MemoryTypes;
use crate::host::{cpuid, enable_xsave, read_msr, write_msr};
use crate::page::{Page, PhysicalMap, physical_of};

const FEATURE_CONTROL: u32 = 0x3a;
/// IA32_FEATURE_CONTROL: it can't be written any more.
const LOCKED: u64 = 1;
/// IA32_FEATURE_CONTROL: VMXON is allowed.
const VMX_ALLOWED: u64 = 1 << 2;

/// What is different between processors with VT-x, beside its controls, and matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Features {
    /// RDTSCP and IA32_TSC_AUX.
    pub(super) tsc_aux: bool,
    /// IA32_SPEC_CTRL.
    pub(super) spec_ctrl: bool,
    /// The state components that guests may have.
    pub(super) xcr0: u64,
}

impl Features {
    /// The features by CPUID, given as a function of leaf and sub-leaf.
    fn new(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Result<Self, EngineError> {
        let refuse = |what: &str| Err(EngineError(alloc::format!("this processor has no {what}")));
        let [_, _, basic, _] = cpuid(1, 0);
        if basic & 1 << 5 == 0 {
            return refuse("VT-x (VMX)");
        }
        if basic & 1 << 26 == 0 {
            return refuse("XSAVE");
        }
        let extended = if cpuid(0x8000_0000, 0)[0] > 0x8000_0000 { cpuid(0x8000_0001, 0) } else { [0; 4] };
        let structured = if cpuid(0, 0)[0] >= 7 { cpuid(7, 0) } else { [0; 4] };
        Ok(Self {
            tsc_aux: extended[3] & 1 << 27 != 0,
            spec_ctrl: structured[3] & 1 << 26 != 0,
            xcr0: u64::from(cpuid(0xd, 0)[0]) & (XCR0_X87 | XCR0_SSE | XCR0_AVX),
        })
    }
}

/// Registers that VM entry and exit leave alone, and the hypervisor doesn't use: the last guest's values stay in them.
const LEFT_ALONE: [u32; 5] =
    [number::STAR, number::LSTAR, number::CSTAR, number::SFMASK, number::KERNEL_GS_BASE];

fn left_alone(state: &CpuState) -> [u64; LEFT_ALONE.len()] {
    let msr = &state.msr;
    [msr.star, msr.lstar, msr.cstar, msr.sfmask, msr.kernel_gs_base]
}

/// A processor that is ready to enter guests.
pub struct VmxProcessor {
    pub(super) features: Features,
    pub(super) controls: Controls,
    pub(super) memory_types: MemoryTypes,
    host: HostState,
    /// What is in the registers that are left alone, and in IA32_TSC_AUX.
    loaded: [AtomicU64; LEFT_ALONE.len()],
    tsc_aux: AtomicU64,
    /// Physical address of the current control structure; 0 if there is none.
    current: AtomicU64,
    /// VMXON's. Only the processor knows of it.
    _region: Box<Page>,
}

impl VmxProcessor {
    /// Switches VMX and XSAVE on, on the current processor, for good.
    ///
    /// # Errors
    /// The processor can't do it, or its firmware has forbidden it.
    ///
    /// # Safety
    /// At privilege level 0 in 64-bit mode, on behalf of whoever owns the processor, whose segments, tables and page tables stay
    /// as they are from now on, with a task register that the global descriptor table describes. The value must live as long
    /// as guests are entered.
    pub unsafe fn enable(map: &dyn PhysicalMap) -> Result<Self, EngineError> {
        let features = Features::new(cpuid)?;
        // SAFETY: at level 0 (the caller's promise); every processor with VMX has the registers of the capabilities and of
        // the types of memory.
        let (controls, memory_types) =
            unsafe { (Controls::new(|msr| read_msr(msr))?, MemoryTypes::new(|msr| read_msr(msr))) };
        let mut region = Page::zeroed();
        region.0[0] = controls.revision.into();
        // SAFETY: as above; the page is one that nothing else uses, and the components are as CPUID allows.
        let host = unsafe {
            allow()?;
            enter_operation(&controls, physical_of(map, &*region))?;
            enable_xsave(features.xcr0);
            HostState::read()
        };
        // SAFETY: these exist wherever there is 64-bit mode.
        let loaded = LEFT_ALONE.map(|msr| AtomicU64::new(unsafe { read_msr(msr) }));
        Ok(Self {
            features,
            controls,
            memory_types,
            host,
            loaded,
            tsc_aux: AtomicU64::new(u64::MAX),
            current: AtomicU64::new(0),
            _region: region,
        })
    }

    pub(super) fn host(&self) -> &HostState {
        &self.host
    }

    /// Makes a control structure the current one.
    ///
    /// # Safety
    /// On this processor, at level 0 with interrupts disabled. The structure at this physical address was cleared once
    /// ([`VmxProcessor::clear`]), and nobody but the caller has it, as long as the returned value lives.
    pub(super) unsafe fn make_current(&self, address: u64) -> Result<Current, EngineError> {
        if self.current.load(Ordering::Relaxed) != address {
            let failed: u8;
            // SAFETY: the caller's promise.
            unsafe {
                asm!("vmptrld [{}]", "setna {}", in(reg) &raw const address, out(reg_byte) failed, options(nostack));
            }
            if failed != 0 {
                return Err(EngineError("the processor refuses a control structure".into()));
            }
            self.current.store(address, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise; `enable` has entered VMX operation.
        Ok(unsafe { Current::new() })
    }

    /// Takes all that the processor has cached of a control structure from it.
    ///
    /// # Safety
    /// As [`VmxProcessor::make_current`]; the structure begins with the revision.
    pub(super) unsafe fn clear(&self, address: u64) {
        // SAFETY: the caller's promise. It fails only for addresses that are none.
        unsafe { asm!("vmclear [{}]", in(reg) &raw const address, options(nostack)) };
        if self.current.load(Ordering::Relaxed) == address {
            self.current.store(0, Ordering::Relaxed);
        }
    }

    /// Loads the registers that VM entry leaves alone.
    ///
    /// # Safety
    /// As [`VmxProcessor::make_current`], for a state whose registers have values that the processor takes.
    pub(super) unsafe fn load_registers(&self, state: &CpuState) {
        for ((msr, value), loaded) in LEFT_ALONE.into_iter().zip(left_alone(state)).zip(&self.loaded) {
            if loaded.swap(value, Ordering::Relaxed) != value {
                // SAFETY: the caller's promise; the host doesn't use them.
                unsafe { write_msr(msr, value) };
            }
        }
        let aux = state.msr.tsc_aux;
        if self.features.tsc_aux && self.tsc_aux.swap(aux, Ordering::Relaxed) != aux {
            // SAFETY: as above; the register exists with the feature.
            unsafe { write_msr(number::TSC_AUX, aux) };
        }
    }

    /// Stores what of the registers the guest has changed by itself.
    ///
    /// # Safety
    /// On this processor, at level 0, after the guest was left.
    pub(super) unsafe fn store_registers(&self, state: &mut CpuState) {
        // SAFETY: the caller's promise.
        let value = unsafe { read_msr(number::KERNEL_GS_BASE) };
        state.msr.kernel_gs_base = value;
        if let Some(last) = self.loaded.last() {
            last.store(value, Ordering::Relaxed);
        }
    }
}

/// Has VMXON allowed.
///
/// # Safety
/// At level 0, on a processor with VMX.
unsafe fn allow() -> Result<(), EngineError> {
    // SAFETY: the register exists on every processor with VMX; unless locked, these bits may be set.
    unsafe {
        let control = read_msr(FEATURE_CONTROL);
        if control & LOCKED == 0 {
            write_msr(FEATURE_CONTROL, control | LOCKED | VMX_ALLOWED);
        } else if control & VMX_ALLOWED == 0 {
            return Err(EngineError("VT-x is switched off in the firmware's set-up".into()));
        }
    }
    Ok(())
}

/// VMXON, with CR0 and CR4 as it wants them.
///
/// # Safety
/// At level 0, on a processor with VMX that is allowed; the region is a page that nothing else uses, with the revision.
unsafe fn enter_operation(controls: &Controls, region: u64) -> Result<(), EngineError> {
    let failed: u8;
    // SAFETY: the caller's promise. In 64-bit mode CR0 lacks at most NE of what VMX wants.
    unsafe {
        let (cr0, cr4): (u64, u64);
        asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack, preserves_flags));
        asm!("mov cr0, {}", in(reg) (cr0 | controls.cr0.0) & controls.cr0.1, options(nomem, nostack, preserves_flags));
        asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags));
        let cr4 = (cr4 | controls.cr4.0 | Cr4::VMXE.bits()) & controls.cr4.1;
        asm!("mov cr4, {}", in(reg) cr4, options(nomem, nostack, preserves_flags));
        asm!("vmxon [{}]", "setna {}", in(reg) &raw const region, out(reg_byte) failed, options(nostack));
    }
    if failed != 0 {
        return Err(EngineError("the processor refuses VMXON".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intel(function: u32, _: u32) -> [u32; 4] {
        match function {
            0 => [0x16, 0, 0, 0],
            1 => [0, 0, 1 << 26 | 1 << 5, 0],
            7 => [0, 0, 0, 1 << 26],
            0xd => [0xe7, 0, 0, 0],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            0x8000_0001 => [0, 0, 0, 1 << 27],
            _ => [0; 4],
        }
    }

    #[test]
    fn features_are_read_from_cpuid() {
        let features = Features::new(intel).unwrap();
        assert_eq!(features, Features { tsc_aux: true, spec_ctrl: true, xcr0: 7 });
        let old = Features::new(|leaf, index| if leaf == 0 { [6, 0, 0, 0] } else { intel(leaf, index) });
        assert!(!old.unwrap().spec_ctrl);
    }

    #[test]
    fn what_is_missing_is_named() {
        let with = |basic| {
            let features = Features::new(|leaf, index| match leaf {
                1 => [0, 0, basic, 0],
                _ => intel(leaf, index),
            });
            features.map(|_| ()).map_err(|error| error.0)
        };
        assert_eq!(with(1 << 26), Err("this processor has no VT-x (VMX)".into()));
        assert_eq!(with(1 << 5), Err("this processor has no XSAVE".into()));
    }

    #[test]
    fn the_last_register_left_alone_is_the_one_that_guests_change() {
        assert_eq!(LEFT_ALONE.last(), Some(&number::KERNEL_GS_BASE));
        let mut state = CpuState::default();
        (state.msr.star, state.msr.kernel_gs_base) = (1, 2);
        assert_eq!(left_alone(&state), [1, 0, 0, 0, 2]);
    }
}
