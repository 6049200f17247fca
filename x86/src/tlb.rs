//! A software translation look-aside buffer: direct-mapped, one entry per 4 KiB of linear address space.
//!
//! An entry holds the permissions of *all* privilege classes, so that neither a change of CPL nor of RFLAGS.AC
//! touches the buffer. Its tag joins the linear page with a *context*, a number of 12 bits that stands for one
//! PCID between two of its flushes: flushing a PCID is drawing a new number for it. Only RAM is cached; a page
//! of a device is walked anew each time.

use alloc::boxed::Box;

use crate::cpu::Access;

/// Entries; a power of two.
const ENTRIES: usize = 4096;
/// Contexts are 1 to this.
const LAST_CONTEXT: u16 = 0xfff;
const PAGE_MASK: u64 = !0xfff;
/// Bit of an entry's data: the translation is global.
pub(crate) const GLOBAL: u64 = 1 << 9;
/// Bit of an entry's data: the translation comes from a page larger than 4 KiB.
pub(crate) const LARGE: u64 = 1 << 10;
pub(crate) const GIANT: u64 = 1 << 11;
/// Log2 of the bytes around an address that INVLPG drops in a large page: the largest is of 4 MiB.
const LARGE_SHIFT: u32 = 22;
/// The same in a page of 1 GiB.
const GIANT_SHIFT: u32 = 30;
/// Log2 of [`REGIONS`].
const REGIONS_SHIFT: u32 = 16;
/// Bits of the filter of regions with large pages: so many that the pages of a program seldom meet those of a kernel's map of
/// all RAM, since each time that costs a flush of everything.
const REGIONS: usize = 1 << REGIONS_SHIFT;

/// For whom an access is made, as far as page permissions tell the difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2 with RFLAGS.AC clear, and every implicit access to a descriptor table or TSS.
    Supervisor = 1,
    /// CPL 0 to 2 with RFLAGS.AC set: SMAP is overridden.
    SupervisorAc = 2,
}

/// The bit of an entry's data that allows this access.
#[inline(always)]
pub(crate) const fn permission(access: Access, privilege: Privilege) -> u64 {
    1 << (access as u64 * 3 + privilege as u64)
}

/// So many entries are remembered for an emptying that touches nothing else.
const FEW: usize = 32;

/// Where a page stands in the buffer. Higher bits are mixed in, since two buffers that are copied from one to the
/// other are likely to lie a power of two apart, give or take a page.
#[inline(always)]
const fn index(linear: u64) -> usize {
    ((linear >> 12 ^ linear >> 18) & (ENTRIES as u64 - 1)) as usize
}

/// Word and bit of the filter of large pages for the region of 1 << `shift` bytes that an address lies in.
const fn region(linear: u64, shift: u32) -> (usize, u64) {
    let number = (linear >> shift).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - REGIONS_SHIFT);
    (number as usize / 64, 1 << (number % 64))
}

#[derive(Clone, Copy)]
struct Entry {
    /// Linear page | context; context 0: empty.
    tag: u64,
    /// Offset in RAM of the page | permission bits | GLOBAL | LARGE | GIANT.
    data: u64,
}

const EMPTY: Entry = Entry { tag: 0, data: 0 };

/// What happened to the buffer since somebody last asked: for an engine that caches translations of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlbChanges {
    /// Translations were dropped that are not all named in `page`.
    pub flushed: bool,
    /// The translations of this one address were dropped.
    pub page: Option<u64>,
    /// Another PCID or page-table root is in use: see [`crate::cpu::Cpu::address_space`].
    pub switched: bool,
}

/// The buffer.
pub(crate) struct Tlb {
    /// Context of the current PCID.
    context: u64,
    entries: Box<[Entry; ENTRIES]>,
    /// Context of each PCID; 0: none yet.
    contexts: Box<[u16; 4096]>,
    last_drawn: u16,
    /// Regions in which large pages have been cached since the last full flush: a filter, some regions share a bit.
    large_regions: Box<[u64; REGIONS / 64]>,
    /// Linear addresses of the entries that were made since the buffer was empty, and how many there are, which may be more.
    filled: ([u64; FEW], usize),
    /// The PCIDs that have a context since then; `last_drawn` counts them.
    drawn: [u16; FEW],
    changes: TlbChanges,
}

impl Tlb {
    pub(crate) fn new() -> Self {
        let mut tlb = Self {
            context: 0,
            entries: Box::new([EMPTY; ENTRIES]),
            contexts: Box::new([0; 4096]),
            last_drawn: 0,
            large_regions: Box::new([0; REGIONS / 64]),
            filled: ([0; FEW], 0),
            drawn: [0; FEW],
            changes: TlbChanges::default(),
        };
        tlb.select(0);
        tlb
    }

