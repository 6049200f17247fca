//! A virtual processor in KVM.
#![allow(unsafe_code)]

use std::arch::x86_64::_rdtsc;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use bivisor_machine::devices::lapic::{BASE_BSP, MSR_APIC_BASE};
use bivisor_machine::engine::{DebugControl, EngineError, Exit, Vcpu, VcpuBus, VcpuSetup};
use bivisor_x86::env::Event;
use bivisor_x86::msr::number;
use bivisor_x86::state::{
    Activity, CpuState, MXCSR_MASK, Mode, SegReg, XCR0_SSE, XCR0_X87, XSAVE_AREA_SIZE, XSTATE_BV,
};
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

use crate::debug::Debug;
use crate::engine::{Vm, failed};
use crate::kick::Kick;
use crate::{cpuid, ioctls, msrs, registers};

/// What `--stats` tells of each reason for which KVM came back.
const REASONS: [(u32, &str); 9] = [
    (KVM_EXIT_IO, "KVM exits: port I/O"),
    (KVM_EXIT_MMIO, "KVM exits: MMIO"),
    (KVM_EXIT_X86_RDMSR, "KVM exits: RDMSR"),
    (KVM_EXIT_X86_WRMSR, "KVM exits: WRMSR"),
    (KVM_EXIT_HLT, "KVM exits: HLT"),
    (KVM_EXIT_IRQ_WINDOW_OPEN, "KVM exits: the guest takes interrupts now"),
    (KVM_EXIT_INTR, "KVM exits: signals"),
    (KVM_EXIT_SET_TPR, "KVM exits: the task priority was lowered"),
    (KVM_EXIT_DEBUG, "KVM exits: debugger"),
];

/// A virtual processor.
pub struct KvmVcpu {
    fd: VcpuFd,
    /// Keeps the guest's memory as long as the guest may execute.
    _vm: Arc<Vm>,
    bus: Arc<dyn VcpuBus>,
    kick: Arc<Kick>,
    /// CPUID 1 EAX.
    signature: u32,
    /// The components of extended state that the processor has.
    components: u64,
    activity: Activity,
    tsc_adjust: u64,
    /// The last exit is only over when the guest is entered again.
    incomplete: bool,
    /// KVM is to be told where the local APIC is.
    apic_base_changed: bool,
    debug: Debug,
    exits: [u64; REASONS.len()],
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.forget();
    }
}

impl KvmVcpu {
    /// The processor of this index.
    pub fn new(vm: Arc<Vm>, index: u32, setup: VcpuSetup) -> Result<Self, EngineError> {
        let VcpuSetup { bus, model, .. } = setup;
        let mut fd = vm.create_vcpu(index).map_err(failed("makes no virtual processor"))?;
        let entries = cpuid::list(&cpuid::entries(&model, &vm.supported, index))
            .ok_or_else(|| EngineError("the processor model has more CPUID leaves than KVM takes".into()))?;
        fd.set_cpuid2(&entries).map_err(failed("refuses the processor model"))?;
        let mut cap = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
        cap.args[0] = 1;
        // An older KVM offers more than CPUID says, to guests that don't look.
        let _ = fd.enable_cap(&cap);
        let immediate_exit = NonNull::from(&mut fd.get_kvm_run().immediate_exit);
        // SAFETY: the byte lies in the vCPU's mapping, which is unmapped when `fd` is dropped; `drop` comes before that. Nobody
        // else accesses it.
        let kick = Arc::new(unsafe { Kick::new(immediate_exit) });
        bus.set_observer(kick.clone());
        Ok(Self {
            fd,
            _vm: vm,
            bus,
            kick,
            signature: model.query(1, 0)[0],
            components: model.xcr0 | XCR0_X87 | XCR0_SSE,
            activity: Activity::Running,
            tsc_adjust: 0,
            incomplete: false,
            apic_base_changed: false,
            debug: Debug::default(),
            exits: [0; REASONS.len()],
        })
    }

    // ---- execution ----

