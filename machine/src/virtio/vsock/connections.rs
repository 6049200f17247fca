//! The state of all connections, as a pure machine: packets of the guest come in, packets for the guest wait to go out.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use super::{BUFFER, Connection, HEADER, HOST, MAX_DATA};

/// Connections at once.
const MAX_CONNECTIONS: usize = 1024;
/// Type of a stream socket.
const STREAM: u16 = 1;

mod operation {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const DATA: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Shutdown: the sender will receive no more; it will send no more.
const NO_RECEIVE: u32 = 1;
const NO_SEND: u32 = 2;

/// What the host's side is to hear.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    Connect(Connection),
    Accepted(Connection),
    Receive(Connection, Vec<u8>),
    EndOfInput(Connection),
    Closed(Connection),
    /// The guest has made room.
    Ready,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has asked; the host's side has not answered.
    Asked,
    /// The host's side has asked; the guest has not answered.
    Wanted,
    Open,
}

/// One connection. Counters wrap, as those in packets do.
#[derive(Debug)]
struct State {
    phase: Phase,
    /// The guest's buffer, and how much of what was sent has left it.
    guest_buffer: u32,
    guest_consumed: u32,
    sent: u32,
    /// What came from the guest, what of it has gone on, and what of that the guest was told.
    received: u32,
    consumed: u32,
    told: u32,
    /// The guest sends no more.
    guest_ended: bool,
    /// The host's side sends no more.
    host_ended: bool,
}

/// A packet's header.
struct Header {
    source: u64,
    destination: u64,
    connection: Connection,
    length: u32,
    kind: u16,
    operation: u16,
    flags: u32,
    buffer: u32,
    consumed: u32,
}

impl Header {
    /// Reads a header of the guest's, whose port is the source.
    fn parse(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| u32::from_le_bytes(core::array::from_fn(|i| bytes[at + i]));
        let long = |at: usize| u64::from(word(at + 4)) << 32 | u64::from(word(at));
        Self {
            source: long(0),
            destination: long(8),
            connection: Connection { guest: word(16), host: word(20) },
            length: word(24),
            kind: word(28) as u16,
            operation: (word(28) >> 16) as u16,
            flags: word(32),
            buffer: word(36),
            consumed: word(40),
        }
    }
}

/// All connections of a guest.
#[derive(Debug)]
pub struct Connections {
    cid: u64,
    all: BTreeMap<Connection, State>,
    /// Packets without data for the guest: connection, operation, flags.
    waiting: VecDeque<(Connection, u16, u32)>,
}

impl Connections {
    /// None, of the guest with this context ID.
    pub fn new(cid: u64) -> Self {
        Self { cid, all: BTreeMap::new(), waiting: VecDeque::new() }
    }

    /// Packets that wait for room in the guest.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The header of the next packet that waits.
    pub fn next_waiting(&mut self) -> Option<[u8; HEADER]> {
        let (connection, operation, flags) = self.waiting.pop_front()?;
        Some(self.header(connection, operation, flags, 0))
    }

    /// The header of a packet with so many bytes of data, which count as sent.
    pub fn data_header(&mut self, connection: Connection, length: u32) -> [u8; HEADER] {
        if let Some(state) = self.all.get_mut(&connection) {
            state.sent = state.sent.wrapping_add(length);
        }
        self.header(connection, operation::DATA, 0, length)
    }

    fn header(&mut self, connection: Connection, operation: u16, flags: u32, length: u32) -> [u8; HEADER] {
        let mut consumed = 0;
        if let Some(state) = self.all.get_mut(&connection) {
            consumed = state.consumed;
            state.told = consumed;
        }
        let mut bytes = [0; HEADER];
        let longs = [HOST, self.cid].map(u64::to_le_bytes);
        let words = [
            connection.host,
            connection.guest,
            length,
            u32::from(STREAM) | u32::from(operation) << 16,
            flags,
            BUFFER,
            consumed,
        ]
        .map(u32::to_le_bytes);
        let parts = longs.as_flattened().iter().chain(words.as_flattened());
        bytes.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
        bytes
    }

    fn tell(&mut self, connection: Connection, operation: u16, flags: u32) {
        self.waiting.push_back((connection, operation, flags));
    }

    /// Bytes that the guest has room for.
    pub fn credit(&self, connection: Connection) -> u32 {
        self.all.get(&connection).filter(|state| state.phase == Phase::Open && !state.host_ended).map_or(
            0,
            |state| {
                let under_way = state.sent.wrapping_sub(state.guest_consumed);
                state.guest_buffer.saturating_sub(under_way)
            },
        )
    }

    /// All end at once; which they were.
    pub fn clear(&mut self) -> Vec<Connection> {
        self.waiting.clear();
        core::mem::take(&mut self.all).into_keys().collect()
    }

    fn open(&mut self, connection: Connection, phase: Phase, guest_buffer: u32) -> bool {
        if self.all.len() >= MAX_CONNECTIONS || self.all.contains_key(&connection) {
            return false;
        }
        let state = State {
            phase,
            guest_buffer,
            guest_consumed: 0,
            sent: 0,
            received: 0,
            consumed: 0,
            told: 0,
            guest_ended: false,
            host_ended: false,
        };
        self.all.insert(connection, state);
        true
    }