    /// Offset in RAM of the byte at `linear`, if it is cached with one of the wanted permissions.
    #[inline(always)]
    pub(crate) fn lookup(&self, linear: u64, wanted: u64) -> Option<u64> {
        let entry = &self.entries[index(linear)];
        if entry.tag == (linear & PAGE_MASK | self.context) && entry.data & wanted != 0 {
            Some(entry.data & PAGE_MASK | linear & !PAGE_MASK)
        } else {
            None
        }
    }

    /// The second try: an entry of a global page that another PCID has filled.
    pub(crate) fn lookup_global(&mut self, linear: u64, wanted: u64) -> Option<u64> {
        let entry = &mut self.entries[index(linear)];
        let same_page = (entry.tag ^ linear) & PAGE_MASK == 0 && entry.tag & !PAGE_MASK != 0;
        if same_page && entry.data & GLOBAL != 0 && entry.data & wanted != 0 {
            entry.tag = linear & PAGE_MASK | self.context;
            return Some(entry.data & PAGE_MASK | linear & !PAGE_MASK);
        }
        None
    }

    /// Enters a translation: offset in RAM of the page, permission bits, GLOBAL, LARGE, GIANT.
    pub(crate) fn insert(&mut self, linear: u64, data: u64) {
        for (flag, shift) in [(LARGE, LARGE_SHIFT), (GIANT, GIANT_SHIFT)] {
            if data & flag != 0 {
                let (word, bit) = region(linear, shift);
                self.large_regions[word] |= bit;
            }
        }
        let (filled, count) = &mut self.filled;
        if let Some(place) = filled.get_mut(*count) {
            *place = linear;
            *count += 1;
        } else {
            *count = FEW + 1;
        }
        let tag = linear & PAGE_MASK | self.context;
        self.entries[index(linear)] = Entry { tag, data };
    }

    /// Makes `pcid` the current one, keeping what is cached for it.
    pub(crate) fn select(&mut self, pcid: u16) {
        let slot = usize::from(pcid & 0xfff);
        if self.contexts[slot] == 0 {
            if self.last_drawn == LAST_CONTEXT {
                self.clear();
            }
            if let Some(place) = self.drawn.get_mut(usize::from(self.last_drawn)) {
                *place = slot as u16;
            }
            self.last_drawn += 1;
            self.contexts[slot] = self.last_drawn;
        }
        let context = self.contexts[slot].into();
        self.changes.switched |= context != self.context;
        self.context = context;
    }

    /// The number that stands for the current PCID since its last flush.
    pub(crate) fn context(&self) -> u16 {
        self.context as u16
    }

    /// Whether the entry for the page, if there is one, is global.
    pub(crate) fn is_global(&self, linear: u64) -> bool {
        let entry = &self.entries[index(linear)];
        entry.tag == (linear & PAGE_MASK | self.context) && entry.data & GLOBAL != 0
    }

    /// What happened since the last call.
    pub(crate) fn take_changes(&mut self) -> TlbChanges {
        core::mem::take(&mut self.changes)
    }

    /// Drops all translations of `pcid` but the global ones. `current`: the PCID in use.
    pub(crate) fn flush_pcid(&mut self, pcid: u16, current: u16) {
        self.contexts[usize::from(pcid & 0xfff)] = 0;
        self.select(current);
    }

    /// Drops everything. `current`: the PCID in use.
    pub(crate) fn flush_all(&mut self, current: u16) {
        self.clear();
        self.select(current);
    }

    /// Drops all translations of all PCIDs but the global ones.
    pub(crate) fn flush_non_global(&mut self, current: u16) {
        for entry in self.entries.iter_mut().filter(|entry| entry.data & GLOBAL == 0) {
            *entry = EMPTY;
        }
        self.changes.flushed = true;
        self.select(current);
    }

