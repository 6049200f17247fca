//! One virtual machine.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU64;

use bivisor_hvm::Hardware;
use bivisor_hvm::host::cpuid;
use bivisor_machine::boot::{BootError, BootImage};
use bivisor_machine::engine::{EngineError, Exit, Vcpu, VcpuBus};
use bivisor_machine::host::{Clock, MachineEvent, Nanos};
use bivisor_machine::lifecycle::TransitionError;
use bivisor_machine::machine::{HostParts, Machine, MachineError, ResetError};
use bivisor_machine::virtio::block::Block;
use bivisor_machine::virtio::device::VirtioDevice;
use bivisor_machine::virtio::net::Net;
use bivisor_x86::cpuid::CpuModel;

use crate::bundle::{MachineConfig, OnCrash};
use crate::console::Line;
use crate::disk::{Disk, SLAB, Slab};
use crate::host::{VcpuWaker, VmAlarm, VmEvents};
use crate::memory::{self, IdentityMap, MemoryError};
use crate::net::Switches;
use crate::processor::Processor;

/// How often a halted processor whose events are all masked is looked at again.
const MASKED_RECHECK: Nanos = 10_000_000;
/// A machine that crashes this often is not started again.
const MAX_CRASHES: u32 = 5;
/// Bytes that are kept for a guest that does not read its console.
const MAX_INPUT: usize = 4096;

/// What all machines run on.
pub(crate) struct Host {
    pub(crate) processor: Processor,
    pub(crate) hardware: Hardware,
    pub(crate) switches: Switches,
    /// The number of the virtual processor that executes: [`VcpuWaker`]'s.
    pub(crate) running: AtomicU64,
}

/// Memory for what a guest writes to its disks.
fn slab() -> Option<Slab> {
    memory::allocate(SLAB as u64).map(|slab| Box::new(slab) as Slab).ok()
}

/// The devices that a machine's configuration names.
fn devices(config: &MachineConfig<'static>, host: &Host) -> Vec<Arc<dyn VirtioDevice>> {
    let disks = config.disks.iter().map(|disk| -> Arc<dyn VirtioDevice> {
        let queues = u16::try_from(config.cpus).unwrap_or(u16::MAX);
        Block::new(Arc::new(Disk::new(disk, slab)), &disk.serial, queues)
    });
    let nets = config
        .nets
        .iter()
        .map(|net| -> Arc<dyn VirtioDevice> { Net::new(host.switches.port(&net.switch), net.mac, None) });
    disks.chain(nets).collect()
}

/// A machine can't be made, or not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Transition(#[from] TransitionError),
    #[error(transparent)]
    Reset(#[from] ResetError),
    #[error("the machine has no such processor")]
    NoSuchProcessor,
}

/// A virtual processor.
struct Slot {
    vcpu: Box<dyn Vcpu>,
    bus: Arc<dyn VcpuBus>,
    waker: Arc<VcpuWaker>,
    /// It waits for an event; one that it has already does not help before this moment.
    halted: Option<Nanos>,
}

/// What became of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It goes on.
    Runs,
    /// It was started again, for this reason.
    Restarted(String),
    /// It has ended, for this reason.
    Ended(String),
}

/// A virtual machine. Dropping it gives its memory back.
pub(crate) struct Vm {
    config: MachineConfig<'static>,
    host: Arc<Host>,
    machine: Arc<Machine>,
    slots: Vec<Slot>,
    alarm: Arc<VmAlarm>,
    events: Arc<VmEvents>,
    crashes: u32,
    /// A processor has shut down, or can't go on, for this reason.
    failure: Option<(bool, String)>,
    input: VecDeque<u8>,
}

impl Vm {
    /// Makes a machine and loads its kernel; its processors execute when [`Vm::run`] is called.
    pub(crate) fn new(
        config: &MachineConfig<'static>,
        host: &Arc<Host>,
        console: Line,
    ) -> Result<Self, VmError> {
        let memory = memory::allocate_guest(config.memory)?;
        let clock = host.processor.clock.clone();
        let model = CpuModel::from_host_natively(cpuid, config.cpus, clock.tsc_hz());
        let (alarm, events) = (VmAlarm::new(host.clone()), VmEvents::new(&config.name));
        let machine = Machine::new(
            bivisor_machine::machine::MachineConfig {
                cpus: config.cpus,
                testdev: config.testdev,
                packed_rings: true,
                pv: config.pv,
            },
            memory,
            Arc::new(model),
            HostParts {
                clock,
                alarm: alarm.clone(),
                events: events.clone(),
                console: Arc::new(console),
                devices: devices(config, host),
            },
        )?;
        let engine = host.hardware.engine(Arc::new(IdentityMap));
        let slots = (0..config.cpus)
            .map(|index| {
                let setup = machine.vcpu_setup(index).ok_or(VmError::NoSuchProcessor)?;
                let bus = setup.bus.clone();
                let waker = VcpuWaker::new(host.clone());
                machine.set_waker(index, waker.clone());
                Ok(Slot { vcpu: engine.create_vcpu(index, setup)?, bus, waker, halted: None })
            })
            .collect::<Result<_, VmError>>()?;
        let mut vm = Self {
            config: config.clone(),
            host: host.clone(),
            machine,
            slots,
            alarm,
            events,
            crashes: 0,
            failure: None,
            input: VecDeque::new(),
        };
        vm.load()?;
        vm.machine.start()?;
        Ok(vm)
    }

