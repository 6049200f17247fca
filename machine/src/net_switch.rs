//! What an Ethernet switch knows: which address was last seen at which port (IEEE 802.1Q, clause 8, without VLANs and
//! spanning tree). It moves no frames itself: type 2 and type 1 ask it where one goes.

use alloc::collections::BTreeMap;

use crate::host::Nanos;

/// How long an address is known after its last frame (802.1Q, table 8-6: the default ageing time).
const AGE: Nanos = 300_000_000_000;

/// Addresses known at one port, at most: one guest can't push the others' out.
const ADDRESSES: usize = 256;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Names a port of the switch.
pub type PortId = u32;

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To this port.
    Port(PortId),
    /// To all ports but the one it came from.
    All,
    /// To none: it is no frame, or its receiver is at the port that it came from.
    Nowhere,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    port: PortId,
    seen: Nanos,
}

/// See the module.
#[derive(Debug, Default)]
pub struct NetSwitch {
    addresses: BTreeMap<Mac, Entry>,
}

impl NetSwitch {
    /// A switch that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns from a frame that came in at `from`, and says where it goes.
    pub fn forward(&mut self, from: PortId, frame: &[u8], now: Nanos) -> Destination {
        let (Some(to), Some(source)) = (mac(frame, 0), mac(frame, 6)) else { return Destination::Nowhere };
        if frame.len() < 14 || is_group(source) {
            return Destination::Nowhere;
        }
        self.learn(from, source, now);
        if is_group(to) {
            return Destination::All;
        }
        match self.addresses.get(&to) {
            Some(entry) if now.saturating_sub(entry.seen) > AGE => Destination::All,
            Some(entry) if entry.port == from => Destination::Nowhere,
            Some(entry) => Destination::Port(entry.port),
            None => Destination::All,
        }
    }

    /// A port is gone, and what was known of it.
    pub fn remove(&mut self, port: PortId) {
        self.addresses.retain(|_, entry| entry.port != port);
    }

    fn learn(&mut self, port: PortId, address: Mac, now: Nanos) {
        if let Some(entry) = self.addresses.get_mut(&address) {
            *entry = Entry { port, seen: now };
            return;
        }
        let own = || self.addresses.iter().filter(|(_, entry)| entry.port == port);
        if own().count() >= ADDRESSES
            && let Some(oldest) = own().min_by_key(|(_, entry)| entry.seen).map(|(address, _)| *address)
        {
            self.addresses.remove(&oldest);
        }
        self.addresses.insert(address, Entry { port, seen: now });
    }
}

fn mac(frame: &[u8], at: usize) -> Option<Mac> {
    frame.get(at..at + 6)?.try_into().ok()
}

/// The address means several receivers (IEEE 802, clause 8.2.2).
fn is_group(address: Mac) -> bool {
    address[0] & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> [u8; 14] {
        let mut frame = [0; 14];
        frame[5] = to;
        frame[11] = from;
        frame
    }

    #[test]
    fn learns_who_is_where() {
        let mut switch = NetSwitch::new();
        assert_eq!(switch.forward(1, &frame(20, 10), 0), Destination::All);
        assert_eq!(switch.forward(2, &frame(10, 20), 1), Destination::Port(1));
        assert_eq!(switch.forward(1, &frame(20, 10), 2), Destination::Port(2));
        // The guest has moved.
        assert_eq!(switch.forward(3, &frame(20, 10), 3), Destination::Port(2));
        assert_eq!(switch.forward(2, &frame(10, 20), 4), Destination::Port(3));
    }

    #[test]
    fn groups_and_strangers_go_to_all() {
        let mut switch = NetSwitch::new();
        let mut to_all = frame(0, 10);
        to_all[..6].fill(0xff);
        assert_eq!(switch.forward(1, &to_all, 0), Destination::All);
        assert_eq!(switch.forward(1, &frame(99, 10), 0), Destination::All);
    }

    #[test]
    fn what_makes_no_sense_goes_nowhere() {
        let mut switch = NetSwitch::new();
        assert_eq!(switch.forward(1, &[], 0), Destination::Nowhere);
        assert_eq!(switch.forward(1, &frame(1, 2)[..13], 0), Destination::Nowhere);
        let mut from_group = frame(20, 10);
        from_group[6] = 1;
        assert_eq!(switch.forward(1, &from_group, 0), Destination::Nowhere);
        assert_eq!(
            switch.forward(1, &frame(10, 10), 0),
            Destination::Nowhere,
            "its receiver is where it came from"
        );
    }

    #[test]
    fn forgets_old_addresses_and_ports_that_are_gone() {
        let mut switch = NetSwitch::new();
        switch.forward(1, &frame(99, 10), 0);
        assert_eq!(switch.forward(2, &frame(10, 20), AGE), Destination::Port(1));
        assert_eq!(switch.forward(2, &frame(10, 20), AGE + 1), Destination::All);
        switch.forward(1, &frame(99, 10), AGE + 2);
        switch.remove(1);
        assert_eq!(switch.forward(2, &frame(10, 20), AGE + 3), Destination::All);
    }

    #[test]
    fn one_port_cannot_push_out_the_others() {
        let mut switch = NetSwitch::new();
        switch.forward(2, &frame(99, 20), 0);
        for number in 0..100_000u32 {
            let mut frame = frame(99, 0);
            frame[7] = 1;
            frame[8..12].copy_from_slice(&number.to_be_bytes());
            switch.forward(1, &frame, u64::from(number));
        }
        assert!(switch.addresses.len() <= ADDRESSES + 1);
        assert_eq!(switch.forward(3, &frame(20, 30), 100_000), Destination::Port(2));
    }
}
