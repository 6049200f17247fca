//! Switches between the guests' network interfaces. A frame waits at its receiver's port until the scheduler, between two turns,
//! puts it into the receiver's buffers.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use bivisor_machine::host::Clock;
use bivisor_machine::net_switch::{Destination, NetSwitch, PortId};
use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use bivisor_machine::sync::Mutex;

/// Frames that wait at a port. More are lost, as at any switch.
const QUEUE: usize = 256;
/// Bytes of the largest frame: Ethernet's, with a tag of IEEE 802.1Q.
const LARGEST: usize = 1518;

/// Tells whoever delivers that there is something to deliver.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Outlet {
    receiver: Option<Arc<dyn PacketReceiver>>,
    frames: VecDeque<Vec<u8>>,
    /// The receiver has no room, and says when it has some.
    stalled: bool,
}

#[derive(Default)]
struct State {
    table: NetSwitch,
    ports: BTreeMap<PortId, Outlet>,
    next: PortId,
}

/// A switch.
pub(crate) struct Switch {
    clock: Arc<dyn Clock>,
    wake: Wake,
    state: Mutex<State>,
}

impl Switch {
    pub(crate) fn new(clock: Arc<dyn Clock>, wake: Wake) -> Arc<Self> {
        Arc::new(Self { clock, wake, state: Mutex::default() })
    }

    /// A new port, which is there until it is dropped.
    pub(crate) fn port(self: &Arc<Self>) -> Arc<Port> {
        let mut state = self.state.lock();
        let id = state.next;
        state.next += 1;
        state.ports.insert(id, Outlet::default());
        Arc::new(Port { switch: self.clone(), id })
    }

    /// Gives receivers what waits for them, as far as they have room.
    pub(crate) fn deliver(&self) {
        let mut state = self.state.lock();
        for outlet in state.ports.values_mut().filter(|outlet| !outlet.stalled) {
            while let Some(frame) = outlet.frames.front() {
                // Without a device the port is a socket with nothing in it.
                if let Some(receiver) = &outlet.receiver
                    && !receiver.receive(frame, &Offload::default())
                {
                    outlet.stalled = true;
                    break;
                }
                outlet.frames.pop_front();
            }
        }
    }
}

/// One interface's port.
pub(crate) struct Port {
    switch: Arc<Switch>,
    id: PortId,
}

impl Port {
    fn change(&self, how: impl FnOnce(&mut Outlet)) {
        if let Some(outlet) = self.switch.state.lock().ports.get_mut(&self.id) {
            how(outlet);
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut state = self.switch.state.lock();
        state.ports.remove(&self.id);
        state.table.remove(self.id);
    }
}

impl PacketPort for Port {
    fn features(&self) -> PortFeatures {
        PortFeatures::default()
    }

    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, _accepted: PortFeatures) {
        self.change(|outlet| *outlet = Outlet { receiver, ..Outlet::default() });
    }

    fn send(&self, frame: &[u8], _offload: &Offload) {
        if frame.len() > LARGEST {
            return;
        }
        let now = self.switch.clock.now();
        let mut state = self.switch.state.lock();
        let destination = state.table.forward(self.id, frame, now);
        let mut waits = false;
        for (id, outlet) in &mut state.ports {
            let wanted = match destination {
                Destination::Port(port) => *id == port,
                Destination::All => *id != self.id,
                Destination::Nowhere => false,
            };
            if wanted && outlet.receiver.is_some() && outlet.frames.len() < QUEUE {
                outlet.frames.push_back(frame.into());
                waits = true;
            }
        }
        drop(state);
        if waits {
            (self.switch.wake)();
        }
    }

    fn ready(&self) {
        self.change(|outlet| outlet.stalled = false);
        (self.switch.wake)();
    }
}

/// All switches, by name.
pub(crate) struct Switches {
    clock: Arc<dyn Clock>,
    wake: Wake,
    by_name: Mutex<BTreeMap<String, Arc<Switch>>>,
}

impl Switches {
    pub(crate) fn new(clock: Arc<dyn Clock>, wake: Wake) -> Self {
        Self { clock, wake, by_name: Mutex::default() }
    }

