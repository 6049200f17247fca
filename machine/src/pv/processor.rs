//! The interface's registers, of the machine and of one processor.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use super::clock::{Origin, TIME_SIZE, WALL_SIZE};
use super::eoi::EoiFlag;
use super::steal::{self, StealTime};
use crate::devices::local_apic::LocalApic;
use crate::dma::Dma;
use crate::host::{Clock, Nanos};
use crate::sync::Mutex;

/// Numbers of the MSRs (Linux, Documentation/virt/kvm/x86/msr.rst).
#[allow(missing_docs)]
pub mod msr {
    pub const WALL_CLOCK_OLD: u32 = 0x11;
    pub const SYSTEM_TIME_OLD: u32 = 0x12;
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
    pub const PV_EOI: u32 = 0x4b56_4d04;
    pub const POLL_CONTROL: u32 = 0x4b56_4d05;
}

/// Bit of the MSRs that hold an address: the guest wants what is described there.
const ENABLED: u64 = 1 << 0;
/// Reserved bits of [`msr::STEAL_TIME`].
const STEAL_RESERVED: u64 = 0x3e;
/// Steal time is brought up to date so often at most, since asking the host takes a microsecond.
const STEAL_PERIOD: Nanos = 1_000_000;

/// What the processors of a machine have in common.
pub struct Paravirt {
    dma: Dma,
    clock: Arc<dyn Clock>,
    origin: Mutex<Origin>,
    wall_clock: AtomicU64,
}

impl Paravirt {
    /// The interface of a machine whose clock shows nothing now.
    pub fn new(dma: Dma, clock: Arc<dyn Clock>) -> Arc<Self> {
        let origin = Mutex::new(Origin::now(&*clock, 0));
        Arc::new(Self { dma, clock, origin, wall_clock: AtomicU64::new(0) })
    }

    /// What the guest's clock shows.
    pub fn time(&self) -> Nanos {
        self.origin.lock().time_at(self.clock.tsc())
    }

    /// The guest's clock shows this from now on; processors are to be told by [`Processor::restore`].
    pub fn set_time(&self, time: Nanos) {
        *self.origin.lock() = Origin::now(&*self.clock, time);
    }

    /// RAM.
    pub(super) fn dma(&self) -> &Dma {
        &self.dma
    }
    /// The host's clock.
    pub(super) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// The offset in RAM of `size` bytes at an address that is a multiple of `alignment`.
    fn place(&self, gpa: u64, size: u64, alignment: u64) -> Option<u64> {
        self.dma.range(gpa, size).ok().filter(|_| gpa.is_multiple_of(alignment))
    }
}

/// What a processor's registers hold, as the guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedProcessor {
    /// [`msr::SYSTEM_TIME`].
    pub system_time: u64,
    /// [`msr::STEAL_TIME`].
    pub steal_time: u64,
    /// [`msr::PV_EOI`].
    pub eoi: u64,
    /// [`msr::POLL_CONTROL`].
    pub poll_control: u64,
}

impl Default for SavedProcessor {
    /// After reset: the host may wait awake for a halted processor.
    fn default() -> Self {
        Self { system_time: 0, steal_time: 0, eoi: 0, poll_control: 1 }
    }
}

#[derive(Default)]
struct Registers {
    written: SavedProcessor,
    /// Offset in RAM of the structure with the time.
    time: Option<u64>,
    steal: Option<StealTime>,
    /// When steal time was brought up to date, if it ever was.
    updated: Option<Nanos>,
}

/// One processor's side of the interface. All but saving, restoring and stopping is for its own thread.
pub struct Processor {
    shared: Arc<Paravirt>,
    apic: Arc<LocalApic>,
    registers: Mutex<Registers>,
}

impl Processor {
    /// The side of the processor with this local APIC, after reset.
    pub fn new(shared: Arc<Paravirt>, apic: Arc<LocalApic>) -> Self {
        Self { shared, apic, registers: Mutex::default() }
    }

    /// What all processors have in common.
    pub fn shared(&self) -> &Paravirt {
        &self.shared
    }

    /// Reads an MSR; `None` if it is none of the interface's.
    pub fn read_msr(&self, number: u32) -> Option<u64> {
        let written = self.registers.lock().written;
        match number {
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => Some(self.shared.wall_clock.load(Ordering::Relaxed)),
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => Some(written.system_time),
            msr::STEAL_TIME => Some(written.steal_time),
            msr::PV_EOI => Some(written.eoi),
            msr::POLL_CONTROL => Some(written.poll_control),
            _ => None,
        }
    }

    /// Writes an MSR; false if it is none of the interface's, or the value is not allowed (#GP). As with KVM, clocks and
    /// steal time at addresses outside RAM are not refused, but nothing is written.
    pub fn write_msr(&self, number: u32, value: u64) -> bool {
        match number {
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => self.write_wall_clock(value),
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => self.write_system_time(value),
            msr::STEAL_TIME if value & STEAL_RESERVED == 0 => self.write_steal_time(value),
            msr::PV_EOI => return self.write_eoi(value),
            msr::POLL_CONTROL if value <= 1 => self.registers.lock().written.poll_control = value,
            _ => return false,
        }
        true
    }

