//! The memory map that a guest is told: in Linux's e820 table, in PVH's and Multiboot's memory maps.

use alloc::vec::Vec;

use crate::map::{BIOS_START, EBDA_START, ECAM_BASE, ECAM_SIZE, HIGH_MEMORY_START, VIDEO_START};
use crate::memory::{GuestMemory, HIGH_RAM_START};

/// What a range of memory is for, with the numbers of the BIOS call E820h (ACPI specification, section 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// RAM for the guest's use.
    Ram = 1,
    /// Firmware data, device registers: not for use as RAM.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First guest-physical address.
    pub start: u64,
    /// Last address plus one.
    pub end: u64,
    /// What for.
    pub kind: RangeKind,
}

impl MemoryRange {
    fn new(start: u64, end: u64, kind: RangeKind) -> Self {
        Self { start, end, kind }
    }
    /// Bytes of the range.
    pub fn size(&self) -> u64 {
        self.end - self.start
    }
}

/// The memory map of a machine with this RAM, in ascending order.
pub fn memory_map(memory: &GuestMemory) -> Vec<MemoryRange> {
    use RangeKind::{Ram, Reserved};
    let low = memory.low_size();
    let mut map = Vec::new();
    map.push(MemoryRange::new(0, EBDA_START.min(low), Ram));
    map.push(MemoryRange::new(EBDA_START, VIDEO_START, Reserved));
    map.push(MemoryRange::new(BIOS_START, HIGH_MEMORY_START, Reserved));
    if low > HIGH_MEMORY_START {
        map.push(MemoryRange::new(HIGH_MEMORY_START, low, Ram));
    }
    // Linux uses ECAM only if the memory map or a motherboard resource reserves it.
    map.push(MemoryRange::new(ECAM_BASE, ECAM_BASE + ECAM_SIZE, Reserved));
    if memory.high_size() > 0 {
        map.push(MemoryRange::new(HIGH_RAM_START, HIGH_RAM_START + memory.high_size(), Ram));
    }
    map
}
