//! The deadlines of all devices. The earliest one is told to the host ([`Alarm`]), which calls
//! [`TimerHub::expired`] when it has come.
//!
//! Locks: a device arms its timer while it holds its own lock, so the hub's lock is taken inside devices'
//! locks, and no device is ever called with the hub's lock held.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use crate::device::Poll;
use crate::host::{Alarm, Nanos};
use crate::sync::Mutex;

struct Slot {
    deadline: Option<Nanos>,
    /// Counts changes of the deadline, so that what a poll returns does not undo what a vCPU armed meanwhile.
    generation: u64,
    device: Weak<dyn Poll>,
}

struct Slots {
    slots: Vec<Slot>,
    /// What the alarm was told last.
    told: Option<Nanos>,
}

impl Slots {
    fn earliest(&self) -> Option<Nanos> {
        self.slots.iter().filter_map(|s| s.deadline).min()
    }
}

/// All deadlines of one machine.
pub struct TimerHub {
    slots: Mutex<Slots>,
    alarm: Arc<dyn Alarm>,
}

/// One device's deadline.
pub struct Timer {
    hub: Arc<TimerHub>,
    slot: usize,
}

impl TimerHub {
    /// A hub with no deadlines. `alarm` is called with the hub's lock held, so that it hears changes in their
    /// order: it must not call the hub back.
    pub fn new(alarm: Arc<dyn Alarm>) -> Arc<Self> {
        Arc::new(Self { slots: Mutex::new(Slots { slots: Vec::new(), told: None }), alarm })
    }

    /// A timer whose expiry calls the device's [`Poll`].
    pub fn register(self: &Arc<Self>, device: Weak<dyn Poll>) -> Timer {
        let slots = &mut self.slots.lock().slots;
        slots.push(Slot { deadline: None, generation: 0, device });
        Timer { hub: self.clone(), slot: slots.len() - 1 }
    }

    fn tell(&self, slots: &mut Slots) {
        let earliest = slots.earliest();
        if earliest != slots.told {
            slots.told = earliest;
            self.alarm.set(earliest);
        }
    }

    fn set(&self, slot: usize, deadline: Option<Nanos>) {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.slots.get_mut(slot) {
            slot.generation = slot.generation.wrapping_add(1);
            slot.deadline = deadline;
        }
        self.tell(&mut slots);
    }

    /// Takes the device of a slot that is due at `now`, with its generation.
    fn take_due(&self, from: usize, now: Nanos) -> Option<(usize, u64, Weak<dyn Poll>)> {
        let mut slots = self.slots.lock();
        let (at, slot) = slots
            .slots
            .iter_mut()
            .enumerate()
            .skip(from)
            .find(|(_, s)| s.deadline.is_some_and(|deadline| deadline <= now))?;
        slot.deadline = None;
        Some((at, slot.generation, slot.device.clone()))
    }

    /// Polls the devices whose deadline has come, each at most once. Called by the host's timer thread (or by any
    /// other) with no lock held.
    pub fn expired(&self, now: Nanos) {
        let mut from = 0;
        while let Some((at, generation, device)) = self.take_due(from, now) {
            let next = device.upgrade().and_then(|d| d.poll(now));
            let mut slots = self.slots.lock();
            if let Some(slot) = slots.slots.get_mut(at)
                && slot.generation == generation
            {
                slot.deadline = next;
            }
            from = at + 1;
        }
        let mut slots = self.slots.lock();
        // The host's alarm has gone off: it must hear of the next deadline even if that is the same.
        slots.told = None;
        let earliest = slots.earliest();
        slots.told = earliest;
        self.alarm.set(earliest);
    }
}

impl Timer {
    /// Sets the deadline, or clears it. May be called with the device's own lock held.
    pub fn set(&self, deadline: Option<Nanos>) {
        self.hub.set(self.slot, deadline);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Told(Mutex<Vec<Option<Nanos>>>);
    impl Alarm for Told {
        fn set(&self, deadline: Option<Nanos>) {
            self.0.lock().push(deadline);
        }
    }

    /// Counts polls; arms itself again after `period`, and once to `from_outside` as a vCPU would meanwhile.
    struct Device {
        timer: Timer,
        polls: Mutex<Vec<Nanos>>,
        period: Option<Nanos>,
        from_outside: Mutex<Option<Nanos>>,
    }
    impl Poll for Device {
        fn poll(&self, now: Nanos) -> Option<Nanos> {
            self.polls.lock().push(now);
            if let Some(deadline) = self.from_outside.lock().take() {
                self.timer.set(Some(deadline));
            }
            self.period.map(|p| now + p)
        }
    }

    fn device(hub: &Arc<TimerHub>, period: Option<Nanos>) -> Arc<Device> {
        Arc::new_cyclic(|me: &Weak<Device>| Device {
            timer: hub.register(me.clone()),
            polls: Mutex::default(),
            period,
            from_outside: Mutex::default(),
        })
    }

    #[test]
    fn the_earliest_deadline_is_told() {
        let told = Arc::new(Told::default());
        let hub = TimerHub::new(told.clone());
        let (a, b) = (device(&hub, None), device(&hub, None));
        a.timer.set(Some(50));
        b.timer.set(Some(70));
        b.timer.set(Some(20));
        b.timer.set(None);
        a.timer.set(None);
        assert_eq!(*told.0.lock(), [Some(50), Some(20), Some(50), None]);
    }

    #[test]
    fn due_devices_are_polled_and_periodic_ones_armed_again() {
        let told = Arc::new(Told::default());
        let hub = TimerHub::new(told.clone());
        let (a, b, late) = (device(&hub, Some(10)), device(&hub, None), device(&hub, None));
        a.timer.set(Some(5));
        b.timer.set(Some(6));
        late.timer.set(Some(100));
        hub.expired(6);
        assert_eq!((a.polls.lock().len(), b.polls.lock().len(), late.polls.lock().len()), (1, 1, 0));
        assert_eq!(told.0.lock().last(), Some(&Some(16)));
        hub.expired(15);
        assert_eq!(a.polls.lock().len(), 1);
        hub.expired(16);
        assert_eq!(*a.polls.lock(), [6, 16]);
    }

    #[test]
    fn an_early_alarm_is_set_again() {
        let told = Arc::new(Told::default());
        let hub = TimerHub::new(told.clone());
        let a = device(&hub, None);
        a.timer.set(Some(50));
        hub.expired(49);
        assert!(a.polls.lock().is_empty());
        assert_eq!(*told.0.lock(), [Some(50), Some(50)]);
    }

    #[test]
    fn what_is_armed_during_a_poll_wins_over_its_answer() {
        let told = Arc::new(Told::default());
        let hub = TimerHub::new(told);
        let a = device(&hub, Some(1000));
        *a.from_outside.lock() = Some(30);
        a.timer.set(Some(10));
        hub.expired(10);
        hub.expired(30);
        assert_eq!(*a.polls.lock(), [10, 30]);
    }

    #[test]
    fn a_device_that_is_gone_is_forgotten() {
        let hub = TimerHub::new(Arc::new(Told::default()));
        let a = device(&hub, Some(1));
        a.timer.set(Some(1));
        drop(a);
        hub.expired(1);
        assert_eq!(hub.slots.lock().earliest(), None);
    }
}
