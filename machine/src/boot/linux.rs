//! The Linux/x86 boot protocol (kernel documentation, `arch/x86/boot.rst` and `zero-page.rst`).

use alloc::vec::Vec;

use bivisor_x86::registers::gpr;

use super::elf::Elf;
use super::layout::Layout;
use super::{BootError, BootImage, Fields, Loaded, Protocol, entry, file_range, pvh, unpack};
use crate::memory::{GuestMemory, LOW_RAM_END};

/// Start of the setup header, in the file and in the zero page.
const HEADER: usize = 0x1f1;
const SETUP_SECTORS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP: usize = 0x200;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const INITRD_ADDRESS_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const XLOAD_FLAGS: usize = 0x236;
const COMMAND_LINE_SIZE: usize = 0x238;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const PREFERRED_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// Fields of the zero page outside of the setup header.
const ACPI_RSDP: usize = 0x70;
const E820_COUNT: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;
const ZERO_PAGE_SIZE: usize = 4096;

/// The kernel is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry point exists, 200h bytes into the protected-mode part.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// A boot loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;

pub fn is_bzimage(file: &[u8]) -> bool {
    file.get(MAGIC..MAGIC + 4) == Some(b"HdrS") && file.u16_at(BOOT_FLAG) == Some(0xaa55)
}

/// The setup header and what it divides the file into.
struct Bzimage<'a> {
    /// The file up to the end of the setup header.
    head: &'a [u8],
    /// Boot protocol version, major in the high byte.
    version: u16,
    /// The protected-mode part.
    kernel: &'a [u8],
}

impl<'a> Bzimage<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, BootError> {
        let short = BootError::Truncated { what: "setup header", end: 0x268, length: file.len() as u64 };
        let version = file.u16_at(VERSION).ok_or(short.clone())?;
        if version < 0x206 {
            return Err(BootError::OldProtocol((version >> 8) as u8, version as u8));
        }
        // The jump instruction at 200h skips the header: its operand is the header's length from 202h on.
        let length = file.u8_at(JUMP + 1).ok_or(short)?;
        let head = file_range(file, 0, MAGIC as u64 + u64::from(length), "setup header")?;
        let sectors = match head.u8_at(SETUP_SECTORS) {
            None | Some(0) => 4,
            Some(n) => u64::from(n),
        };
        let setup = (sectors + 1) * 512;
        // Counted in units of 16 bytes; the signature of a signed kernel may follow.
        let paragraphs = head.u32_at(0x1f4).unwrap_or(0);
        let kernel = file_range(file, setup, u64::from(paragraphs) * 16, "compressed kernel")?;
        if head.u8_at(LOAD_FLAGS).unwrap_or(0) & LOADED_HIGH == 0 {
            return Err(BootError::Damaged("it is a zImage, which loads below 1 MiB"));
        }
        Ok(Self { head, version, kernel })
    }

    /// The compressed kernel inside, for those versions that say where it is.
    fn payload(&self) -> Option<&'a [u8]> {
        if self.version < 0x208 {
            return None;
        }
        let start = self.head.u32_at(PAYLOAD_OFFSET)? as usize;
        let length = self.head.u32_at(PAYLOAD_LENGTH)? as usize;
        self.kernel.get(start..start.checked_add(length)?)
    }

    /// Where the kernel wants to run, and how much memory it needs there.
    fn place(&self) -> (u64, u64) {
        let size = self.kernel.len() as u64;
        if self.version >= 0x20a && self.head.u8_at(RELOCATABLE) == Some(1) {
            let align = u64::from(self.head.u32_at(KERNEL_ALIGNMENT).unwrap_or(0)).max(1);
            let preferred = self.head.u64_at(PREFERRED_ADDRESS).unwrap_or(0);
            let needed = u64::from(self.head.u32_at(INIT_SIZE).unwrap_or(0));
            (preferred.checked_next_multiple_of(align).unwrap_or(preferred), needed.max(size))
        } else {
            // The kernel's size when unpacked is not known: four times is the usual guess.
            (crate::map::HIGH_MEMORY_START, size.saturating_mul(4))
        }
    }

    fn is_64_bit(&self) -> bool {
        self.version >= 0x20c && self.head.u16_at(XLOAD_FLAGS).unwrap_or(0) & XLF_KERNEL_64 != 0
    }
}

