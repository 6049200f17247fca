//! The socket device (section 5.10): stream connections between the guest and its host, by port numbers.
//!
//! What the guest sends is handed to the host's side by the thread that notifies the queue; what the host's side sends is
//! put into the guest's buffers by the host's thread.

mod connections;
#[cfg(test)]
mod tests;

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::device::{Kind, SavedDevice, VirtioDevice, read_config};
use super::queue::Virtqueue;
use crate::dma::Dma;
use crate::sync::Mutex;
use connections::{Action, Connections};

const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const EVENT: u16 = 2;
const QUEUE_SIZE: u16 = 128;
/// Bytes of a packet's header (section 5.10.6).
const HEADER: usize = 44;
/// Bytes of data in a packet at most.
const MAX_DATA: u32 = 64 << 10;
/// Answers that wait for room in the guest, from which on the guest's packets wait, too (section 5.10.6.3).
const WAITING_ANSWERS: usize = 256;
/// The host's context ID.
const HOST: u64 = 2;
/// Context IDs of guests: 0 to 2 have a meaning of their own, as has the largest.
const FIRST_GUEST: u32 = 3;
/// Event: the connections are gone.
const TRANSPORT_RESET: u32 = 0;

/// A connection by its ports; it goes from the host to the guest or the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// The guest's port.
    pub guest: u32,
    /// The host's port.
    pub host: u32,
}

/// The host's side. Its methods return at once, are called by virtual processors' threads, and must not call the device
/// from inside.
pub trait VsockHost: Send + Sync {
    /// The device that it belongs to, or none any more.
    fn attach(&self, guest: Option<Arc<dyn VsockGuest>>);
    /// The guest wants a connection; [`VsockGuest::accept`] or [`VsockGuest::close`] is the answer.
    fn connect(&self, connection: Connection);
    /// The guest has accepted a connection that the host wanted.
    fn accepted(&self, connection: Connection);
    /// Bytes from the guest: never more than [`BUFFER`] without [`VsockGuest::consumed`].
    fn receive(&self, connection: Connection, bytes: Vec<u8>);
    /// The guest will send nothing more.
    fn end_of_input(&self, connection: Connection);
    /// The connection is over, or was refused. What was received before still goes to the far end.
    fn closed(&self, connection: Connection);
    /// There may be room again after [`VsockGuest::send`] took less than all.
    fn ready(&self);
}

/// Bytes of a connection that the host's side has at most.
pub const BUFFER: u32 = 256 << 10;

/// The device as the host's side sees it. Connections that are over are passed over.
pub trait VsockGuest: Send + Sync {
    /// Wants a connection. False: there is none, or there are too many.
    fn connect(&self, connection: Connection) -> bool;
    /// Accepts a connection that the guest wanted.
    fn accept(&self, connection: Connection);
    /// Sends bytes; says how many the guest took.
    fn send(&self, connection: Connection, bytes: &[u8]) -> usize;
    /// So many received bytes have gone on, and others may come.
    fn consumed(&self, connection: Connection, bytes: u32);
    /// Nothing more will be sent.
    fn end_of_output(&self, connection: Connection);
    /// The connection is over, or refused.
    fn close(&self, connection: Connection);
}

/// The device.
pub struct Vsock {
    cid: u32,
    host: Arc<dyn VsockHost>,
    side: Arc<GuestSide>,
}

#[derive(Default)]
struct Queues {
    receive: Option<Arc<Virtqueue>>,
    send: Option<Arc<Virtqueue>>,
    event: Option<Arc<Virtqueue>>,
    paused: bool,
}

/// What both sides share.
struct GuestSide {
    queues: Mutex<Queues>,
    connections: Mutex<Connections>,
}

impl Vsock {
    /// A device of a guest with this context ID (at least 3).
    pub fn new(cid: u32, host: Arc<dyn VsockHost>) -> Arc<Self> {
        let cid = cid.clamp(FIRST_GUEST, u32::MAX - 1);
        let connections = Mutex::new(Connections::new(cid.into()));
        Arc::new(Self { cid, host, side: Arc::new(GuestSide { queues: Mutex::default(), connections }) })
    }

    /// Works off what the guest sends, as long as it takes the answers.
    fn send_all(&self, queue: &Arc<Virtqueue>) {
        queue.run(|| {
            while self.side.connections.lock().waiting() < WAITING_ANSWERS
                && let Some(chain) = queue.pop()
            {
                let mut reader = chain.reader(queue.dma());
                let header = reader.array::<HEADER>();
                let left = reader.left();
                let action = header.and_then(|header| {
                    self.side.connections.lock().packet(&header, left, |length| {
                        let mut data = alloc::vec![0; length as usize];
                        reader.read(&mut data);
                        data
                    })
                });
                queue.complete(chain.token, 0);
                if let Some(action) = action {
                    self.act(action);
                }
                self.side.flush();
            }
        });
    }

