//! Finds room in RAM for a kernel and what is handed to it.

use alloc::vec::Vec;
use core::ops::Range;

use super::{BootError, MemoryRange, RangeKind, memory_map};
use crate::map::EBDA_START;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// Where boot information goes, if the kernel leaves it free: above what old kernels use for their real-mode
/// parts, below the extended BIOS data area.
const LOW: Range<u64> = 0x9000..EBDA_START;

/// The RAM of a machine while it is being filled.
pub struct Layout<'m> {
    pub memory: &'m GuestMemory,
    pub map: Vec<MemoryRange>,
    used: Vec<Range<u64>>,
}

impl<'m> Layout<'m> {
    pub fn new(memory: &'m GuestMemory) -> Self {
        Self { memory, map: memory_map(memory), used: Vec::new() }
    }

    /// Takes a range that the kernel wants at this very place. Ranges may overlap: parts of an ELF file do.
    pub fn reserve(&mut self, start: u64, size: u64) -> Result<(), BootError> {
        let end = start.checked_add(size).ok_or(BootError::Damaged("an address is beyond 64 bits"))?;
        let holder = self.map.iter().find(|r| r.kind == RangeKind::Ram && (r.start..r.end).contains(&start));
        match holder {
            Some(range) if end <= range.end => {
                self.used.push(start..end);
                Ok(())
            }
            // The last range of RAM below the hole is simply too short.
            Some(range) if range.end == self.memory.low_size() => {
                Err(BootError::KernelTooBig { end, ram: self.memory.size() })
            }
            None if start >= self.memory.low_size() && end <= crate::memory::LOW_RAM_END => {
                Err(BootError::KernelTooBig { end, ram: self.memory.size() })
            }
            _ => Err(BootError::BadAddress { start, end }),
        }
    }

    /// The end of the highest range taken so far.
    pub fn end_of_used(&self) -> u64 {
        self.used.iter().map(|r| r.end).max().unwrap_or(0)
    }

    /// A used range that overlaps this one.
    fn obstacle(&self, start: u64, end: u64) -> Option<&Range<u64>> {
        self.used.iter().find(|r| r.start < end && start < r.end)
    }

    /// Takes the lowest free place at or above `from` that ends at or below `to`, in one range of RAM.
    pub fn place_up(&mut self, size: u64, align: u64, from: u64, to: u64) -> Option<u64> {
        for range in self.map.iter().filter(|r| r.kind == RangeKind::Ram) {
            let limit = range.end.min(to);
            let mut start = range.start.max(from).checked_next_multiple_of(align)?;
            while let Some(end) = start.checked_add(size).filter(|&end| end <= limit) {
                match self.obstacle(start, end) {
                    Some(used) => start = used.end.checked_next_multiple_of(align)?,
                    None => {
                        self.used.push(start..end);
                        return Some(start);
                    }
                }
            }
        }
        None
    }

    /// Takes the highest free place of whole pages that ends at or below `to`.
    pub fn place_down(&mut self, size: u64, to: u64) -> Option<u64> {
        for range in self.map.iter().rev().filter(|r| r.kind == RangeKind::Ram) {
            let mut end = range.end.min(to);
            while let Some(start) = end.checked_sub(size).map(|s| s & !(PAGE_SIZE - 1)) {
                if start < range.start {
                    break;
                }
                match self.obstacle(start, start + size) {
                    Some(used) => end = used.start,
                    None => {
                        self.used.push(start..start + size);
                        return Some(start);
                    }
                }
            }
        }
        None
    }

    /// Puts boot information into low memory, or anywhere below 4 GiB if it is too long for that.
    pub fn put(&mut self, bytes: &[u8], align: u64) -> Result<u64, BootError> {
        let size = bytes.len() as u64;
        let start = self
            .place_up(size, align, LOW.start, LOW.end)
            .or_else(|| self.place_up(size, align, LOW.start, self.memory.low_size()))
            .ok_or(BootError::NoLowMemory)?;
        self.memory.write(start, bytes)?;
        Ok(start)
    }

    /// Puts a string with a final zero.
    pub fn put_string(&mut self, parts: &[&str]) -> Result<u64, BootError> {
        let mut bytes: Vec<u8> = parts.join(" ").into_bytes();
        bytes.push(0);
        self.put(&bytes, 16)
    }

    /// Puts an initrd as high as possible, ending at or below `to`.
    pub fn put_initrd(&mut self, initrd: &[u8], to: u64) -> Result<u64, BootError> {
        let size = initrd.len() as u64;
        let start =
            self.place_down(size, to).ok_or(BootError::InitrdTooBig { size, ram: self.memory.size() })?;
        self.memory.write(start, initrd)?;
        Ok(start)
    }
}
