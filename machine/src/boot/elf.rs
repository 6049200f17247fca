//! ELF files, as far as loading a kernel needs (System V ABI, chapters 4 and 5).

use alloc::format;
use alloc::vec::Vec;

use super::layout::Layout;
use super::{BootError, Fields, file_range};

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note of the entry point for PVH (Xen, `public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A part of the file that belongs in memory, or a note.
struct Segment {
    kind: u32,
    offset: u64,
    physical: u64,
    in_file: u64,
    in_memory: u64,
}

/// A parsed ELF file.
pub struct Elf<'a> {
    file: &'a [u8],
    segments: Vec<Segment>,
    /// The entry point: a virtual address.
    pub entry: u64,
}

pub fn is_elf(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

impl<'a> Elf<'a> {
    /// Reads the headers. Segments are known to lie within the file.
    pub fn parse(file: &'a [u8]) -> Result<Self, BootError> {
        let truncated = BootError::Truncated { what: "ELF header", end: 0x40, length: file.len() as u64 };
        let header = Self::parse_header(file).ok_or(truncated)??;
        let mut segments = Vec::new();
        for i in 0..u64::from(header.segment_count) {
            let start = header.segments.saturating_add(i * u64::from(header.segment_size));
            let bytes = file_range(file, start, header.segment_size.into(), "ELF program header")?;
            let segment = Segment::parse(bytes, header.is_64)
                .ok_or(BootError::Damaged("its ELF program headers are too short"))?;
            if matches!(segment.kind, PT_LOAD | PT_NOTE) {
                file_range(file, segment.offset, segment.in_file, "ELF segment")?;
                segments.push(segment);
            }
        }
        Ok(Self { file, segments, entry: header.entry })
    }

    fn parse_header(file: &[u8]) -> Option<Result<Header, BootError>> {
        let is_64 = file.u8_at(4)? == CLASS_64;
        let machine = file.u16_at(0x12)?;
        if file.u8_at(5)? != LITTLE_ENDIAN || !matches!(machine, MACHINE_386 | MACHINE_X86_64) {
            return Some(Err(BootError::Architecture(machine_name(machine))));
        }
        Some(Ok(if is_64 {
            Header {
                is_64,
                entry: file.u64_at(0x18)?,
                segments: file.u64_at(0x20)?,
                segment_size: file.u16_at(0x36)?,
                segment_count: file.u16_at(0x38)?,
            }
        } else {
            Header {
                is_64,
                entry: file.u32_at(0x18)?.into(),
                segments: file.u32_at(0x1c)?.into(),
                segment_size: file.u16_at(0x2a)?,
                segment_count: file.u16_at(0x2c)?,
            }
        }))
    }

    /// The entry point that the PVH note gives, if there is one.
    pub fn pvh_entry(&self) -> Result<Option<u32>, BootError> {
        for segment in self.segments.iter().filter(|s| s.kind == PT_NOTE) {
            let notes = file_range(self.file, segment.offset, segment.in_file, "ELF note")?;
            if let Some(entry) = find_pvh_note(notes) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Puts all segments at their physical addresses.
    pub fn load(&self, layout: &mut Layout<'_>) -> Result<(), BootError> {
        let mut loaded = false;
        for segment in self.segments.iter().filter(|s| s.kind == PT_LOAD && s.in_memory > 0) {
            let bytes = file_range(self.file, segment.offset, segment.in_file, "ELF segment")?;
            let zeros = segment
                .in_memory
                .checked_sub(segment.in_file)
                .ok_or(BootError::Damaged("an ELF segment is longer in the file than in memory"))?;
            layout.reserve(segment.physical, segment.in_memory)?;
            layout.memory.write(segment.physical, bytes)?;
            layout.memory.fill(segment.physical + segment.in_file, zeros, 0)?;
            loaded = true;
        }
        if loaded { Ok(()) } else { Err(BootError::Damaged("its ELF header names nothing to load")) }
    }

    /// The physical address of the entry point, which kernels for higher halves give as a virtual one only by
    /// mistake: the Multiboot specification wants a physical one.
    pub fn physical_entry(&self) -> Result<u32, BootError> {
        u32::try_from(self.entry).map_err(|_| BootError::Damaged("its ELF entry point is above 4 GiB"))
    }
}

struct Header {
    is_64: bool,
    entry: u64,
    segments: u64,
    segment_size: u16,
    segment_count: u16,
}

impl Segment {
    fn parse(bytes: &[u8], is_64: bool) -> Option<Self> {
        Some(if is_64 {
            Self {
                kind: bytes.u32_at(0)?,
                offset: bytes.u64_at(8)?,
                physical: bytes.u64_at(0x18)?,
                in_file: bytes.u64_at(0x20)?,
                in_memory: bytes.u64_at(0x28)?,
            }
        } else {
            Self {
                kind: bytes.u32_at(0)?,
                offset: bytes.u32_at(4)?.into(),
                physical: bytes.u32_at(0xc)?.into(),
                in_file: bytes.u32_at(0x10)?.into(),
                in_memory: bytes.u32_at(0x14)?.into(),
            }
        })
    }
}

/// Walks notes: name size, descriptor size, type, name, descriptor, the last two padded to four bytes.
fn find_pvh_note(mut notes: &[u8]) -> Option<u32> {
    loop {
        let name_size = notes.u32_at(0)? as usize;
        let descriptor_size = notes.u32_at(4)? as usize;
        let kind = notes.u32_at(8)?;
        let name = notes.get(12..)?.get(..name_size)?;
        let descriptor_start = 12usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
        let descriptor = notes.get(descriptor_start..)?.get(..descriptor_size)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // Four or eight bytes; the address is a 32-bit one in both.
            return descriptor.u32_at(0);
        }
        let next = descriptor_start.checked_add(descriptor_size.checked_next_multiple_of(4)?)?;
        notes = notes.get(next..)?;
    }
}

fn machine_name(machine: u16) -> alloc::string::String {
    match machine {
        40 => "32-bit ARM".into(),
        183 => "64-bit ARM".into(),
        243 => "RISC-V".into(),
        20 | 21 => "PowerPC".into(),
        22 => "IBM Z".into(),
        8 => "MIPS".into(),
        other => format!("another architecture (ELF machine {other})"),
    }
}
