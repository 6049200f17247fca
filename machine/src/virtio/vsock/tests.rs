//! The socket device, driven through rings of every format.

use alloc::vec;

use super::*;
use crate::virtio::testing::{Bench, Driver, Returned};

const CID: u32 = 7;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Connect(Connection),
    Accepted(Connection),
    Receive(Connection, Vec<u8>),
    End(Connection),
    Closed(Connection),
}

#[derive(Default)]
struct Host {
    heard: Mutex<Vec<Heard>>,
    guest: Mutex<Option<Arc<dyn VsockGuest>>>,
    ready: Mutex<u32>,
}

impl VsockHost for Host {
    fn attach(&self, guest: Option<Arc<dyn VsockGuest>>) {
        *self.guest.lock() = guest;
    }
    fn connect(&self, connection: Connection) {
        self.heard.lock().push(Heard::Connect(connection));
    }
    fn accepted(&self, connection: Connection) {
        self.heard.lock().push(Heard::Accepted(connection));
    }
    fn receive(&self, connection: Connection, bytes: Vec<u8>) {
        self.heard.lock().push(Heard::Receive(connection, bytes));
    }
    fn end_of_input(&self, connection: Connection) {
        self.heard.lock().push(Heard::End(connection));
    }
    fn closed(&self, connection: Connection) {
        self.heard.lock().push(Heard::Closed(connection));
    }
    fn ready(&self) {
        *self.ready.lock() += 1;
    }
}

struct Rig {
    host: Arc<Host>,
    device: Arc<Vsock>,
    queues: [Arc<Virtqueue>; 3],
    receive: Driver,
    send: Driver,
    event: Driver,
    bench: Bench,
}

const C: Connection = Connection { guest: 1000, host: 80 };

fn rigs() -> [Rig; 3] {
    Bench::all_kinds(0).map(|bench| {
        let host = Arc::new(Host::default());
        let device = Vsock::new(CID, host.clone());
        let ((a, receive), (b, send), (c, event)) =
            (bench.queue(RECEIVE, 64), bench.queue(SEND, 64), bench.queue(EVENT, 8));
        let queues = [a, b, c];
        device.activate(bench.features, &queues.clone().map(Some));
        let mut rig = Rig { host, device, queues, receive, send, event, bench };
        for _ in 0..16 {
            rig.receive.offer(&[], &[HEADER + 100]);
        }
        rig
    })
}

impl Rig {
    fn packet(
        &mut self,
        connection: Connection,
        operation: u16,
        flags: u32,
        credit: (u32, u32),
        data: &[u8],
    ) {
        let mut header = Vec::new();
        header.extend(u64::from(CID).to_le_bytes());
        header.extend(HOST.to_le_bytes());
        for word in [
            connection.guest,
            connection.host,
            data.len() as u32,
            1 | u32::from(operation) << 16,
            flags,
            credit.0,
            credit.1,
        ] {
            header.extend(word.to_le_bytes());
        }
        self.raw(&header, data);
    }
    fn raw(&mut self, header: &[u8], data: &[u8]) {
        let pieces: &[&[u8]] = if data.is_empty() { &[header] } else { &[header, data] };
        self.send.offer(pieces, &[]);
        self.device.notify(&self.queues[1]);
        self.send.expect();
    }
    fn guest(&self) -> Arc<dyn VsockGuest> {
        self.host.guest.lock().clone().unwrap()
    }
    fn heard(&self) -> Vec<Heard> {
        core::mem::take(&mut *self.host.heard.lock())
    }
    /// Connection, operation, flags, consumed, and data of the next packet for the guest.
    fn answer(&mut self) -> Option<(Connection, u16, u32, u32, Vec<u8>)> {
        let Returned { data, written, .. } = self.receive.returned()?;
        self.receive.offer(&[], &[HEADER + 100]);
        let word = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8), word(28) & 0xffff, word(36)), (2, CID, 1, BUFFER));
        assert_eq!(written as usize, HEADER + word(24) as usize);
        let connection = Connection { guest: word(20), host: word(16) };
        let data = data[HEADER..written as usize].to_vec();
        Some((connection, (word(28) >> 16) as u16, word(32), word(40), data))
    }
    fn connected(&mut self) {
        self.packet(C, REQUEST, 0, (150, 0), &[]);
        self.guest().accept(C);
        assert_eq!(self.heard(), [Heard::Connect(C)]);
        assert_eq!(self.answer(), Some((C, RESPONSE, 0, 0, vec![])));
    }
}

#[test]
fn the_guest_connects_and_both_send_within_their_credit() {
    for mut rig in rigs() {
        rig.connected();
        rig.packet(C, DATA, 0, (150, 0), b"question");
        assert_eq!(rig.heard(), [Heard::Receive(C, b"question".to_vec())]);
        // Three buffers would do, but the guest has room for 150 bytes only.
        assert_eq!(rig.guest().send(C, &[7; 250]), 150);
        assert_eq!(rig.answer(), Some((C, DATA, 0, 0, vec![7; 100])));
        assert_eq!(rig.answer(), Some((C, DATA, 0, 0, vec![7; 50])));
        assert_eq!((rig.guest().send(C, b"x"), rig.answer()), (0, None));
        rig.guest().consumed(C, 8);
        assert_eq!(rig.answer(), None);
        rig.packet(C, CREDIT_REQUEST, 0, (150, 149), &[]);
        assert_eq!(rig.answer(), Some((C, CREDIT_UPDATE, 0, 8, vec![])));
        assert!(*rig.host.ready.lock() > 0);
        assert_eq!(rig.guest().send(C, &[1; 250]), 149);
    }
}

