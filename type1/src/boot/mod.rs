//! What a boot loader tells. Every loader's protocol fills one [`BootInfo`].

pub mod pvh;

use crate::list::List;

/// Ranges of the memory map that are taken note of.
const MAX_RANGES: usize = 128;
/// Modules that are taken note of.
const MAX_MODULES: usize = 16;
/// Bytes of the command line that are kept.
const MAX_COMMAND_LINE: usize = 512;

/// A range of physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Last address plus one.
    pub end: u64,
}

impl Range {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// What the loader knows of the machine, and what it has loaded. A copy: nothing points into the loader's memory but the
/// ranges of modules.
#[derive(Clone, Debug)]
pub struct BootInfo {
    memory: List<Range, MAX_RANGES>,
    modules: List<Range, MAX_MODULES>,
    command_line: ([u8; MAX_COMMAND_LINE], usize),
    /// Physical address of the ACPI root pointer; 0 if the loader doesn't tell.
    pub rsdp: u64,
}

impl BootInfo {
    fn new(rsdp: u64) -> Self {
        Self { memory: List::EMPTY, modules: List::EMPTY, command_line: ([0; MAX_COMMAND_LINE], 0), rsdp }
    }

    /// The ranges that are RAM and free for use, but for what the loader has put there.
    pub fn memory(&self) -> &[Range] {
        self.memory.as_slice()
    }

    /// The modules, where they lie.
    pub fn modules(&self) -> &[Range] {
        self.modules.as_slice()
    }

    /// Bytes of usable RAM.
    pub fn usable_memory(&self) -> u64 {
        self.memory().iter().map(Range::size).sum()
    }

    /// The hypervisor's own command line; what of it is not UTF-8, or too much, is missing.
    pub fn command_line(&self) -> &str {
        let (bytes, length) = &self.command_line;
        let bytes = bytes.get(..*length).unwrap_or_default();
        bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid())
    }
}

/// Physical memory, as the loader left it.
pub trait PhysicalMemory {
    /// Reads bytes; false if they can't be.
    ///
    /// # Safety
    /// Nothing writes the bytes meanwhile, and reading them has no effects.
    #[allow(unsafe_code)]
    unsafe fn read(&self, address: u64, to: &mut [u8]) -> bool;
}

/// The first 4 GiB, mapped as they are.
pub struct Identity;

impl PhysicalMemory for Identity {
    #[allow(unsafe_code)]
    unsafe fn read(&self, address: u64, to: &mut [u8]) -> bool {
        let fits = address.checked_add(to.len() as u64).is_some_and(|end| end <= 1 << 32);
        if address == 0 || !fits {
            return false;
        }
        // SAFETY: mapped on the bare machine at this point (the contract of `crate::run`), and read by nobody else's leave
        // (the contract of the method). The slice is memory of ours.
        unsafe { core::ptr::copy_nonoverlapping(address as *const u8, to.as_mut_ptr(), to.len()) };
        true
    }
}
