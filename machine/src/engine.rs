//! The contract between a machine and what executes its guest's instructions.
//!
//! An engine's vCPU runs on a thread of the host. Port I/O, MMIO, MSRs and hypercalls do not end
//! [`Vcpu::run`]: the engine calls the machine back through [`VcpuBus`], because one instruction may need
//! several of them (a string operation, an access across two pages) and must then continue where it was. What
//! ends a run is what the host must act on: [`Exit`].

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::env::Event;
use bivisor_x86::state::CpuState;

use crate::memory::GuestMemory;

/// Why a vCPU stopped executing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// HLT (or wait-for-SIPI) with no event waiting: sleep until [`VcpuBus::has_event`].
    Halt,
    /// A triple fault; the state is that of the last fault.
    Shutdown,
    /// [`crate::host::Waker::wake`] was called, or the machine has stopped.
    Kicked,
    /// A breakpoint, watchpoint or single step of the debugger; RIP is that of the next instruction.
    Debug,
}

/// An engine can't go on with this VM.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(pub String);

/// What a debugger wants of a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// Return after one instruction.
    pub single_step: bool,
    /// Return before the instruction at one of these linear addresses.
    pub breakpoints: alloc::vec::Vec<u64>,
}

/// The machine as one vCPU sees it: everything outside RAM. Thread-safe; every vCPU has one of its own
/// (it knows its local APIC).
pub trait VcpuBus: Send + Sync {
    /// Reads a device register; all ones where nothing is.
    fn mmio_read(&self, gpa: u64, size: usize) -> u64;
    /// Writes a device register.
    fn mmio_write(&self, gpa: u64, size: usize, value: u64);
    /// IN.
    fn port_in(&self, port: u16, size: usize) -> u32;
    /// OUT.
    fn port_out(&self, port: u16, size: usize, value: u32);
    /// Whether an event may be waiting: one relaxed load.
    fn has_event(&self) -> bool;
    /// Has `observer` called whenever another thread raises an event, for an engine that does not ask
    /// [`VcpuBus::has_event`] all the time. Called once, before the vCPU runs.
    fn set_observer(&self, observer: Arc<dyn crate::host::Waker>);
    /// Takes the next event by priority, acknowledging an interrupt at its controller.
    fn take_event(&self, interrupts: bool, nmis: bool) -> Option<Event>;
    /// CR8.
    fn cr8(&self) -> u8;
    /// Sets CR8.
    fn set_cr8(&self, value: u8);
    /// An MSR of the machine (APIC base, x2APIC, TSC deadline, paravirtual); `None`: #GP.
    fn read_msr(&self, msr: u32) -> Option<u64>;
    /// Writes such an MSR; false: #GP.
    fn write_msr(&self, msr: u32, value: u64) -> bool;
    /// The processor was reset by INIT.
    fn on_init(&self);
    /// What to add to the host's time-stamp counter to get the guest's.
    fn tsc_offset(&self) -> u64;
    /// Sets the guest's time-stamp counter to `value` as of now.
    fn set_tsc(&self, value: u64);
    /// A hypercall; `None` where there is no paravirtual interface.
    fn hypercall(&self, state: &CpuState) -> Option<u64>;
    /// Counts why guest code was left, where the bus has not been asked for anything.
    fn count(&self, _kind: crate::exits::Kind) {}
    /// The vCPU's thread is about to sleep, since the processor is halted.
    fn parked(&self) {}
    /// The vCPU's thread has slept.
    fn unparked(&self) {}
    /// Whether the host may wait awake for a moment before it lets the thread of a halted processor sleep.
    fn host_polls(&self) -> bool {
        true
    }
}

/// Hears what a vCPU executes.
pub trait Tracer: Send {
    /// The vCPU is in this state and about to execute `code`: the bytes at its instruction pointer, as many as an
    /// instruction may have, as far as they lie in one page of RAM.
    fn about_to_execute(&mut self, state: &CpuState, code: &[u8]);
}

/// Hears where an engine puts the code that it makes.
pub trait CodeMap: Send {
    /// Code of this many bytes, with a name, stands at an address from now on, whatever stood there before.
    fn made(&mut self, address: u64, size: u64, name: String);
    /// No code is used any more: its addresses will get other code.
    fn cleared(&mut self);
}

/// A machine without anything in it, but that its owner may end a run: for measuring and testing engines by themselves.
#[derive(Default)]
pub struct EmptyBus {
    kicked: AtomicBool,
    observer: spin::Once<Arc<dyn crate::host::Waker>>,
}

impl EmptyBus {
    /// Makes the engine return, now and whenever it runs again.
    pub fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        if let Some(observer) = self.observer.get() {
            observer.wake();
        }
    }
}

impl VcpuBus for EmptyBus {
    fn mmio_read(&self, _gpa: u64, _size: usize) -> u64 {
        u64::MAX
    }
    fn mmio_write(&self, _gpa: u64, _size: usize, _value: u64) {}
    fn port_in(&self, _port: u16, _size: usize) -> u32 {
        u32::MAX
    }
    fn port_out(&self, _port: u16, _size: usize, _value: u32) {}
    fn has_event(&self) -> bool {
        self.kicked.load(Ordering::Relaxed)
    }
    fn set_observer(&self, observer: Arc<dyn crate::host::Waker>) {
        self.observer.call_once(|| observer);
    }
    fn take_event(&self, _interrupts: bool, _nmis: bool) -> Option<Event> {
        self.has_event().then_some(Event::Kick)
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _value: u8) {}
    fn read_msr(&self, _msr: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> bool {
        false
    }
    fn on_init(&self) {}
    fn tsc_offset(&self) -> u64 {
        0
    }
    fn set_tsc(&self, _value: u64) {}
    fn hypercall(&self, _state: &CpuState) -> Option<u64> {
        None
    }
}

/// One virtual processor of an engine.
pub trait Vcpu: Send {
    /// The architectural state, while not running.
    fn state(&mut self) -> Result<CpuState, EngineError>;
    /// Replaces the architectural state, while not running.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
    /// Executes the guest until something ends it.
    fn run(&mut self) -> Result<Exit, EngineError>;
    /// Sets what a debugger wants from the next run on.
    fn set_debug(&mut self, debug: &DebugControl) -> Result<(), EngineError>;
    /// Also counts what takes time to count, from now on.
    fn count_all(&mut self) {}
    /// What the engine has counted since the vCPU was made, with words for each count.
    fn statistics(&self) -> alloc::vec::Vec<(String, u64)> {
        alloc::vec::Vec::new()
    }
    /// Tells a tracer what is executed from now on: every instruction, or at least every place that a jump leads to.
    fn set_tracer(&mut self, _tracer: Box<dyn Tracer>) {}
    /// Tells what code is made from now on.
    fn set_code_map(&mut self, _map: Box<dyn CodeMap>) {}
    /// Guest-physical address of a linear address by the current page tables, without side effects.
    fn translate(&mut self, linear: u64) -> Option<u64>;
}

/// Executes guests: one value per VM.
pub trait Engine: Send + Sync {
    /// The engine's name on the command line.
    fn name(&self) -> &'static str;
    /// Makes the vCPU of this index; called once per vCPU, before any runs.
    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError>;
}

/// What a vCPU is made with.
pub struct VcpuSetup {
    /// The machine's RAM.
    pub memory: Arc<GuestMemory>,
    /// Everything else.
    pub bus: Arc<dyn VcpuBus>,
    /// What CPUID says.
    pub model: Arc<CpuModel>,
}
