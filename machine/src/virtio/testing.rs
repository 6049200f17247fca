//! The driver's side of virtqueues, for tests: it puts requests into a ring of either format and collects what was used.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Display;
use core::sync::atomic::{AtomicU32, Ordering};

use super::feature::{EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1};
use super::queue::{Shared, Signal, Virtqueue};
use super::ring::Layout;
use crate::dma::Dma;
use crate::memory::GuestMemory;
use crate::sync::Mutex;

pub const RAM: usize = 8 << 20;
/// Each queue has so much of RAM for its ring and buffers.
const REGION: u64 = 1 << 20;
const BUFFERS: u64 = 0x8_0000;
const WRAP: u16 = 1 << 15;

/// Records what devices signal.
#[derive(Default)]
pub struct Signals {
    used: [AtomicU32; 4],
    pub config_changes: AtomicU32,
    broken: Mutex<Option<String>>,
}

impl Signals {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
    /// Interrupts of a queue.
    pub fn used(&self, queue: usize) -> u32 {
        self.used[queue].load(Ordering::SeqCst)
    }
    pub fn broken(&self) -> Option<String> {
        self.broken.lock().clone()
    }
}

impl Signal for Signals {
    fn used(&self, queue: u16) {
        self.used[usize::from(queue)].fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::SeqCst);
    }
    fn broken(&self, why: &dyn Display) {
        self.broken.lock().get_or_insert(why.to_string());
    }
}

/// RAM and negotiated features that several queues share.
pub struct Bench {
    pub memory: Arc<GuestMemory>,
    pub signals: Arc<Signals>,
    pub features: u64,
    shared: Shared,
}

impl Bench {
    pub fn new(features: u64) -> Self {
        let memory = Arc::new(GuestMemory::on_heap(RAM));
        let signals = Signals::new();
        let features = features | VERSION_1;
        let shared = Shared::new(features, Dma::new(memory.clone()), signals.clone());
        Self { memory, signals, features, shared }
    }
    /// Every format and option, for tests of devices.
    pub fn all_kinds(features: u64) -> [Self; 3] {
        let options = [0, INDIRECT_DESC | EVENT_IDX, INDIRECT_DESC | EVENT_IDX | RING_PACKED];
        options.map(|option| Self::new(features | option))
    }
    /// A queue and its driver.
    pub fn queue(&self, index: u16, size: u16) -> (Arc<Virtqueue>, Driver) {
        let driver = Driver::new(self.memory.clone(), self.features, u64::from(index) * REGION, size);
        (Virtqueue::new(index, &driver.layout, &self.shared).unwrap(), driver)
    }
}

/// A request that the driver has offered.
#[derive(Clone, Default)]
struct Offered {
    writable: Vec<(u64, u32)>,
    /// Split: descriptors. Packed: as many as it takes.
    descriptors: Vec<u16>,
}

/// A request that came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Returned {
    pub id: u16,
    pub written: u32,
    /// All that the device could write.
    pub data: Vec<u8>,
}

/// The driver of one queue.
pub struct Driver {
    memory: Arc<GuestMemory>,
    pub layout: Layout,
    packed: bool,
    event_index: bool,
    indirect: bool,
    /// Descriptors (split) or buffer IDs (packed) that are free.
    free: Vec<u16>,
    free_entries: u16,
    offered: Vec<Offered>,
    outstanding: usize,
    next: u16,
    last_used: u16,
    buffer: u64,
    buffers: u64,
}

impl Driver {
    fn new(memory: Arc<GuestMemory>, features: u64, base: u64, size: u16) -> Self {
        let packed = features & RING_PACKED != 0;
        let layout =
            Layout { size, descriptors: base + 0x1000, driver: base + 0x2_0000, device: base + 0x3_0000 };
        Self {
            memory,
            layout,
            packed,
            event_index: features & EVENT_IDX != 0,
            indirect: features & INDIRECT_DESC != 0,
            free: (0..size).rev().collect(),
            free_entries: size,
            offered: vec![Offered::default(); size.into()],
            outstanding: 0,
            next: if packed { WRAP } else { 0 },
            last_used: if packed { WRAP } else { 0 },
            buffer: base + BUFFERS,
            buffers: base + BUFFERS,
        }
    }