    /// One entry into the guest, and what made it come back. `Some`: the run is over.
    fn turn(&mut self) -> Result<Option<Exit>, EngineError> {
        if std::mem::take(&mut self.apic_base_changed) {
            self.complete()?;
            let mut sregs = self.fd.get_sregs().map_err(failed("gives no registers"))?;
            sregs.apic_base = self.apic_base();
            self.fd.set_sregs(&sregs).map_err(failed("takes no registers"))?;
        }
        self.kick.enter();
        let exit = match self.take_events() {
            Ok(None) => match self.activity {
                Activity::Running => self.execute(),
                Activity::Halted | Activity::WaitForSipi => Ok(Some(Exit::Halt)),
                Activity::Shutdown => Ok(Some(Exit::Shutdown)),
            },
            other => other,
        };
        self.kick.leave();
        exit
    }

    /// Takes the events that may be taken, and has KVM tell when another one may.
    fn take_events(&mut self) -> Result<Option<Exit>, EngineError> {
        let run = self.fd.get_kvm_run();
        let mut open = run.ready_for_interrupt_injection != 0 && run.if_flag != 0;
        run.request_interrupt_window = 0;
        while self.bus.has_event() {
            let executing = matches!(self.activity, Activity::Running | Activity::Halted);
            match self.bus.take_event(open && executing, executing) {
                Some(Event::Kick) => return Ok(Some(Exit::Kicked)),
                Some(Event::Interrupt(vector)) => {
                    ioctls::interrupt(&self.fd, vector).map_err(failed("takes no interrupt"))?;
                    self.activity = Activity::Running;
                    // It has room for one.
                    open = false;
                }
                Some(Event::Nmi) => {
                    self.fd.nmi().map_err(failed("takes no NMI"))?;
                    self.activity = Activity::Running;
                }
                Some(Event::Init) => {
                    self.initialize()?;
                    open = false;
                }
                Some(Event::Sipi(page)) => {
                    let mut state = self.state()?;
                    if state.start(page) {
                        self.replace_state(&state, true)?;
                    }
                }
                // KVM keeps no translations of its own making, and no guest finds what asks for these.
                Some(Event::Unhalt | Event::FlushTlb) => {}
                None => {
                    self.fd.get_kvm_run().request_interrupt_window = 1;
                    break;
                }
            }
        }
        Ok(None)
    }

    fn initialize(&mut self) -> Result<(), EngineError> {
        let mut state = self.state()?;
        let bootstrap = self.apic_base() & BASE_BSP != 0;
        state.init(self.signature, bootstrap);
        self.replace_state(&state, true)?;
        self.bus.on_init();
        Ok(())
    }

    fn apic_base(&self) -> u64 {
        self.bus.read_msr(MSR_APIC_BASE).unwrap_or(0)
    }

    /// KVM_RUN, and what it asks for.
    fn execute(&mut self) -> Result<Option<Exit>, EngineError> {
        self.fd.get_kvm_run().cr8 = self.bus.cr8().into();
        let result = self.fd.run().map(|_| ());
        self.incomplete = false;
        let run = self.fd.get_kvm_run();
        let (cr8, reason) = (run.cr8 as u8 & 0xf, run.exit_reason);
        if cr8 != self.bus.cr8() {
            self.bus.set_cr8(cr8);
        }
        match result {
            Ok(()) => {}
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => return Ok(None),
            Err(error) => return Err(failed("executes the guest no more")(error)),
        }
        if let Some(at) = REASONS.iter().position(|(known, _)| *known == reason) {
            self.exits[at] += 1;
        }
        self.handle(reason)
    }

