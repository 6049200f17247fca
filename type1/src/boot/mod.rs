//! What a boot loader tells. Every loader's protocol fills one [`BootInfo`].

pub mod efi;
mod multiboot2;
mod pvh;

use crate::list::List;

/// Protocols of boot loaders, by what the entry code calls them: two by their magic numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Protocol {
    /// Xen's PVH.
    Pvh = 0x336e_c578,
    /// Multiboot2.
    Multiboot2 = 0x36d7_6289,
    /// UEFI, by [`efi::main`].
    Efi = 1,
}

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
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    memory: List<Range, MAX_RANGES>,
    modules: List<Range, MAX_MODULES>,
    command_line: ([u8; MAX_COMMAND_LINE], usize),
    acpi: Option<AcpiRoot>,
}

impl BootInfo {
    const EMPTY: Self = Self {
        memory: List::EMPTY,
        modules: List::EMPTY,
        command_line: ([0; MAX_COMMAND_LINE], 0),
        acpi: None,
    };

    /// Reads what a loader has left at an address, by the protocol of this number.
    ///
    /// # Safety
    /// The loader has left it there, and has kept to the protocol.
    ///
    /// # Errors
    /// It is damaged, or there is no such protocol.
    #[allow(unsafe_code)]
    pub unsafe fn read(memory: &impl PhysicalMemory, protocol: u32, address: u64) -> Result<Self, BootError> {
        // SAFETY: the caller's promise.
        unsafe {
            let mut info = match protocol {
                _ if protocol == Protocol::Pvh as u32 => pvh::read(memory, address)?,
                _ if protocol == Protocol::Multiboot2 as u32 => multiboot2::read(memory, address)?,
                _ if protocol == Protocol::Efi as u32 => efi::read(address),
                other => return Err(BootError::Protocol(other)),
            };
            // Loaders of a BIOS may not have looked for it.
            info.acpi = info.acpi.or_else(|| AcpiRoot::find(memory));
            Ok(info)
        }
    }

    /// Takes note of RAM.
    fn add_memory(&mut self, range: Range) {
        if range.size() == 0 {
            return;
        }
        // Firmware cuts RAM into many pieces that touch.
        match self.memory.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            // What finds no room is not used.
            _ => drop(self.memory.push(range)),
        }
    }

    /// Takes note of a module. One too many is not used, and so need not be kept.
    fn add_module(&mut self, range: Range) {
        self.modules.push(range);
    }

    /// Takes note of a command line that ends with a zero, and what is behind it.
    fn set_command_line(&mut self, text: &[u8]) {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let (bytes, length) = &mut self.command_line;
        *length = text.len().min(MAX_COMMAND_LINE);
        bytes[..*length].copy_from_slice(&text[..*length]);
    }

    /// The ranges that are RAM and free for use, but for what the loader has put there.
    pub fn memory(&self) -> &[Range] {
        self.memory.as_slice()
    }

    /// The modules, where they lie.
    pub fn modules(&self) -> &[Range] {
        self.modules.as_slice()
    }

    /// Where the firmware's ACPI tables are, if there are any.
    pub fn acpi(&self) -> Option<AcpiRoot> {
        self.acpi
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

/// What a loader has left can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The entry code has named no protocol.
    #[error("{0:#x} is no boot protocol")]
    Protocol(u32),
    /// It is not there.
    #[error("there is no {what} at {address:#x}")]
    Magic {
        /// What.
        what: &'static str,
        /// Where it should be.
        address: u64,
    },
    /// It has no memory map.
    #[error("it has no memory map")]
    NoMemoryMap,
    /// It points to nowhere.
    #[error("its {what} is said to be at {address:#x}, where nothing can be read")]
    Outside {
        /// What.
        what: &'static str,
        /// Where.
        address: u64,
    },
    /// It contradicts itself.
    #[error("its {what} has a length that can't be")]
    Length {
        /// What.
        what: &'static str,
    },
}

/// The root of ACPI's tables: the RSDT, or the XSDT, whose entries have 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiRoot {
    /// Physical address.
    pub address: u64,
    /// It is an XSDT.
    pub is_wide: bool,
}

