//! A virtual processor: the hardware executes, the interpreter helps out.

use alloc::string::String;
use alloc::vec::Vec;

use bivisor_machine::engine::{DebugControl, EngineError, Exit, Vcpu, VcpuSetup};
use bivisor_x86::cpu::Cpu;
use bivisor_x86::env::Event;
use bivisor_x86::registers::{Cr0, Rflags, gpr};
use bivisor_x86::state::{Activity, CpuState};

use crate::env::VcpuEnv;
use crate::guest::{Cause, DR7_ENABLES, Entry, HardwareGuest, Injection, Kind, Left, PortAccess};

/// After so many exits a run ends even without an interrupt of the host's: Bochs' processor lets none end the run of a guest that
/// was entered with interrupts disabled.
const MAX_EXITS: u32 = 256;

/// How often the processor left the guest, and why.
#[derive(Default)]
struct Counts {
    instructions: [u64; Kind::ALL.len()],
    ports: u64,
    unmapped: u64,
    host: u64,
    windows: u64,
    exceptions: u64,
    injections: u64,
}

impl Counts {
    fn count(&mut self, cause: &Cause) {
        let count = match cause {
            Cause::Instruction(kind) => &mut self.instructions[*kind as usize],
            Cause::Port(_) => &mut self.ports,
            Cause::Unmapped(_) => &mut self.unmapped,
            Cause::Host => &mut self.host,
            Cause::InterruptWindow => &mut self.windows,
            Cause::Exception(_) | Cause::Shutdown => &mut self.exceptions,
        };
        *count += 1;
    }
}

/// A virtual processor on hardware of any make.
pub struct HvmVcpu<G> {
    guest: G,
    cpu: Cpu,
    env: VcpuEnv,
    /// What has to reach the guest before anything else.
    pending: Option<Injection>,
    /// The processor's cached translations are out of date.
    flush: bool,
    counts: Counts,
}

impl<G: HardwareGuest> HvmVcpu<G> {
    /// The virtual processor of this number.
    pub fn new(guest: G, index: u32, setup: VcpuSetup) -> Self {
        let mut cpu = Cpu::new(setup.model);
        cpu.apic_id = index;
        let env = VcpuEnv { memory: setup.memory, bus: setup.bus };
        Self { guest, cpu, env, pending: None, flush: true, counts: Counts::default() }
    }

    /// Takes events as far as the guest can have them now. What it is to be entered with, or why it is not.
    fn prepare(&mut self) -> Result<Entry, Exit> {
        let (mut window, mut nmi_window) = (false, false);
        while self.pending.is_none() && self.env.bus.has_event() {
            let state = &self.cpu.state;
            let executing = matches!(state.activity, Activity::Running | Activity::Halted);
            let interrupts = executing && state.has_flags(Rflags::IF) && !state.interrupt_shadow;
            let nmis = executing && !state.nmi_blocked && !state.interrupt_shadow;
            match self.env.bus.take_event(interrupts, nmis) {
                Some(Event::Kick) => return Err(Exit::Kicked),
                Some(Event::Interrupt(vector)) => self.pending = Some(Injection::Interrupt(vector)),
                Some(Event::Nmi) => {
                    self.pending = Some(Injection::Nmi);
                    self.cpu.state.nmi_blocked = true;
                }
                Some(event) => {
                    self.cpu.deliver_event(&mut self.env, event);
                    self.flush = true;
                }
                None => {
                    // What waits with interrupts open is an NMI, for which the end of the last one's handler is awaited.
                    (window, nmi_window) = (!interrupts, !nmis);
                    break;
                }
            }
        }
        if self.pending.is_some() {
            self.cpu.state.activity = Activity::Running;
            window = self.env.bus.has_event();
            nmi_window = window;
        }
        match self.cpu.state.activity {
            Activity::Running => {}
            Activity::Halted | Activity::WaitForSipi => return Err(Exit::Halt),
            Activity::Shutdown => return Err(Exit::Shutdown),
        }
        let injection = self.pending.take();
        self.counts.injections += u64::from(injection.is_some());
        let flush = core::mem::take(&mut self.flush);
        let tsc_offset = self.env.bus.tsc_offset();
        Ok(Entry { injection, interrupt_window: window, nmi_window, tsc_offset, flush })
    }

