//! A virtual processor in Intel's hardware.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::arch::asm;

use bivisor_machine::engine::EngineError;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::exception::vector;
use bivisor_x86::msr::number::SPEC_CTRL;
use bivisor_x86::registers::{Cr0, Rflags};
use bivisor_x86::state::{CpuState, XSTATE_BV};

use super::controls::{Controls, Primary};
use super::exit::{self, Decoded, reason};
use super::field::{Field, Vmcs};
use super::memory_type::WRITE_BACK;
use super::permissions::MsrBitmap;
use super::processor::VmxProcessor;
use super::state::GuestFields;
use super::switch::{self, Switch};
use crate::guest::{Cause, DR7_ENABLES, Entry, HardwareGuest, Left};
use crate::host::{handle_nmi, load_debug_addresses, take_interrupts, write_msr};
use crate::nested::NestedTables;
use crate::page::{Page, PhysicalMap, physical_of};

/// Where an EPT entry has the type of memory.
const TYPE_SHIFT: u32 = 3;
/// EPT pointer: the tables are in write-back memory, and have four levels.
const EPT_FORM: u64 = WRITE_BACK as u64 | 3 << 3;

/// Interruptibility (SDM Vol. 3C, table 25-3).
mod blocking {
    pub(super) const STI: u64 = 1 << 0;
    pub(super) const MOV_SS: u64 = 1 << 1;
    pub(super) const NMI: u64 = 1 << 3;
}

/// Pending debug exceptions: a single step.
const PENDING_STEP: u64 = 1 << 14;
/// Interruption information: an error code is pushed.
const PUSHES_CODE: u64 = 1 << 11;
/// Kind of INVVPID: all of one address space's.
const SINGLE_SPACE: u64 = 1;
/// Kind of INVEPT: of all EPTs.
const ALL_TABLES: u64 = 2;

/// What all virtual processors of a machine share.
pub struct VmxMachine {
    nested: NestedTables,
    msrs: Box<MsrBitmap>,
}

impl VmxMachine {
    /// Lets guests at the memory, which is of the types that the processor says.
    pub fn new(memory: &GuestMemory, processor: &VmxProcessor, map: &dyn PhysicalMap) -> Self {
        let attributes = |physical, size| {
            processor.memory_types.of(physical, size).map(|kind| u64::from(kind) << TYPE_SHIFT)
        };
        Self { nested: NestedTables::new(memory, map, attributes), msrs: MsrBitmap::guests_own() }
    }
}

/// A virtual processor as the hardware keeps it.
pub struct VmxGuest {
    /// The control structure. Only the processor knows what is in it.
    _vmcs: Box<Page>,
    address: u64,
    vpid: u16,
    /// What the control structure has of the guest's registers; nothing before the first entry.
    known: Option<GuestFields>,
    /// Debug exceptions that wait for the end of an interrupt shadow.
    pending_debug: u64,
    launched: bool,
    _machine: Arc<VmxMachine>,
    processor: Arc<VmxProcessor>,
}

impl VmxGuest {
    /// A virtual processor with an address space number of its own, not zero, to run on `processor` only.
    ///
    /// # Errors
    /// The processor refuses its control structure.
    ///
    /// # Safety
    /// On `processor`, at level 0 with interrupts disabled; and it is dropped there, too.
    pub unsafe fn new(
        machine: Arc<VmxMachine>,
        processor: Arc<VmxProcessor>,
        vpid: u16,
        map: &dyn PhysicalMap,
    ) -> Result<Self, EngineError> {
        let mut page = Page::zeroed();
        page.0[0] = processor.controls.revision.into();
        let address = physical_of(map, &*page);
        // SAFETY: the caller's promise; the page is new, and begins with the revision.
        let mut vmcs = unsafe {
            processor.clear(address);
            processor.make_current(address)?
        };
        set_up(&mut vmcs, &processor.controls, vpid);
        vmcs.write(Field::MsrBitmap, physical_of(map, &*machine.msrs));
        vmcs.write(Field::EptPointer, machine.nested.root() | EPT_FORM);
        processor.host().write(&mut vmcs);
        Ok(Self {
            _vmcs: page,
            address,
            vpid,
            known: None,
            pending_debug: 0,
            launched: false,
            _machine: machine,
            processor,
        })
    }
}

