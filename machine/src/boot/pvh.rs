//! PVH direct boot (Xen, `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`).

use alloc::vec::Vec;

use bivisor_x86::registers::gpr;

use super::elf::Elf;
use super::entry::{self, PLAIN};
use super::layout::Layout;
use super::{BootError, BootImage, Loaded, Protocol};
use crate::memory::GuestMemory;

const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const START_VERSION: u32 = 1;

/// Loads an ELF file and enters it in 32-bit protected mode with EBX pointing to the start information.
pub fn load(
    elf: &Elf<'_>,
    pvh_entry: u32,
    image: &BootImage<'_>,
    memory: &GuestMemory,
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let mut layout = Layout::new(memory);
    elf.load(&mut layout)?;
    let command_line = layout.put_string(&[image.command_line])?;
    let module = match image.initrd {
        Some(initrd) => {
            let start = layout.put_initrd(initrd, memory.low_size())?;
            Some(layout.put(&fields(&[start, initrd.len() as u64, 0, 0]), 8)?)
        }
        None => None,
    };
    let map = memory_map(&layout);
    let map_start = layout.put(&map, 8)?;

    let mut info = Vec::new();
    for word in [START_MAGIC, START_VERSION, 0, module.is_some().into()] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    info.extend(fields(&[module.unwrap_or(0), command_line, rsdp, map_start, layout.map.len() as u64]));
    let info = layout.put(&info, 8)?;

    let mut state = entry::protected(&mut layout, &PLAIN, pvh_entry)?;
    state.gpr[gpr::RBX] = info;
    Ok(Loaded { state, protocol: Protocol::Pvh })
}

/// The memory map: address, size, type and a reserved word for each range.
fn memory_map(layout: &Layout<'_>) -> Vec<u8> {
    layout.map.iter().flat_map(|r| fields(&[r.start, r.size(), r.kind as u64])).collect()
}

fn fields(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
