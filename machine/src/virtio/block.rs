//! The block device (section 5.2).
//!
//! A request is read and handed to the store by the thread that notifies the queue; the store ends it by a thread of its
//! own, which copies what was read into RAM and interrupts. Requests overtake each other, as the store lets them.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use super::chain::Chain;
use super::device::{Kind, VirtioDevice, read_config};
use super::queue::Virtqueue;
use crate::block::{BlockError, BlockOperation, BlockStore};
use crate::sync::{Mutex, wait_until};

/// Bytes of a sector, in which the driver counts.
const SECTOR: u64 = 512;
/// Bytes of a serial number.
pub const SERIAL_SIZE: usize = 20;
/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;
/// Queues at most.
pub const MAX_QUEUES: u16 = 16;
/// Pieces of a request, and bytes of each.
const SEGMENTS: u32 = 254;
const SEGMENT_SIZE: u32 = 64 << 10;
/// Bytes of a request at most.
const REQUEST_SIZE: u32 = SEGMENTS * SEGMENT_SIZE;
/// Bytes of all requests that are under way, from which on the next ones wait.
const UNDER_WAY: usize = 32 << 20;
/// Sectors that one command discards or zeroes at most: 1 GiB.
const RANGE_SECTORS: u32 = 1 << 21;
/// Buffers that are kept for the next requests, and their size at most.
const KEPT_BUFFERS: usize = 8;
const KEPT_SIZE: usize = 1 << 20;

mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Types of requests.
mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// A range's flag: the room may be given back.
const UNMAP: u32 = 1;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// The device.
pub struct Block(Arc<Shared>);

struct Shared {
    store: Arc<dyn BlockStore>,
    serial: [u8; SERIAL_SIZE],
    queues: u16,
    /// Requests that the store has, and their bytes.
    requests: AtomicUsize,
    bytes: AtomicUsize,
    buffers: Mutex<Vec<Vec<u8>>>,
    /// Queues that wait until fewer bytes are under way.
    stalled: Mutex<Vec<Arc<Virtqueue>>>,
}

/// A request as it was read.
enum Request {
    /// For the store.
    Submit(BlockOperation),
    /// Ends at once, with these bytes for the driver.
    Done(u8, Vec<u8>),
}

impl Block {
    /// A disk with the content of a store. `serial`: what the guest may know it by, at most [`SERIAL_SIZE`] bytes.
    /// `queues`: how many, as many as there are processors is best.
    pub fn new(store: Arc<dyn BlockStore>, serial: &str, queues: u16) -> Arc<Self> {
        let mut bytes = [0; SERIAL_SIZE];
        for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Arc::new(Self(Arc::new(Shared {
            store,
            serial: bytes,
            queues: queues.clamp(1, MAX_QUEUES),
            requests: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            buffers: Mutex::default(),
            stalled: Mutex::default(),
        })))
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind { id: 2, class: 0x01_80_00, name: "block" }
    }
    fn features(&self) -> u64 {
        let common = feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY;
        let access = match (self.0.store.read_only(), self.0.store.can_discard()) {
            (true, _) => feature::RO,
            (false, true) => feature::FLUSH | feature::WRITE_ZEROES | feature::DISCARD,
            (false, false) => feature::FLUSH | feature::WRITE_ZEROES,
        };
        common | access | if self.0.queues > 1 { feature::MQ } else { 0 }
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE; self.0.queues.into()]
    }
    fn config_read(&self, offset: usize, to: &mut [u8]) {
        read_config(&self.0.config(), offset, to);
    }
    fn notify(&self, queue: &Arc<Virtqueue>) {
        self.0.process(queue);
    }
    fn reset(&self) {
        self.drain();
        self.0.stalled.lock().clear();
    }
    fn drain(&self) {
        if self.0.requests.load(Ordering::SeqCst) != 0 {
            self.0.store.drain();
        }
        // The last ones may still be telling of their end.
        wait_until(|| self.0.requests.load(Ordering::SeqCst) == 0);
    }
}