impl Drop for VmxGuest {
    fn drop(&mut self) {
        // SAFETY: the promise of `new`. After it the processor writes nothing to the page any more.
        unsafe { self.processor.clear(self.address) };
    }
}

/// The fields that never change.
fn set_up(vmcs: &mut impl Vmcs, controls: &Controls, vpid: u16) {
    vmcs.write(Field::PinControls, controls.pin.into());
    vmcs.write(Field::SecondaryControls, controls.secondary.into());
    vmcs.write(Field::ExitControls, controls.exit.into());
    if controls.has_vpid() {
        vmcs.write(Field::Vpid, vpid.into());
    }
    // A guest whose handlers of the first two raise them again would keep the processor in microcode for ever. A
    // machine check is the host's, so that it is not delivered to a guest as its own.
    vmcs.write(Field::ExceptionBitmap, 1 << vector::AC | 1 << vector::DB | 1 << vector::MC);
    vmcs.write(Field::VmcsLinkPointer, u64::MAX);
    // Nothing is known of what a cleared structure has.
    for field in [
        Field::GuestDebugctl,
        Field::GuestActivity,
        Field::Cr3TargetCount,
        Field::ExitStoreCount,
        Field::ExitLoadCount,
        Field::EntryLoadCount,
    ] {
        vmcs.write(field, 0);
    }
    // What the guest reads of CR0 and CR4 is in their shadows; changes are checked against its model.
    vmcs.write(Field::Cr0Mask, u64::MAX);
    vmcs.write(Field::Cr4Mask, u64::MAX);
}

/// What delays events (SDM Vol. 3C, section 27.3.1.5: STI's shadow is one only with interrupts enabled).
fn interruptibility(state: &CpuState, entry: &Entry) -> u64 {
    let shadow = match (state.interrupt_shadow, state.ss_shadow || !state.has_flags(Rflags::IF)) {
        (false, _) => 0,
        (true, true) => blocking::MOV_SS,
        (true, false) => blocking::STI,
    };
    // An NMI that is injected blocks the next one by itself.
    let nmi = state.nmi_blocked && entry.injection != Some(crate::guest::Injection::Nmi);
    shadow | if nmi { blocking::NMI } else { 0 }
}

/// Makes the control structure ready to enter the guest in this state.
fn prepare(vmcs: &mut impl Vmcs, state: &CpuState, entry: &Entry, controls: &Controls, pending_debug: u64) {
    let mut primary = controls.primary;
    if entry.interrupt_window {
        primary |= Primary::INTERRUPT_WINDOW_EXITING.bits();
    }
    if entry.nmi_window {
        primary |= Primary::NMI_WINDOW_EXITING.bits();
    }
    vmcs.write(Field::PrimaryControls, primary.into());
    vmcs.write(Field::TscOffset, entry.tsc_offset);
    vmcs.write(Field::GuestInterruptibility, interruptibility(state, entry));
    // A shadow holds the trap back as well.
    let step = state.interrupt_shadow && state.has_flags(Rflags::TF);
    vmcs.write(Field::GuestPendingDebug, pending_debug | if step { PENDING_STEP } else { 0 });
    let (info, code) = entry.injection.as_ref().map_or((0, 0), exit::encode);
    // Real mode pushes no error codes.
    let info = if state.cr0_has(Cr0::PE) { info } else { info & !PUSHES_CODE };
    vmcs.write(Field::EntryInterruptionInfo, info);
    vmcs.write(Field::EntryErrorCode, code);
}