    /// Loads the kernel and sets the processors' first states.
    fn load(&mut self) -> Result<(), VmError> {
        let config = &self.config;
        let loaded = self.machine.load(&BootImage {
            kernel: &config.kernel,
            name: &config.name,
            initrd: config.initrd.as_deref(),
            command_line: &config.command_line,
            unpack: false,
        })?;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let state = if index == 0 { &loaded.state } else { &self.machine.waiting_state() };
            slot.vcpu.set_state(state)?;
            slot.halted = None;
        }
        Ok(())
    }

    /// Starts from power-up again.
    pub(crate) fn restart(&mut self) -> Result<(), VmError> {
        self.machine.pause()?;
        self.machine.reset()?;
        let memory = self.machine.memory();
        memory.fill_at(0, memory.size(), 0);
        self.failure = None;
        self.input.clear();
        self.load()?;
        self.machine.start()?;
        Ok(())
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// Number of its processors.
    pub(crate) fn cpus(&self) -> usize {
        self.slots.len()
    }

    /// Bytes of its RAM.
    pub(crate) fn memory(&self) -> u64 {
        self.machine.memory().size()
    }

    /// What was counted, by processor.
    pub(crate) fn statistics(&self) -> impl Iterator<Item = (usize, String, u64)> + '_ {
        self.slots.iter().enumerate().flat_map(|(index, slot)| {
            let counts = slot.vcpu.statistics().into_iter().filter(|(_, count)| *count != 0);
            counts.map(move |(words, count)| (index, words, count))
        })
    }

    /// When it has something to do next even if no processor executes.
    pub(crate) fn deadline(&self) -> Nanos {
        self.slots
            .iter()
            .filter(|slot| slot.bus.has_event())
            .filter_map(|slot| slot.halted)
            .fold(self.alarm.deadline(), Nanos::min)
    }

    /// Somebody typed this for the guest. What it doesn't read in time is lost.
    pub(crate) fn typed(&mut self, byte: u8) {
        if self.input.len() < MAX_INPUT {
            self.input.push_back(byte);
        }
    }

    /// Does what is due by now.
    pub(crate) fn expire(&mut self, now: Nanos) {
        if self.alarm.deadline() <= now {
            self.machine.expired(now);
        }
        if !self.input.is_empty() {
            let taken = self.machine.console_receive(self.input.make_contiguous());
            self.input.drain(..taken);
        }
    }

    /// Whether a processor has something to execute.
    pub(crate) fn is_runnable(&self, cpu: usize, now: Nanos) -> bool {
        self.slots.get(cpu).is_some_and(|slot| match slot.halted {
            None => true,
            Some(recheck) => slot.bus.has_event() && recheck <= now,
        })
    }

    /// Lets a processor execute until an interrupt of the host's, or until it has nothing to do.
    pub(crate) fn run(&mut self, cpu: usize) {
        let Some(slot) = self.slots.get_mut(cpu) else { return };
        let was_halted = slot.halted.take().is_some();
        slot.waker.runs();
        match slot.vcpu.run() {
            Ok(Exit::Halt) => {
                let masked = was_halted && slot.bus.has_event();
                let recheck = if masked { self.host.processor.clock.now() + MASKED_RECHECK } else { 0 };
                slot.halted = Some(recheck);
            }
            Ok(Exit::Kicked | Exit::Debug) => {}
            Ok(Exit::Shutdown) => {
                let place = slot.vcpu.state().map_or(0, |state| state.rip);
                self.failure =
                    Some((true, alloc::format!("CPU {cpu} shut down by a triple fault at {place:#x}")));
            }
            Err(error) => self.failure = Some((false, alloc::format!("CPU {cpu} can't go on: {error}"))),
        }
    }

    /// Acts on what the guest has asked for and on what has happened to it.
    pub(crate) fn settle(&mut self) -> Outcome {
        let ended = |why: &str| Outcome::Ended(why.into());
        let (restart, why) = match (self.events.take(), self.failure.take()) {
            (None, None) => return Outcome::Runs,
            (Some(MachineEvent::PowerOff), _) => return ended("powered off"),
            (Some(MachineEvent::TestExit(status)), _) => {
                return Outcome::Ended(alloc::format!("ended with status {status}"));
            }
            (Some(MachineEvent::Reset), _) => (true, "reset".into()),
            (None, Some((is_crash, why))) => {
                self.crashes += 1;
                let again = self.config.on_crash == OnCrash::Restart && self.crashes < MAX_CRASHES;
                (is_crash && again, why)
            }
        };
        if !restart {
            return Outcome::Ended(why);
        }
        match self.restart() {
            Ok(()) => Outcome::Restarted(why),
            Err(error) => Outcome::Ended(alloc::format!("{why}, and can't be started again: {error}")),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.machine.stop();
        self.machine.stop_devices();
    }
}
