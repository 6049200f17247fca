//! The virtual machine: what belongs to it, how it is wired, and how it lives.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Arguments;
use core::iter;

use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::state::{Activity, CpuState};

use crate::acpi::{AcpiConfig, Tables};
use crate::boot::{self, BootError, BootImage, Loaded};
use crate::devices::lapic::Lapic;
use crate::devices::{RestoreError, Saved};
use crate::dma::Dma;
use crate::engine::VcpuSetup;
use crate::exits::Exits;
use crate::firmware;
use crate::host::{Alarm, ByteStream, Clock, EventSink, MachineEvent, Nanos, Waker};
use crate::irq::Interrupts;
use crate::lifecycle::{Lifecycle, Transition, TransitionError};
use crate::map::PCI_MEMORY64_START;
use crate::memory::{GuestMemory, HIGH_RAM_START, LOW_RAM_END};
use crate::pc::{Pc, PcError, PcParts, SavedPc};
use crate::pv;
use crate::sync::Mutex;
use crate::timer::TimerHub;
use crate::vcpu_bus::ProcessorBus;
use crate::virtio::device::VirtioDevice;

/// Processors that a machine may have.
pub const MAX_CPUS: u32 = 64;
/// Least RAM: below it there is no room for a kernel above 1 MiB.
pub const MIN_MEMORY: u64 = 2 << 20;
/// Most RAM: it ends where the window for 64-bit PCI memory starts.
pub const MAX_MEMORY: u64 = PCI_MEMORY64_START - HIGH_RAM_START + LOW_RAM_END;

/// What a machine is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Number of processors, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// With QEMU's test devices, for third-party test kernels.
    pub testdev: bool,
    /// Virtio devices offer packed rings, too.
    pub packed_rings: bool,
    /// With KVM's paravirtual interface.
    pub pv: bool,
}

/// What the host gives to a machine.
#[derive(Clone)]
pub struct HostParts {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Hears when the next deadline changes; then [`Machine::expired`] is to be called in time.
    pub alarm: Arc<dyn Alarm>,
    /// Hears what the guest asks of the whole machine.
    pub events: Arc<dyn EventSink>,
    /// The far end of the first serial line; what it sends goes to [`Machine::console_receive`].
    pub console: Arc<dyn ByteStream>,
    /// Virtio devices, in the order of their slots on the PCI bus.
    pub devices: Vec<Arc<dyn VirtioDevice>>,
}

/// A machine can't be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// Too few or too many processors.
    #[error("a machine has 1 to {MAX_CPUS} processors, not {0}")]
    Cpus(u32),
    /// Too little or too much RAM.
    #[error("a machine has {} MiB to {} GiB of memory, not {} bytes", MIN_MEMORY >> 20, MAX_MEMORY >> 30, .0)]
    Memory(u64),
    /// Its devices don't fit together.
    #[error(transparent)]
    Pc(#[from] PcError),
}

/// What a local APIC holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedApic {
    /// Its registers.
    pub registers: Saved<Lapic>,
    /// Waiting events that no register holds, see [`crate::devices::local_apic::LocalApic::save_events`].
    pub events: u32,
}

/// What the paravirtual interface holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedParavirt {
    /// What the guest's clock shows.
    pub time: Nanos,
    /// What the guest has written, by processor.
    pub processors: Vec<pv::SavedProcessor>,
}

/// Everything that a machine's devices hold, as of one moment. The processors' states and RAM are the host's to
/// keep.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedMachine {
    /// Version of this layout, see [`SavedMachine::VERSION`].
    pub version: u32,
    /// Local APICs by processor.
    pub apics: Vec<SavedApic>,
    /// The guest's time-stamp counter.
    pub tsc: u64,
    /// The paravirtual interface, if there is one.
    pub pv: Option<SavedParavirt>,
    /// All other devices.
    pub pc: SavedPc,
}

impl SavedMachine {
    /// Version of the layout.
    pub const VERSION: u32 = 3;
}

/// One virtual machine, without the threads that execute its processors.
pub struct Machine {
    config: MachineConfig,
    memory: Arc<GuestMemory>,
    model: Arc<CpuModel>,
    clock: Arc<dyn Clock>,
    timers: Arc<TimerHub>,
    interrupts: Arc<Interrupts>,
    pc: Pc,
    /// Each processor's side of the paravirtual interface; none without it.
    pv: Vec<Arc<pv::Processor>>,
    /// By processor.
    exits: Vec<Arc<Exits>>,
    lifecycle: Mutex<Lifecycle>,
    /// State after power-up, which a reset restores.
    power_up: SavedMachine,
}

/// Makes every processor return from its engine when the guest asks something of the whole machine.
struct Events {
    host: Arc<dyn EventSink>,
    interrupts: Arc<Interrupts>,
}

impl EventSink for Events {
    fn event(&self, event: MachineEvent) {
        self.host.event(event);
        kick_all(&self.interrupts);
    }
    fn log(&self, line: Arguments<'_>) {
        self.host.log(line);
    }
}

