//! PVH (Xen, `public/arch-x86/hvm/start_info.h`): how QEMU, Firecracker and others enter a kernel directly.
#![allow(unsafe_code)]

use super::{AcpiRoot, BootError, BootInfo, Fields, MAX_COMMAND_LINE, PhysicalMemory, Protocol, Range};

/// The first version with a memory map.
const MEMORY_MAP_VERSION: u32 = 1;
/// Type of a range that is RAM, as in the BIOS's E820.
const TYPE_RAM: u32 = 1;
/// More modules or ranges than this are a mistake.
const MAX_ENTRIES: u32 = 4096;

/// Reads the start information at an address, and all that it points to.
///
/// # Safety
/// The address is the one that the loader passed, and the loader kept to PVH.
///
/// # Errors
/// It is damaged.
pub(super) unsafe fn read(memory: &impl PhysicalMemory, address: u64) -> Result<BootInfo, BootError> {
    let mut fields = Fields { memory, what: "start information", at: address };
    if fields.u32()? != Protocol::Pvh as u32 {
        return Err(BootError::Magic { what: "PVH start information", address });
    }
    let version = fields.u32()?;
    if version < MEMORY_MAP_VERSION {
        return Err(BootError::NoMemoryMap);
    }
    let (_flags, modules) = (fields.u32()?, fields.u32()?);
    let (module_list, command_line, rsdp) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let (map, ranges) = (fields.u64()?, fields.u32()?);
    let mut info = BootInfo::EMPTY;
    // SAFETY: the loader says that it is there.
    info.acpi = unsafe { AcpiRoot::at(memory, rsdp) };
    read_command_line(&mut info, memory, command_line)?;

    let mut fields = Fields { memory, what: "list of modules", at: module_list };
    for _ in 0..modules.min(MAX_ENTRIES) {
        let (start, size) = (fields.u64()?, fields.u64()?);
        let (_command_line, _reserved) = (fields.u64()?, fields.u64()?);
        info.add_module(Range { start, end: start.saturating_add(size) });
    }
    let mut fields = Fields { memory, what: "memory map", at: map };
    for _ in 0..ranges.min(MAX_ENTRIES) {
        let (start, size) = (fields.u64()?, fields.u64()?);
        let (kind, _reserved) = (fields.u32()?, fields.u32()?);
        if kind == TYPE_RAM {
            info.add_memory(Range { start, end: start.saturating_add(size) });
        }
    }
    Ok(info)
}

fn read_command_line(
    info: &mut BootInfo,
    memory: &impl PhysicalMemory,
    address: u64,
) -> Result<(), BootError> {
    if address == 0 {
        return Ok(());
    }
    let mut fields = Fields { memory, what: "command line", at: address };
    let mut text = [0; MAX_COMMAND_LINE];
    for byte in &mut text {
        [*byte] = fields.bytes()?;
        if *byte == 0 {
            break;
        }
    }
    info.set_command_line(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bytes, root_pointer};
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    fn read(memory: &Bytes) -> Result<BootInfo, BootError> {
        // SAFETY: it is only bytes.
        unsafe { super::read(memory, 0x1000) }
    }

    fn start_info(version: u32, command_line: u64) -> Bytes {
        let mut bytes = vec![];
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        bytes.extend([Protocol::Pvh as u32, version, 0, 1].iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(words(&[0x1100, command_line, 0x1380, 0x1200, 3]));
        bytes.resize(0x100, 0);
        bytes.extend(words(&[0x800_0000, 0x1234, 0, 0]));
        bytes.resize(0x200, 0);
        bytes.extend(words(&[0, 0x9_fc00, 1, 0xf_0000, 0x1_0000, 2, 0x10_0000, 0x3ff0_0000, 1]));
        bytes.resize(0x300, 0);
        bytes.extend(b"debug-exit quiet\0junk");
        bytes.resize(0x380, 0);
        bytes.extend(root_pointer(0x3ffe_1234));
        bytes.resize(0x400, 0);
        Bytes(bytes)
    }

    #[test]
    fn what_the_loader_tells() {
        let info = read(&start_info(1, 0x1300)).unwrap();
        assert_eq!(info.command_line(), "debug-exit quiet");
        assert_eq!(info.modules(), [Range { start: 0x800_0000, end: 0x800_1234 }]);
        assert_eq!(
            info.memory(),
            [Range { start: 0, end: 0x9_fc00 }, Range { start: 0x10_0000, end: 0x4000_0000 }]
        );
        let root = AcpiRoot { address: 0x3ffe_1234, is_wide: false };
        assert_eq!((info.acpi(), info.usable_memory()), (Some(root), 0x3ff0_0000 + 0x9_fc00));
        assert_eq!(read(&start_info(1, 0)).unwrap().command_line(), "");
    }

    #[test]
    fn what_is_damaged_is_refused() {
        assert_eq!(read(&start_info(0, 0)).unwrap_err(), BootError::NoMemoryMap);
        assert_eq!(
            read(&start_info(1, 0x9999)).unwrap_err(),
            BootError::Outside { what: "command line", address: 0x9999 }
        );
        assert_eq!(
            read(&Bytes(vec![0; 64])).unwrap_err(),
            BootError::Magic { what: "PVH start information", address: 0x1000 }
        );
        let mut cut = start_info(1, 0);
        cut.0.truncate(0x210);
        assert!(matches!(read(&cut), Err(BootError::Outside { what: "memory map", .. })));
    }
}
