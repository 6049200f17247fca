//! The port and memory address maps: which device answers where.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::device::{Mmio, PortIo};
use crate::sync::Mutex;

/// A range could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Another device has part of it.
    #[error("the range {first:#x}..={last:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address asked for.
        first: u64,
        /// Last address asked for.
        last: u64,
        /// Start of the device that is there.
        other: u64,
    },
    /// It is empty or ends outside of the address space.
    #[error("the range at {0:#x} is empty or too long")]
    BadRange(u64),
}

struct Entry<T: ?Sized> {
    first: u64,
    last: u64,
    /// Widest access that the device decodes, in bytes.
    width: usize,
    device: Arc<T>,
}

impl<T: ?Sized> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self { first: self.first, last: self.last, width: self.width, device: self.device.clone() }
    }
}

/// Disjoint ranges in ascending order. Ranges move while the guest runs (PCI BARs), so lookups take a lock,
/// for as long as a binary search lasts; it is not held while a device is called.
struct RangeMap<T: ?Sized> {
    entries: Mutex<Vec<Entry<T>>>,
}

impl<T: ?Sized> RangeMap<T> {
    fn new() -> Self {
        Self { entries: Mutex::new(Vec::new()) }
    }

    fn insert(&self, entry: Entry<T>) -> Result<(), MapError> {
        let mut entries = self.entries.lock();
        let at = entries.partition_point(|e| e.last < entry.first);
        if let Some(next) = entries.get(at)
            && next.first <= entry.last
        {
            return Err(MapError::Overlap { first: entry.first, last: entry.last, other: next.first });
        }
        entries.insert(at, entry);
        Ok(())
    }

    fn remove(&self, first: u64) -> bool {
        let mut entries = self.entries.lock();
        match entries.binary_search_by_key(&first, |e| e.first) {
            Ok(at) => {
                entries.remove(at);
                true
            }
            Err(_) => false,
        }
    }

    fn find(&self, address: u64) -> Option<Entry<T>> {
        let entries = self.entries.lock();
        let entry = entries.get(entries.partition_point(|e| e.last < address))?;
        (entry.first <= address).then(|| entry.clone())
    }

    /// Calls `access(device, address, size, shift)` for each part of an access that a device takes as a whole:
    /// all of it where one device covers it and decodes that width, else the widest aligned pieces. `shift`
    /// is the piece's place in the value, in bits. Pieces that no device covers are passed as `None`.
    fn split(&self, address: u64, size: usize, mut access: impl FnMut(Option<&Entry<T>>, u64, usize, u32)) {
        let mut done = 0;
        let mut found: Option<Entry<T>> = None;
        while done < size {
            let at = address.wrapping_add(done as u64);
            if found.as_ref().is_none_or(|e| at > e.last || at < e.first) {
                found = self.find(at);
            }
            let left = size - done;
            let last = at.saturating_add(left as u64 - 1);
            let piece = match &found {
                None if left == size && self.nothing_in(at, last) => left,
                None => 1,
                Some(e) if left <= e.width && last <= e.last => left,
                Some(e) => {
                    let covered = (e.last - at).saturating_add(1).min(left as u64) as usize;
                    widest_piece(at, covered.min(e.width))
                }
            };
            access(found.as_ref(), at, piece, (done * 8) as u32);
            done += piece;
        }
    }

    fn nothing_in(&self, first: u64, last: u64) -> bool {
        let entries = self.entries.lock();
        entries.get(entries.partition_point(|e| e.last < first)).is_none_or(|e| e.first > last)
    }
}

/// The largest power of two that is at most `limit` and divides `address`, as a bus splits an access.
fn widest_piece(address: u64, limit: usize) -> usize {
    let mut piece = 1;
    while piece * 2 <= limit && address.is_multiple_of(piece as u64 * 2) {
        piece *= 2;
    }
    piece
}

fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1u64 << (size * 8)) - 1 }
}

/// How many accesses no device answered.
#[derive(Default)]
struct Misses {
    reads: AtomicU64,
    writes: AtomicU64,
}

/// The 64 Ki ports of the machine.
pub struct PortMap {
    ranges: RangeMap<dyn PortIo>,
    misses: Misses,
}

impl Default for PortMap {
    fn default() -> Self {
        Self::new()
    }
}

