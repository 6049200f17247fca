//! A vCPU's local APIC as vCPU threads, devices and the timer thread share it: the registers behind a lock,
//! and one atomic word that says what waits for the processor.

use alloc::sync::{Arc, Weak};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use bivisor_x86::env::Event;

use super::lapic::{BadAccess, Effect, Lapic, Moment, Pending};
use super::message::{Delivery, Message};
use super::{Registers, RestoreError, Saved};
use crate::device::Poll;
use crate::host::{Clock, Nanos, Waker};
use crate::pv::eoi::EoiFlag;
use crate::sync::Mutex;
use crate::timer::{Timer, TimerHub};

/// Bits of the event word.
mod event {
    pub const INTERRUPT: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 1;
    /// A second NMI, which came while the first was not yet taken.
    pub const NMI_SECOND: u32 = 1 << 2;
    pub const INIT: u32 = 1 << 3;
    pub const SIPI: u32 = 1 << 4;
    pub const KICK: u32 = 1 << 5;
    /// The present HLT, or the next, ends without an interrupt.
    pub const UNHALT: u32 = 1 << 6;
    /// Cached translations are to be dropped.
    pub const FLUSH_TLB: u32 = 1 << 7;
    /// The vector of the start-up IPI.
    pub const SIPI_VECTOR_SHIFT: u32 = 8;
    /// What is saved: all but what follows from the registers or is the host's.
    pub const SAVED: u32 = NMI | NMI_SECOND | INIT | SIPI | UNHALT | 0xff << SIPI_VECTOR_SHIFT;
}

/// What [`LocalApic::take_event`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The processor's event.
    Event(Event),
    /// An interrupt that must be acknowledged at the PIC.
    FromPic,
}

/// What the lock guards.
struct Guarded {
    lapic: Lapic,
    /// Where the guest ends interrupts without an exit.
    eoi: Option<EoiFlag>,
}

impl Guarded {
    /// The registers may be behind what the guest has done.
    fn eoi_is_set(&self) -> bool {
        self.eoi.as_ref().is_some_and(EoiFlag::is_set)
    }
}

/// The shared block of one vCPU.
pub struct LocalApic {
    events: AtomicU32,
    /// Where the registers are in guest-physical memory; all ones if they are not.
    mmio_base: AtomicU64,
    tsc_offset: AtomicU64,
    registers: Mutex<Guarded>,
    /// [`Guarded::eoi_is_set`], for the vCPU's own thread.
    eoi_is_set: AtomicBool,
    timer: Timer,
    clock: Arc<dyn Clock>,
    waker: spin::Once<Arc<dyn Waker>>,
    observer: spin::Once<Arc<dyn Waker>>,
}

/// Who changes the registers: the vCPU's own thread needs no waking.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Owner,
    Other,
}

impl LocalApic {
    /// The local APIC with this ID, after reset.
    pub fn new(
        id: u32,
        bootstrap: bool,
        physical_bits: u32,
        clock: Arc<dyn Clock>,
        timers: &Arc<TimerHub>,
    ) -> Arc<Self> {
        let registers = Lapic::new(id, bootstrap, physical_bits);
        Arc::new_cyclic(|me: &Weak<Self>| Self {
            events: AtomicU32::new(0),
            mmio_base: AtomicU64::new(registers.mmio_base().unwrap_or(u64::MAX)),
            tsc_offset: AtomicU64::new(0),
            registers: Mutex::new(Guarded { lapic: registers, eoi: None }),
            eoi_is_set: AtomicBool::new(false),
            timer: timers.register(me.clone()),
            clock,
            waker: spin::Once::new(),
            observer: spin::Once::new(),
        })
    }

    /// Tells how to wake the vCPU's thread. Only the first call counts.
    pub fn set_waker(&self, waker: Arc<dyn Waker>) {
        self.waker.call_once(|| waker);
    }

    /// Tells the vCPU's engine how it learns of events without asking. Only the first call counts.
    pub fn set_observer(&self, observer: Arc<dyn Waker>) {
        self.observer.call_once(|| observer);
    }

    fn wake(&self) {
        // The engine first: a woken thread must find what the engine was told.
        for waker in [&self.observer, &self.waker].into_iter().filter_map(|waker| waker.get()) {
            waker.wake();
        }
    }

    fn raise(&self, bits: u32) {
        let before = self.events.fetch_or(bits, Ordering::SeqCst);
        if before & bits != bits {
            self.wake();
        }
    }

