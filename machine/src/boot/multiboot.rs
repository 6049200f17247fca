//! Multiboot 1 (Multiboot Specification version 0.6.96).

use alloc::vec::Vec;

use bivisor_x86::registers::gpr;

use super::elf::{self, Elf};
use super::entry::{self, PLAIN};
use super::layout::Layout;
use super::{BootError, BootImage, Fields, Loaded, Protocol, file_range};
use crate::map::{EBDA_START, HIGH_MEMORY_START};
use crate::memory::{GuestMemory, PAGE_SIZE};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies within so many bytes of the file's start.
const HEADER_SEARCH: usize = 8192;
/// Page-aligned modules, memory information, video mode (which may be ignored).
const OFFERED: u32 = 0x0007;
/// Bits of the flags whose meaning must be known to the loader.
const REQUIREMENTS: u32 = 0xffff;
const HAS_ADDRESSES: u32 = 1 << 16;

/// What EAX holds at the kernel's entry.
const BOOTED_MAGIC: u64 = 0x2bad_b002;
/// Bits of the information structure's flags.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
/// Bytes of the information structure up to the frame-buffer fields, which are not offered.
const INFO_SIZE: usize = 88;

/// The header that makes a file a Multiboot kernel.
pub struct Header {
    /// Where it is in the file.
    at: usize,
    flags: u32,
}

/// Looks for the header: a magic number, flags, and a checksum that makes their sum zero.
pub fn find_header(file: &[u8]) -> Option<Header> {
    (0..HEADER_SEARCH - 12).step_by(4).find_map(|at| {
        let (magic, flags, checksum) = (file.u32_at(at)?, file.u32_at(at + 4)?, file.u32_at(at + 8)?);
        let valid = magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0;
        valid.then_some(Header { at, flags })
    })
}

/// Loads a kernel and enters it in 32-bit protected mode.
pub fn load(header: &Header, image: &BootImage<'_>, memory: &GuestMemory) -> Result<Loaded, BootError> {
    let unknown = header.flags & REQUIREMENTS & !OFFERED;
    if unknown != 0 {
        return Err(BootError::MultibootFeatures(unknown));
    }
    let mut layout = Layout::new(memory);
    let entry = if header.flags & HAS_ADDRESSES != 0 {
        load_by_addresses(header, image.kernel, &mut layout)?
    } else if elf::is_elf(image.kernel) {
        let elf = Elf::parse(image.kernel)?;
        elf.load(&mut layout)?;
        elf.physical_entry()?
    } else {
        return Err(BootError::Damaged("its Multiboot header has no addresses, and it is no ELF file"));
    };
    let info = information(image, &mut layout)?;
    let mut state = entry::protected(&mut layout, &PLAIN, entry)?;
    state.gpr[gpr::RAX] = BOOTED_MAGIC;
    state.gpr[gpr::RBX] = info;
    Ok(Loaded { state, protocol: Protocol::Multiboot })
}

/// Loads a flat image to where the header says; returns the entry point.
fn load_by_addresses(header: &Header, file: &[u8], layout: &mut Layout<'_>) -> Result<u32, BootError> {
    let field = |offset| {
        file.u32_at(header.at + offset).ok_or(BootError::Truncated {
            what: "Multiboot header",
            end: header.at as u64 + 32,
            length: file.len() as u64,
        })
    };
    let (header_address, load_start, load_end, bss_end, entry) =
        (field(12)?, field(16)?, field(20)?, field(24)?, field(28)?);
    let before_header = header_address
        .checked_sub(load_start)
        .ok_or(BootError::Damaged("its Multiboot header is before its load address"))?;
    let start = (header.at as u64)
        .checked_sub(before_header.into())
        .ok_or(BootError::Damaged("its Multiboot load address is before the start of the file"))?;
    // Zero means: to the end of the file.
    let length = match load_end {
        0 => file.len() as u64 - start,
        end => u64::from(end)
            .checked_sub(load_start.into())
            .ok_or(BootError::Damaged("its Multiboot load address is after the end"))?,
    };
    let bytes = file_range(file, start, length, "Multiboot image")?;
    let zeros = u64::from(bss_end).saturating_sub(u64::from(load_start) + length);
    layout.reserve(load_start.into(), length + zeros)?;
    layout.memory.write(load_start.into(), bytes)?;
    layout.memory.fill(u64::from(load_start) + length, zeros, 0)?;
    Ok(entry)
}

/// Puts modules, strings, memory map and the information structure (section 3.3) into memory; returns the
/// structure's address.
fn information(image: &BootImage<'_>, layout: &mut Layout<'_>) -> Result<u64, BootError> {
    let mut info = Information::default();
    let low = layout.memory.low_size();
    info.set(0, INFO_MEMORY | INFO_COMMAND_LINE | INFO_MEMORY_MAP | INFO_LOADER_NAME);
    info.set(4, (EBDA_START >> 10) as u32);
    info.set(8, (low.saturating_sub(HIGH_MEMORY_START) >> 10) as u32);

    if let Some(initrd) = image.initrd {
        let size = initrd.len() as u64;
        // Right behind the kernel, where GRUB puts modules too, so that the kernel's own allocations above
        // them have one range.
        let start = layout
            .place_up(size, PAGE_SIZE, layout.end_of_used().max(HIGH_MEMORY_START), low)
            .ok_or(BootError::InitrdTooBig { size, ram: layout.memory.size() })?;
        layout.memory.write(start, initrd)?;
        let name = layout.put_string(&["initrd"])?;
        let words = [start as u32, (start + size) as u32, name as u32, 0];
        let modules = layout.put(&words.map(u32::to_le_bytes).concat(), 4)?;
        info.set(0, info.get(0) | INFO_MODULES);
        info.set(20, 1);
        info.set(24, modules as u32);
    }
    info.set(16, layout.put_string(&[image.name, image.command_line])? as u32);
    let map = memory_map(layout);
    info.set(44, map.len() as u32);
    info.set(48, layout.put(&map, 4)? as u32);
    info.set(64, layout.put_string(&["Bivisor"])? as u32);
    layout.put(&info.0, 4)
}

/// The information structure.
struct Information([u8; INFO_SIZE]);

impl Default for Information {
    fn default() -> Self {
        Self([0; INFO_SIZE])
    }
}

impl Information {
    fn set(&mut self, at: usize, value: u32) {
        if let Some(field) = self.0.get_mut(at..at + 4) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
    fn get(&self, at: usize) -> u32 {
        self.0.u32_at(at).unwrap_or(0)
    }
}

/// The memory map: the size of the rest of the entry, address, length, type.
fn memory_map(layout: &Layout<'_>) -> Vec<u8> {
    let mut map = Vec::new();
    for range in &layout.map {
        map.extend_from_slice(&20u32.to_le_bytes());
        map.extend_from_slice(&range.start.to_le_bytes());
        map.extend_from_slice(&range.size().to_le_bytes());
        map.extend_from_slice(&(range.kind as u32).to_le_bytes());
    }
    map
}
