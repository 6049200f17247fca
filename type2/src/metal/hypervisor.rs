//! The hypervisor for the bare machine as cargo links it, an ELF file, and what loaders take of it: an ELF file without
//! sections, which GRUB wants (it refuses relocations, which the image applies itself), and a UEFI application.

use super::MetalError;

/// Where the image is linked (`type1/metal.ld`).
pub const BASE: u64 = 0x20_0000;
/// Bytes of a page: what sections of both formats are aligned to.
const PAGE: usize = 4096;
/// Name of the section with the BIOS's boot sector and loader.
const BIOS_SECTION: &[u8] = b".bios";
const PT_LOAD: u32 = 1;
const WRITABLE: u32 = 2;
const EXECUTABLE: u32 = 1;

/// A part of the image in memory.
struct Segment {
    flags: u32,
    /// First address, in the file's bytes and in memory.
    address: u64,
    bytes: Vec<u8>,
    in_memory: u64,
}

impl Segment {
    /// End in memory.
    fn end(&self) -> u64 {
        self.address + self.in_memory
    }
}

/// The hypervisor's image.
pub struct Hypervisor {
    file: Vec<u8>,
    segments: Vec<Segment>,
    /// Boot sector and loader for BIOS.
    pub bios: Vec<u8>,
    /// Entry for UEFI, from [`BASE`] on.
    efi_entry: u32,
    /// Entry by PVH, an address.
    pub pvh_entry: u32,
}

/// Fields of a little-endian file; `None` where it ends too early.
fn field<const N: usize>(file: &[u8], at: u64) -> Option<[u8; N]> {
    file.get(usize::try_from(at).ok()?..)?.first_chunk().copied()
}
fn u16_at(file: &[u8], at: u64) -> Option<u16> {
    field(file, at).map(u16::from_le_bytes)
}
fn u32_at(file: &[u8], at: u64) -> Option<u32> {
    field(file, at).map(u32::from_le_bytes)
}
fn u64_at(file: &[u8], at: u64) -> Option<u64> {
    field(file, at).map(u64::from_le_bytes)
}
fn bytes_at(file: &[u8], at: u64, length: u64) -> Option<&[u8]> {
    file.get(usize::try_from(at).ok()?..)?.get(..usize::try_from(length).ok()?)
}

impl Hypervisor {
    /// Reads the file that cargo has linked.
    ///
    /// # Errors
    /// It is another file.
    pub fn parse(file: Vec<u8>) -> Result<Self, MetalError> {
        Self::read(file).ok_or(MetalError::Hypervisor)
    }

    fn read(file: Vec<u8>) -> Option<Self> {
        if !file.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let segments = segments(&file)?;
        let adjoin = segments.windows(2).all(|pair| pair[0].end() <= pair[1].address);
        if segments.first()?.address != BASE || !adjoin {
            return None;
        }
        // The linker script puts the two entries behind the code.
        let section = section(&file, BIOS_SECTION)?;
        let (bios, entries) = section.split_at_checked(section.len().checked_sub(8)?)?;
        let (efi_entry, pvh_entry) = (u32_at(entries, 0)?, u32_at(entries, 4)?);
        let bios = bios.to_vec();
        (bios.len() > 1024).then_some(Self { file, segments, bios, efi_entry, pvh_entry })
    }

    /// Where the image ends in memory.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(BASE, Segment::end)
    }

    /// What lies in memory from [`BASE`] on, as far as it is not zero.
    pub fn memory(&self) -> Vec<u8> {
        let mut memory = Vec::new();
        for segment in &self.segments {
            memory.resize((segment.address - BASE) as usize, 0);
            memory.extend(&segment.bytes);
        }
        memory
    }

    /// The image for GRUB, and for loaders that speak PVH.
    ///
    /// # Errors
    /// None but for a damaged file.
    pub fn elf(&self) -> Result<Vec<u8>, MetalError> {
        let end = program_headers(&self.file)
            .into_iter()
            .flatten()
            .filter_map(|at| Some(u64_at(&self.file, at + 8)? + u64_at(&self.file, at + 32)?))
            .max();
        let mut file = end
            .and_then(|end| bytes_at(&self.file, 0, end))
            .map(<[u8]>::to_vec)
            .ok_or(MetalError::Hypervisor)?;
        // e_shoff; e_shnum and e_shstrndx (System V ABI, chapter 4).
        file[0x28..0x30].fill(0);
        file[0x3c..0x40].fill(0);
        Ok(file)
    }

    /// The image as a UEFI application: a PE file (Microsoft's PE format), whose first page is headers and whose bytes lie in
    /// the file as they lie in memory, up to the variables that are zero.
    pub fn pe(&self) -> Vec<u8> {
        const HEADERS: u32 = PAGE as u32;
        let virtual_address = |address: u64| (address - BASE) as u32 + HEADERS;
        let memory = self.memory();
        let mut file = vec![0; PAGE];
        file.extend(&memory);
        file.resize(file.len().next_multiple_of(PAGE), 0);
        let relocations = (file.len() as u32, virtual_address(self.end().next_multiple_of(PAGE as u64)));
        // The image relocates itself, but some firmware wants relocations: a block of two that mean nothing.
        file.extend([0u32, 12, 0].iter().flat_map(|word| word.to_le_bytes()));
        file.resize(file.len().next_multiple_of(PAGE), 0);

        let mut header = Header(Vec::with_capacity(PAGE));
        header.dos();
        header.coff(self.segments.len() as u16 + 1);
        header.optional(virtual_address(BASE) + self.efi_entry, relocations.1);
        for segment in &self.segments {
            let start = virtual_address(segment.address);
            let in_file = segment.bytes.len().next_multiple_of(PAGE) as u32;
            let (name, kind) = match segment.flags {
                flags if flags & EXECUTABLE != 0 => (b".text\0\0\0", 0x6000_0020),
                flags if flags & WRITABLE != 0 => (b".data\0\0\0", 0xc000_0040),
                _ => (b".rdata\0\0", 0x4000_0040),
            };
            header.section(name, start, segment.in_memory as u32, start, in_file, kind);
        }
        header.section(b".reloc\0\0", relocations.1, 12, relocations.0, PAGE as u32, 0x4200_0040);
        file[..header.0.len()].copy_from_slice(&header.0);
        file
    }
}