fn kick_all(interrupts: &Interrupts) {
    for apic in interrupts.apics() {
        apic.kick();
    }
}

impl Machine {
    /// A machine after power-up, with nothing in its memory yet: see [`Machine::load`].
    pub fn new(
        config: MachineConfig,
        memory: Arc<GuestMemory>,
        model: Arc<CpuModel>,
        host: HostParts,
    ) -> Result<Arc<Self>, MachineError> {
        if config.cpus == 0 || config.cpus > MAX_CPUS {
            return Err(MachineError::Cpus(config.cpus));
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory.size()) {
            return Err(MachineError::Memory(memory.size()));
        }
        let timers = TimerHub::new(host.alarm);
        let interrupts = Interrupts::new(config.cpus, model.physical_bits, &host.clock, &timers);
        let events = Arc::new(Events { host: host.events, interrupts: interrupts.clone() });
        let pc = Pc::new(PcParts {
            testdev: config.testdev,
            memory: (memory.low_size(), memory.high_size()),
            clock: host.clock.clone(),
            timers: timers.clone(),
            interrupts: interrupts.clone(),
            events,
            console: host.console,
            dma: Dma::new(memory.clone()),
            devices: host.devices,
            packed_rings: config.packed_rings,
        })?;
        let offset = 0u64.wrapping_sub(host.clock.tsc());
        for apic in interrupts.apics() {
            apic.set_tsc_offset(offset);
        }
        if let Some(bootstrap) = interrupts.apics().first() {
            bootstrap.enter_virtual_wire_mode();
        }
        let pv = if config.pv { paravirt(&memory, &host.clock, &interrupts) } else { Vec::new() };
        let model = if config.pv { Arc::new(pv::cpuid::announce(&model)) } else { model };
        let power_up = save(&interrupts, &pc, 0, None);
        Ok(Arc::new(Self {
            config,
            memory,
            model,
            clock: host.clock,
            timers,
            interrupts,
            pc,
            pv,
            exits: (0..config.cpus).map(|_| Arc::default()).collect(),
            lifecycle: Mutex::new(Lifecycle::Created),
            power_up,
        }))
    }

    /// What the machine is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }
    /// Its RAM.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
    /// The devices that a PC has.
    pub fn pc(&self) -> &Pc {
        &self.pc
    }

    /// Why the guest's code was left, by processor.
    pub fn exits(&self) -> &[Arc<Exits>] {
        &self.exits
    }

    /// What an engine needs to make the processor of this index; `None` if there is no such processor.
    pub fn vcpu_setup(&self, index: u32) -> Option<VcpuSetup> {
        let bus = ProcessorBus {
            ports: self.pc.ports().clone(),
            mmio: self.pc.mmio().clone(),
            apic: self.interrupts.vcpu(index as usize)?,
            pv: self.pv.get(index as usize).cloned(),
            exits: self.exits.get(index as usize)?.clone(),
            hypercalls: self.config.testdev,
        };
        Some(VcpuSetup { memory: self.memory.clone(), bus: Arc::new(bus), model: self.model.clone() })
    }

    /// Tells how to wake the thread of this processor. Only the first call for a processor counts.
    pub fn set_waker(&self, index: u32, waker: Arc<dyn Waker>) {
        if let Some(apic) = self.interrupts.apics().get(index as usize) {
            apic.set_waker(waker);
        }
    }

    /// Puts the ACPI tables and a kernel into memory. Not while the machine runs. Gives the boot processor's
    /// state; the others start in [`Machine::waiting_state`].
    pub fn load(&self, image: &BootImage<'_>) -> Result<Loaded, BootError> {
        let tables = Tables::new(&AcpiConfig { cpus: self.config.cpus });
        tables.write(&self.memory)?;
        let mut loaded = boot::load(image, &self.memory, tables.rsdp())?;
        firmware::set_memory_types(&mut loaded.state, self.model.physical_bits);
        Ok(loaded)
    }

    /// The state in which the processors other than the boot processor wait for it to start them.
    pub fn waiting_state(&self) -> CpuState {
        let mut state = CpuState { activity: Activity::WaitForSipi, ..CpuState::default() };
        firmware::set_memory_types(&mut state, self.model.physical_bits);
        state
    }

    /// What the machine is doing.
    pub fn lifecycle(&self) -> Lifecycle {
        *self.lifecycle.lock()
    }

    fn transition(&self, transition: Transition) -> Result<(), TransitionError> {
        let mut lifecycle = self.lifecycle.lock();
        *lifecycle = lifecycle.after(transition)?;
        Ok(())
    }