    /// A new port of the switch of this name, which comes into being with its first one.
    pub(crate) fn port(&self, name: &str) -> Arc<Port> {
        let mut by_name = self.by_name.lock();
        let new = || Switch::new(self.clock.clone(), self.wake.clone());
        by_name.entry(name.into()).or_insert_with(new).port()
    }

    /// As [`Switch::deliver`], for all.
    pub(crate) fn deliver(&self) {
        self.by_name.lock().values().for_each(|switch| switch.deliver());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_machine::host::Nanos;
    use core::sync::atomic::{AtomicUsize, Ordering};

    struct Still;
    impl Clock for Still {
        fn now(&self) -> Nanos {
            0
        }
        fn wall_seconds(&self) -> u64 {
            0
        }
        fn tsc(&self) -> u64 {
            0
        }
        fn tsc_hz(&self) -> u64 {
            1
        }
    }

    /// Takes so many frames.
    struct Guest {
        room: AtomicUsize,
        got: Mutex<Vec<Vec<u8>>>,
    }
    impl Guest {
        fn new(room: usize) -> Arc<Self> {
            Arc::new(Self { room: AtomicUsize::new(room), got: Mutex::default() })
        }
        fn count(&self) -> usize {
            self.got.lock().len()
        }
    }
    impl PacketReceiver for Guest {
        fn receive(&self, frame: &[u8], _: &Offload) -> bool {
            let room = self.room.load(Ordering::Relaxed);
            if room == 0 {
                return false;
            }
            self.room.store(room - 1, Ordering::Relaxed);
            self.got.lock().push(frame.into());
            true
        }
    }

    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut frame = alloc::vec![0; 60];
        (frame[5], frame[11]) = (to, from);
        frame
    }

    fn connect(switch: &Arc<Switch>, room: usize) -> (Arc<Port>, Arc<Guest>) {
        let (port, guest) = (switch.port(), Guest::new(room));
        port.attach(Some(guest.clone()), PortFeatures::default());
        (port, guest)
    }

    #[test]
    fn frames_reach_who_is_meant() {
        let woken = Arc::new(AtomicUsize::new(0));
        let count = woken.clone();
        let switch = Switch::new(
            Arc::new(Still),
            Arc::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        );
        let [(a, in_a), (b, in_b), (_c, in_c)] = [1, 2, 3].map(|_| connect(&switch, 100));
        a.send(&frame(2, 1), &Offload::default());
        assert_eq!((in_b.count(), woken.load(Ordering::Relaxed)), (0, 1));
        switch.deliver();
        assert_eq!((in_a.count(), in_b.count(), in_c.count()), (0, 1, 1));
        b.send(&frame(1, 2), &Offload::default());
        a.send(&frame(2, 1), &Offload::default());
        a.send(&[0; LARGEST + 1], &Offload::default());
        switch.deliver();
        assert_eq!((in_a.count(), in_b.count(), in_c.count()), (1, 2, 1));
        // Who is gone gets nothing, and is not remembered.
        drop(b);
        a.send(&frame(2, 1), &Offload::default());
        switch.deliver();
        assert_eq!((in_b.count(), in_c.count()), (2, 2));
    }

    #[test]
    fn who_has_no_room_gets_the_rest_later_and_no_more_than_waits() {
        let switch = Switch::new(Arc::new(Still), Arc::new(|| {}));
        let ((a, _in_a), (b, in_b)) = (connect(&switch, 0), connect(&switch, 2));
        for _ in 0..QUEUE + 10 {
            a.send(&frame(2, 1), &Offload::default());
        }
        switch.deliver();
        assert_eq!(in_b.count(), 2);
        in_b.room.store(1000, Ordering::Relaxed);
        switch.deliver();
        assert_eq!(in_b.count(), 2);
        b.ready();
        switch.deliver();
        assert_eq!(in_b.count(), QUEUE);
        a.send(&frame(2, 1), &Offload::default());
        b.attach(None, PortFeatures::default());
        switch.deliver();
        assert_eq!(in_b.count(), QUEUE);
    }
}
