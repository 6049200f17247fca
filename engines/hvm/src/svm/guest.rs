//! A virtual processor in AMD's hardware.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;

use bivisor_machine::engine::EngineError;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::exception::vector;
use bivisor_x86::msr::number::{SPEC_CTRL, TSC_AUX};
use bivisor_x86::state::{CpuState, XSTATE_BV};

use super::exit::{self, code};
use super::permissions::{IoPermissions, MsrPermissions};
use super::processor::{Features, SvmProcessor};
use super::switch::{self, Switch};
use super::vmcb::{Intercepts1, Intercepts2, Vmcb, tlb_control, virtual_interrupt};
use crate::guest::{Cause, DR7_ENABLES, Entry, HardwareGuest, Left};
use crate::host::{load_debug_addresses, take_interrupts, write_msr};
use crate::nested::NestedTables;
use crate::page::{Page, PhysicalMap, physical_of};

/// What all virtual processors of a machine share.
pub struct SvmMachine {
    nested: NestedTables,
    ports: Box<IoPermissions>,
    msrs: Box<MsrPermissions>,
}

impl SvmMachine {
    /// Lets guests at the memory, and at no port.
    pub fn new(memory: &GuestMemory, map: &dyn PhysicalMap) -> Self {
        // The type of memory is what the guest's and the host's own tables and registers make of it.
        let nested = NestedTables::new(memory, map, |_, _| Some(0));
        Self { nested, ports: IoPermissions::none(), msrs: MsrPermissions::guests_own() }
    }
}

/// A virtual processor as the hardware keeps it.
pub struct SvmGuest {
    vmcb: Box<Vmcb>,
    vmcb_address: u64,
    /// What VMSAVE keeps of the host while the guest executes.
    _host: Box<Page>,
    host_address: u64,
    _machine: Arc<SvmMachine>,
    processor: Arc<SvmProcessor>,
}

impl SvmGuest {
    /// A virtual processor with an address space number of its own, to run on `processor` only.
    pub fn new(
        machine: Arc<SvmMachine>,
        processor: Arc<SvmProcessor>,
        asid: u32,
        map: &dyn PhysicalMap,
    ) -> Self {
        let mut vmcb = Vmcb::zeroed();
        set_up(&mut vmcb, asid);
        vmcb.control.iopm_base_pa = physical_of(map, &*machine.ports);
        vmcb.control.msrpm_base_pa = physical_of(map, &*machine.msrs);
        vmcb.control.nested_cr3 = machine.nested.root();
        let host = Page::zeroed();
        Self {
            vmcb_address: physical_of(map, &*vmcb),
            vmcb,
            host_address: physical_of(map, &*host),
            _host: host,
            _machine: machine,
            processor,
        }
    }
}

/// The parts of the block that never change.
fn set_up(vmcb: &mut Vmcb, asid: u32) {
    let control = &mut vmcb.control;
    // CR0 and CR8 are the machine's, bits of CR4 are checked against its model. CR2 and CR3 are the guest's.
    control.cr_reads = 1 << 0 | 1 << 8;
    control.cr_writes = 1 << 0 | 1 << 4 | 1 << 8;
    (control.dr_reads, control.dr_writes) = (u16::MAX, u16::MAX);
    // A guest whose handlers of these two raise them again would keep the processor in microcode for ever. A
    // machine check is the host's, so that it is not delivered to a guest as its own.
    control.exceptions = 1 << vector::AC | 1 << vector::DB | 1 << vector::MC;
    control.intercepts1 = intercepts1(false, false).bits();
    control.intercepts2 = Intercepts2::all().bits();
    control.asid = asid;
    control.tlb_control = tlb_control::FLUSH_ALL;
    control.nested_paging = 1;
}

/// The intercepts of the first vector; two of them are on only while they are needed.
fn intercepts1(window: bool, interrupt_return: bool) -> Intercepts1 {
    let mut intercepts = Intercepts1::all() - Intercepts1::VINTR - Intercepts1::IRET;
    intercepts.set(Intercepts1::VINTR, window);
    intercepts.set(Intercepts1::IRET, interrupt_return);
    intercepts
}