impl PortMap {
    /// A map with no devices.
    pub fn new() -> Self {
        Self { ranges: RangeMap::new(), misses: Misses::default() }
    }
    /// Gives `count` ports from `first` to a device that decodes accesses of up to `width` (1, 2, 4) bytes.
    /// Wider ones reach it in pieces, lowest first, as a bridge to the ISA bus splits them.
    pub fn insert(
        &self,
        first: u16,
        count: u32,
        width: usize,
        device: Arc<dyn PortIo>,
    ) -> Result<(), MapError> {
        let first = u64::from(first);
        if count == 0 || first + u64::from(count) > 0x1_0000 {
            return Err(MapError::BadRange(first));
        }
        self.ranges.insert(Entry { first, last: first + u64::from(count) - 1, width: width.max(1), device })
    }
    /// Takes back the range that starts at this port; false if there is none.
    pub fn remove(&self, first: u16) -> bool {
        self.ranges.remove(u64::from(first))
    }
    /// IN of `size` (1, 2, 4) bytes: all ones where no device is.
    pub fn read(&self, port: u16, size: usize) -> u32 {
        let mut value = 0u64;
        self.ranges.split(u64::from(port), size, |entry, at, size, shift| {
            let piece = match entry {
                Some(e) => e.device.port_read(at as u16, size),
                None => {
                    self.misses.reads.fetch_add(1, Ordering::Relaxed);
                    u32::MAX
                }
            };
            value |= (u64::from(piece) & mask(size)) << shift;
        });
        value as u32
    }
    /// OUT of `size` bytes: dropped where no device is.
    pub fn write(&self, port: u16, size: usize, value: u32) {
        self.ranges.split(u64::from(port), size, |entry, at, size, shift| match entry {
            Some(e) => {
                e.device.port_write(at as u16, size, ((u64::from(value) >> shift) & mask(size)) as u32);
            }
            None => {
                self.misses.writes.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    /// Reads and writes that no device answered.
    pub fn misses(&self) -> (u64, u64) {
        (self.misses.reads.load(Ordering::Relaxed), self.misses.writes.load(Ordering::Relaxed))
    }
}

/// Guest-physical addresses of device registers.
pub struct MmioMap {
    ranges: RangeMap<dyn Mmio>,
    misses: Misses,
}

impl Default for MmioMap {
    fn default() -> Self {
        Self::new()
    }
}

impl MmioMap {
    /// A map with no devices.
    pub fn new() -> Self {
        Self { ranges: RangeMap::new(), misses: Misses::default() }
    }
    /// Gives `size` bytes from guest-physical address `first` to a device.
    pub fn insert(&self, first: u64, size: u64, device: Arc<dyn Mmio>) -> Result<(), MapError> {
        let last = size.checked_sub(1).and_then(|s| first.checked_add(s)).ok_or(MapError::BadRange(first))?;
        self.ranges.insert(Entry { first, last, width: 8, device })
    }
    /// Takes back the range that starts here; false if there is none.
    pub fn remove(&self, first: u64) -> bool {
        self.ranges.remove(first)
    }
    /// Reads `size` (1, 2, 4, 8) bytes: all ones where no device is.
    pub fn read(&self, gpa: u64, size: usize) -> u64 {
        let mut value = 0u64;
        self.ranges.split(gpa, size, |entry, at, size, shift| {
            let piece = match entry {
                Some(e) => e.device.mmio_read(at - e.first, size),
                None => {
                    self.misses.reads.fetch_add(1, Ordering::Relaxed);
                    u64::MAX
                }
            };
            value |= (piece & mask(size)) << shift;
        });
        value
    }
    /// Writes `size` bytes: dropped where no device is.
    pub fn write(&self, gpa: u64, size: usize, value: u64) {
        self.ranges.split(gpa, size, |entry, at, size, shift| match entry {
            Some(e) => e.device.mmio_write(at - e.first, size, (value >> shift) & mask(size)),
            None => {
                self.misses.writes.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    /// Reads and writes that no device answered.
    pub fn misses(&self) -> (u64, u64) {
        (self.misses.reads.load(Ordering::Relaxed), self.misses.writes.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers each byte with the low byte of its address and records what it saw.
    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, usize, u64)>>);

    fn pattern(at: u64, size: usize) -> u64 {
        (0..size as u64).fold(0, |v, i| v | ((at + i) & 0xff) << (i * 8))
    }

    impl PortIo for Echo {
        fn port_read(&self, port: u16, size: usize) -> u32 {
            self.0.lock().push((port.into(), size, 0));
            pattern(port.into(), size) as u32
        }
        fn port_write(&self, port: u16, size: usize, value: u32) {
            self.0.lock().push((port.into(), size, value.into()));
        }
    }
    impl Mmio for Echo {
        fn mmio_read(&self, offset: u64, size: usize) -> u64 {
            pattern(offset, size)
        }
        fn mmio_write(&self, offset: u64, size: usize, value: u64) {
            self.0.lock().push((offset, size, value));
        }
    }

    #[test]
    fn overlap_is_refused_and_neighbours_are_not() {
        let map = PortMap::new();
        map.insert(0x20, 2, 1, Arc::new(Echo::default())).unwrap();
        assert!(matches!(map.insert(0x21, 4, 1, Arc::new(Echo::default())), Err(MapError::Overlap { .. })));
        assert!(matches!(
            map.insert(0x10, 0x20, 1, Arc::new(Echo::default())),
            Err(MapError::Overlap { .. })
        ));
        map.insert(0x22, 2, 1, Arc::new(Echo::default())).unwrap();
        map.insert(0x1f, 1, 1, Arc::new(Echo::default())).unwrap();
        assert_eq!(map.insert(0xffff, 2, 1, Arc::new(Echo::default())), Err(MapError::BadRange(0xffff)));
    }

    #[test]
    fn a_removed_range_is_free_again() {
        let map = MmioMap::new();
        map.insert(0x1000, 0x1000, Arc::new(Echo::default())).unwrap();
        assert!(!map.remove(0x1800));
        assert!(map.remove(0x1000));
        map.insert(0x1800, 8, Arc::new(Echo::default())).unwrap();
        assert_eq!(map.read(0x1000, 4), 0xffff_ffff);
    }

    #[test]
    fn wide_access_to_a_byte_device_comes_in_bytes() {
        let map = PortMap::new();
        let device = Arc::new(Echo::default());
        map.insert(0x40, 4, 1, device.clone()).unwrap();
        map.write(0x40, 4, 0x4433_2211);
        assert_eq!(*device.0.lock(), [(0x40, 1, 0x11), (0x41, 1, 0x22), (0x42, 1, 0x33), (0x43, 1, 0x44)]);
        assert_eq!(map.read(0x41, 2), 0x4241);
    }

    #[test]
    fn partly_covered_access_reads_ones_elsewhere() {
        let map = PortMap::new();
        map.insert(0x70, 2, 1, Arc::new(Echo::default())).unwrap();
        assert_eq!(map.read(0x71, 4), 0xffff_ff71);
        assert_eq!(map.read(0x6f, 2), 0x70ff);
        assert_eq!(map.misses(), (4, 0));
    }

    #[test]
    fn whole_access_reaches_a_wide_device_once() {
        let map = PortMap::new();
        let device = Arc::new(Echo::default());
        map.insert(0xcf8, 8, 4, device.clone()).unwrap();
        assert_eq!(map.read(0xcfd, 2), 0xfefd);
        assert_eq!(*device.0.lock(), [(0xcfd, 2, 0)]);
    }

    #[test]
    fn misses_are_ones_and_counted_once() {
        let map = MmioMap::new();
        assert_eq!(map.read(0xfee0_0000, 8), u64::MAX);
        assert_eq!(map.read(u64::MAX, 1), 0xff);
        map.write(0, 4, 1);
        assert_eq!(map.misses(), (2, 1));
    }

    #[test]
    fn mmio_offsets_count_from_the_range() {
        let map = MmioMap::new();
        let device = Arc::new(Echo::default());
        map.insert(0xff00_0000, 0x100, device.clone()).unwrap();
        assert_eq!(map.read(0xff00_0010, 4), 0x1312_1110);
        map.write(0xff00_00fe, 4, 0xddcc_bbaa);
        assert_eq!(*device.0.lock(), [(0xfe, 2, 0xbbaa)]);
    }

    #[test]
    fn a_port_access_past_the_end_wraps_nowhere() {
        let map = PortMap::new();
        assert_eq!(map.read(0xffff, 4), u32::MAX);
        map.write(0xffff, 4, 0);
    }
}