impl Shared {
    /// The configuration structure (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
        const MINIMUM_IO_BLOCKS: u16 = 8;
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = config.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &(self.store.size() / SECTOR).to_le_bytes());
        put(8, &SEGMENT_SIZE.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Blocks of 4 KiB are best, as that is what host file systems have.
        put(24, &[PHYSICAL_BLOCK_EXPONENT]);
        put(26, &MINIMUM_IO_BLOCKS.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        // Discard: sectors, ranges, alignment. Write zeroes: sectors, ranges, may give room back.
        for at in [36, 48] {
            put(at, &RANGE_SECTORS.to_le_bytes());
            put(at + 4, &1u32.to_le_bytes());
        }
        put(44, &(1u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
        put(56, &[self.store.can_discard().into()]);
        config
    }

    /// Works off a queue as far as requests may be under way.
    fn process(self: &Arc<Self>, queue: &Arc<Virtqueue>) {
        queue.run(|| {
            while !self.is_stalled(queue)
                && let Some(chain) = queue.pop()
            {
                self.begin(queue, chain);
            }
        });
    }

    /// Whether a queue has to wait; then it goes on when a request has ended.
    fn is_stalled(&self, queue: &Arc<Virtqueue>) -> bool {
        let too_many = || self.bytes.load(Ordering::SeqCst) >= UNDER_WAY;
        if !too_many() {
            return false;
        }
        self.stalled.lock().push(queue.clone());
        // The last one may have ended before it could see the queue.
        let stalled = too_many();
        if !stalled {
            self.stalled.lock().retain(|other| !Arc::ptr_eq(other, queue));
        }
        stalled
    }

    fn begin(self: &Arc<Self>, queue: &Arc<Virtqueue>, chain: Chain) {
        // The status is the last byte; what stands before it is data.
        let Some(room) = chain.writable().checked_sub(1) else {
            queue.fail(&"a request has no room for its status");
            return;
        };
        let Some(request) = self.parse(queue, &chain, room) else {
            queue.fail(&"a request has no header");
            return;
        };
        match request {
            Request::Done(status, bytes) => self.end(queue, &chain, status, &bytes),
            Request::Submit(operation) => self.submit(queue, chain, operation),
        }
    }

    /// `None`: there is no header.
    fn parse(&self, queue: &Virtqueue, chain: &Chain, room: u32) -> Option<Request> {
        let mut reader = chain.reader(queue.dma());
        let header = reader.array::<16>()?;
        let word = |at: usize| u64::from_le_bytes(core::array::from_fn(|i| header[at + i]));
        let kind = word(0) as u32;
        let ended = |status| Some(Request::Done(status, Vec::new()));
        let Some(offset) = word(8).checked_mul(SECTOR) else { return ended(IO_ERROR) };
        Some(Request::Submit(match kind {
            request::IN if room == 0 => return ended(OK),
            request::OUT if reader.left() == 0 => return ended(OK),
            request::IN if self.is_inside(offset, room.into()) && room <= REQUEST_SIZE => {
                BlockOperation::Read { offset, buffer: self.buffer(room as usize) }
            }
            request::OUT if self.is_inside(offset, reader.left().into()) && reader.left() <= REQUEST_SIZE => {
                let mut buffer = self.buffer(reader.left() as usize);
                reader.read(&mut buffer);
                BlockOperation::Write { offset, buffer }
            }
            request::FLUSH => BlockOperation::Flush,
            request::GET_ID => return Some(Request::Done(OK, self.serial.to_vec())),
            request::DISCARD | request::WRITE_ZEROES => {
                let Some(range) = reader.array::<16>().filter(|_| reader.left() == 0) else {
                    return ended(IO_ERROR);
                };
                match self.range(kind, &range) {
                    Ok(operation) => operation,
                    Err(status) => return ended(status),
                }
            }
            request::IN | request::OUT => return ended(IO_ERROR),
            _ => return ended(UNSUPPORTED),
        }))
    }

    /// A command on a range: first sector, number of sectors, flags (section 5.2.6).
    fn range(&self, kind: u32, range: &[u8; 16]) -> Result<BlockOperation, u8> {
        let word = |at: usize| u32::from_le_bytes(core::array::from_fn(|i| range[at + i]));
        let first = u64::from(word(4)) << 32 | u64::from(word(0));
        let (sectors, flags) = (word(8), word(12));
        let unmap = flags & UNMAP != 0;
        if flags & !UNMAP != 0 || kind == request::DISCARD && unmap {
            return Err(UNSUPPORTED);
        }
        let (offset, length) = (first.checked_mul(SECTOR).ok_or(IO_ERROR)?, u64::from(sectors) * SECTOR);
        if sectors > RANGE_SECTORS || !self.is_inside(offset, length) {
            return Err(IO_ERROR);
        }
        if kind == request::WRITE_ZEROES {
            return Ok(BlockOperation::WriteZeroes { offset, length, unmap });
        }
        if !self.store.can_discard() {
            return Err(UNSUPPORTED);
        }
        Ok(BlockOperation::Discard { offset, length })
    }

    /// Whether a range is inside the disk and made of whole sectors.
    fn is_inside(&self, offset: u64, length: u64) -> bool {
        let end = offset.checked_add(length);
        length.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= self.store.size())
    }

    fn buffer(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.buffers.lock().pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    fn submit(self: &Arc<Self>, queue: &Arc<Virtqueue>, chain: Chain, operation: BlockOperation) {
        let bytes = match &operation {
            BlockOperation::Read { buffer, .. } | BlockOperation::Write { buffer, .. } => buffer.len(),
            _ => 0,
        };
        // A driver that can't flush has every write made safe (section 5.2.6.2).
        let flush = matches!(operation, BlockOperation::Write { .. }) && !queue.has(feature::FLUSH);
        let is_read = matches!(operation, BlockOperation::Read { .. });
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
        let (shared, queue) = (self.clone(), queue.clone());
        self.store.submit(
            operation,
            alloc::boxed::Box::new(move |result, buffer| {
                let read = if is_read && result.is_ok() { buffer.as_slice() } else { &[] };
                if flush && result.is_ok() {
                    shared.clone().flush_then_end(queue, chain, bytes);
                } else {
                    shared.end(&queue, &chain, status(result), read);
                    shared.ended(bytes);
                }
                shared.keep(buffer);
            }),
        );
    }

    fn flush_then_end(self: Arc<Self>, queue: Arc<Virtqueue>, chain: Chain, bytes: usize) {
        let store = self.store.clone();
        store.submit(
            BlockOperation::Flush,
            alloc::boxed::Box::new(move |result, _| {
                self.end(&queue, &chain, status(result), &[]);
                self.ended(bytes);
            }),
        );
    }

    /// Gives a request back with its status, and the bytes that it read.
    fn end(&self, queue: &Virtqueue, chain: &Chain, status: u8, read: &[u8]) {
        let Some(_lease) = queue.lease() else { return };
        let mut writer = chain.writer(queue.dma());
        let room = chain.writable() - 1;
        let read = read.get(..room as usize).unwrap_or(read);
        writer.write(read);
        writer.skip(room - read.len() as u32);
        writer.write(&[status]);
        let written = if status == OK { read.len() as u32 + 1 } else { chain.writable() };
        queue.complete(chain.token, written);
    }

    /// A request is no longer under way: others that waited may be.
    fn ended(self: &Arc<Self>, bytes: usize) {
        let before = self.bytes.fetch_sub(bytes, Ordering::SeqCst);
        if before >= UNDER_WAY {
            let stalled = core::mem::take(&mut *self.stalled.lock());
            for queue in stalled {
                self.process(&queue);
            }
        }
        self.requests.fetch_sub(1, Ordering::SeqCst);
    }

    /// Keeps a buffer for the next request.
    fn keep(&self, buffer: Vec<u8>) {
        if buffer.capacity() == 0 || buffer.capacity() > KEPT_SIZE {
            return;
        }
        let mut buffers = self.buffers.lock();
        if buffers.len() < KEPT_BUFFERS {
            buffers.push(buffer);
        }
    }
}

fn status(result: Result<(), BlockError>) -> u8 {
    match result {
        Ok(()) => OK,
        Err(BlockError::Unsupported) => UNSUPPORTED,
        Err(_) => IO_ERROR,
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