    fn moment(&self) -> Moment {
        Moment {
            now: self.clock.now(),
            tsc: self.clock.tsc().wrapping_add(self.tsc_offset()),
            tsc_hz: self.clock.tsc_hz(),
        }
    }

    /// Changes the registers, then makes the event word and the timer follow.
    fn update<R>(&self, by: By, change: impl FnOnce(&mut Lapic, &Moment) -> R) -> R {
        let moment = self.moment();
        let mut guarded = self.registers.lock();
        let registers = &mut guarded.lapic;
        let armed = registers.timer_armed();
        let result = change(registers, &moment);
        self.mmio_base.store(registers.mmio_base().unwrap_or(u64::MAX), Ordering::Relaxed);
        let rearmed = (registers.timer_armed() != armed).then(|| registers.deadline(&moment));
        let wake = self.publish(&guarded) && by == By::Other;
        if let Some(deadline) = rearmed {
            self.timer.set(deadline);
        }
        drop(guarded);
        if wake {
            self.wake();
        }
        result
    }

    /// Brings the event word in line with the registers; true if an interrupt is newly there.
    fn publish(&self, guarded: &Guarded) -> bool {
        let registers = &guarded.lapic;
        // The guest may have ended what seems to hold an interrupt back.
        if registers.pending().is_some() || guarded.eoi_is_set() && registers.requested() {
            self.events.fetch_or(event::INTERRUPT, Ordering::SeqCst) & event::INTERRUPT == 0
        } else {
            self.events.fetch_and(!event::INTERRUPT, Ordering::SeqCst);
            false
        }
    }

    // ---- for the vCPU's own thread ----

    /// Whether an event may be waiting.
    pub fn has_event(&self) -> bool {
        self.events.load(Ordering::Relaxed) != 0
    }

    /// Takes the next event by priority. Costs one load while nothing can be taken.
    pub fn take_event(&self, interrupts: bool, nmis: bool) -> Option<Taken> {
        use event::{FLUSH_TLB, INIT, INTERRUPT, KICK, NMI, NMI_SECOND, SIPI, SIPI_VECTOR_SHIFT, UNHALT};
        let events = self.events.load(Ordering::Acquire);
        for (bit, event) in [(FLUSH_TLB, Event::FlushTlb), (UNHALT, Event::Unhalt)] {
            if events & bit != 0 {
                self.events.fetch_and(!bit, Ordering::AcqRel);
                return Some(Taken::Event(event));
            }
        }
        if events & KICK != 0 {
            self.events.fetch_and(!KICK, Ordering::AcqRel);
            return Some(Taken::Event(Event::Kick));
        }
        if events & INIT != 0 {
            self.events.fetch_and(!INIT, Ordering::AcqRel);
            return Some(Taken::Event(Event::Init));
        }
        if events & SIPI != 0 {
            let taken = self.events.fetch_and(!(SIPI | 0xff << SIPI_VECTOR_SHIFT), Ordering::AcqRel);
            return Some(Taken::Event(Event::Sipi((taken >> SIPI_VECTOR_SHIFT) as u8)));
        }
        if events & NMI != 0 {
            if nmis {
                // Another may come at any moment, so which bit is taken is decided with the taking.
                let _ = self.events.fetch_update(Ordering::AcqRel, Ordering::Acquire, |e| {
                    Some(e & !if e & NMI_SECOND != 0 { NMI_SECOND } else { NMI })
                });
                return Some(Taken::Event(Event::Nmi));
            }
            // While one is being handled only one more is held.
            self.events.fetch_and(!NMI_SECOND, Ordering::AcqRel);
        }
        if events & INTERRUPT != 0 && interrupts {
            return self.acknowledge();
        }
        None
    }

    fn acknowledge(&self) -> Option<Taken> {
        let mut guarded = self.registers.lock();
        let pending = guarded.lapic.acknowledge();
        if let (Guarded { lapic, eoi: Some(eoi) }, Some(Pending::Vector(vector))) = (&mut *guarded, pending)
            && lapic.ends_quietly(vector)
        {
            eoi.set();
            self.eoi_is_set.store(true, Ordering::Relaxed);
        }
        self.publish(&guarded);
        match pending? {
            Pending::Vector(vector) => Some(Taken::Event(Event::Interrupt(vector))),
            Pending::ExtInt => Some(Taken::FromPic),
        }
    }