/// Makes the block ready to enter the guest in this state.
fn prepare(vmcb: &mut Vmcb, state: &CpuState, entry: &Entry, features: &Features) {
    vmcb.save.load(state);
    let control = &mut vmcb.control;
    control.tsc_offset = entry.tsc_offset;
    control.interrupt_shadow = state.interrupt_shadow.into();
    control.event_injection = entry.injection.as_ref().map_or(0, exit::encode);
    control.intercepts1 = intercepts1(entry.interrupt_window, state.nmi_blocked).bits();
    control.virtual_interrupt = virtual_interrupt::V_INTR_MASKING;
    if entry.interrupt_window {
        // Nobody gets this interrupt: the guest is left when it could take it.
        control.virtual_interrupt |=
            virtual_interrupt::V_IRQ | virtual_interrupt::V_INTR_PRIORITY | virtual_interrupt::V_IGN_TPR;
    }
    if entry.flush {
        control.tlb_control =
            if features.flush_by_asid { tlb_control::FLUSH_GUEST } else { tlb_control::FLUSH_ALL };
    }
}

/// Brings the state up to date with the block, and tells why the guest was left.
fn finish(vmcb: &mut Vmcb, state: &mut CpuState) -> Result<Left, EngineError> {
    vmcb.save.store(state);
    state.interrupt_shadow = vmcb.control.interrupt_shadow & 1 != 0;
    state.ss_shadow = false;
    let left = exit::decode(&vmcb.control, state.cr2).ok_or_else(|| {
        let control = &vmcb.control;
        EngineError(match control.exit_code {
            // The manual has 64 bits of ones; QEMU has 32.
            code::INVALID | code::INVALID_32 => {
                format!("the processor refuses the guest's state at {:#x} ({})", state.rip, checked(vmcb))
            }
            code => format!(
                "the processor left the guest at {:#x} for the unexpected reason {code:#x} ({:#x}, {:#x})",
                state.rip, control.exit_info1, control.exit_info2
            ),
        })
    });
    vmcb.control.tlb_control = 0;
    vmcb.control.event_injection = 0;
    left
}

/// What VMRUN checks, for a report.
fn checked(vmcb: &Vmcb) -> String {
    let Vmcb { control, save } = vmcb;
    format!(
        "CR0 {:#x}, CR3 {:#x}, CR4 {:#x}, EFER {:#x}, DR6 {:#x}, DR7 {:#x}, injected {:#x}",
        save.cr0, save.cr3, save.cr4, save.efer, save.dr6, save.dr7, control.event_injection
    )
}

impl HardwareGuest for SvmGuest {
    const KEEPS_PDPTES: bool = false;