impl AcpiRoot {
    const SIGNATURE: &[u8; 8] = b"RSD PTR ";
    /// Bytes of a pointer of version 1, and of later ones.
    const LENGTHS: [usize; 2] = [20, 36];

    /// From the root pointer (ACPI Specification, 5.2.5.3), of which there may be fewer bytes than that; `None` if it is none.
    fn of_pointer(bytes: &[u8]) -> Option<Self> {
        let sum =
            |length: usize| Some(bytes.get(..length)?.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
        if bytes.get(..8)? != Self::SIGNATURE || sum(Self::LENGTHS[0])? != 0 {
            return None;
        }
        let wide = (*bytes.get(15)? >= 2 && sum(Self::LENGTHS[1]) == Some(0)).then(|| bytes.get(24..32));
        let narrow = u32::from_le_bytes(bytes.get(16..20)?.try_into().ok()?);
        match wide.flatten().and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes) {
            Some(address @ 1..) => Some(Self { address, is_wide: true }),
            _ => Some(Self { address: narrow.into(), is_wide: false }),
        }
    }

    /// From the root pointer at an address.
    ///
    /// # Safety
    /// Nothing writes there, and reading has no effects.
    #[allow(unsafe_code)]
    unsafe fn at(memory: &impl PhysicalMemory, address: u64) -> Option<Self> {
        let mut bytes = [0; Self::LENGTHS[1]];
        // SAFETY: the caller's promise.
        unsafe { memory.read(address, &mut bytes) }.then(|| Self::of_pointer(&bytes))?
    }

    /// Looks where a BIOS has it (ACPI Specification, 5.2.5.1): in the first KiB of the extended BIOS data area, or in the BIOS.
    ///
    /// # Safety
    /// As in [`BootInfo::read`].
    #[allow(unsafe_code)]
    unsafe fn find(memory: &impl PhysicalMemory) -> Option<Self> {
        const DATA_AREA_SEGMENT: u64 = 0x40e;
        let mut segment = [0; 2];
        // SAFETY: the first MiB of a PC has RAM and read-only memory at these places.
        unsafe {
            let data_area = match memory.read(DATA_AREA_SEGMENT, &mut segment) {
                true => u64::from(u16::from_le_bytes(segment)) << 4,
                false => 0,
            };
            let places = (data_area..data_area + 1024).chain(0xe_0000..0x10_0000).step_by(16);
            places.filter(|at| *at != 0).find_map(|at| Self::at(memory, at))
        }
    }
}

/// Reads fields one after the other.
struct Fields<'a, M> {
    memory: &'a M,
    what: &'static str,
    at: u64,
}

#[allow(unsafe_code)]
impl<M: PhysicalMemory> Fields<'_, M> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], BootError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), BootError> {
        // SAFETY: a loader has put it there for us to read (the contract of `BootInfo::read`), and does nothing any more.
        if !unsafe { self.memory.read(self.at, bytes) } {
            return Err(BootError::Outside { what: self.what, address: self.at });
        }
        self.at += bytes.len() as u64;
        Ok(())
    }
    fn u32(&mut self) -> Result<u32, BootError> {
        self.bytes().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, BootError> {
        self.bytes().map(u64::from_le_bytes)
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

#[cfg(test)]
#[allow(unsafe_code)]
mod testing {
    use super::PhysicalMemory;
    use alloc::vec::Vec;

    /// ACPI's root pointer, of version 1.
    pub(super) fn root_pointer(root: u32) -> Vec<u8> {
        let mut pointer = b"RSD PTR \0BIVISR\0".to_vec();
        pointer.extend(root.to_le_bytes());
        pointer[8] = pointer.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        pointer
    }

    /// Memory from 1000h on.
    pub(super) struct Bytes(pub(super) Vec<u8>);

    impl PhysicalMemory for Bytes {
        unsafe fn read(&self, address: u64, to: &mut [u8]) -> bool {
            let from = address.checked_sub(0x1000).and_then(|at| self.0.get(at as usize..)?.get(..to.len()));
            from.map(|from| to.copy_from_slice(from)).is_some()
        }
    }
}