    fn act(&self, action: Action) {
        match action {
            Action::Connect(connection) => self.host.connect(connection),
            Action::Accepted(connection) => self.host.accepted(connection),
            Action::Receive(connection, bytes) => self.host.receive(connection, bytes),
            Action::EndOfInput(connection) => self.host.end_of_input(connection),
            Action::Closed(connection) => self.host.closed(connection),
            Action::Ready => self.host.ready(),
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind { id: 19, class: 0x02_80_00, name: "socket" }
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE; 3]
    }
    fn config_read(&self, offset: usize, to: &mut [u8]) {
        read_config(&u64::from(self.cid).to_le_bytes(), offset, to);
    }
    fn activate(&self, _features: u64, queues: &[Option<Arc<Virtqueue>>]) {
        let queue = |index: u16| queues.get(usize::from(index)).cloned().flatten();
        *self.side.queues.lock() =
            Queues { receive: queue(RECEIVE), send: queue(SEND), event: queue(EVENT), paused: false };
        self.host.attach(Some(self.side.clone()));
    }
    fn notify(&self, queue: &Arc<Virtqueue>) {
        match queue.index() {
            SEND => self.send_all(queue),
            RECEIVE => {
                self.side.flush();
                self.host.ready();
                // Packets may have waited for room for their answers.
                let send = self.side.queues.lock().send.clone();
                if let Some(send) = send {
                    self.send_all(&send);
                }
            }
            _ => {}
        }
    }
    fn reset(&self) {
        self.host.attach(None);
        *self.side.queues.lock() = Queues::default();
        for connection in self.side.connections.lock().clear() {
            self.host.closed(connection);
        }
    }
    fn drain(&self) {
        self.side.queues.lock().paused = true;
    }
    fn resume(&self) {
        self.side.queues.lock().paused = false;
        self.side.flush();
        self.host.ready();
    }
    fn restore(&self, saved: &SavedDevice) -> bool {
        // The far ends of the guest's connections are not here.
        let event = self.side.queues.lock().event.clone();
        if let Some(queue) = event
            && let Some(_lease) = queue.lease()
            && let Some(chain) = queue.pop()
        {
            let written = chain.writer(queue.dma()).write(&TRANSPORT_RESET.to_le_bytes());
            queue.complete(chain.token, written as u32);
        }
        *saved == SavedDevice::default()
    }
}

impl GuestSide {
    /// Puts what waits into the guest's buffers, as far as there are any.
    fn flush(&self) {
        let queues = self.queues.lock();
        let Some(queue) = queues.receive.as_ref().filter(|_| !queues.paused) else { return };
        let Some(_lease) = queue.lease() else { return };
        let mut connections = self.connections.lock();
        while connections.waiting() > 0 {
            let Some(chain) = queue.pop() else { return };
            if (chain.writable() as usize) < HEADER {
                queue.fail(&"a buffer is too small for a header");
                return;
            }
            if let Some(header) = connections.next_waiting() {
                let written = chain.writer(queue.dma()).write(&header);
                queue.complete(chain.token, written as u32);
            }
        }
    }

    /// Puts data into the guest's buffers.
    fn put(&self, dma: &Dma, queue: &Virtqueue, connection: Connection, bytes: &[u8]) -> usize {
        let mut connections = self.connections.lock();
        let mut taken = 0;
        loop {
            let rest = bytes.get(taken..).unwrap_or_default();
            let credit = connections.credit(connection).min(MAX_DATA) as usize;
            if rest.is_empty() || credit == 0 {
                return taken;
            }
            let Some(chain) = queue.pop() else { return taken };
            let room = (chain.writable() as usize).saturating_sub(HEADER);
            if room == 0 {
                queue.fail(&"a buffer is too small for a header and data");
                return taken;
            }
            let length = rest.len().min(credit).min(room);
            let header = connections.data_header(connection, length as u32);
            let mut writer = chain.writer(dma);
            writer.write(&header);
            writer.write(rest.get(..length).unwrap_or_default());
            queue.complete(chain.token, (HEADER + length) as u32);
            taken += length;
        }
    }
}

impl VsockGuest for GuestSide {
    fn connect(&self, connection: Connection) -> bool {
        let asked = self.connections.lock().connect(connection);
        self.flush();
        asked
    }
    fn accept(&self, connection: Connection) {
        self.connections.lock().accept(connection);
        self.flush();
    }
    fn send(&self, connection: Connection, bytes: &[u8]) -> usize {
        self.flush();
        let queues = self.queues.lock();
        let Some(queue) = queues.receive.as_ref().filter(|_| !queues.paused) else { return 0 };
        let Some(_lease) = queue.lease() else { return 0 };
        // In front of data comes what waits, if it found no room.
        if self.connections.lock().waiting() > 0 {
            return 0;
        }
        self.put(queue.dma(), queue, connection, bytes)
    }
    fn consumed(&self, connection: Connection, bytes: u32) {
        self.connections.lock().consumed(connection, bytes);
        self.flush();
    }
    fn end_of_output(&self, connection: Connection) {
        self.connections.lock().end_of_output(connection);
        self.flush();
    }
    fn close(&self, connection: Connection) {
        self.connections.lock().close(connection);
        self.flush();
    }
}