    /// Drops the translations of one address in all PCIDs, global or not; of a large page, all of its parts.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        match self.changes.page {
            Some(page) if page != linear => self.changes.flushed = true,
            _ => self.changes.page = Some(linear),
        }
        let entry = &mut self.entries[index(linear)];
        if (entry.tag ^ linear) & PAGE_MASK == 0 {
            *entry = EMPTY;
        }
        for (flag, shift) in [(LARGE, LARGE_SHIFT), (GIANT, GIANT_SHIFT)] {
            let (word, bit) = region(linear, shift);
            if self.large_regions[word] & bit != 0 {
                // The part of the page that holds `linear` need not be cached while others are, here or elsewhere.
                self.changes.flushed = true;
                for entry in self.entries.iter_mut() {
                    if entry.data & flag != 0 && (entry.tag ^ linear) >> shift == 0 {
                        *entry = EMPTY;
                    }
                }
            }
        }
    }

    fn clear(&mut self) {
        self.changes.flushed = true;
        let (filled, count) = &self.filled;
        match filled.get(..*count) {
            Some(filled) => {
                for linear in filled {
                    self.entries[index(*linear)] = EMPTY;
                    for shift in [LARGE_SHIFT, GIANT_SHIFT] {
                        self.large_regions[region(*linear, shift).0] = 0;
                    }
                }
            }
            None => {
                self.entries.fill(EMPTY);
                self.large_regions.fill(0);
            }
        }
        match self.drawn.get(..usize::from(self.last_drawn)) {
            Some(drawn) => drawn.iter().for_each(|slot| self.contexts[usize::from(*slot)] = 0),
            None => self.contexts.fill(0),
        }
        self.filled.1 = 0;
        self.last_drawn = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u64 = permission(Access::Read, Privilege::Supervisor);
    const WRITE: u64 = permission(Access::Write, Privilege::Supervisor);

    #[test]
    fn permissions_are_separate() {
        let mut tlb = Tlb::new();
        tlb.insert(0x1234_5000, 0x7000 | READ);
        assert_eq!(tlb.lookup(0x1234_5678, READ), Some(0x7678));
        assert_eq!(tlb.lookup(0x1234_5678, WRITE), None);
        assert_eq!(tlb.lookup(0x1234_6678, READ), None);
        assert_eq!(tlb.lookup(0x1_1234_5678, READ), None);
    }

    #[test]
    fn pcids_do_not_mix_and_global_entries_are_shared() {
        let mut tlb = Tlb::new();
        tlb.insert(0x5000, 0x7000 | READ);
        tlb.insert(0x6000, 0x8000 | READ | GLOBAL);
        tlb.select(5);
        assert_eq!(tlb.lookup(0x5000, READ), None);
        assert_eq!(tlb.lookup_global(0x5000, READ), None);
        assert_eq!(tlb.lookup_global(0x6000, READ), Some(0x8000));
        tlb.select(0);
        assert_eq!(tlb.lookup(0x5000, READ), Some(0x7000));
        tlb.flush_pcid(0, 0);
        assert_eq!(tlb.lookup(0x5000, READ), None);
        assert_eq!(tlb.lookup_global(0x6000, READ), Some(0x8000));
        tlb.flush_all(0);
        assert_eq!(tlb.lookup_global(0x6000, READ), None);
    }

    #[test]
    fn neighbours_and_buffers_a_power_of_two_apart_have_places_of_their_own() {
        let mut tlb = Tlb::new();
        let pages = (0..ENTRIES as u64).map(|page| 0x7f12_3400_0000 + (page << 12));
        pages.clone().for_each(|linear| tlb.insert(linear, READ));
        assert!(pages.into_iter().all(|linear| tlb.lookup(linear, READ).is_some()));
        for distance in [1 << 24, (1 << 24) + 0x1000, (1 << 26) + 0x1000, (1 << 29) - 0x1000] {
            for page in 0..32 {
                let linear = 0x7f00_0000_0000 + (page << 12);
                assert!((0..32).all(|other| index(linear + distance + (other << 12)) != index(linear)));
            }
        }
    }

    #[test]
    fn contexts_run_out_without_reviving_old_entries() {
        let mut tlb = Tlb::new();
        tlb.insert(0x5000, 0x7000 | READ);
        for _ in 0..2 * u32::from(LAST_CONTEXT) {
            tlb.flush_pcid(0, 0);
            assert_eq!(tlb.lookup(0x5000, READ), None);
        }
    }

    #[test]
    fn emptying_leaves_nothing_however_much_there_was() {
        for pages in [1, FEW as u64, FEW as u64 + 1, 1000] {
            let mut tlb = Tlb::new();
            for page in 0..pages {
                tlb.select(page as u16);
                tlb.insert(page << 21, READ | GLOBAL | LARGE | GIANT);
            }
            tlb.flush_all(7);
            assert!(tlb.entries.iter().all(|entry| entry.tag == 0 && entry.data == 0), "{pages}");
            assert!(tlb.large_regions.iter().all(|word| *word == 0), "{pages}");
            assert_eq!((tlb.contexts.iter().filter(|context| **context != 0).count(), tlb.context), (1, 1));
        }
    }

    #[test]
    fn flushing_an_address_drops_every_part_of_a_large_page() {
        let mut tlb = Tlb::new();
        tlb.insert(0x20_0000, 0x7000 | READ | LARGE);
        tlb.insert(0x20_1000, 0x8000 | READ | LARGE);
        tlb.insert(0x20_2000, 0x9000 | READ);
        tlb.flush_page(0x20_0000);
        assert_eq!(tlb.lookup(0x20_1000, READ), None);
        assert_eq!(tlb.lookup(0x20_2000, READ), Some(0x9000));
    }
}