    /// Whether [`LocalApic::settle_eoi`] has something to do.
    pub fn eoi_is_set(&self) -> bool {
        self.eoi_is_set.load(Ordering::Relaxed)
    }
    /// Ends the interrupt that the guest has ended without an exit, if it has; else that will take an exit.
    pub fn settle_eoi(&self) -> Effect {
        let mut guarded = self.registers.lock();
        self.eoi_is_set.store(false, Ordering::Relaxed);
        let ended = guarded.eoi.as_mut().is_some_and(EoiFlag::take);
        let effect = if ended { guarded.lapic.end_of_interrupt() } else { Effect::None };
        self.publish(&guarded);
        effect
    }
    /// Where the guest ends interrupts without an exit from now on. What it ended before must be settled.
    pub fn set_eoi_flag(&self, flag: Option<EoiFlag>) {
        self.registers.lock().eoi = flag;
        self.eoi_is_set.store(false, Ordering::Relaxed);
    }

    /// Guest-physical address of the 4 KiB of registers; all ones while they are not in memory space.
    pub fn mmio_base(&self) -> u64 {
        self.mmio_base.load(Ordering::Relaxed)
    }
    /// Reads at an offset of the register page.
    pub fn mmio_read(&self, offset: u64, size: usize) -> u64 {
        self.update(By::Owner, |r, moment| r.mmio_read(offset, size, moment))
    }
    /// Writes at an offset of the register page.
    pub fn mmio_write(&self, offset: u64, size: usize, value: u64) -> Effect {
        self.update(By::Owner, |r, moment| r.mmio_write(offset, size, value, moment))
    }
    /// Reads an x2APIC MSR.
    pub fn msr_read(&self, msr: u32) -> Result<u64, BadAccess> {
        self.update(By::Owner, |r, moment| r.msr_read(msr, moment))
    }
    /// Writes an x2APIC MSR.
    pub fn msr_write(&self, msr: u32, value: u64) -> Result<Effect, BadAccess> {
        self.update(By::Owner, |r, moment| r.msr_write(msr, value, moment))
    }
    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.registers.lock().lapic.base()
    }
    /// Writes IA32_APIC_BASE.
    pub fn set_base(&self, value: u64) -> Result<(), BadAccess> {
        self.update(By::Owner, |r, _| r.set_base(value))
    }
    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        self.update(By::Owner, |r, moment| r.tsc_deadline(moment))
    }
    /// Writes IA32_TSC_DEADLINE.
    pub fn set_tsc_deadline(&self, value: u64) {
        self.update(By::Owner, |r, moment| r.set_tsc_deadline(value, moment));
    }
    /// CR8.
    pub fn cr8(&self) -> u8 {
        self.registers.lock().lapic.cr8()
    }
    /// Sets CR8.
    pub fn set_cr8(&self, value: u8) {
        let mut guarded = self.registers.lock();
        guarded.lapic.set_cr8(value);
        self.publish(&guarded);
    }
    /// The processor was reset by INIT.
    pub fn on_init(&self) {
        self.update(By::Owner, |r, _| r.init());
    }
    /// What to add to the host's time-stamp counter to get the guest's.
    pub fn tsc_offset(&self) -> u64 {
        self.tsc_offset.load(Ordering::Relaxed)
    }
    /// Sets the guest's time-stamp counter as of now; a deadline follows it.
    pub fn set_tsc(&self, value: u64) {
        self.tsc_offset.store(value.wrapping_sub(self.clock.tsc()), Ordering::Relaxed);
        self.update(By::Owner, |r, moment| {
            r.advance(moment);
            self.timer.set(r.deadline(moment));
        });
    }

    /// Sets what to add to the host's time-stamp counter, as of reset or restoring: every processor of a machine
    /// gets the same, so that their counters agree. Not for a machine that runs.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.tsc_offset.store(offset, Ordering::Relaxed);
    }
    /// The waiting events that no register holds (NMI, INIT, start-up), to be saved.
    pub fn save_events(&self) -> u32 {
        self.events.load(Ordering::SeqCst) & event::SAVED
    }
    /// Takes over saved events; those that waited are dropped. Not for a machine that runs.
    pub fn restore_events(&self, saved: u32) {
        self.events.fetch_and(event::INTERRUPT, Ordering::SeqCst);
        self.events.fetch_or(saved & event::SAVED, Ordering::SeqCst);
    }

    // ---- for everybody ----

    /// Makes the vCPU's engine return to its caller soon.
    pub fn kick(&self) {
        self.raise(event::KICK);
    }
    /// Ends the processor's HLT, the present one or the next.
    pub fn unhalt(&self) {
        self.raise(event::UNHALT);
    }
    /// Has the processor drop its cached translations before it executes anything.
    pub fn flush_tlb(&self) {
        self.raise(event::FLUSH_TLB);
    }
    /// Raises a non-maskable interrupt.
    pub fn raise_nmi(&self) {
        let result = self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |e| {
            Some(if e & event::NMI != 0 { e | event::NMI_SECOND } else { e | event::NMI })
        });
        if result.is_ok_and(|before| before & event::NMI == 0) {
            self.wake();
        }
    }
    fn raise_sipi(&self, vector: u8) {
        let _ = self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |e| {
            let cleared = e & !(0xff << event::SIPI_VECTOR_SHIFT);
            Some(cleared | event::SIPI | u32::from(vector) << event::SIPI_VECTOR_SHIFT)
        });
        self.wake();
    }

    /// Whether a message is meant for this local APIC.
    pub fn matches(&self, message: &Message) -> bool {
        self.registers.lock().lapic.matches(message)
    }
    /// The priority that the arbitration of lowest priority compares.
    pub fn priority(&self) -> u8 {
        self.registers.lock().lapic.ppr()
    }
    /// Accepts a message, whatever its destination says.
    pub fn accept(&self, message: &Message) {
        let (vector, level) = (message.vector, message.level);
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                self.update(By::Other, |r, _| r.accept(vector, level));
            }
            Delivery::ExtInt => self.update(By::Other, |r, _| r.accept_ext_int()),
            Delivery::Nmi => self.raise_nmi(),
            Delivery::Init => {
                // INIT ends what was to start before it.
                self.events.fetch_and(!event::SIPI, Ordering::SeqCst);
                self.raise(event::INIT);
            }
            Delivery::Sipi => self.raise_sipi(vector),
            // There is no system management mode.
            Delivery::Smi => {}
        }
    }
    /// Drives LINT0, where the PIC is.
    pub fn set_lint0(&self, high: bool) {
        if self.update(By::Other, |r, _| r.set_lint0(high)) {
            self.raise_nmi();
        }
    }
    /// Drives LINT1, where a PC has its NMI sources.
    pub fn set_lint1(&self, high: bool) {
        if self.update(By::Other, |r, _| r.set_lint1(high)) {
            self.raise_nmi();
        }
    }
    /// Does what firmware does on the bootstrap processor ([`Lapic::enter_virtual_wire_mode`]).
    pub fn enter_virtual_wire_mode(&self) {
        self.update(By::Other, |r, _| r.enter_virtual_wire_mode());
    }

    /// A copy of the registers.
    pub fn save(&self) -> Saved<Lapic> {
        self.registers.lock().lapic.save()
    }
    /// Takes over saved registers.
    pub fn restore(&self, saved: &Saved<Lapic>) -> Result<(), RestoreError> {
        self.update(By::Other, |r, moment| {
            r.restore(saved)?;
            self.timer.set(r.deadline(moment));
            Ok(())
        })
    }
}