    /// Does what the guest was left for.
    fn handle(&mut self, left: Left) {
        match left.cause {
            Cause::Host | Cause::InterruptWindow => self.pending = left.delivering,
            Cause::Exception(exception) => {
                // One that was raised by the delivery of another one is for the interpreter, which knows what comes of two.
                match left.delivering {
                    Some(injection) => self.deliver_in_software(injection),
                    None => self.pending = Some(Injection::Exception(exception)),
                }
            }
            Cause::Shutdown => self.cpu.state.activity = Activity::Shutdown,
            Cause::Port(access) if !self.is_debugged() => self.access_port(&access),
            Cause::Port(_) | Cause::Instruction(_) | Cause::Unmapped(_) => self.in_software(left.delivering),
        }
    }

    /// Whether something may have to be done after the next instruction alone.
    fn is_debugged(&self) -> bool {
        self.cpu.state.has_flags(Rflags::TF) || self.cpu.state.dr[7] & DR7_ENABLES != 0
    }

    /// IN or OUT, which the processor has decoded and checked.
    fn access_port(&mut self, access: &PortAccess) {
        let (bus, state) = (&self.env.bus, &mut self.cpu.state);
        let accumulator = &mut state.gpr[gpr::RAX];
        if access.input {
            let value = u64::from(bus.port_in(access.port, access.size));
            // Four bytes clear the upper half.
            let kept = if access.size == 4 { 0 } else { u64::MAX << (8 * access.size) };
            *accumulator = *accumulator & kept | value & !(u64::MAX << (8 * access.size));
        } else {
            let value = *accumulator & !(u64::MAX << (8 * access.size));
            bus.port_out(access.port, access.size, value as u32);
        }
        state.rip = access.next_rip;
        state.rflags &= !Rflags::RF.bits();
        state.interrupt_shadow = false;
    }

    /// Lets the interpreter deliver what the processor could not, or execute the next instruction.
    fn in_software(&mut self, delivering: Option<Injection>) {
        let before = translation_registers(&self.cpu.state);
        let paging = self.cpu.state.cr0_has(Cr0::PG);
        if !G::KEEPS_PDPTES && paging && self.cpu.uses_pdptes(self.cpu.state.cr4) {
            // The hardware has checked them when it loaded them; a guest that has changed them in memory since gets the
            // new ones a little early.
            if let Ok(pdpte) = self.cpu.read_pdptes(&self.env, self.cpu.state.cr3) {
                self.cpu.state.pdpte = pdpte;
            }
        }
        match delivering {
            Some(injection) => self.deliver_in_software(injection),
            None => self.cpu.execute_next(&mut self.env),
        }
        self.flush |= translation_registers(&self.cpu.state) != before;
    }

    fn deliver_in_software(&mut self, injection: Injection) {
        self.cpu.flush_tlb();
        match injection {
            Injection::Interrupt(vector) => self.cpu.deliver_event(&mut self.env, Event::Interrupt(vector)),
            Injection::Nmi => self.cpu.deliver_event(&mut self.env, Event::Nmi),
            Injection::Exception(exception) => self.cpu.deliver_exception(&mut self.env, exception),
        }
    }
}

/// The registers whose change ends the validity of cached translations.
fn translation_registers(state: &CpuState) -> [u64; 4] {
    [state.cr0, state.cr3, state.cr4, state.msr.efer]
}

impl<G: HardwareGuest> Vcpu for HvmVcpu<G> {
    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.cpu.state.clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.cpu.state = state.clone();
        self.cpu.state_changed();
        self.pending = None;
        self.flush = true;
        Ok(())
    }

    fn run(&mut self) -> Result<Exit, EngineError> {
        for _ in 0..MAX_EXITS {
            let entry = match self.prepare() {
                Ok(entry) => entry,
                Err(exit) => return Ok(exit),
            };
            let left = self.guest.run(&mut self.cpu.state, &entry)?;
            self.counts.count(&left.cause);
            self.handle(left);
            if left.cause == Cause::Host {
                break;
            }
        }
        Ok(Exit::Kicked)
    }

    fn set_debug(&mut self, debug: &DebugControl) -> Result<(), EngineError> {
        if *debug == DebugControl::default() {
            return Ok(());
        }
        Err(EngineError("this engine has no debugger".into()))
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let counts = &self.counts;
        let instructions =
            Kind::ALL.iter().map(|(kind, words)| (*words, counts.instructions[*kind as usize]));
        let others = [
            ("exits for ports", counts.ports),
            ("exits for devices in memory", counts.unmapped),
            ("exits for interrupts of the host", counts.host),
            ("exits for interrupt windows", counts.windows),
            ("exits for exceptions", counts.exceptions),
            ("events injected", counts.injections),
        ];
        instructions.chain(others).map(|(words, count)| (words.into(), count)).collect()
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        self.cpu.translate(&self.env, linear)
    }
}

#[cfg(test)]
#[path = "vcpu_tests.rs"]
mod tests;