/// Brings the state up to date with the control structure, but for the registers in [`GuestFields`], and tells why the guest was
/// left.
fn finish(vmcs: &impl Vmcs, state: &mut CpuState) -> Result<Decoded, EngineError> {
    let decoded = exit::decode(vmcs, state.cr2).ok_or_else(|| EngineError(unexpected(vmcs)))?;
    let interruptibility = vmcs.read(Field::GuestInterruptibility);
    state.interrupt_shadow = interruptibility & (blocking::STI | blocking::MOV_SS) != 0;
    state.ss_shadow = interruptibility & blocking::MOV_SS != 0;
    state.nmi_blocked = interruptibility & blocking::NMI != 0 || decoded.nmi_blocked;
    // One that is delivered again blocks the others again.
    state.nmi_blocked |= decoded.left.delivering == Some(crate::guest::Injection::Nmi);
    let (cleared, set) = decoded.dr6;
    state.dr[6] = state.dr[6] & !cleared | set;
    Ok(decoded)
}

/// What nobody asked for, in words.
fn unexpected(vmcs: &impl Vmcs) -> String {
    let (full, rip) = (vmcs.read(Field::ExitReason), vmcs.read(Field::GuestRip));
    let qualification = vmcs.read(Field::ExitQualification);
    if full as u16 == reason::INVALID_STATE {
        return format!(
            "the processor refuses the guest's state at {rip:#x} ({qualification:#x}; {})",
            checked(vmcs)
        );
    }
    let info = vmcs.read(Field::ExitInterruptionInfo);
    format!(
        "the processor left the guest at {rip:#x} for the unexpected reason {full:#x} ({qualification:#x}, {info:#x})"
    )
}

/// What VM entry checks most, for a report.
fn checked(vmcs: &impl Vmcs) -> String {
    let read = |field| vmcs.read(field);
    format!(
        "CR0 {:#x}, CR3 {:#x}, CR4 {:#x}, EFER {:#x}, RFLAGS {:#x}, CS {:#x}, SS {:#x}, TR {:#x}, LDTR {:#x}, blocking {:#x}, \
         injected {:#x}",
        read(Field::GuestCr0),
        read(Field::GuestCr3),
        read(Field::GuestCr4),
        read(Field::GuestEfer),
        read(Field::GuestRflags),
        read(Field::GuestCsRights),
        read(Field::GuestSsRights),
        read(Field::GuestTrRights),
        read(Field::GuestLdtrRights),
        read(Field::GuestInterruptibility),
        read(Field::EntryInterruptionInfo)
    )
}

/// INVVPID or INVEPT with a descriptor of two words.
macro_rules! invalidate {
    ($instruction:literal, $kind:expr, $descriptor:expr) => {{
        let descriptor: [u64; 2] = $descriptor;
        asm!(
            concat!($instruction, " {}, [{}]"),
            in(reg) $kind, in(reg) &raw const descriptor,
            options(nostack)
        )
    }};
}

impl VmxGuest {
    /// Enters the guest with what is in the current control structure; whether that was possible.
    ///
    /// # Safety
    /// The contract of [`HardwareGuest::run`], with the guest's control structure current and ready.
    unsafe fn enter(&mut self, state: &mut CpuState, flush: bool) -> u64 {
        let features = &self.processor.features;
        let mut switch = Switch {
            registers: &raw mut state.gpr,
            xsave: (&raw mut state.xsave).cast(),
            guest_xcr0: state.xcr0,
            host_xcr0: features.xcr0,
            cr2: state.cr2,
            launched: self.launched.into(),
        };
        // SAFETY: whoever made the engine owns the processor and has entered VMX operation (`VmxProcessor::enable`), which
        // set XCR0 too; the engine's contract is that interrupts are disabled around `run`. `set_up` and `prepare` made the
        // control structure: what is the host's ends the run, and its EPT maps the machine's RAM only. The state's
        // area has room for x87, SSE and AVX, the most that `Features::xcr0` has, and holds what XSAVE or the interpreter put
        // there. DR0 to DR3 and the model-specific registers take every value that the interpreter lets a guest write, the
        // host uses none of them, and the way out sets DR7 to its value after reset.
        let failed = unsafe {
            if !self.launched {
                // Tables that were at the same place may be remembered.
                invalidate!("invept", ALL_TABLES, [0; 2]);
            }
            if flush && self.processor.controls.has_vpid() {
                invalidate!("invvpid", SINGLE_SPACE, [u64::from(self.vpid), 0]);
            }
            self.processor.load_registers(state);
            if state.dr[7] & DR7_ENABLES != 0 {
                load_debug_addresses(state);
            }
            let speculation = features.spec_ctrl && state.msr.spec_ctrl != 0;
            if speculation {
                write_msr(SPEC_CTRL, state.msr.spec_ctrl);
            }
            let failed = switch::enter(&raw mut switch);
            if speculation {
                write_msr(SPEC_CTRL, 0);
            }
            self.processor.store_registers(state);
            failed
        };
        state.cr2 = switch.cr2;
        // XSAVE says which components are in their initial state; all of them have been written.
        state.xsave.bytes[XSTATE_BV].copy_from_slice(&features.xcr0.to_le_bytes());
        failed
    }
}

