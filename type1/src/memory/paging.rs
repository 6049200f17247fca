//! The hypervisor's own page tables: everything where it is, writable or executable but never both.
#![allow(unsafe_code)]

use core::arch::asm;

use super::{Image, LARGE_PAGE, MemoryError, PAGE};
use crate::boot::Range;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
/// Uncached, with the PAT as after reset: PWT and PCD.
const UNCACHED: u64 = 1 << 3 | 1 << 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Devices are below.
const DEVICES_END: u64 = 1 << 32;

/// What lies where.
pub(super) struct Layout<'a> {
    pub(super) image: Image,
    pub(super) memory: &'a [Range],
}

impl Layout<'_> {
    /// How a page is mapped.
    fn flags(&self, address: u64) -> u64 {
        let image = &self.image;
        if (image.start..image.text_end).contains(&address) {
            PRESENT
        } else if (image.text_end..image.rodata_end).contains(&address) {
            PRESENT | NO_EXECUTE
        } else if (image.rodata_end..image.end).contains(&address)
            || self.memory.iter().any(|range| (range.start..range.end).contains(&address))
        {
            PRESENT | WRITABLE | NO_EXECUTE
        } else {
            PRESENT | WRITABLE | NO_EXECUTE | UNCACHED
        }
    }

    /// How a large page is mapped, if it is mapped alike from end to end.
    fn large_flags(&self, address: u64) -> Option<u64> {
        let end = address + LARGE_PAGE;
        let bounds = [self.image.start, self.image.text_end, self.image.rodata_end, self.image.end];
        let cut = |bound: &u64| address < *bound && *bound < end;
        let whole =
            !bounds.iter().any(cut) && !self.memory.iter().any(|range| cut(&range.start) || cut(&range.end));
        whole.then(|| self.flags(address))
    }

    /// The last address that is mapped, plus one.
    fn end(&self) -> u64 {
        let memory = self.memory.iter().map(|range| range.end).max().unwrap_or(0);
        memory.max(DEVICES_END).next_multiple_of(LARGE_PAGE)
    }

    /// Whether a large page has to be mapped: all of them where devices are, those with RAM above.
    fn is_used(&self, address: u64) -> bool {
        let end = address + LARGE_PAGE;
        address < DEVICES_END || self.memory.iter().any(|range| range.start < end && address < range.end)
    }
}

/// Page tables, in frames that `allocate` gives.
pub(super) struct PageTables<A> {
    root: u64,
    allocate: A,
}

impl<A: FnMut() -> Result<u64, MemoryError>> PageTables<A> {
    /// Empty ones.
    pub(super) fn new(mut allocate: A) -> Result<Self, MemoryError> {
        let root = allocate()?;
        // SAFETY: what `allocate` gives is a free frame, mapped at its address.
        unsafe { clear(root) };
        Ok(Self { root, allocate })
    }