    // ---- the host's side ----

    /// The host's side wants a connection.
    pub fn connect(&mut self, connection: Connection) -> bool {
        let asked = self.open(connection, Phase::Wanted, 0);
        if asked {
            self.tell(connection, operation::REQUEST, 0);
        }
        asked
    }

    /// The host's side accepts a connection.
    pub fn accept(&mut self, connection: Connection) {
        if let Some(state) = self.all.get_mut(&connection)
            && state.phase == Phase::Asked
        {
            state.phase = Phase::Open;
            self.tell(connection, operation::RESPONSE, 0);
        }
    }

    /// Received bytes have gone on. The guest is told when half of the buffer is free that it does not know of.
    pub fn consumed(&mut self, connection: Connection, bytes: u32) {
        let Some(state) = self.all.get_mut(&connection) else { return };
        state.consumed = state.consumed.wrapping_add(bytes);
        if state.consumed.wrapping_sub(state.told) >= BUFFER / 2 && state.phase == Phase::Open {
            state.told = state.consumed;
            self.tell(connection, operation::CREDIT_UPDATE, 0);
        }
    }

    /// The host's side sends no more.
    pub fn end_of_output(&mut self, connection: Connection) {
        if let Some(state) = self.all.get_mut(&connection)
            && !core::mem::replace(&mut state.host_ended, true)
        {
            self.tell(connection, operation::SHUTDOWN, NO_SEND);
        }
    }

    /// The host's side ends a connection, or refuses it.
    pub fn close(&mut self, connection: Connection) {
        if self.all.remove(&connection).is_some() {
            self.tell(connection, operation::RESET, 0);
        }
    }

    // ---- the guest's side ----

    /// A packet of the guest's with so many bytes behind its header, which `data` gives. Says what the host's side is to
    /// hear.
    pub fn packet(
        &mut self,
        header: &[u8; HEADER],
        left: u32,
        data: impl FnOnce(u32) -> Vec<u8>,
    ) -> Option<Action> {
        let header = Header::parse(header);
        let connection = header.connection;
        if (header.source, header.destination) != (self.cid, HOST) {
            // Addressed to nobody, or by somebody else.
            return None;
        }
        let makes_sense = header.kind == STREAM && header.length <= left && header.length <= MAX_DATA;
        if !makes_sense {
            return self.refuse(connection, header.operation);
        }
        if header.operation == operation::REQUEST {
            if !self.open(connection, Phase::Asked, header.buffer) {
                return self.refuse(connection, header.operation);
            }
            return Some(Action::Connect(connection));
        }
        let Some(state) = self.all.get_mut(&connection) else {
            return self.refuse(connection, header.operation);
        };
        (state.guest_buffer, state.guest_consumed) = (header.buffer, header.consumed);
        match (header.operation, state.phase) {
            (operation::RESPONSE, Phase::Wanted) => {
                state.phase = Phase::Open;
                Some(Action::Accepted(connection))
            }
            (operation::RESET, _) => {
                self.all.remove(&connection);
                Some(Action::Closed(connection))
            }
            (operation::SHUTDOWN, Phase::Open) => self.shutdown(connection, header.flags),
            (operation::DATA, Phase::Open) => {
                let received = state.received.wrapping_add(header.length);
                if state.guest_ended || received.wrapping_sub(state.consumed) > BUFFER {
                    return self.refuse(connection, header.operation);
                }
                state.received = received;
                Some(Action::Receive(connection, data(header.length)))
            }
            (operation::CREDIT_UPDATE, Phase::Open) => Some(Action::Ready),
            (operation::CREDIT_REQUEST, Phase::Open) => {
                self.tell(connection, operation::CREDIT_UPDATE, 0);
                Some(Action::Ready)
            }
            _ => self.refuse(connection, header.operation),
        }
    }

    /// Answers a packet that makes no sense by a reset, which ends the connection if there is one.
    fn refuse(&mut self, connection: Connection, operation: u16) -> Option<Action> {
        let existed = self.all.remove(&connection).is_some();
        if operation != operation::RESET {
            self.tell(connection, operation::RESET, 0);
        }
        existed.then_some(Action::Closed(connection))
    }

    fn shutdown(&mut self, connection: Connection, flags: u32) -> Option<Action> {
        let state = self.all.get_mut(&connection)?;
        if flags & (NO_RECEIVE | NO_SEND) == NO_RECEIVE | NO_SEND {
            // Both: the sender waits for the end.
            self.all.remove(&connection);
            self.tell(connection, operation::RESET, 0);
            return Some(Action::Closed(connection));
        }
        if flags & NO_RECEIVE != 0 {
            state.host_ended = true;
        }
        if flags & NO_SEND != 0 && !core::mem::replace(&mut state.guest_ended, true) {
            return Some(Action::EndOfInput(connection));
        }
        None
    }
}
