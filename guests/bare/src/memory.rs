//! Page tables and the pages they are made of (Intel SDM volume 3, chapter 4).
use crate::{Global, cpu};

/// Entry bits, the same at every level.
pub mod bit {
    #![allow(missing_docs)]
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const PWT: u64 = 1 << 3;
    pub const PCD: u64 = 1 << 4;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    /// In a directory or directory pointer entry: maps a large page.
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

/// Page fault error code bits (Intel SDM volume 3, figure 4-12).
pub mod fault {
    #![allow(missing_docs)]
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const RSVD: u64 = 1 << 3;
    pub const I: u64 = 1 << 4;
}

/// Bytes of a 2 MiB page.
pub const LARGE: u64 = 1 << 21;

/// Bits of an entry that hold a physical address.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

unsafe extern "C" {
    static image_end: u8;
    static boot_pml4: u64;
}

static NEXT_PAGE: Global<u64> = Global::new(0);

/// Takes `count` zeroed pages behind the image, never to be given back.
pub fn pages(count: u64) -> u64 {
    if NEXT_PAGE.get() == 0 {
        NEXT_PAGE.set((&raw const image_end) as u64);
    }
    let page = NEXT_PAGE.get();
    NEXT_PAGE.set(page + count * 4096);
    for word in 0..count * 512 {
        write(page + word * 8, 0u64);
    }
    page
}

/// Takes `count` zeroed pages whose address is a multiple of `alignment` (a power of two).
pub fn aligned_pages(count: u64, alignment: u64) -> u64 {
    let page = pages(0);
    pages((page.wrapping_neg() & (alignment - 1)) >> 12);
    pages(count)
}

/// Reads memory.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the guest owns its machine's memory; an address outside it faults or reads as a device.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes memory.
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: as in `read`; what lies there is the caller's.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// Root of the tables that the start-up code made: 4 GiB one to one, for ring 0, writable, in 2 MiB pages.
pub fn boot_root() -> u64 {
    (&raw const boot_pml4) as u64
}

/// A set of 4-level tables that starts with the lowest 4 GiB one to one, in 2 MiB pages for ring 0, writable.
#[derive(Clone, Copy)]
pub struct Tables {
    /// Physical address of the PML4.
    pub root: u64,
}

impl Tables {
    /// Makes tables; the upper levels leave every right to the pages.
    pub fn new() -> Self {
        let tables = Self { root: pages(1) };
        for address in (0..1 << 32).step_by(LARGE as usize) {
            write(tables.entry(address, 2), address | bit::P | bit::W | bit::PS);
        }
        tables
    }

    /// Loads them.
    pub fn load(&self) {
        cpu::write_cr3(self.root);
    }

    /// Address of the entry that maps `address` at `level` (1: a 4 KiB page, 2: 2 MiB, 3: 1 GiB, 4: the PML4);
    /// tables on the way are made with all rights, in the place of large pages, too.
    pub fn entry(&self, address: u64, level: u32) -> u64 {
        let mut table = self.root;
        for upper in (level + 1..=4).rev() {
            let entry = table + (address >> (12 + 9 * (upper - 1)) & 511) * 8;
            let mut value: u64 = read(entry);
            if value & bit::P == 0 || value & bit::PS != 0 && upper <= 3 {
                value = pages(1) | bit::P | bit::W | bit::U;
                write(entry, value);
            }
            table = value & ADDRESS;
        }
        table + (address >> (12 + 9 * (level - 1)) & 511) * 8
    }

    /// Maps one 4 KiB page.
    pub fn map(&self, address: u64, physical: u64, bits: u64) {
        write(self.entry(address, 1), physical | bits);
        cpu::invlpg(address);
    }
}

impl Default for Tables {
    fn default() -> Self {
        Self::new()
    }
}