/// Loads a bzImage: the kernel inside by PVH where it can, else by the entry points of the boot protocol.
pub fn load(image: &BootImage<'_>, memory: &GuestMemory, rsdp: u64) -> Result<Loaded, BootError> {
    let bzimage = Bzimage::parse(image.kernel)?;
    let limit = bzimage.head.u32_at(COMMAND_LINE_SIZE).unwrap_or(255) as usize;
    if image.command_line.len() > limit {
        return Err(BootError::CommandLineTooLong { length: image.command_line.len(), limit });
    }
    if image.unpack
        && let Some(vmlinux) = unpacked(&bzimage, memory)
        && let Ok(elf) = Elf::parse(&vmlinux)
        && let Ok(Some(pvh_entry)) = elf.pvh_entry()
    {
        return pvh::load(&elf, pvh_entry, image, memory, rsdp);
    }
    load_packed(&bzimage, image, memory, rsdp)
}

/// The kernel inside a bzImage. `None`: it can't be unpacked here; the guest does it, or says why it can't.
fn unpacked(bzimage: &Bzimage<'_>, memory: &GuestMemory) -> Option<Vec<u8>> {
    unpack::unpack(bzimage.payload()?, memory.size()).ok()
}

fn load_packed(
    bzimage: &Bzimage<'_>,
    image: &BootImage<'_>,
    memory: &GuestMemory,
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let mut layout = Layout::new(memory);
    let (start, size) = bzimage.place();
    if start.saturating_add(size) > LOW_RAM_END {
        return Err(BootError::KernelTooBig { end: start.saturating_add(size), ram: memory.size() });
    }
    layout.reserve(start, size)?;
    memory.write(start, bzimage.kernel)?;

    let mut page = ZeroPage::new(bzimage.head);
    page.set(COMMAND_LINE_POINTER, layout.put_string(&[image.command_line])?);
    if let Some(initrd) = image.initrd {
        let last = u64::from(bzimage.head.u32_at(INITRD_ADDRESS_MAX).unwrap_or(0x37ff_ffff));
        page.set(RAMDISK_IMAGE, layout.put_initrd(initrd, last + 1)?);
        page.set(RAMDISK_SIZE, initrd.len() as u64);
    }
    page.put(TYPE_OF_LOADER, &[UNDEFINED_LOADER]);
    page.set(CODE32_START, start);
    page.put(ACPI_RSDP, &rsdp.to_le_bytes());
    page.put(E820_COUNT, &[layout.map.len().min(E820_MAX) as u8]);
    for (i, range) in layout.map.iter().take(E820_MAX).enumerate() {
        let entry = E820_TABLE + i * 20;
        page.put(entry, &range.start.to_le_bytes());
        page.put(entry + 8, &range.size().to_le_bytes());
        page.put(entry + 16, &(range.kind as u32).to_le_bytes());
    }
    let page = layout.put(&page.0, ZERO_PAGE_SIZE as u64)?;

    let (mut state, protocol) = if bzimage.is_64_bit() {
        (entry::long(&mut layout, &entry::LINUX, start + ENTRY_64)?, Protocol::Linux64)
    } else {
        (entry::protected(&mut layout, &entry::LINUX, start as u32)?, Protocol::Linux32)
    };
    state.gpr[gpr::RSI] = page;
    Ok(Loaded { state, protocol })
}

/// `struct boot_params`.
struct ZeroPage([u8; ZERO_PAGE_SIZE]);

impl ZeroPage {
    /// All zero, but for the setup header that came with the kernel.
    fn new(head: &[u8]) -> Self {
        let mut page = Self([0; ZERO_PAGE_SIZE]);
        page.put(HEADER, head.get(HEADER..).unwrap_or(&[]));
        page
    }
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    }
    /// Sets a 32-bit field; everything that it can point to is below 4 GiB.
    fn set(&mut self, at: usize, value: u64) {
        self.put(at, &(value as u32).to_le_bytes());
    }
}
