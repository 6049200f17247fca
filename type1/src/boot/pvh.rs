//! PVH (Xen, `public/arch-x86/hvm/start_info.h`): how QEMU, Firecracker and others enter a kernel directly.
#![allow(unsafe_code)]

use super::{BootInfo, MAX_COMMAND_LINE, PhysicalMemory, Range};

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const MEMORY_MAP_VERSION: u32 = 1;
/// Type of a range that is RAM, as in the BIOS's E820.
const TYPE_RAM: u32 = 1;
/// More modules or ranges than this are a mistake.
const MAX_ENTRIES: u32 = 4096;

/// The information is not what PVH promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PvhError {
    /// It is not there.
    #[error("there is no PVH start information at {0:#x}")]
    Magic(u64),
    /// It has no memory map.
    #[error("it is of version {0}, which has no memory map")]
    Version(u32),
    /// It points to nowhere.
    #[error("its {what} is said to be at {address:#x}, where nothing can be read")]
    Outside {
        /// What.
        what: &'static str,
        /// Where.
        address: u64,
    },
}

/// Reads fields one after the other.
struct Fields<'a, M> {
    memory: &'a M,
    what: &'static str,
    at: u64,
}

impl<M: PhysicalMemory> Fields<'_, M> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], PvhError> {
        let mut bytes = [0; N];
        // SAFETY: the loader has put it there for us to read, by PVH, and does nothing any more.
        if !unsafe { self.memory.read(self.at, &mut bytes) } {
            return Err(PvhError::Outside { what: self.what, address: self.at });
        }
        self.at += N as u64;
        Ok(bytes)
    }
    fn u32(&mut self) -> Result<u32, PvhError> {
        self.bytes().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, PvhError> {
        self.bytes().map(u64::from_le_bytes)
    }
}

/// Reads the start information at an address, and all that it points to.
///
/// # Safety
/// The address is the one that the loader passed, and the loader kept to PVH.
///
/// # Errors
/// It is damaged.
pub unsafe fn read(memory: &impl PhysicalMemory, address: u64) -> Result<BootInfo, PvhError> {
    let mut fields = Fields { memory, what: "start information", at: address };
    if fields.u32()? != MAGIC {
        return Err(PvhError::Magic(address));
    }
    let version = fields.u32()?;
    if version < MEMORY_MAP_VERSION {
        return Err(PvhError::Version(version));
    }
    let (_flags, modules) = (fields.u32()?, fields.u32()?);
    let (module_list, command_line, rsdp) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let (map, ranges) = (fields.u64()?, fields.u32()?);
    let mut info = BootInfo::new(rsdp);
    read_command_line(&mut info, memory, command_line)?;

    let mut fields = Fields { memory, what: "list of modules", at: module_list };
    for _ in 0..modules.min(MAX_ENTRIES) {
        let (start, size) = (fields.u64()?, fields.u64()?);
        let (_command_line, _reserved) = (fields.u64()?, fields.u64()?);
        // A module too many is not used, and so need not be kept.
        info.modules.push(Range { start, end: start.saturating_add(size) });
    }
    let mut fields = Fields { memory, what: "memory map", at: map };
    for _ in 0..ranges.min(MAX_ENTRIES) {
        let (start, size) = (fields.u64()?, fields.u64()?);
        let (kind, _reserved) = (fields.u32()?, fields.u32()?);
        if kind == TYPE_RAM && size != 0 {
            info.memory.push(Range { start, end: start.saturating_add(size) });
        }
    }
    Ok(info)
}

fn read_command_line(
    info: &mut BootInfo,
    memory: &impl PhysicalMemory,
    address: u64,
) -> Result<(), PvhError> {
    if address == 0 {
        return Ok(());
    }
    let mut fields = Fields { memory, what: "command line", at: address };
    let (bytes, length) = &mut info.command_line;
    while *length < MAX_COMMAND_LINE {
        let [byte] = fields.bytes()?;
        if byte == 0 {
            break;
        }
        bytes[*length] = byte;
        *length += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    /// Memory from 1000h on.
    struct Bytes(Vec<u8>);
    impl PhysicalMemory for Bytes {
        unsafe fn read(&self, address: u64, to: &mut [u8]) -> bool {
            let from = address.checked_sub(0x1000).and_then(|at| self.0.get(at as usize..)?.get(..to.len()));
            from.map(|from| to.copy_from_slice(from)).is_some()
        }
    }
    fn read(memory: &Bytes) -> Result<BootInfo, PvhError> {
        // SAFETY: it is only bytes.
        unsafe { super::read(memory, 0x1000) }
    }

    fn start_info(version: u32, command_line: u64) -> Bytes {
        let mut bytes = vec![];
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        bytes.extend([MAGIC, version, 0, 1].iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(words(&[0x1100, command_line, 0xf_0000, 0x1200, 3]));
        bytes.resize(0x100, 0);
        bytes.extend(words(&[0x800_0000, 0x1234, 0, 0]));
        bytes.resize(0x200, 0);
        bytes.extend(words(&[0, 0x9_fc00, 1, 0xf_0000, 0x1_0000, 2, 0x10_0000, 0x3ff0_0000, 1]));
        bytes.resize(0x300, 0);
        bytes.extend(b"debug-exit quiet\0junk");
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
        assert_eq!((info.rsdp, info.usable_memory()), (0xf_0000, 0x3ff0_0000 + 0x9_fc00));
        assert_eq!(read(&start_info(1, 0)).unwrap().command_line(), "");
    }

    #[test]
    fn what_is_damaged_is_refused() {
        assert_eq!(read(&start_info(0, 0)).unwrap_err(), PvhError::Version(0));
        assert_eq!(
            read(&start_info(1, 0x9999)).unwrap_err(),
            PvhError::Outside { what: "command line", address: 0x9999 }
        );
        assert_eq!(read(&Bytes(vec![0; 64])).unwrap_err(), PvhError::Magic(0x1000));
        let mut cut = start_info(1, 0);
        cut.0.truncate(0x210);
        assert!(matches!(read(&cut), Err(PvhError::Outside { what: "memory map", .. })));
    }
}