    fn handle(&mut self, reason: u32) -> Result<Option<Exit>, EngineError> {
        match reason {
            KVM_EXIT_IO => self.port_io(),
            KVM_EXIT_MMIO => self.mmio(),
            KVM_EXIT_X86_RDMSR => self.read_msr(),
            KVM_EXIT_X86_WRMSR => self.write_msr()?,
            KVM_EXIT_HLT => self.activity = Activity::Halted,
            KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_INTR | KVM_EXIT_SET_TPR => {}
            KVM_EXIT_DEBUG => return self.debug_exit(),
            KVM_EXIT_SHUTDOWN => {
                self.activity = Activity::Shutdown;
                return Ok(Some(Exit::Shutdown));
            }
            _ => return Err(EngineError(self.misfortune(reason))),
        }
        Ok(None)
    }

    /// What went wrong, in words.
    fn misfortune(&mut self, reason: u32) -> String {
        let run = self.fd.get_kvm_run();
        match reason {
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the reason says that this field is the one that is set; all its bit patterns are valid.
                let why = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                format!("the processor refuses to execute the guest (reason {why:#x})")
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: as above.
                let kind = unsafe { run.__bindgen_anon_1.internal.suberror };
                let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
                format!("KVM could not go on (internal error {kind}) at RIP {rip:#x}")
            }
            _ => format!("KVM came back with exit reason {reason}, which nobody knows"),
        }
    }

    fn port_io(&mut self) {
        self.incomplete = true;
        let bus = &*self.bus;
        let run = self.fd.get_kvm_run();
        // SAFETY: KVM's exit reason says that this field is the one that is set; all its bit patterns are valid.
        let io = unsafe { run.__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let length = size * io.count as usize;
        // SAFETY: KVM puts the data at this offset of the vCPU's mapping, of which `run` is the beginning and which is as long
        // as KVM says that it must be (KVM_GET_VCPU_MMAP_SIZE); the slice ends before anything else uses the mapping.
        let data = unsafe {
            let start = (&raw mut *run).cast::<u8>().add(io.data_offset as usize);
            slice::from_raw_parts_mut(start, length)
        };
        for element in data.chunks_exact_mut(size.max(1)) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                let value = bus.port_in(io.port, size).to_le_bytes();
                element.copy_from_slice(&value[..size.min(4)]);
            } else {
                bus.port_out(io.port, size, little_endian(element) as u32);
            }
        }
    }

    fn mmio(&mut self) {
        self.incomplete = true;
        let bus = &*self.bus;
        // SAFETY: KVM's exit reason says that this field is the one that is set; all its bit patterns are valid.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let length = (mmio.len as usize).min(mmio.data.len());
        let (mut gpa, mut rest) = (mmio.phys_addr, &mut mmio.data[..length]);
        while !rest.is_empty() {
            // Devices know accesses of 1, 2, 4 and 8 bytes.
            let size = 1 << rest.len().ilog2();
            let (piece, behind) = rest.split_at_mut(size);
            if mmio.is_write != 0 {
                bus.mmio_write(gpa, size, little_endian(piece));
            } else {
                piece.copy_from_slice(&bus.mmio_read(gpa, size).to_le_bytes()[..size]);
            }
            gpa += size as u64;
            rest = behind;
        }
    }

    fn tsc(&self) -> u64 {
        // SAFETY: every x86-64 CPU has RDTSC.
        unsafe { _rdtsc() }.wrapping_add(self.bus.tsc_offset())
    }

    fn read_msr(&mut self) {
        self.incomplete = true;
        // SAFETY: KVM's exit reason says that this field is the one that is set; all its bit patterns are valid.
        let number = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.msr.index };
        let value = match number {
            number::TSC => Some(self.tsc()),
            number::TSC_ADJUST => Some(self.tsc_adjust),
            _ => self.bus.read_msr(number),
        };
        // SAFETY: as above.
        let msr = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.msr };
        msr.error = value.is_none().into();
        msr.data = value.unwrap_or(0);
    }

    fn write_msr(&mut self) -> Result<(), EngineError> {
        self.incomplete = true;
        // SAFETY: KVM's exit reason says that this field is the one that is set; all its bit patterns are valid.
        let msr = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.msr };
        let written = match msr.index {
            number::TSC => {
                self.tsc_adjust = self.tsc_adjust.wrapping_add(msr.data.wrapping_sub(self.tsc()));
                self.set_tsc(msr.data)?;
                true
            }
            number::TSC_ADJUST => {
                let by = msr.data.wrapping_sub(self.tsc_adjust);
                self.tsc_adjust = msr.data;
                self.set_tsc(self.tsc().wrapping_add(by))?;
                true
            }
            number => self.bus.write_msr(number, msr.data),
        };
        self.apic_base_changed |= written && msr.index == MSR_APIC_BASE;
        // SAFETY: as above.
        unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.msr }.error = (!written).into();
        Ok(())
    }

    fn set_tsc(&mut self, value: u64) -> Result<(), EngineError> {
        self.bus.set_tsc(value);
        self.set_tsc_offset()
    }

    fn set_tsc_offset(&mut self) -> Result<(), EngineError> {
        ioctls::set_tsc_offset(&self.fd, self.bus.tsc_offset())
            .map_err(failed("does not set the time-stamp counter"))
    }

    /// Has KVM complete what the last exit left to do, so that registers are what they seem.
    fn complete(&mut self) -> Result<(), EngineError> {
        if !std::mem::take(&mut self.incomplete) {
            return Ok(());
        }
        self.kick.leave_at_once();
        match self.fd.run() {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(failed("does not complete an instruction")(error)),
            // Another piece of the same instruction.
            Ok(_) => {
                let reason = self.fd.get_kvm_run().exit_reason;
                self.handle(reason)?;
                self.complete()
            }
        }
    }

    // ---- the debugger ----

    fn apply_debug(&mut self) -> Result<(), EngineError> {
        self.fd.set_guest_debug(&self.debug.settings()).map_err(failed("can't be debugged"))
    }

    fn debug_exit(&mut self) -> Result<Option<Exit>, EngineError> {
        // SAFETY: KVM's exit reason says that this field is the one that is set; all its bit patterns are valid.
        let linear = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.debug.arch.pc };
        if self.debug.stops_at(linear) {
            return Ok(Some(Exit::Debug));
        }
        self.apply_debug()?;
        Ok(None)
    }

    fn begin_debug(&mut self) -> Result<(), EngineError> {
        let state = self.state()?;
        let base = if state.mode() == Mode::Long64 { 0 } else { state.seg[SegReg::Cs as usize].base };
        self.debug.begin(base.wrapping_add(state.rip));
        self.apply_debug()
    }

    // ---- state ----

    /// Replaces the state; `clean`: also what KVM was about to deliver.
    fn replace_state(&mut self, state: &CpuState, clean: bool) -> Result<(), EngineError> {
        self.complete()?;
        let refuses = failed("takes no registers");
        let sregs = registers::system(state, self.apic_base(), self.bus.cr8());
        self.fd.set_sregs(&sregs).map_err(&refuses)?;
        self.fd.set_regs(&registers::general(state)).map_err(&refuses)?;
        self.set_extended(state).map_err(&refuses)?;
        let mut debug = kvm_debugregs { dr6: state.dr[6], dr7: state.dr[7], ..Default::default() };
        debug.db.copy_from_slice(&state.dr[..4]);
        self.fd.set_debug_regs(&debug).map_err(&refuses)?;
        let mut msrs = state.msr.clone();
        msrs::for_each(&mut msrs, |number, value| self.set_one_msr(number, *value));
        let events = self.fd.get_vcpu_events().map_err(&refuses)?;
        let mut events = if clean { kvm_vcpu_events::default() } else { events };
        let sti = if state.ss_shadow { KVM_X86_SHADOW_INT_MOV_SS } else { KVM_X86_SHADOW_INT_STI };
        events.interrupt.shadow = if state.interrupt_shadow { sti as u8 } else { 0 };
        events.nmi.masked = state.nmi_blocked.into();
        events.flags = KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING;
        self.fd.set_vcpu_events(&events).map_err(&refuses)?;
        self.tsc_adjust = state.msr.tsc_adjust;
        self.activity = state.activity;
        self.set_tsc_offset()
    }

    /// A register that this KVM doesn't have is passed over: no guest finds it.
    fn set_one_msr(&self, number: u32, value: u64) {
        if self.one_msr(number) == Some(value) {
            return;
        }
        let entry = kvm_msr_entry { index: number, data: value, ..Default::default() };
        if let Ok(list) = Msrs::from_entries(&[entry]) {
            let _ = self.fd.set_msrs(&list);
        }
    }

    fn one_msr(&self, number: u32) -> Option<u64> {
        let entry = kvm_msr_entry { index: number, ..Default::default() };
        let mut list = Msrs::from_entries(&[entry]).ok()?;
        let count = self.fd.get_msrs(&mut list).ok()?;
        (count == 1).then(|| list.as_slice()[0].data)
    }

    fn set_extended(&self, state: &CpuState) -> Result<(), kvm_ioctls::Error> {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = state.xcr0;
        self.fd.set_xcrs(&xcrs)?;
        let mut bytes = state.xsave.bytes;
        let present = &mut bytes[XSTATE_BV];
        let kept = little_endian(present) & self.components;
        present.copy_from_slice(&kept.to_le_bytes());
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = little_endian(bytes) as u32;
        }
        // SAFETY: no component beyond what fits into the structure is enabled for this process (that takes ARCH_REQ_XCOMP_GUEST_PERM).
        unsafe { self.fd.set_xsave(&xsave) }
    }

    fn extended(&self, state: &mut CpuState) -> Result<(), kvm_ioctls::Error> {
        state.xcr0 = self.fd.get_xcrs()?.xcrs[0].value;
        let xsave = self.fd.get_xsave()?;
        let bytes = &mut state.xsave.bytes;
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(&xsave.region[..XSAVE_AREA_SIZE / 4]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        bytes[XSTATE_BV].copy_from_slice(&self.components.to_le_bytes());
        Ok(())
    }

    fn read_state(&mut self) -> Result<CpuState, kvm_ioctls::Error> {
        let mut state = CpuState { activity: self.activity, ..CpuState::default() };
        registers::take_general(&mut state, &self.fd.get_regs()?);
        registers::take_system(&mut state, &self.fd.get_sregs()?);
        self.extended(&mut state)?;
        let debug = self.fd.get_debug_regs()?;
        state.dr[..4].copy_from_slice(&debug.db);
        (state.dr[6], state.dr[7]) = (debug.dr6, debug.dr7);
        msrs::for_each(&mut state.msr, |number, place| {
            *place = self.one_msr(number).unwrap_or(*place);
        });
        state.msr.tsc_adjust = self.tsc_adjust;
        let events = self.fd.get_vcpu_events()?;
        state.interrupt_shadow = events.interrupt.shadow != 0;
        state.ss_shadow = u32::from(events.interrupt.shadow) & KVM_X86_SHADOW_INT_MOV_SS != 0;
        state.nmi_blocked = events.nmi.masked != 0;
        Ok(state)
    }
}

/// The number that up to eight bytes hold.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Vcpu for KvmVcpu {
    fn state(&mut self) -> Result<CpuState, EngineError> {
        self.complete()?;
        self.read_state().map_err(failed("gives no registers"))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.replace_state(state, false)
    }

    fn run(&mut self) -> Result<Exit, EngineError> {
        if self.debug.is_on() && self.activity == Activity::Running {
            self.begin_debug()?;
        }
        loop {
            if let Some(exit) = self.turn()? {
                self.complete()?;
                return Ok(exit);
            }
        }
    }

    fn set_debug(&mut self, debug: &DebugControl) -> Result<(), EngineError> {
        self.debug.set(debug);
        self.apply_debug()
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        REASONS.iter().zip(self.exits).map(|((_, words), count)| ((*words).to_owned(), count)).collect()
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        let translation = self.fd.translate_gva(linear).ok()?;
        (translation.valid != 0).then_some(translation.physical_address)
    }
}