#[test]
fn a_full_buffer_is_told_of_when_half_is_free_again() {
    for mut rig in rigs() {
        rig.connected();
        let piece = vec![3; MAX_DATA as usize];
        for _ in 0..BUFFER / MAX_DATA {
            rig.packet(C, DATA, 0, (150, 0), &piece);
        }
        assert_eq!(rig.heard().len(), 4);
        rig.guest().consumed(C, BUFFER / 2 - 1);
        assert_eq!(rig.answer(), None);
        rig.guest().consumed(C, 1);
        assert_eq!(rig.answer(), Some((C, CREDIT_UPDATE, 0, BUFFER / 2, vec![])));
        // More than was allowed ends it.
        for _ in 0..2 {
            rig.packet(C, DATA, 0, (150, 0), &piece);
        }
        assert_eq!(rig.heard().len(), 2);
        rig.packet(C, DATA, 0, (150, 0), b"x");
        assert_eq!(rig.heard(), [Heard::Closed(C)]);
        assert_eq!(rig.answer().map(|a| a.1), Some(RESET));
    }
}

#[test]
fn the_host_connects_and_is_accepted_or_refused() {
    for mut rig in rigs() {
        let guest = rig.guest();
        assert!(guest.connect(C) && !guest.connect(C));
        assert_eq!(rig.answer().map(|a| (a.0, a.1)), Some((C, REQUEST)));
        assert_eq!(guest.send(C, b"too early"), 0);
        rig.packet(C, RESPONSE, 0, (9, 0), &[]);
        assert_eq!(rig.heard(), [Heard::Accepted(C)]);
        assert_eq!(guest.send(C, b"hi"), 2);
        rig.answer();
        let other = Connection { guest: 5, host: 6 };
        assert!(guest.connect(other));
        rig.answer();
        rig.packet(other, RESET, 0, (0, 0), &[]);
        assert_eq!((rig.heard(), rig.answer()), (vec![Heard::Closed(other)], None));
    }
}

#[test]
fn ends_of_each_direction_and_of_both() {
    for mut rig in rigs() {
        rig.connected();
        rig.packet(C, SHUTDOWN, 2, (150, 0), &[]);
        assert_eq!(rig.heard(), [Heard::End(C)]);
        assert_eq!(rig.guest().send(C, b"still"), 5);
        rig.answer();
        rig.guest().end_of_output(C);
        rig.guest().end_of_output(C);
        assert_eq!(rig.answer().map(|a| (a.1, a.2)), Some((SHUTDOWN, 2)));
        assert_eq!(rig.guest().send(C, b"no more"), 0);
        rig.packet(C, SHUTDOWN, 3, (150, 0), &[]);
        assert_eq!(rig.heard(), [Heard::Closed(C)]);
        assert_eq!((rig.answer().map(|a| a.1), rig.answer()), (Some(RESET), None));
    }
}

#[test]
fn what_makes_no_sense_is_answered_by_a_reset() {
    for mut rig in rigs() {
        for operation in [RESPONSE, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST, 0, 99] {
            rig.packet(C, operation, 0, (1, 0), &[]);
            assert_eq!(rig.answer().map(|a| (a.0, a.1)), Some((C, RESET)), "{operation}");
        }
        rig.packet(C, RESET, 0, (1, 0), &[]);
        rig.raw(&[0; HEADER], &[]);
        rig.raw(&[0; HEADER - 1], &[]);
        assert_eq!(rig.answer(), None);
        // The same connection twice; more data than the packet has.
        rig.connected();
        rig.packet(C, REQUEST, 0, (1, 0), &[]);
        assert_eq!((rig.heard(), rig.answer().map(|a| a.1)), (vec![Heard::Closed(C)], Some(RESET)));
        let mut header = vec![0; HEADER];
        header[0] = CID as u8;
        header[8] = 2;
        header[24] = 1;
        header[28..32].copy_from_slice(&(1 | u32::from(DATA) << 16).to_le_bytes());
        rig.raw(&header, &[]);
        assert_eq!(rig.answer().map(|a| a.1), Some(RESET));
        assert_eq!(rig.bench.signals.broken(), None);
    }
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let [_, _, mut rig] = rigs();
    let mut sent = 0;
    let header = {
        let mut header = vec![0; HEADER];
        header[0] = CID as u8;
        header[8] = 2;
        header[28] = 1;
        header
    };
    while rig.send.has_room(1) && sent < 1000 {
        rig.send.offer(&[&header], &[]);
        rig.device.notify(&rig.queues[1]);
        rig.send.returned();
        sent += 1;
    }
    assert!(sent < 1000);
    assert_eq!(rig.device.side.connections.lock().waiting(), WAITING_ANSWERS);
    // Room for some answers lets it go on.
    for _ in 0..16 {
        rig.answer();
    }
    rig.device.notify(&rig.queues[0]);
    assert!(rig.send.returned().is_some());
}

#[test]
fn a_reset_and_a_restored_machine_have_no_connections() {
    for mut rig in rigs() {
        rig.connected();
        rig.event.offer(&[], &[8]);
        assert!(rig.device.restore(&SavedDevice::default()));
        assert_eq!(rig.event.expect().written, 4);
        rig.device.drain();
        assert_eq!(rig.guest().send(C, b"x"), 0);
        rig.device.resume();
        rig.queues.iter().for_each(|queue| queue.close());
        let guest = rig.guest();
        rig.device.reset();
        assert_eq!(rig.heard(), [Heard::Closed(C)]);
        assert!(rig.host.guest.lock().is_none());
        assert_eq!(guest.send(C, b"x"), 0);
    }
}
