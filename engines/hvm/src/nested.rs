//! Nested page tables: from guest-physical to physical addresses. AMD's are page tables of 64-bit mode, in which every access is
//! one of user mode (APM Vol. 2, section 15.25). In Intel's the low three bits are the permissions to read, write and execute,
//! and the type of memory stands in the entry (SDM Vol. 3C, section 29.3.2).

use alloc::boxed::Box;
use alloc::vec::Vec;

use bivisor_machine::memory::GuestMemory;

use crate::page::{LARGE_SIZE, PAGE_SIZE, Page, PhysicalMap, physical_of};

const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Present, writable, user's; or readable, writable, executable.
const TABLE: u64 = 0b111;

/// The nested page tables of one machine. All of its RAM is mapped from the beginning, nothing else ever is: what a guest
/// accesses elsewhere is a device's.
pub struct NestedTables {
    /// All tables, the root first.
    tables: Vec<(u64, Box<Page>)>,
}

impl NestedTables {
    /// Maps a machine's RAM, in pages of 2 MiB where both addresses allow it. `attributes` tells what else stands in the entry for
    /// a page, by its physical address and size; nothing if that differs within it, as it does in no small page.
    pub fn new(
        memory: &GuestMemory,
        map: &dyn PhysicalMap,
        attributes: impl Fn(u64, u64) -> Option<u64>,
    ) -> Self {
        let mut tables = Self { tables: Vec::new() };
        tables.new_table(map);
        let mut offset = 0;
        while offset < memory.size() {
            let gpa = memory.gpa(offset);
            let physical = map.physical(memory.host_base().wrapping_add(offset as usize));
            // The hole between the two parts of RAM is at a multiple of a large page.
            let left = memory.size() - offset;
            let fits = (gpa | physical) & (LARGE_SIZE - 1) == 0 && left >= LARGE_SIZE;
            let large = if fits { attributes(physical, LARGE_SIZE) } else { None };
            let own = large.or_else(|| attributes(physical, PAGE_SIZE)).unwrap_or(0);
            tables.map(gpa, physical | own, large.is_some(), map);
            offset += if large.is_some() { LARGE_SIZE } else { PAGE_SIZE };
        }
        tables
    }

    /// Physical address of the root.
    pub fn root(&self) -> u64 {
        self.tables.first().map_or(0, |(address, _)| *address)
    }

    fn new_table(&mut self, map: &dyn PhysicalMap) -> u64 {
        let table = Page::zeroed();
        let address = physical_of(map, &*table);
        self.tables.push((address, table));
        address
    }

    /// The entry for an address in the table at a physical address; `level` 4 is the root.
    fn entry(&mut self, table: u64, gpa: u64, level: u32) -> Option<&mut u64> {
        let index = (gpa >> (12 + 9 * (level - 1)) & 511) as usize;
        // The tables in use are the last ones.
        self.tables
            .iter_mut()
            .rev()
            .find(|(address, _)| *address == table)
            .map(|(_, page)| &mut page.0[index])
    }

    fn map(&mut self, gpa: u64, to: u64, large: bool, map: &dyn PhysicalMap) {
        let leaf = if large { 2 } else { 1 };
        let mut table = self.root();
        for level in (leaf + 1..=4).rev() {
            let below = self.entry(table, gpa, level).map_or(0, |entry| *entry & ADDRESS);
            table = match below {
                0 => {
                    let new = self.new_table(map);
                    if let Some(entry) = self.entry(table, gpa, level) {
                        *entry = new | TABLE;
                    }
                    new
                }
                below => below,
            };
        }
        if let Some(entry) = self.entry(table, gpa, leaf) {
            *entry = to | TABLE | if large { LARGE } else { 0 };
        }
    }

    /// Walks the tables as the processor does.
    #[cfg(test)]
    fn translate(&mut self, gpa: u64) -> Option<u64> {
        let mut table = self.root();
        for level in (1..=4).rev() {
            let entry = *self.entry(table, gpa, level)?;
            if entry & TABLE != TABLE {
                return None;
            }
            if level == 1 || entry & LARGE != 0 {
                let size = 1u64 << (12 + 9 * (level - 1));
                return Some(entry & ADDRESS | gpa & (size - 1));
            }
            table = entry & ADDRESS;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Identity;

    const PLAIN: fn(u64, u64) -> Option<u64> = |_, _| Some(0);

    #[test]
    fn ram_is_mapped_and_nothing_else() {
        let memory = GuestMemory::on_heap(5 << 20);
        let base = memory.host_base() as u64;
        let mut tables = NestedTables::new(&memory, &Identity, PLAIN);
        for gpa in [0, 0x1234, 0x1f_ffff, 0x20_0000, 0x4f_ffff] {
            assert_eq!(tables.translate(gpa), Some(base + gpa), "{gpa:#x}");
        }
        for gpa in [0x50_0000, 0xfee0_0000, 1 << 32, 1 << 39] {
            assert_eq!(tables.translate(gpa), None, "{gpa:#x}");
        }
    }

    /// Puts memory at an address of its own choice.
    struct Moved(u64, u64);
    impl PhysicalMap for Moved {
        fn physical(&self, address: *const u8) -> u64 {
            let offset = (address as u64).wrapping_sub(self.0);
            if offset < 8 << 20 { self.1 + offset } else { address as u64 }
        }
    }

    #[test]
    fn aligned_ram_takes_large_pages() {
        let memory = GuestMemory::on_heap(6 << 20);
        let base = memory.host_base() as u64;
        let mut tables = NestedTables::new(&memory, &Moved(base, 0x4000_0000), PLAIN);
        assert_eq!(tables.tables.len(), 3);
        assert_eq!(tables.translate(0x45_6789), Some(0x4045_6789));
        let mut tables = NestedTables::new(&memory, &Moved(base, 0x4000_1000), PLAIN);
        assert_eq!(tables.tables.len(), 6);
        assert_eq!(tables.translate(0x45_6789), Some(0x4045_7789));
    }

    #[test]
    fn pages_have_their_attributes() {
        let memory = GuestMemory::on_heap(4 << 20);
        let base = memory.host_base() as u64;
        // The second large page is not alike from end to end.
        let attributes = |physical: u64, size: u64| match physical {
            0x4000_0000 => Some(0x30),
            _ if size == LARGE_SIZE => None,
            _ => Some(if physical < 0x4030_0000 { 0x30 } else { 0 }),
        };
        let mut tables = NestedTables::new(&memory, &Moved(base, 0x4000_0000), attributes);
        assert_eq!(tables.translate(0x1234), Some(0x4000_1234));
        assert_eq!(tables.translate(0x30_1234), Some(0x4030_1234));
        let leaf = |table: usize, index: usize| tables.tables[table].1.0[index];
        assert_eq!((leaf(2, 0), leaf(3, 0xff)), (0x4000_00b7, 0x402f_f037));
        assert_eq!(leaf(3, 0x100), 0x4030_0007);
    }
}