    /// RAM for a buffer.
    pub fn allocate(&mut self, length: usize) -> u64 {
        let at = self.buffer;
        self.buffer += (length as u64).next_multiple_of(16);
        at
    }

    fn forward(&self, position: u16, count: u16) -> u16 {
        let index = (position & !WRAP) + count;
        let wrap = position & WRAP;
        if index >= self.layout.size { index - self.layout.size | wrap ^ WRAP } else { index | wrap }
    }

    /// Whether a request of so many pieces has room.
    pub fn has_room(&self, pieces: usize) -> bool {
        let entries = if self.indirect { 1 } else { pieces };
        if self.packed {
            usize::from(self.free_entries) >= entries && !self.free.is_empty()
        } else {
            self.free.len() >= entries
        }
    }

    /// Offers a request: what the device reads, and room for what it writes. Returns its name.
    pub fn offer(&mut self, readable: &[&[u8]], writable: &[usize]) -> u16 {
        if self.outstanding == 0 {
            self.buffer = self.buffers;
        }
        let mut pieces = Vec::new();
        for bytes in readable {
            let at = self.allocate(bytes.len());
            self.memory.write(at, bytes).unwrap();
            pieces.push((at, bytes.len() as u32, 0u16));
        }
        for &length in writable {
            let at = self.allocate(length);
            self.memory.fill(at, length as u64, 0xee).unwrap();
            pieces.push((at, length as u32, 2));
        }
        self.offer_raw(&pieces)
    }

    /// Offers pieces: address, length, flags (2: the device writes).
    pub fn offer_raw(&mut self, pieces: &[(u64, u32, u16)]) -> u16 {
        let writable = pieces.iter().filter(|p| p.2 & 2 != 0).map(|p| (p.0, p.1)).collect();
        let pieces = if self.indirect { vec![self.table(pieces)] } else { pieces.to_vec() };
        self.outstanding += 1;
        let (id, descriptors) =
            if self.packed { self.offer_packed(&pieces) } else { self.offer_split(&pieces) };
        self.offered[usize::from(id)] = Offered { writable, descriptors };
        id
    }

    fn table(&mut self, pieces: &[(u64, u32, u16)]) -> (u64, u32, u16) {
        let table = self.allocate(pieces.len() * 16);
        for (index, &(address, length, flags)) in pieces.iter().enumerate() {
            let next = u16::from(index + 1 < pieces.len());
            let rest = if self.packed {
                u64::from(length) | u64::from(flags) << 48
            } else {
                u64::from(length) | u64::from(flags | next) << 32 | (index as u64 + 1) << 48
            };
            self.memory.store64(table + 16 * index as u64, address);
            self.memory.store64(table + 16 * index as u64 + 8, rest);
        }
        (table, pieces.len() as u32 * 16, 4)
    }

    fn offer_split(&mut self, pieces: &[(u64, u32, u16)]) -> (u16, Vec<u16>) {
        let descriptors: Vec<u16> = pieces.iter().map(|_| self.free.pop().unwrap()).collect();
        for (index, &(address, length, flags)) in pieces.iter().enumerate() {
            let at = self.layout.descriptors + 16 * u64::from(descriptors[index]);
            let next = descriptors.get(index + 1);
            let flags = flags | u16::from(next.is_some());
            let rest =
                u64::from(length) | u64::from(flags) << 32 | u64::from(next.copied().unwrap_or(0xffff)) << 48;
            self.memory.store64(at, address);
            self.memory.store64(at + 8, rest);
        }
        let head = descriptors[0];
        let slot = u64::from(self.next % self.layout.size);
        self.memory.store16(self.layout.driver + 4 + 2 * slot, head);
        self.next = self.next.wrapping_add(1);
        self.memory.store16(self.layout.driver + 2, self.next);
        (head, descriptors)
    }