/// Offsets of the program headers.
fn program_headers(file: &[u8]) -> Option<Vec<u64>> {
    let (start, size, count) = (u64_at(file, 0x20)?, u16_at(file, 0x36)?, u16_at(file, 0x38)?);
    (0..u64::from(count)).map(|index| start.checked_add(index * u64::from(size))).collect()
}

fn segments(file: &[u8]) -> Option<Vec<Segment>> {
    let mut segments = Vec::new();
    for at in program_headers(file)? {
        if u32_at(file, at)? != PT_LOAD {
            continue;
        }
        let (flags, offset, address) = (u32_at(file, at + 4)?, u64_at(file, at + 8)?, u64_at(file, at + 16)?);
        let (in_file, in_memory) = (u64_at(file, at + 32)?, u64_at(file, at + 40)?);
        let bytes = bytes_at(file, offset, in_file)?.to_vec();
        let fits = in_file <= in_memory && address.checked_add(in_memory)? < 1 << 30;
        segments.push(fits.then_some(Segment { flags, address, bytes, in_memory })?);
    }
    Some(segments)
}

/// The content of a section.
fn section<'a>(file: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, size, count, names) =
        (u64_at(file, 0x28)?, u16_at(file, 0x3a)?, u16_at(file, 0x3c)?, u16_at(file, 0x3e)?);
    let header = |index: u16| start + u64::from(index) * u64::from(size);
    let content = |at: u64| bytes_at(file, u64_at(file, at + 24)?, u64_at(file, at + 32)?);
    let names = content(header(names))?;
    (0..count).map(header).find_map(|at| {
        let own = names.get(u32_at(file, at)? as usize..)?.split(|byte| *byte == 0).next()?;
        (own == name).then(|| content(at))?
    })
}

/// The headers of a PE file, written one after the other.
struct Header(Vec<u8>);