    /// The host is about to let the processors execute for the first time.
    pub fn start(&self) -> Result<(), TransitionError> {
        self.transition(Transition::Start)?;
        self.pc.resume();
        Ok(())
    }
    /// Makes all processors return from their engines ([`crate::engine::Exit::Kicked`]); their threads then wait
    /// while [`Machine::lifecycle`] says [`Lifecycle::Paused`].
    pub fn pause(&self) -> Result<(), TransitionError> {
        self.transition(Transition::Pause)?;
        kick_all(&self.interrupts);
        Ok(())
    }
    /// The processors may go on.
    pub fn resume(&self) -> Result<(), TransitionError> {
        self.transition(Transition::Resume)?;
        self.pc.resume();
        self.pv.iter().for_each(|processor| processor.stopped());
        Ok(())
    }
    /// Ends the machine: all processors return from their engines.
    pub fn stop(&self) {
        // Stopping is possible in every phase.
        let _ = self.transition(Transition::Stop);
        kick_all(&self.interrupts);
    }

    /// Brings all devices back to their state after power-up. All processors must stand still; the host then
    /// loads its boot image again, and sets their states.
    pub fn reset(&self) -> Result<(), ResetError> {
        self.transition(Transition::Reset)?;
        self.restore(&self.power_up)?;
        Ok(())
    }

    /// Does what devices have to do by `now`. Called when the host's alarm goes off.
    pub fn expired(&self, now: Nanos) {
        self.timers.expired(now);
    }

    /// Bytes for the first serial line; says how many it took. The rest is to be offered again later.
    pub fn console_receive(&self, bytes: &[u8]) -> usize {
        self.pc.console_receive(bytes)
    }

    /// Presses the power button: a guest with ACPI shuts itself down.
    pub fn power_button(&self) {
        self.pc.power_button();
    }

    /// Raises a non-maskable interrupt at every processor, as the NMI button of a server does.
    pub fn nmi(&self) {
        for apic in self.interrupts.apics() {
            apic.set_lint1(true);
            apic.set_lint1(false);
        }
    }

    /// Ends what devices do after [`Machine::stop`], when no processor executes any more: what the guest has asked for is
    /// done, and nothing that belongs to the host refers to this machine any more.
    pub fn stop_devices(&self) {
        self.pc.stop();
    }

    /// Returns when nothing that the guest asked devices for is still going on; nothing comes into the machine either until
    /// it goes on. All processors must stand still.
    pub fn drain(&self) {
        self.pc.drain();
    }

    /// Everything that the devices hold. All processors must stand still; devices are drained.
    pub fn save(&self) -> SavedMachine {
        for index in 0..self.interrupts.apics().len() {
            if let Some(processor) = self.interrupts.vcpu(index) {
                processor.settle();
            }
        }
        let offset = self.interrupts.apics().first().map_or(0, |apic| apic.tsc_offset());
        let pv = self.pv.first().map(|first| SavedParavirt {
            time: first.shared().time(),
            processors: self.pv.iter().map(|processor| processor.save()).collect(),
        });
        save(&self.interrupts, &self.pc, self.clock.tsc().wrapping_add(offset), pv)
    }

    /// Takes over what [`Machine::save`] of a machine of the same configuration gave. All processors must stand
    /// still. After an error the machine is of no use but to be reset.
    pub fn restore(&self, saved: &SavedMachine) -> Result<(), RestoreError> {
        if saved.version != SavedMachine::VERSION {
            return Err(RestoreError::Version { found: saved.version, expected: SavedMachine::VERSION });
        }
        if saved.apics.len() != self.interrupts.apics().len() {
            return Err(RestoreError::Invalid);
        }
        let offset = saved.tsc.wrapping_sub(self.clock.tsc());
        for (apic, saved) in self.interrupts.apics().iter().zip(&saved.apics) {
            apic.set_tsc_offset(offset);
            apic.restore_events(saved.events);
            apic.restore(&saved.registers)?;
        }
        if let Some(first) = self.pv.first() {
            first.shared().set_time(saved.pv.as_ref().map_or(0, |pv| pv.time));
        }
        let written = saved.pv.iter().flat_map(|pv| &pv.processors).copied();
        for (processor, saved) in self.pv.iter().zip(written.chain(iter::repeat(Default::default()))) {
            processor.restore(&saved);
        }
        self.pc.restore(&saved.pc)
    }
}

/// Each processor's side of the paravirtual interface.
fn paravirt(
    memory: &Arc<GuestMemory>,
    clock: &Arc<dyn Clock>,
    interrupts: &Interrupts,
) -> Vec<Arc<pv::Processor>> {
    let shared = pv::Paravirt::new(Dma::new(memory.clone()), clock.clone());
    let processor = |apic: &Arc<_>| Arc::new(pv::Processor::new(shared.clone(), Arc::clone(apic)));
    interrupts.apics().iter().map(processor).collect()
}

fn save(interrupts: &Interrupts, pc: &Pc, tsc: u64, pv: Option<SavedParavirt>) -> SavedMachine {
    let apics = interrupts
        .apics()
        .iter()
        .map(|apic| SavedApic { registers: apic.save(), events: apic.save_events() })
        .collect();
    SavedMachine { version: SavedMachine::VERSION, apics, tsc, pv, pc: pc.save() }
}

/// A machine was not reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResetError {
    /// It runs, or has ended.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// A device refused.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
