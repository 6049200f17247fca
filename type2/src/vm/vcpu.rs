//! The threads that execute a machine's virtual CPUs, one each.

use std::hint;
use std::io;
use std::num::NonZeroU64;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use bivisor_backends::thread::{Role, spawn};
use bivisor_machine::engine::{EngineError, Exit, Vcpu, VcpuBus};
use bivisor_machine::exits::Kind;
use bivisor_machine::host::{Clock, Nanos, Waker};
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::state::CpuState;

use super::gate::Gate;
use super::halt_poll::HaltPoll;
use super::{Event, inspect};
use crate::host::alarm::HostAlarm;
use crate::host::clock::{LinuxClock, asleep};

/// How often a halted vCPU whose events are all masked looks again.
const MASKED_RECHECK: Duration = Duration::from_millis(10);

/// Why a vCPU stands still and somebody must decide.
#[derive(Debug)]
pub enum VcpuEvent {
    /// A triple fault: the vCPU's state, and the bytes at its instruction pointer.
    Crash {
        /// Which vCPU.
        cpu: u32,
        /// Its registers.
        state: Box<CpuState>,
        /// What it was about to execute, as far as it can be read.
        code: Vec<u8>,
    },
    /// The debugger's breakpoint or step.
    Debug {
        /// Which vCPU.
        cpu: u32,
    },
    /// The engine can't go on.
    Engine {
        /// Which vCPU.
        cpu: u32,
        /// Why.
        error: EngineError,
    },
}

/// Wakes a vCPU's thread from HLT.
#[derive(Default)]
pub struct ThreadWaker(OnceLock<Thread>);

impl Waker for ThreadWaker {
    fn wake(&self) {
        if let Some(thread) = self.0.get() {
            thread.unpark();
        }
    }
}

/// What the threads of one machine share.
pub struct Surroundings {
    /// Whether they may execute.
    pub gate: Arc<Gate>,
    /// Time.
    pub clock: Arc<LinuxClock>,
    /// The machine's earliest deadline.
    pub alarm: Arc<HostAlarm>,
    /// How many vCPUs there are.
    pub vcpus: usize,
    /// Processors of the host's that the process may use at once.
    pub processors: usize,
    /// RAM.
    pub memory: Arc<GuestMemory>,
    /// Polls the devices that are due.
    pub expired: Box<dyn Fn(Nanos) + Send + Sync>,
}

/// A virtual CPU; its thread holds the lock while it executes.
pub type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

/// Locks a vCPU that stands still.
pub fn lock(vcpu: &SharedVcpu) -> MutexGuard<'_, Box<dyn Vcpu>> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread of one vCPU.
pub struct VcpuThread {
    /// Number, from 0.
    pub index: u32,
    /// The vCPU.
    pub vcpu: SharedVcpu,
    /// What lies around it.
    pub bus: Arc<dyn VcpuBus>,
    /// What all vCPUs share.
    pub surroundings: Arc<Surroundings>,
    /// Who hears what happens.
    pub events: Sender<Event>,
}

impl VcpuThread {
    /// Starts the thread, which waits at the gate. `waker` then wakes it.
    pub fn start(self, waker: &ThreadWaker) -> io::Result<JoinHandle<()>> {
        let handle = spawn(Role::Vcpu, &format!("vcpu{}", self.index), move || self.run())?;
        // A waker serves one thread.
        let _ = waker.0.set(handle.thread().clone());
        Ok(handle)
    }

    fn run(self) {
        // Wake-ups exact to the nanosecond instead of 50 µs; a kernel that refuses leaves the default.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let gate = &self.surroundings.gate;
        while asleep(|| gate.enter(self.index)) {
            let event = self.execute();
            // Before others see the gate empty, so that they find it closed, and the event sent.
            if let Some(event) = event {
                gate.close();
                // The supervisor is only gone at the end.
                let _ = self.events.send(Event::Vcpu(event));
            }
            gate.leave();
        }
    }

    /// Executes until the gate closes or something must be decided.
    fn execute(&self) -> Option<VcpuEvent> {
        let mut vcpu = lock(&self.vcpu);
        let mut idle = false;
        let mut poll = HaltPoll::new(self.surroundings.vcpus, self.surroundings.processors);
        while self.surroundings.gate.is_open() {
            match vcpu.run() {
                // Halted again in spite of an event: it is masked, and only another one can help.
                Ok(Exit::Halt) if idle && self.bus.has_event() => {
                    asleep(|| thread::park_timeout(MASKED_RECHECK));
                }
                Ok(Exit::Halt) => {
                    self.bus.count(Kind::Halt);
                    self.sleep(&mut poll);
                    idle = true;
                    continue;
                }
                Ok(Exit::Kicked) => {}
                Ok(Exit::Debug) => return Some(VcpuEvent::Debug { cpu: self.index }),
                Ok(Exit::Shutdown) => return Some(self.crash(&mut **vcpu)),
                Err(error) => return Some(VcpuEvent::Engine { cpu: self.index, error }),
            }
            idle = false;
        }
        None
    }

    /// Waits for an event of a halted vCPU, and does what becomes due meanwhile.
    fn sleep(&self, poll: &mut HaltPoll) {
        let Surroundings { gate, clock, alarm, expired, .. } = &*self.surroundings;
        let start = clock.now();
        let awake = if self.bus.host_polls() { poll.time() } else { 0 };
        while !self.bus.has_event() && clock.now() < start + awake {
            hint::spin_loop();
        }
        let parks = !self.bus.has_event();
        if parks {
            self.bus.parked();
        }
        while !self.bus.has_event() && gate.is_open() {
            let now = clock.now();
            if alarm.deadline().is_some_and(|deadline| deadline <= now) {
                expired(now);
            } else {
                asleep(|| alarm.park());
            }
        }
        if parks {
            self.bus.unparked();
        }
        poll.halted(clock.now() - start);
    }

    fn crash(&self, vcpu: &mut dyn Vcpu) -> VcpuEvent {
        let cpu = self.index;
        match vcpu.state() {
            Ok(state) => {
                let code = inspect::code(vcpu, &self.surroundings.memory, &state);
                VcpuEvent::Crash { cpu, state: Box::new(state), code }
            }
            Err(error) => VcpuEvent::Engine { cpu, error },
        }
    }
}