impl Header {
    fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }
    fn u32s(&mut self, values: &[u32]) {
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// The header of MS-DOS, of which only the mark and the place of the next header mean something.
    fn dos(&mut self) {
        self.0.extend(b"MZ");
        self.0.resize(60, 0);
        self.u32s(&[64]);
    }

    fn coff(&mut self, sections: u16) {
        const X86_64: u16 = 0x8664;
        const OPTIONAL_HEADER_SIZE: u16 = 112 + 16 * 8;
        /// Executable, and able to use addresses above 2 GiB.
        const CHARACTERISTICS: u16 = 0x22;
        self.0.extend(b"PE\0\0");
        self.u16(X86_64);
        self.u16(sections);
        self.u32s(&[0, 0, 0]);
        self.u16(OPTIONAL_HEADER_SIZE);
        self.u16(CHARACTERISTICS);
    }

    /// Everything but the relocations' place is as the image needs it; sizes of code and data are only told to people.
    fn optional(&mut self, entry: u32, relocations: u32) {
        const PE32_PLUS: u16 = 0x20b;
        const EFI_APPLICATION: u16 = 10;
        /// It may be anywhere, and does not execute data.
        const DLL_CHARACTERISTICS: u16 = 0x140;
        const DIRECTORIES: u32 = 16;
        const RELOCATIONS: u32 = 5;
        let (page, base) = (PAGE as u32, (BASE as u32) - PAGE as u32);
        self.u16(PE32_PLUS);
        self.u16(0);
        self.u32s(&[0, 0, 0, entry, page, base, 0, page, page]);
        self.u32s(&[0, 0, 0, 0, relocations + page, page, 0]);
        self.u16(EFI_APPLICATION);
        self.u16(DLL_CHARACTERISTICS);
        self.u32s(&[0; 8]);
        self.u32s(&[0, DIRECTORIES]);
        for directory in 0..DIRECTORIES {
            self.u32s(&if directory == RELOCATIONS { [relocations, 12] } else { [0, 0] });
        }
    }

    fn section(&mut self, name: &[u8; 8], start: u32, size: u32, offset: u32, in_file: u32, kind: u32) {
        self.0.extend(name);
        self.u32s(&[size, start, in_file, offset, 0, 0, 0, kind]);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An ELF file such as cargo's linker makes: code, constants, variables of which half are zeros, and the BIOS's section.
    pub fn linked() -> Vec<u8> {
        let mut file = vec![0; 0x4000];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        put(0, b"\x7fELF\x02\x01\x01");
        put(0x20, &words(&[64, 0x3c00]));
        put(0x34, &[64, 0, 56, 0, 3, 0, 64, 0, 3, 0, 2, 0]);
        for (index, (flags, offset, in_file, in_memory)) in
            [(5u64, 0x1000u64, 0x1000u64, 0x1000u64), (4, 0x2000, 0x800, 0x800), (6, 0x3000, 0x100, 0x3000)]
                .into_iter()
                .enumerate()
        {
            let address = BASE + offset - 0x1000;
            let header = words(&[1 | flags << 32, offset, address, address, in_file, in_memory, 4096]);
            put(64 + 56 * index, &header);
            put(offset as usize, &vec![index as u8 + 1; in_file as usize]);
        }
        put(0x3100, &[0xb1; 2048]);
        put(0x3100 + 2048, &[0x34, 0x12, 0, 0, 0x78, 0x56, 0x20, 0]);
        // Sections: none, the BIOS's, and the names.
        put(0x3c40, &words(&[1 | 1 << 32, 0, 0, 0x3100, 2056]));
        put(0x3c80, &words(&[7 | 3 << 32, 0, 0, 0x3e00, 16]));
        put(0x3e00, b"\0.bios\0.shstrtab");
        file
    }

    #[test]
    fn the_application_lies_in_its_file_as_in_memory() {
        let hypervisor = Hypervisor::parse(linked()).unwrap();
        assert_eq!((hypervisor.end(), hypervisor.pvh_entry), (BASE + 0x5000, 0x20_5678));
        assert!(hypervisor.bios == [0xb1; 2048]);
        let (memory, pe) = (hypervisor.memory(), hypervisor.pe());
        assert_eq!(memory.len(), 0x2100);
        assert_eq!((memory[0], memory[0x1000], memory[0x1800], memory[0x2000]), (1, 2, 0, 3));
        assert!(pe[PAGE..].starts_with(&memory) && pe.len().is_multiple_of(PAGE));
        let header = u32_at(&pe, 60).unwrap().into();
        assert_eq!((&pe[..2], u32_at(&pe, header)), (&b"MZ"[..], Some(u32::from_le_bytes(*b"PE\0\0"))));
        assert_eq!((u16_at(&pe, header + 6), u16_at(&pe, header + 20)), (Some(4), Some(240)));
        let optional = header + 24;
        assert_eq!(u32_at(&pe, optional + 16), Some(0x1000 + 0x1234));
        // Behind the variables that are zero come the relocations, and then nothing.
        let sections = optional + 240;
        let section =
            |index: u64| [8, 12, 16, 20, 36].map(|at| u32_at(&pe, sections + 40 * index + at).unwrap());
        assert_eq!(section(0), [0x1000, 0x1000, 0x1000, 0x1000, 0x6000_0020]);
        assert_eq!(section(1), [0x800, 0x2000, 0x1000, 0x2000, 0x4000_0040]);
        assert_eq!(section(2), [0x3000, 0x3000, 0x1000, 0x3000, 0xc000_0040]);
        assert_eq!(section(3), [12, 0x6000, 0x1000, 0x4000, 0x4200_0040]);
        assert_eq!(u32_at(&pe, optional + 56), Some(0x7000));
        assert_eq!((u32_at(&pe, optional + 152), u32_at(&pe, optional + 156)), (Some(0x6000), Some(12)));
    }

    #[test]
    fn grub_gets_no_sections() {
        let elf = Hypervisor::parse(linked()).unwrap().elf().unwrap();
        assert_eq!(elf.len(), 0x3100);
        assert_eq!((u64_at(&elf, 0x28), u16_at(&elf, 0x3c), u16_at(&elf, 0x38)), (Some(0), Some(0), Some(3)));
    }

    #[test]
    fn other_files_are_refused() {
        let good = linked();
        assert!(Hypervisor::parse(good[..0x3900].to_vec()).is_err());
        assert!(Hypervisor::parse(b"#!/bin/sh\n".to_vec()).is_err());
        for (at, value) in [(0x20, 0xff), (0x28, 0xff), (64 + 16, 1), (64 + 36, 0xff), (0x3e01, b'x')] {
            let mut bad = good.clone();
            bad[at..at + 3].fill(value);
            assert!(Hypervisor::parse(bad).is_err(), "{at:#x}");
        }
    }
}
