//! Multiboot2 (its specification, version 2.0, 3.6): how GRUB and Limine enter.
#![allow(unsafe_code)]

use super::{AcpiRoot, BootError, BootInfo, Fields, MAX_COMMAND_LINE, PhysicalMemory, Range};

/// Types of tags.
mod tag {
    pub(super) const END: u32 = 0;
    pub(super) const COMMAND_LINE: u32 = 1;
    pub(super) const MODULE: u32 = 3;
    pub(super) const MEMORY_MAP: u32 = 6;
    pub(super) const ACPI_OLD: u32 = 14;
    pub(super) const ACPI_NEW: u32 = 15;
}
/// Type of a range that is RAM.
const TYPE_RAM: u32 = 1;
/// Bytes of a tag's head, and the alignment of tags.
const HEAD: u64 = 8;

/// Reads the information at an address.
///
/// # Safety
/// The address is the one that the loader passed, and the loader kept to Multiboot2.
///
/// # Errors
/// It is damaged.
pub(super) unsafe fn read(memory: &impl PhysicalMemory, address: u64) -> Result<BootInfo, BootError> {
    let mut fields = Fields { memory, what: "information", at: address };
    let end = address + u64::from(fields.u32()?);
    let mut info = BootInfo::EMPTY;
    let mut at = address + HEAD;
    while at + HEAD <= end {
        let mut fields = Fields { memory, what: "tag", at };
        let (kind, size) = (fields.u32()?, u64::from(fields.u32()?));
        if size < HEAD || at + size > end {
            return Err(BootError::Length { what: "tag" });
        }
        let length = size - HEAD;
        match kind {
            tag::END => break,
            tag::COMMAND_LINE => info.set_command_line(&head::<MAX_COMMAND_LINE, _>(&mut fields, length)?),
            tag::MODULE => {
                let (start, end) = (fields.u32()?, fields.u32()?);
                info.add_module(Range { start: start.into(), end: end.into() });
            }
            tag::MEMORY_MAP => read_map(&mut info, &mut fields, length)?,
            // The newer one stands for both.
            tag::ACPI_OLD | tag::ACPI_NEW => {
                let root = AcpiRoot::of_pointer(&head::<36, _>(&mut fields, length)?);
                info.acpi = root.filter(|root| root.is_wide).or(info.acpi).or(root);
            }
            _ => {}
        }
        at += size.next_multiple_of(HEAD);
    }
    if info.memory().is_empty() { Err(BootError::NoMemoryMap) } else { Ok(info) }
}

/// The first bytes of a tag's content; zeros follow a shorter one.
fn head<const N: usize, M: PhysicalMemory>(
    fields: &mut Fields<'_, M>,
    length: u64,
) -> Result<[u8; N], BootError> {
    let mut bytes = [0; N];
    let length = usize::try_from(length).unwrap_or(N).min(N);
    fields.fill(&mut bytes[..length])?;
    Ok(bytes)
}

fn read_map<M: PhysicalMemory>(
    info: &mut BootInfo,
    fields: &mut Fields<'_, M>,
    length: u64,
) -> Result<(), BootError> {
    let (entry_size, _version) = (u64::from(fields.u32()?), fields.u32()?);
    let (first, length) = (fields.at, length.saturating_sub(HEAD));
    if entry_size < 20 {
        return Err(BootError::Length { what: "memory map" });
    }
    for index in 0..length / entry_size {
        fields.at = first + index * entry_size;
        let (start, size, kind) = (fields.u64()?, fields.u64()?, fields.u32()?);
        if kind == TYPE_RAM {
            info.add_memory(Range { start, end: start.saturating_add(size) });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bytes, root_pointer};
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    fn read(bytes: Vec<u8>) -> Result<BootInfo, BootError> {
        // SAFETY: it is only bytes.
        unsafe { super::read(&Bytes(bytes), 0x1000) }
    }

    /// Information with these tags.
    fn information(tags: &[(u32, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; 8];
        for (kind, content) in tags.iter().chain(&[(tag::END, vec![])]) {
            bytes.extend(kind.to_le_bytes());
            bytes.extend((content.len() as u32 + 8).to_le_bytes());
            bytes.extend(content);
            bytes.resize(bytes.len().next_multiple_of(8), 0xcc);
        }
        let size = bytes.len() as u32;
        bytes[..4].copy_from_slice(&size.to_le_bytes());
        bytes
    }

    fn map() -> (u32, Vec<u8>) {
        let mut map: Vec<u8> = [24u32, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        for (start, size, kind) in [
            (0u64, 0x9_fc00u64, 1u64),
            (0xf_0000, 0x1_0000, 2),
            (0x10_0000, 0xf0_0000, 1),
            (0x100_0000, 0x1000, 1),
        ] {
            map.extend([start, size, kind].iter().flat_map(|word| word.to_le_bytes()));
        }
        (tag::MEMORY_MAP, map)
    }

    #[test]
    fn what_the_loader_tells() {
        let module = [0x800_0000u32, 0x800_1234].iter().flat_map(|word| word.to_le_bytes());
        let module = module.chain(*b"machines\0").collect();
        let info = read(information(&[
            (tag::COMMAND_LINE, b"debug-exit quiet\0".to_vec()),
            (2, b"GRUB\0".to_vec()),
            (tag::MODULE, module),
            map(),
            (tag::ACPI_OLD, root_pointer(0x3ffe_1234)),
        ]))
        .unwrap();
        assert_eq!(info.command_line(), "debug-exit quiet");
        assert_eq!(info.modules(), [Range { start: 0x800_0000, end: 0x800_1234 }]);
        assert_eq!(
            info.memory(),
            [Range { start: 0, end: 0x9_fc00 }, Range { start: 0x10_0000, end: 0x100_1000 }]
        );
        assert_eq!(info.acpi(), Some(AcpiRoot { address: 0x3ffe_1234, is_wide: false }));
    }

    #[test]
    fn what_is_damaged_is_refused() {
        assert_eq!(read(information(&[])).unwrap_err(), BootError::NoMemoryMap);
        let good = information(&[map()]);
        assert!(read(good[..good.len() - 24].to_vec()).is_err());
        let mut small = good.clone();
        small[12] = 7;
        assert_eq!(read(small).unwrap_err(), BootError::Length { what: "tag" });
        let mut large = good.clone();
        large[13] = 0xff;
        assert_eq!(read(large).unwrap_err(), BootError::Length { what: "tag" });
        let mut entries = good;
        entries[16] = 0;
        assert_eq!(read(entries).unwrap_err(), BootError::Length { what: "memory map" });
    }
}