impl HardwareGuest for VmxGuest {
    const KEEPS_PDPTES: bool = true;

    fn run(&mut self, state: &mut CpuState, entry: &Entry) -> Result<Left, EngineError> {
        // SAFETY: the engine's contract, and the control structure is this guest's alone.
        let mut vmcs = unsafe { self.processor.make_current(self.address)? };
        let mut fields = GuestFields::of(state, &self.processor.controls);
        fields.write(&mut vmcs, self.known.as_ref());
        prepare(&mut vmcs, state, entry, &self.processor.controls, self.pending_debug);
        // SAFETY: as above; it is ready.
        let failed = unsafe { self.enter(state, entry.flush) };
        if failed != 0 {
            let error = vmcs.read(Field::InstructionError);
            let checked = checked(&vmcs);
            return Err(EngineError(format!(
                "the processor refuses to enter the guest: error {error} ({checked})"
            )));
        }
        let decoded = finish(&vmcs, state)?;
        self.launched = true;
        fields.read(&vmcs);
        fields.store(state);
        self.known = Some(fields);
        let goes_on = matches!(decoded.left.cause, Cause::Host | Cause::InterruptWindow);
        self.pending_debug = if goes_on { vmcs.read(Field::GuestPendingDebug) } else { 0 };
        if decoded.left.cause == Cause::Host {
            // Only now: one that is taken after another exit would not end the run, and whoever waits for it not hear of it.
            // SAFETY: as above; the owner's interrupt handlers keep the registers.
            unsafe {
                if decoded.nmi {
                    handle_nmi();
                }
                take_interrupts();
            }
        }
        Ok(decoded.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Injection, Kind};
    use crate::vmx::controls::tests::able;
    use crate::vmx::field::Written;
    use bivisor_x86::exception::Exception;

    fn prepared(state: &CpuState, entry: &Entry) -> Written {
        let controls = Controls::new(able).unwrap();
        let mut vmcs = Written::default();
        set_up(&mut vmcs, &controls, 3);
        prepare(&mut vmcs, state, entry, &controls, 0);
        vmcs
    }

    #[test]
    fn nothing_of_the_host_is_left_open() {
        let vmcs = prepared(&CpuState::default(), &Entry::default());
        let on = Primary::from_bits_retain(vmcs.read(Field::PrimaryControls) as u32);
        assert!(
            on.contains(Primary::UNCONDITIONAL_IO_EXITING | Primary::MSR_BITMAPS | Primary::MOV_DR_EXITING)
        );
        assert!(!on.intersects(Primary::INTERRUPT_WINDOW_EXITING | Primary::NMI_WINDOW_EXITING));
        assert_eq!(vmcs.read(Field::PinControls) & 0x29, 0x29);
        assert_eq!((vmcs.read(Field::Cr0Mask), vmcs.read(Field::Cr4Mask)), (u64::MAX, u64::MAX));
        assert_eq!((vmcs.read(Field::Vpid), vmcs.read(Field::ExceptionBitmap)), (3, 0x6_0002));
        assert_eq!(vmcs.read(Field::EntryInterruptionInfo), 0);
    }

    #[test]
    fn windows_and_an_injection() {
        let entry = Entry {
            injection: Some(Injection::Exception(Exception::gp(0x18))),
            interrupt_window: true,
            nmi_window: true,
            tsc_offset: 5,
            flush: false,
        };
        let vmcs = prepared(&CpuState { cr0: 0x11, ..CpuState::default() }, &entry);
        let on = Primary::from_bits_retain(vmcs.read(Field::PrimaryControls) as u32);
        assert!(on.contains(Primary::INTERRUPT_WINDOW_EXITING | Primary::NMI_WINDOW_EXITING));
        assert_eq!((vmcs.read(Field::TscOffset), vmcs.read(Field::EntryErrorCode)), (5, 0x18));
        assert_eq!(vmcs.read(Field::EntryInterruptionInfo), 0x8000_0b0d);
        let real = prepared(&CpuState::default(), &entry);
        assert_eq!(real.read(Field::EntryInterruptionInfo), 0x8000_030d);
    }

    #[test]
    fn shadows_and_blocked_nmis() {
        let blocking = |state: &CpuState, injection| {
            let vmcs = prepared(state, &Entry { injection, ..Entry::default() });
            (vmcs.read(Field::GuestInterruptibility), vmcs.read(Field::GuestPendingDebug))
        };
        let mut state = CpuState { interrupt_shadow: true, rflags: 0x202, ..CpuState::default() };
        assert_eq!(blocking(&state, None), (blocking::STI, 0));
        state.ss_shadow = true;
        assert_eq!(blocking(&state, None), (blocking::MOV_SS, 0));
        (state.ss_shadow, state.rflags) = (false, 0x102);
        assert_eq!(blocking(&state, None), (blocking::MOV_SS, PENDING_STEP));
        let state = CpuState { nmi_blocked: true, ..CpuState::default() };
        assert_eq!(blocking(&state, None), (blocking::NMI, 0));
        assert_eq!(blocking(&state, Some(Injection::Nmi)), (0, 0));
    }

    #[test]
    fn what_an_exit_tells_of_the_state() {
        let mut state = CpuState { nmi_blocked: true, ..CpuState::default() };
        state.dr[6] |= 1;
        let mut vmcs = prepared(&state, &Entry::default());
        vmcs.write(Field::ExitReason, reason::CPUID.into());
        vmcs.write(Field::GuestInterruptibility, blocking::STI);
        let left = finish(&vmcs, &mut state).unwrap().left;
        assert_eq!(left, Left { cause: Cause::Instruction(Kind::Cpuid), delivering: None });
        assert!(state.interrupt_shadow && !state.ss_shadow && !state.nmi_blocked);
        // A single step; an NMI whose delivery met a device.
        vmcs.write(Field::ExitReason, reason::EXCEPTION_OR_NMI.into());
        vmcs.write(Field::ExitInterruptionInfo, 0x8000_0301);
        vmcs.write(Field::ExitQualification, 1 << 14);
        finish(&vmcs, &mut state).unwrap();
        assert_eq!(state.dr[6], 0xffff_4ff0);
        vmcs.write(Field::ExitReason, reason::EPT_VIOLATION.into());
        vmcs.write(Field::VectoringInfo, 0x8000_0202);
        assert_eq!(finish(&vmcs, &mut state).unwrap().left.delivering, Some(Injection::Nmi));
        assert!(state.nmi_blocked);
    }

    #[test]
    fn a_refused_state_is_an_error_in_words() {
        let mut state = CpuState::default();
        let mut vmcs = prepared(&state, &Entry::default());
        vmcs.write(Field::ExitReason, 0x8000_0021);
        assert!(finish(&vmcs, &mut state).unwrap_err().0.contains("refuses"));
        vmcs.write(Field::ExitReason, 49);
        assert!(finish(&vmcs, &mut state).unwrap_err().0.contains("0x31"));
    }
}
