//! One run of a machine, from power-up to its end or its reset.

pub mod counters;
pub mod gate;
mod halt_poll;
pub mod inspect;
pub mod vcpu;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bivisor_backends::console::{Console, ConsoleEvent, InputSink};
use bivisor_machine::boot::BootImage;
use bivisor_machine::engine::{DebugControl, Engine, EngineError};
use bivisor_machine::host::{EventSink, MachineEvent};
use bivisor_machine::lifecycle::Lifecycle;
use bivisor_machine::machine::{HostParts, Machine, MachineConfig};
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpuid::CpuModel;

use crate::backends::Backends;
use crate::config::{Paravirtual, VmConfig};
use crate::error::Failure;
use crate::guest::Guest;
use crate::host::alarm::{AlarmThread, HostAlarm};
use crate::host::clock::{LinuxClock, host_cpuid};
use crate::host::log::Log;
use crate::host::memory;
use crate::perf_map::PerfMap;
use crate::trace::{TraceError, TraceFile};
use crate::{engines, status};
use counters::Counters;
use gate::Gate;
use vcpu::{SharedVcpu, Surroundings, ThreadWaker, VcpuEvent, VcpuThread, lock};

/// What the supervisor of a machine hears.
#[derive(Debug)]
pub enum Event {
    /// The guest asks something of the whole machine.
    Machine(MachineEvent),
    /// A vCPU stands still.
    Vcpu(VcpuEvent),
    /// The console's user, or its end.
    Console(ConsoleEvent),
    /// A signal asks for the end.
    Signal(i32),
    /// The debugger ends the machine.
    Killed,
    /// The trace can't be written any more.
    TraceLost(TraceError),
}

/// What every run of a machine has in common.
pub struct Parts {
    /// What the machine is made of.
    pub config: VmConfig,
    /// What it boots.
    pub guest: Guest,
    /// What executes it.
    pub engine: engines::Source,
    /// Time.
    pub clock: Arc<LinuxClock>,
    /// Processors of the host's that the process may use at once.
    pub processors: usize,
    /// Its first serial port's far end.
    pub console: Console,
    /// What its devices are backed by.
    pub backends: Backends,
    /// The file for what the guest executes.
    pub trace: Option<Arc<TraceFile>>,
    /// The names of translated code for perf.
    pub perf_map: Option<PerfMap>,
    /// What all its runs have done.
    pub counters: Arc<Counters>,
    /// Log of what devices refuse.
    pub log: Arc<Log>,
    /// The supervisor.
    pub events: Sender<Event>,
}

/// Tells the supervisor what the guest asks of the machine; from then on the guest executes nothing more.
struct Sink {
    gate: Arc<Gate>,
    told: AtomicBool,
    events: Sender<Event>,
    log: Arc<Log>,
}

impl EventSink for Sink {
    fn event(&self, event: MachineEvent) {
        self.gate.close();
        // The first one counts: another vCPU may ask for something else before it stands still.
        if !self.told.swap(true, Ordering::Relaxed) {
            // The supervisor is only gone at the end.
            let _ = self.events.send(Event::Machine(event));
        }
    }
    fn log(&self, line: fmt::Arguments<'_>) {
        self.log.line(line);
    }
}

/// The machine's end of the console.
struct SerialLine(Arc<Machine>);

impl InputSink for SerialLine {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.0.console_receive(bytes)
    }
}

/// A machine with its threads.
pub struct Session {
    machine: Arc<Machine>,
    memory: Arc<GuestMemory>,
    gate: Arc<Gate>,
    vcpus: Vec<SharedVcpu>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    _alarm: AlarmThread,
}

impl Session {
    /// Makes a machine, loads its guest, and starts its threads, which wait for [`Session::resume`].
    pub fn new(parts: &Parts) -> Result<Self, Failure> {
        let config = &parts.config;
        let memory = memory::allocate(config.memory.0).map_err(|error| {
            Failure::new(
                status::HOST,
                format!("the host gives no {} of memory ({error}): say --memory with less", config.memory),
            )
        })?;
        let memory = Arc::new(memory);
        let engine = parts.engine.engine();
        let gate = Arc::new(Gate::new());
        let alarm = HostAlarm::new(parts.clock.clone());
        let machine = Machine::new(
            MachineConfig {
                cpus: config.cpus,
                testdev: config.testdev,
                packed_rings: true,
                pv: config.pv == Paravirtual::On,
            },
            memory.clone(),
            Arc::new(CpuModel::from_host(host_cpuid, config.cpus, parts.clock.frequency())),
            HostParts {
                clock: parts.clock.clone(),
                alarm: alarm.clone(),
                events: Arc::new(Sink {
                    gate: gate.clone(),
                    told: AtomicBool::new(false),
                    events: parts.events.clone(),
                    log: parts.log.clone(),
                }),
                console: parts.console.line(),
                devices: parts.backends.devices(config.cpus, &memory),
            },
        )
        .map_err(Failure::configuration)?;
        parts.counters.begin(machine.exits());
        let vcpus = make_vcpus(&machine, &*engine, parts)?;
        let expiring = machine.clone();
        let alarm_thread =
            alarm.start(move |now| expiring.expired(now)).map_err(|error| no_thread(&error))?;
        let session = Self {
            threads: Mutex::default(),
            gate: gate.clone(),
            vcpus,
            memory: memory.clone(),
            machine: machine.clone(),
            _alarm: alarm_thread,
        };
        let expiring = machine.clone();
        let surroundings = Arc::new(Surroundings {
            gate,
            clock: parts.clock.clone(),
            alarm,
            memory,
            vcpus: session.vcpus.len(),
            processors: parts.processors,
            expired: Box::new(move |now| expiring.expired(now)),
        });
        session.start_threads(&surroundings, parts)?;
        parts.console.input().connect(Arc::new(SerialLine(machine)));
        Ok(session)
    }

