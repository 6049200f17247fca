//! States in which a boot protocol hands the processor to a kernel.

use bivisor_x86::registers::{Cr0, Cr4, Efer};
use bivisor_x86::state::{CpuState, SegReg, Segment, TableRegister};

use super::BootError;
use super::layout::Layout;
use crate::memory::PAGE_SIZE;

/// Access rights of flat segments, with the accessed bit set: code read/execute, data read/write.
const CODE: u16 = 0x9b;
const DATA: u16 = 0x93;

/// Selectors of the code and the data segment; with the null one and each other they make the whole GDT.
pub struct Selectors {
    pub code: u16,
    pub data: u16,
}

/// What Linux calls `__BOOT_CS` and `__BOOT_DS`.
pub const LINUX: Selectors = Selectors { code: 0x10, data: 0x18 };
/// What Multiboot loaders and PVH hypervisors use.
pub const PLAIN: Selectors = Selectors { code: 0x08, data: 0x10 };

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attributes: attributes | Segment::G }
}

/// The descriptor of a flat segment.
fn descriptor(segment: &Segment) -> u64 {
    0x000f_0000_0000_ffff | u64::from(segment.attributes) << 40
}

/// Flat segments, loaded in the registers and in a GDT in memory, for kernels that reload a register before
/// they have a table of their own.
fn flat(layout: &mut Layout<'_>, selectors: &Selectors, code_size: u16) -> Result<CpuState, BootError> {
    let mut state = CpuState::default();
    let code = segment(selectors.code, CODE | code_size);
    let data = segment(selectors.data, DATA | Segment::DB);
    state.seg = [data; 6];
    state.seg[SegReg::Cs as usize] = code;

    let mut table = [0u8; 4 * 8];
    for segment in [code, data] {
        let at = usize::from(segment.selector);
        if let Some(entry) = table.get_mut(at..at + 8) {
            entry.copy_from_slice(&descriptor(&segment).to_le_bytes());
        }
    }
    state.gdtr = TableRegister { base: layout.put(&table, 8)?, limit: table.len() as u16 - 1 };
    state.idtr = TableRegister::default();
    // A busy 32-bit TSS of the smallest size, as PVH wants it (and VM entries on hardware do).
    state.tr = Segment { base: 0, limit: 0x67, selector: 0, attributes: 0x8b };
    Ok(state)
}

/// 32-bit protected mode without paging.
pub fn protected(layout: &mut Layout<'_>, selectors: &Selectors, entry: u32) -> Result<CpuState, BootError> {
    let mut state = flat(layout, selectors, Segment::DB)?;
    state.cr0 = (Cr0::PE | Cr0::ET).bits();
    state.rip = entry.into();
    Ok(state)
}

/// 64-bit mode, the first 4 GiB mapped one to one by 2 MiB pages.
pub fn long(layout: &mut Layout<'_>, selectors: &Selectors, entry: u64) -> Result<CpuState, BootError> {
    let mut state = flat(layout, selectors, Segment::L)?;
    state.cr3 = identity_map(layout)?;
    state.cr4 = Cr4::PAE.bits();
    state.cr0 = (Cr0::PE | Cr0::ET | Cr0::PG).bits();
    state.msr.efer = (Efer::LME | Efer::LMA).bits();
    state.rip = entry;
    Ok(state)
}

/// Page tables: a PML4, a page-directory-pointer table, and four page directories.
fn identity_map(layout: &mut Layout<'_>) -> Result<u64, BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const DIRECTORIES: u64 = 4;
    let page = PAGE_SIZE as usize;
    let tables = alloc::vec![0u8; page * (2 + DIRECTORIES as usize)];
    let root = layout.put(&tables, PAGE_SIZE)?;
    let memory = layout.memory;
    let pointers = root + PAGE_SIZE;
    let directories = pointers + PAGE_SIZE;
    memory.write(root, &(pointers | PRESENT_WRITABLE).to_le_bytes())?;
    for i in 0..DIRECTORIES {
        let directory = directories + i * PAGE_SIZE;
        memory.write(pointers + i * 8, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
    }
    for i in 0..DIRECTORIES * 512 {
        memory.write(directories + i * 8, &(i << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes())?;
    }
    Ok(root)
}