    fn run(&mut self, state: &mut CpuState, entry: &Entry) -> Result<Left, EngineError> {
        let features = self.processor.features();
        prepare(&mut self.vmcb, state, entry, features);
        let mut switch = Switch {
            registers: &raw mut state.gpr,
            xsave: (&raw mut state.xsave).cast(),
            guest_xcr0: state.xcr0,
            host_xcr0: features.xcr0,
            guest: self.vmcb_address,
            host: self.host_address,
        };
        // SAFETY: whoever made the engine owns the processor and has enabled SVM on it (`SvmProcessor::enable`), which
        // set XCR0 too; the engine's contract is that interrupts are disabled around `run`. `set_up` and `prepare` made
        // the block: it intercepts VMRUN and all that is the host's, and its nested tables map the machine's RAM
        // only. The state's area has room for x87, SSE and AVX, the most that `Features::xcr0` has, and holds what XSAVE
        // or the interpreter put there. DR0 to DR3, TSC_AUX and SPEC_CTRL take every value that the
        // interpreter lets a guest write, the host uses none of them, and VMRUN clears the host's DR7 on the way back.
        unsafe {
            if features.tsc_aux {
                write_msr(TSC_AUX, state.msr.tsc_aux);
            }
            if state.dr[7] & DR7_ENABLES != 0 {
                load_debug_addresses(state);
            }
            let speculation = features.spec_ctrl && state.msr.spec_ctrl != 0;
            if speculation {
                write_msr(SPEC_CTRL, state.msr.spec_ctrl);
            }
            switch::enter(&raw mut switch);
            if speculation {
                write_msr(SPEC_CTRL, 0);
            }
        }
        // XSAVE says which components are in their initial state; all of them have been written.
        state.xsave.bytes[XSTATE_BV].copy_from_slice(&features.xcr0.to_le_bytes());
        let left = finish(&mut self.vmcb, state)?;
        if left.cause == Cause::Host {
            // Only now: one that is taken after another exit would not end the run, and whoever waits for it not hear of it.
            // SAFETY: as above; the owner's interrupt handlers keep the registers.
            unsafe { take_interrupts() };
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Injection, Kind};

    const FEATURES: Features = Features {
        nested_paging: true,
        flush_by_asid: true,
        asids: 16,
        tsc_aux: true,
        spec_ctrl: true,
        xcr0: 7,
    };

    fn block(state: &CpuState, entry: &Entry) -> Box<Vmcb> {
        let mut vmcb = Vmcb::zeroed();
        set_up(&mut vmcb, 1);
        prepare(&mut vmcb, state, entry, &FEATURES);
        vmcb
    }

    #[test]
    fn nothing_of_the_host_is_left_open() {
        let vmcb = block(&CpuState::default(), &Entry::default());
        let control = &vmcb.control;
        assert_eq!(
            (control.intercepts2, control.nested_paging, control.asid),
            (0x2fff & !0x1180 | 0x200, 1, 1)
        );
        let on = Intercepts1::from_bits_retain(control.intercepts1);
        assert!(
            on.contains(
                Intercepts1::INTR | Intercepts1::NMI | Intercepts1::IOIO_PROT | Intercepts1::MSR_PROT
            )
        );
        assert!(!on.intersects(Intercepts1::VINTR | Intercepts1::IRET));
        assert_eq!(control.virtual_interrupt, virtual_interrupt::V_INTR_MASKING);
        assert_eq!(control.tlb_control, tlb_control::FLUSH_ALL);
    }

    #[test]
    fn a_window_and_an_injection() {
        let mut state = CpuState { nmi_blocked: true, interrupt_shadow: true, ..CpuState::default() };
        let entry = Entry {
            injection: Some(Injection::Interrupt(0x20)),
            interrupt_window: true,
            nmi_window: false,
            tsc_offset: 5,
            flush: true,
        };
        let mut vmcb = block(&state, &entry);
        let control = &mut vmcb.control;
        let on = Intercepts1::from_bits_retain(control.intercepts1);
        assert!(on.contains(Intercepts1::VINTR | Intercepts1::IRET));
        assert_eq!(
            (control.event_injection, control.interrupt_shadow, control.tsc_offset),
            (0x8000_0020, 1, 5)
        );
        assert_eq!(control.tlb_control, tlb_control::FLUSH_GUEST);
        assert_eq!(control.virtual_interrupt & virtual_interrupt::V_IRQ, virtual_interrupt::V_IRQ);
        (control.exit_code, control.interrupt_shadow) = (exit::code::CPUID, 0);
        let left = finish(&mut vmcb, &mut state).unwrap();
        assert_eq!(left.cause, Cause::Instruction(Kind::Cpuid));
        assert_eq!((vmcb.control.event_injection, vmcb.control.tlb_control), (0, 0));
        assert!(!state.interrupt_shadow && state.nmi_blocked);
    }

    #[test]
    fn a_refused_state_is_an_error_in_words() {
        let mut state = CpuState::default();
        let mut vmcb = block(&state, &Entry::default());
        vmcb.control.exit_code = u64::MAX;
        assert!(finish(&mut vmcb, &mut state).unwrap_err().0.contains("refuses"));
        vmcb.control.exit_code = 0x52;
        assert!(finish(&mut vmcb, &mut state).unwrap_err().0.contains("0x52"));
    }
}