    fn offer_packed(&mut self, pieces: &[(u64, u32, u16)]) -> (u16, Vec<u16>) {
        let id = self.free.pop().unwrap();
        let first = self.next;
        let mut first_rest = 0;
        for (index, &(address, length, flags)) in pieces.iter().enumerate() {
            let wrap = if self.next & WRAP != 0 { 1 << 7 } else { 1 << 15 };
            let flags = flags | wrap | u16::from(index + 1 < pieces.len());
            let at = self.layout.descriptors + 16 * u64::from(self.next & !WRAP);
            let rest = u64::from(length) | u64::from(id) << 32 | u64::from(flags) << 48;
            self.memory.store64(at, address);
            if index == 0 {
                first_rest = rest;
            } else {
                self.memory.store64(at + 8, rest);
            }
            self.next = self.forward(self.next, 1);
        }
        self.free_entries -= pieces.len() as u16;
        self.memory.store64(self.layout.descriptors + 16 * u64::from(first & !WRAP) + 8, first_rest);
        (id, vec![0; pieces.len()])
    }

    /// Whether the device wants to be told of the request that was offered last.
    pub fn must_notify(&self, entries: u16) -> bool {
        let (device, size) = (self.layout.device, self.layout.size);
        if !self.packed {
            let event = self.memory.load16(device + 4 + 8 * u64::from(size));
            return !self.event_index || self.next.wrapping_sub(event).wrapping_sub(1) < 1;
        }
        match self.memory.load16(device + 2) {
            1 => false,
            2 => {
                let event = self.memory.load16(device);
                (0..entries).any(|back| self.forward(event, back + 1) == self.next)
            }
            _ => true,
        }
    }

    /// Asks for an interrupt at the next request that comes back.
    pub fn ask_for_interrupt(&self) {
        if !self.event_index {
            return;
        }
        if self.packed {
            self.memory.store16(self.layout.driver, self.last_used);
            self.memory.store16(self.layout.driver + 2, 2);
        } else {
            self.memory.store16(self.layout.driver + 4 + 2 * u64::from(self.layout.size), self.last_used);
        }
    }

    /// The next request that came back.
    pub fn returned(&mut self) -> Option<Returned> {
        let (id, written) = if self.packed { self.returned_packed()? } else { self.returned_split()? };
        let offered = core::mem::take(&mut self.offered[usize::from(id)]);
        assert!(!offered.descriptors.is_empty(), "{id} was not offered");
        if self.packed {
            self.last_used = self.forward(self.last_used, offered.descriptors.len() as u16);
            self.free_entries += offered.descriptors.len() as u16;
            self.free.push(id);
        } else {
            self.last_used = self.last_used.wrapping_add(1);
            self.free.extend(&offered.descriptors);
        }
        self.outstanding -= 1;
        let mut data = Vec::new();
        for (address, length) in offered.writable {
            let from = data.len();
            data.resize(from + length as usize, 0);
            self.memory.read(address, &mut data[from..]).unwrap();
        }
        Some(Returned { id, written, data })
    }

    fn returned_split(&self) -> Option<(u16, u32)> {
        let used = self.layout.device;
        if self.memory.load16(used + 2) == self.last_used {
            return None;
        }
        let entry = self.memory.load64(used + 4 + 8 * u64::from(self.last_used % self.layout.size));
        Some((entry as u16, (entry >> 32) as u32))
    }

    fn returned_packed(&self) -> Option<(u16, u32)> {
        let rest = self.memory.load64(self.layout.descriptors + 16 * u64::from(self.last_used & !WRAP) + 8);
        let flags = (rest >> 48) as u16;
        let wrap = self.last_used & WRAP != 0;
        let is_used = (flags & 1 << 7 != 0) == wrap && (flags & 1 << 15 != 0) == wrap;
        is_used.then_some(((rest >> 32) as u16, rest as u32))
    }

    /// Everything that the device could write of the next request that came back, which must be there.
    pub fn expect(&mut self) -> Returned {
        self.returned().expect("nothing came back")
    }
}