    fn write_wall_clock(&self, gpa: u64) {
        self.shared.wall_clock.store(gpa, Ordering::Relaxed);
        if let Some(place) = self.shared.place(gpa, WALL_SIZE, 4) {
            self.shared.origin.lock().publish_wall(&self.shared.dma, place, &*self.shared.clock);
        }
    }

    fn write_system_time(&self, value: u64) {
        let mut registers = self.registers.lock();
        registers.written.system_time = value;
        let place = self.shared.place(value & !ENABLED, TIME_SIZE, 4);
        registers.time = place.filter(|_| value & ENABLED != 0);
        self.publish_time(&registers, false);
    }

    fn publish_time(&self, registers: &Registers, stopped: bool) {
        if let Some(place) = registers.time {
            self.shared.origin.lock().publish(&self.shared.dma, place, self.apic.tsc_offset(), stopped);
        }
    }

    fn write_steal_time(&self, value: u64) {
        self.set_steal_time(&mut self.registers.lock(), value);
        self.account();
    }

    fn set_steal_time(&self, registers: &mut Registers, value: u64) {
        registers.written.steal_time = value;
        let place = self.shared.place(value & !(steal::SIZE - 1), steal::SIZE, steal::SIZE);
        let place = place.filter(|_| value & ENABLED != 0);
        registers.steal = place.map(|place| StealTime::new(self.shared.dma.clone(), place));
        registers.updated = None;
    }

    fn write_eoi(&self, value: u64) -> bool {
        let gpa = value & !ENABLED;
        let place = self.shared.place(gpa, 1, 4);
        let enabled = value & ENABLED != 0;
        if !gpa.is_multiple_of(4) || enabled && place.is_none() {
            return false;
        }
        self.registers.lock().written.eoi = value;
        self.set_eoi(place.filter(|_| enabled));
        true
    }

    fn set_eoi(&self, place: Option<u64>) {
        self.apic.set_eoi_flag(place.map(|place| EoiFlag::new(self.shared.dma.clone(), place)));
    }

    /// The guest has set the processor's time-stamp counter.
    pub fn counter_changed(&self) {
        self.publish_time(&self.registers.lock(), false);
    }

    /// The processor was reset.
    pub fn reset(&self) {
        *self.registers.lock() = Registers::default();
        self.set_eoi(None);
    }

    /// Brings steal time up to date, now and then: called when the processor takes an interrupt, such as that of the
    /// guest's tick.
    pub fn account(&self) {
        let mut registers = self.registers.lock();
        let Registers { steal: Some(steal), updated, .. } = &mut *registers else { return };
        let now = self.shared.clock.now();
        if updated.is_some_and(|updated| now.saturating_sub(updated) < STEAL_PERIOD) {
            return;
        }
        *updated = Some(now);
        steal.update(self.shared.clock.stolen());
    }

    /// The processor's thread is about to sleep.
    pub fn parked(&self) {
        if let Some(steal) = &self.registers.lock().steal {
            steal.parked();
        }
    }

    /// The processor's thread has slept.
    pub fn unparked(&self) {
        if let Some(steal) = &self.registers.lock().steal
            && steal.unparked()
        {
            self.apic.flush_tlb();
        }
    }

    /// Wall-clock time in nanoseconds since 1970, and what the processor's time-stamp counter shows at that moment.
    pub(super) fn wall_and_counter(&self) -> (Nanos, u64) {
        let clock = self.shared.clock();
        (clock.wall(), clock.tsc().wrapping_add(self.apic.tsc_offset()))
    }

    /// Whether the guest leaves it to the host to wait awake for a moment when the processor halts.
    pub fn host_polls(&self) -> bool {
        self.registers.lock().written.poll_control & 1 != 0
    }

    /// Tells the guest that its machine stood still, so that it doesn't take the time for a hang of its own.
    pub fn stopped(&self) {
        self.publish_time(&self.registers.lock(), true);
    }

    /// What the guest has written.
    pub fn save(&self) -> SavedProcessor {
        self.registers.lock().written
    }

    /// Takes over what was saved; what isn't allowed counts as not written.
    pub fn restore(&self, saved: &SavedProcessor) {
        self.reset();
        self.write_system_time(saved.system_time);
        if saved.steal_time & STEAL_RESERVED == 0 {
            self.set_steal_time(&mut self.registers.lock(), saved.steal_time);
        }
        self.write_eoi(saved.eoi);
        self.write_msr(msr::POLL_CONTROL, saved.poll_control);
    }
}

#[cfg(test)]
#[path = "processor_tests.rs"]
mod tests;