impl Poll for LocalApic {
    fn poll(&self, _: Nanos) -> Option<Nanos> {
        self.update(By::Other, |r, moment| {
            r.advance(moment);
            r.deadline(moment)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::lapic::{DEFAULT_BASE, MSR_TSC_DEADLINE};
    use crate::devices::message::BROADCAST;
    use crate::devices::testing::{Host, Time};

    struct Rig {
        apic: Arc<LocalApic>,
        host: Arc<Host>,
        time: Arc<Time>,
        hub: Arc<TimerHub>,
    }
    fn rig() -> Rig {
        let (host, time) = (Host::new(), Time::new());
        let hub = TimerHub::new(host.clone());
        let apic = LocalApic::new(0, true, 40, time.clone(), &hub);
        apic.set_waker(host.clone());
        apic.mmio_write(0xf0, 4, 0x1ff);
        Rig { apic, host, time, hub }
    }
    fn message(delivery: Delivery, vector: u8) -> Message {
        Message { destination: BROADCAST, logical: false, delivery, vector, level: false }
    }

    #[test]
    fn an_interrupt_wakes_once_and_is_taken_when_allowed() {
        let r = rig();
        assert!(!r.apic.has_event());
        r.apic.accept(&message(Delivery::Fixed, 0x40));
        r.apic.accept(&message(Delivery::Fixed, 0x41));
        assert_eq!((r.apic.has_event(), r.host.wakes()), (true, 1));
        assert_eq!(r.apic.take_event(false, true), None);
        assert_eq!(r.apic.take_event(true, true), Some(Taken::Event(Event::Interrupt(0x41))));
        assert!(!r.apic.has_event());
        r.apic.mmio_write(0xb0, 4, 0);
        assert_eq!((r.apic.has_event(), r.host.wakes()), (true, 1));
        assert_eq!(r.apic.take_event(true, true), Some(Taken::Event(Event::Interrupt(0x40))));
    }

    #[test]
    fn at_most_two_nmis_wait_and_one_during_a_handler() {
        let r = rig();
        let nmis = |allowed| {
            (0..5).filter(|_| r.apic.take_event(true, allowed) == Some(Taken::Event(Event::Nmi))).count()
        };
        (0..3).for_each(|_| r.apic.accept(&message(Delivery::Nmi, 0)));
        assert_eq!(nmis(true), 2);
        (0..3).for_each(|_| r.apic.raise_nmi());
        assert_eq!((nmis(false), nmis(true)), (0, 1));
        assert!(!r.apic.has_event());
    }

    #[test]
    fn init_comes_before_start_up_and_drops_an_older_one() {
        let r = rig();
        r.apic.accept(&message(Delivery::Sipi, 0x10));
        r.apic.accept(&message(Delivery::Init, 0));
        r.apic.accept(&message(Delivery::Sipi, 0x99));
        assert_eq!(r.apic.take_event(false, false), Some(Taken::Event(Event::Init)));
        assert_eq!(r.apic.take_event(false, false), Some(Taken::Event(Event::Sipi(0x99))));
        assert!(!r.apic.has_event());
    }

    #[test]
    fn a_kick_always_gets_through() {
        let r = rig();
        r.apic.kick();
        assert_eq!(r.apic.take_event(false, false), Some(Taken::Event(Event::Kick)));
        assert_eq!(r.apic.take_event(true, true), None);
    }

    #[test]
    fn the_timer_fires_from_the_hub() {
        let r = rig();
        r.apic.mmio_write(0x3e0, 4, 0xb);
        r.apic.mmio_write(0x320, 4, 0xee);
        r.apic.mmio_write(0x380, 4, 500);
        let deadline = r.host.deadline().unwrap();
        assert_eq!(deadline, r.time.now() + 5000);
        r.time.advance(5000);
        r.hub.expired(deadline);
        assert_eq!((r.host.wakes(), r.host.deadline()), (1, None));
        assert_eq!(r.apic.take_event(true, true), Some(Taken::Event(Event::Interrupt(0xee))));
    }

    #[test]
    fn a_tsc_deadline_follows_the_guest_counter() {
        let r = rig();
        r.apic.set_tsc(0);
        r.apic.mmio_write(0x320, 4, 0xee | 2 << 17);
        r.apic.set_tsc_deadline(2000);
        assert_eq!(r.host.deadline(), Some(r.time.now() + 1000));
        r.apic.set_tsc(1000);
        assert_eq!(r.host.deadline(), Some(r.time.now() + 500));
        r.apic.set_tsc(2000);
        assert_eq!((r.apic.tsc_deadline(), r.apic.has_event()), (0, true));
        assert_eq!(MSR_TSC_DEADLINE, 0x6e0);
    }

    #[test]
    fn the_register_page_follows_the_base() {
        let r = rig();
        assert_eq!(r.apic.mmio_base(), DEFAULT_BASE);
        r.apic.set_base(DEFAULT_BASE).unwrap();
        assert_eq!(r.apic.mmio_base(), u64::MAX);
    }

    #[test]
    fn raising_the_task_priority_withdraws_the_event() {
        let r = rig();
        r.apic.accept(&message(Delivery::Fixed, 0x40));
        r.apic.set_cr8(4);
        assert_eq!((r.apic.has_event(), r.apic.cr8()), (false, 4));
        r.apic.set_cr8(3);
        assert!(r.apic.has_event());
    }

    #[test]
    fn restoring_arms_the_timer() {
        let r = rig();
        r.apic.mmio_write(0x320, 4, 0xee);
        r.apic.mmio_write(0x380, 4, 1 << 20);
        let (saved, armed) = (r.apic.save(), r.host.deadline());
        r.apic.mmio_write(0x380, 4, 0);
        assert_eq!(r.host.deadline(), None);
        r.apic.restore(&saved).unwrap();
        assert!(armed.is_some() && r.host.deadline() == armed);
    }
}