    fn start_threads(&self, surroundings: &Arc<Surroundings>, parts: &Parts) -> Result<(), Failure> {
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            let Some(setup) = self.machine.vcpu_setup(index) else { continue };
            let waker = Arc::new(ThreadWaker::default());
            let thread = VcpuThread {
                index,
                vcpu: vcpu.clone(),
                bus: setup.bus,
                surroundings: surroundings.clone(),
                events: parts.events.clone(),
            };
            let handle = thread.start(&waker).map_err(|error| no_thread(&error))?;
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
            self.machine.set_waker(index, waker);
        }
        Ok(())
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The vCPUs, by number. Only while the machine stands still can they be locked without waiting.
    pub fn vcpus(&self) -> &[SharedVcpu] {
        &self.vcpus
    }

    /// What machine and engine have counted, a line each. The machine must stand still.
    pub fn statistics(&self) -> String {
        let mut text = String::new();
        for (index, (vcpu, exits)) in self.vcpus.iter().zip(self.machine.exits()).enumerate() {
            let exits =
                exits.list().into_iter().map(|(name, count)| (format!("exits by kind: {name}"), count));
            let engine = lock(vcpu).statistics();
            for (name, count) in exits.chain(engine).filter(|(_, count)| *count != 0) {
                text.push_str(&format!("CPU {index} {count:>14} {name}\n"));
            }
        }
        text
    }

    /// Tells every vCPU, by number, what a debugger wants. The machine must stand still.
    pub fn set_debug(&self, control: impl Fn(u32) -> DebugControl) -> Result<(), EngineError> {
        (0..).zip(&self.vcpus).try_for_each(|(index, vcpu)| lock(vcpu).set_debug(&control(index)))
    }

    /// Lets every vCPU forget what it has cached of memory that was changed from outside. The machine must stand
    /// still.
    pub fn refresh(&self) -> Result<(), EngineError> {
        self.vcpus.iter().try_for_each(|vcpu| {
            let mut vcpu = lock(vcpu);
            let state = vcpu.state()?;
            vcpu.set_state(&state)
        })
    }

    /// Lets the guest execute, for the first time or again.
    pub fn resume(&self) {
        self.resume_some(gate::ALL);
    }

    /// Lets only the vCPUs execute whose bits are set.
    pub fn resume_some(&self, cpus: u64) {
        // Nothing but a machine that is running or has ended refuses, and for that nothing is to be done.
        let _ = match self.machine.lifecycle() {
            Lifecycle::Created => self.machine.start(),
            _ => self.machine.resume(),
        };
        self.gate.open(cpus);
    }

    /// Lets the guest stand still; returns when all vCPUs do.
    pub fn pause(&self) {
        self.gate.close();
        if self.machine.lifecycle() == Lifecycle::Running {
            // It may have ended in between.
            let _ = self.machine.pause();
        }
        self.gate.wait_until_empty();
    }

    /// Ends the machine and its vCPUs' threads.
    pub fn stop(&self) {
        self.gate.lock_for_good();
        self.machine.stop();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic there has already been reported.
            let _ = thread.join();
        }
        self.machine.stop_devices();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Loads the guest and makes the vCPUs in their first states.
fn make_vcpus(machine: &Machine, engine: &dyn Engine, parts: &Parts) -> Result<Vec<SharedVcpu>, Failure> {
    let guest = &parts.guest;
    let kernel = guest.kernel.read().map_err(Failure::configuration)?;
    let initrd = guest.initrd.as_ref().map(|file| file.read()).transpose().map_err(Failure::configuration)?;
    let path = guest.kernel.path();
    let loaded = machine
        .load(&BootImage {
            kernel: &kernel,
            name: &path.to_string_lossy(),
            initrd: initrd.as_deref(),
            command_line: &guest.command_line,
            unpack: true,
        })
        .map_err(|error| Failure::new(status::CONFIGURATION, format!("{}: {error}", path.display())))?;
    parts.log.line(format_args!("{} is entered by {}", path.display(), loaded.protocol.name()));
    let failed =
        |error: &dyn fmt::Display| Failure::new(status::ENGINE, format!("engine {}: {error}", engine.name()));
    if let Some(trace) = &parts.trace {
        trace.session(engine.name());
    }
    let mut vcpus = Vec::new();
    for index in 0..parts.config.cpus {
        let setup = machine.vcpu_setup(index).ok_or_else(|| failed(&"the machine has no such CPU"))?;
        let mut vcpu = engine.create_vcpu(index, setup).map_err(|error| failed(&error))?;
        let state = if index == 0 { &loaded.state } else { &machine.waiting_state() };
        vcpu.set_state(state).map_err(|error| failed(&error))?;
        if parts.config.stats {
            vcpu.count_all();
        }
        if let Some(trace) = &parts.trace {
            vcpu.set_tracer(trace.tracer(index));
        }
        if let Some(map) = &parts.perf_map {
            vcpu.set_code_map(map.code_map());
        }
        vcpus.push(Arc::new(Mutex::new(vcpu)));
    }
    Ok(vcpus)
}

fn no_thread(error: &std::io::Error) -> Failure {
    Failure::new(status::HOST, format!("the host starts no more threads ({error}): end other programs"))
}
