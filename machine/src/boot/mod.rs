//! Boot protocols: puts a kernel into memory and makes the state in which its first processor starts.
//!
//! Linux bzImage ([`linux`]), ELF with a PVH note ([`pvh`]) and Multiboot 1 ([`multiboot`]). The kernel file is
//! anything somebody found: every read of it is checked, and every error is a sentence for its owner.

mod elf;
mod entry;
mod layout;
mod linux;
mod memory_map;
mod multiboot;
mod pvh;
mod unpack;

#[cfg(test)]
mod tests;

use alloc::string::String;

use bivisor_x86::state::CpuState;

use crate::memory::{GuestMemory, OutsideRam};
pub use memory_map::{MemoryRange, RangeKind, memory_map};
pub use unpack::UnpackError;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootImage<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// The kernel's name, which Multiboot puts in front of the command line.
    pub name: &'a str,
    /// The initial RAM disk, or the first Multiboot module.
    pub initrd: Option<&'a [u8]>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Unpacks a bzImage here, which is faster than letting the guest do it.
    pub unpack: bool,
}

/// How a kernel was entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux, 64-bit entry.
    Linux64,
    /// Linux, 32-bit entry.
    Linux32,
    /// PVH.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

impl Protocol {
    /// The protocol's name, for users.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linux64 => "Linux, 64-bit entry",
            Self::Linux32 => "Linux, 32-bit entry",
            Self::Pvh => "PVH",
            Self::Multiboot => "Multiboot",
        }
    }
}

/// A kernel that is in memory, ready to start.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// State of the boot processor. The others wait for a SIPI.
    pub state: CpuState,
    /// How it starts.
    pub protocol: Protocol,
}

/// Why a kernel can't be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The file has no bytes.
    #[error("the kernel file is empty")]
    Empty,
    /// The file is something else.
    #[error(
        "this is no kernel: the file is neither a Linux bzImage, nor an ELF file with a PVH note, nor a Multiboot image"
    )]
    NotAKernel,
    /// For another processor.
    #[error("the kernel is for {0}, but this machine is an x86-64 PC")]
    Architecture(String),
    /// The file ends too early.
    #[error("the kernel file is truncated: its {what} ends at byte {end}, the file has only {length}")]
    Truncated {
        /// What lies beyond the end.
        what: &'static str,
        /// Where that should end.
        end: u64,
        /// Bytes in the file.
        length: u64,
    },
    /// The file contradicts itself.
    #[error("the kernel file is damaged: {0}")]
    Damaged(&'static str),
    /// A bzImage from before Linux 2.6.22.
    #[error("the kernel speaks Linux boot protocol {0}.{1:02}, but 2.06 or later (Linux 2.6.22) is needed")]
    OldProtocol(u8, u8),
    /// Not enough RAM where the kernel wants to be.
    #[error("the kernel does not fit: it needs RAM up to {} MiB, the machine has {} MiB; give it more memory", to_mib(.end), to_mib(.ram))]
    KernelTooBig {
        /// End of the memory that the kernel needs.
        end: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// The kernel wants to lie where firmware tables or devices are.
    #[error("the kernel wants to be loaded at {start:#x} to {end:#x}, where this machine has no free RAM")]
    BadAddress {
        /// First address.
        start: u64,
        /// Last address plus one.
        end: u64,
    },
    /// No room for the initrd.
    #[error("the initrd of {} MiB does not fit beside the kernel into {} MiB of memory; give the machine more", to_mib(.size), to_mib(.ram))]
    InitrdTooBig {
        /// Bytes of the initrd.
        size: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// The kernel would cut the command line.
    #[error("the command line has {length} bytes, but this kernel takes at most {limit}")]
    CommandLineTooLong {
        /// Bytes without the final zero.
        length: usize,
        /// What fits.
        limit: usize,
    },
    /// The kernel would see only a part of the command line.
    #[error("the command line contains a zero byte")]
    CommandLineZero,
    /// No room below 640 KiB for what is handed to the kernel.
    #[error("no room is left in low memory for the boot information: the kernel takes all of it")]
    NoLowMemory,
    /// A Multiboot kernel asks for something that this loader does not have.
    #[error("the Multiboot kernel requires features {0:#x} that are not offered")]
    MultibootFeatures(u32),
    /// A 64-bit ELF file without an entry point for loaders.
    #[error(
        "the ELF file has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY) and no Multiboot header, so it can't be started"
    )]
    NoEntry,
    /// What was placed turned out not to be RAM.
    #[error(transparent)]
    Memory(#[from] OutsideRam),
}

/// Mebibytes, rounded up.
fn to_mib(bytes: &u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Loads a kernel and what belongs to it, in the first protocol that the file offers. `rsdp` is the
/// guest-physical address of the ACPI root pointer, whose tables are in memory.
pub fn load(image: &BootImage<'_>, memory: &GuestMemory, rsdp: u64) -> Result<Loaded, BootError> {
    if image.kernel.is_empty() {
        return Err(BootError::Empty);
    }
    if image.command_line.contains('\0') {
        return Err(BootError::CommandLineZero);
    }
    if linux::is_bzimage(image.kernel) {
        return linux::load(image, memory, rsdp);
    }
    if let Some(header) = multiboot::find_header(image.kernel) {
        return multiboot::load(&header, image, memory);
    }
    if elf::is_elf(image.kernel) {
        let elf = elf::Elf::parse(image.kernel)?;
        let entry = elf.pvh_entry()?.ok_or(BootError::NoEntry)?;
        return pvh::load(&elf, entry, image, memory, rsdp);
    }
    Err(foreign(image.kernel))
}

/// The error for a file in none of our formats: says so if it is a kernel of another architecture.
fn foreign(file: &[u8]) -> BootError {
    match file.get(0x38..0x3c) {
        Some(b"ARM\x64") => BootError::Architecture("64-bit ARM".into()),
        Some(b"RSC\x05") => BootError::Architecture("RISC-V".into()),
        _ => BootError::NotAKernel,
    }
}

/// Little-endian numbers at an offset of a file, if it is that long.
trait Fields {
    fn u8_at(&self, at: usize) -> Option<u8>;
    fn u16_at(&self, at: usize) -> Option<u16>;
    fn u32_at(&self, at: usize) -> Option<u32>;
    fn u64_at(&self, at: usize) -> Option<u64>;
}

impl Fields for [u8] {
    fn u8_at(&self, at: usize) -> Option<u8> {
        self.get(at).copied()
    }
    fn u16_at(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(*self.get(at..)?.first_chunk()?))
    }
    fn u32_at(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(*self.get(at..)?.first_chunk()?))
    }
    fn u64_at(&self, at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(*self.get(at..)?.first_chunk()?))
    }
}

/// The bytes `start .. start + length` of a file.
fn file_range<'a>(
    file: &'a [u8],
    start: u64,
    length: u64,
    what: &'static str,
) -> Result<&'a [u8], BootError> {
    let end = start.saturating_add(length);
    usize::try_from(start)
        .ok()
        .zip(usize::try_from(end).ok())
        .and_then(|(start, end)| file.get(start..end))
        .ok_or(BootError::Truncated { what, end, length: file.len() as u64 })
}