    /// Maps everything.
    ///
    /// # Safety
    /// The frames are mapped at their addresses, and nobody else's.
    pub(super) unsafe fn map_all(&mut self, layout: &Layout<'_>) -> Result<(), MemoryError> {
        for large in (0..layout.end()).step_by(LARGE_PAGE as usize).filter(|at| layout.is_used(*at)) {
            match layout.large_flags(large) {
                // SAFETY: the caller's promise.
                Some(flags) => unsafe { self.map(large, 2, flags | LARGE)? },
                None => {
                    for page in (large..large + LARGE_PAGE).step_by(PAGE as usize) {
                        // SAFETY: as above.
                        unsafe { self.map(page, 1, layout.flags(page))? };
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets the entry of `level` for an address.
    ///
    /// # Safety
    /// As [`PageTables::map_all`].
    unsafe fn map(&mut self, address: u64, level: u32, flags: u64) -> Result<(), MemoryError> {
        let mut table = self.root;
        for above in (level + 1..=4).rev() {
            let entry = entry(table, address, above);
            // SAFETY: `table` is one of our frames, so that the entry lies in it.
            table = match unsafe { entry.read() } & ADDRESS {
                0 => {
                    let new = (self.allocate)()?;
                    // SAFETY: a free frame; and the entry as above.
                    unsafe {
                        clear(new);
                        entry.write(new | PRESENT | WRITABLE);
                    }
                    new
                }
                below => below,
            };
        }
        // SAFETY: as above.
        unsafe { entry(table, address, level).write(address | flags) };
        Ok(())
    }

    /// Uses them from now on, for good.
    ///
    /// # Safety
    /// At privilege level 0; everything in use is mapped where it is.
    pub(super) unsafe fn load(&self) {
        // SAFETY: the caller's promise.
        unsafe { asm!("mov cr3, {}", in(reg) self.root, options(nostack, preserves_flags)) };
    }
}

/// The entry for an address in a table of a level, 4 being the root's.
fn entry(table: u64, address: u64, level: u32) -> *mut u64 {
    let index = address >> (12 + 9 * (level - 1)) & 511;
    (table + 8 * index) as *mut u64
}

/// Makes a table empty.
///
/// # Safety
/// `table` is a mapped frame that nobody else uses.
unsafe fn clear(table: u64) {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::write_bytes(table as *mut u8, 0, PAGE as usize) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;

    #[repr(align(4096))]
    struct Frame([u8; PAGE as usize]);

    const MEMORY: [Range; 3] = [
        Range { start: 0, end: 0x9_f000 },
        Range { start: 0x10_0000, end: 0x3ff0_0000 },
        Range { start: 0x1_0000_0000, end: 0x1_4000_0000 },
    ];

    fn layout() -> Layout<'static> {
        let image = Image { start: 0x20_0000, text_end: 0x28_1000, rodata_end: 0x2a_0000, end: 0x30_0000 };
        Layout { image, memory: &MEMORY }
    }

    #[test]
    fn nothing_is_writable_and_executable() {
        let layout = layout();
        for address in (0..layout.end()).step_by(0x1000) {
            let flags = layout.flags(address);
            assert!(flags & WRITABLE == 0 || flags & NO_EXECUTE != 0, "{address:#x}");
            assert_eq!(flags & NO_EXECUTE == 0, (0x20_0000..0x28_1000).contains(&address), "{address:#x}");
        }
        assert_eq!(layout.flags(0x28_1000), PRESENT | NO_EXECUTE);
        assert_eq!(layout.flags(0xfee0_0000) & UNCACHED, UNCACHED);
        assert_eq!(layout.flags(0x9_e000) & UNCACHED, 0);
        assert_eq!(layout.flags(0x9_f000) & UNCACHED, UNCACHED);
    }

    #[test]
    fn large_pages_are_of_one_kind() {
        let layout = layout();
        assert_eq!(layout.large_flags(0), None);
        assert_eq!(layout.large_flags(0x20_0000), None);
        assert_eq!(layout.large_flags(0x40_0000), Some(PRESENT | WRITABLE | NO_EXECUTE));
        assert_eq!(layout.large_flags(0x3fe0_0000), None);
        assert!(
            layout.is_used(0xfee0_0000) && layout.is_used(0x1_3fe0_0000) && !layout.is_used(0x1_4000_0000)
        );
    }

    #[test]
    fn the_tables_say_what_the_layout_says() {
        let layout = layout();
        let allocate = || Ok(Box::leak(Box::new(Frame([0xff; PAGE as usize]))).0.as_ptr() as u64);
        let mut tables = PageTables::new(allocate).unwrap();
        // SAFETY: the frames are the test's own.
        unsafe { tables.map_all(&layout).unwrap() };
        let look = |address: u64| {
            let mut table = tables.root;
            for level in (1..=4).rev() {
                // SAFETY: as above.
                let found = unsafe { entry(table, address, level).read() };
                if found & PRESENT == 0 {
                    return None;
                }
                if level == 1 || found & LARGE != 0 {
                    let offset = address & ((1 << (12 + 9 * (level - 1))) - 1);
                    return Some(((found & ADDRESS) + offset, found & !ADDRESS & !LARGE));
                }
                table = found & ADDRESS;
            }
            None
        };
        for address in
            [0x1000, 0x20_0000, 0x28_0000, 0x28_1000, 0x2f_f000, 0x4321_5000, 0xfee0_0000, 0x1_3000_0000]
        {
            assert_eq!(look(address), Some((address, layout.flags(address))), "{address:#x}");
        }
        assert_eq!((look(0x1_4000_0000), look(0x80_0000_0000)), (None, None));
    }
}
