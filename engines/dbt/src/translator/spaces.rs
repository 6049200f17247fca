//! The inline TLBs of the address spaces that the guest used last.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use super::context::{NO_STACK_PAGE, Slot, TLB_EMPTY, TLB_ENTRIES, TlbEntry};
use super::windows::{Mapping, SPACES};

const CLASSES: usize = 3;
const WORDS: usize = TLB_ENTRIES / 64;
const PAGE_MASK: u64 = !0xfff;
/// A bit for each entry, by address space and privilege class.
type Bits = [[[AtomicU64; WORDS]; CLASSES]; SPACES];

/// No bit set.
fn no_bits() -> Box<Bits> {
    Box::new([const { [const { [const { AtomicU64::new(0) }; WORDS] }; CLASSES] }; SPACES])
}

/// The numbers of the bits that are set.
fn bits(words: &[AtomicU64]) -> impl Iterator<Item = usize> {
    words.iter().enumerate().flat_map(|(word, bits)| {
        let mut bits = bits.load(Ordering::SeqCst);
        std::iter::from_fn(move || {
            let number = word * 64 + bits.trailing_zeros() as usize;
            bits &= bits.checked_sub(1)?;
            Some(number)
        })
    })
}

/// The inline TLBs, as other threads may see them, with a record of which entries were ever filled.
pub struct SharedTlbs {
    mapping: Arc<Mapping>,
    /// How often stack windows and slots were emptied.
    resets: AtomicU64,
    /// An entry for stores made room for another since the processor last looked for a block: what was read of it may
    /// still be used.
    evicted: AtomicBool,
    touched: Box<Bits>,
    /// Those of them that may hold pages that are not global.
    local: Box<Bits>,
}

impl SharedTlbs {
    fn new(mapping: Arc<Mapping>) -> Self {
        let tlbs = Self {
            mapping,
            resets: AtomicU64::new(0),
            evicted: AtomicBool::new(false),
            touched: no_bits(),
            local: no_bits(),
        };
        for space in 0..SPACES {
            for tlb in &tlbs.mapping.tlbs(space).class {
                tlb.entries.iter().for_each(TlbEntry::clear);
            }
        }
        tlbs
    }

    /// Every entry that may be in use, of one class in one address space.
    fn used(&self, space: usize, class: usize) -> impl Iterator<Item = (usize, &TlbEntry)> {
        self.marked(&self.touched, space, class)
    }

    /// Every entry whose bit is set.
    fn marked<'a>(
        &'a self,
        marks: &'a Bits,
        space: usize,
        class: usize,
    ) -> impl Iterator<Item = (usize, &'a TlbEntry)> {
        let entries = &self.mapping.tlbs(space).class[class].entries;
        bits(&marks[space][class]).map(move |index| (index, &entries[index]))
    }

    /// How often stack windows and slots were emptied: what a block has checked holds until then.
    pub fn resets(&self) -> u64 {
        self.resets.load(Ordering::SeqCst)
    }

    /// A block is entered: no other one is in the middle of anything.
    pub fn enter_block(&self) {
        self.evicted.store(false, Ordering::SeqCst);
    }

    /// The mapping of what translated code works on.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The slots that may hold a page.
    fn filled_slots(&self) -> impl Iterator<Item = &Slot> {
        let slots = self.mapping.slots();
        bits(self.mapping.filled_slots()).map(|number| &slots[number])
    }

    /// Empties stack window and slots. May be called from any thread.
    pub fn forget_windows(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.mapping.stack_page().store(NO_STACK_PAGE, Ordering::Relaxed);
        self.filled_slots().for_each(|slot| slot.page.store(NO_STACK_PAGE, Ordering::Relaxed));
        fence(Ordering::SeqCst);
    }

    /// Whether stack window or a slot holds the page of a linear address.
    fn has_window_to(&self, linear: u64) -> bool {
        let page = linear & PAGE_MASK;
        let stack = self.mapping.stack_page().load(Ordering::SeqCst);
        stack == page || self.filled_slots().any(|slot| slot.page.load(Ordering::SeqCst) == page)
    }

    /// Whether stores to the page of RAM at this host address may go by the stack window or a slot.
    fn has_window(&self, host: u64) -> bool {
        let stack = self.mapping.stack_page().load(Ordering::SeqCst);
        let stack_host = self.mapping.stack_addend().load(Ordering::SeqCst).wrapping_add(stack);
        stack_host == host || self.filled_slots().any(|slot| slot.host.load(Ordering::SeqCst) == host)
    }

    /// Makes stores to the page of RAM at this host address go the slow way, once [`SharedTlbs::forget_windows`] was
    /// called too. Whether any went the quick way. May be called from any thread.
    pub fn forget_writes(&self, host: u64) -> bool {
        let mut any = self.has_window(host) || self.evicted.load(Ordering::SeqCst);
        for (_, entry) in
            (0..SPACES).flat_map(|space| (0..CLASSES).flat_map(move |class| self.used(space, class)))
        {
            let tag = entry.write.load(Ordering::Relaxed);
            if tag != TLB_EMPTY && entry.addend.load(Ordering::Relaxed).wrapping_add(tag << 12) == host {
                entry.write.store(TLB_EMPTY, Ordering::SeqCst);
                any = true;
            }
        }
        any
    }

    fn clear(&self, space: usize, class: usize) {
        self.used(space, class).for_each(|(_, entry)| entry.clear());
        self.touched[space][class].iter().for_each(|word| word.store(0, Ordering::Relaxed));
        self.local[space][class].iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Empties what is not global.
    fn clear_local(&self, space: usize, class: usize) {
        let local = self.marked(&self.local, space, class).map(|(_, entry)| entry);
        local.filter(|entry| entry.global.load(Ordering::Relaxed) == 0).for_each(TlbEntry::clear);
        self.local[space][class].iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

/// A page to be entered into the inline TLB.
pub struct Filling {
    /// Privilege class.
    pub class: u8,
    /// A linear address in the page.
    pub linear: u64,
    /// What to add to get the host's address.
    pub addend: u64,
    /// It may be written.
    pub write: bool,
    /// It is global.
    pub global: bool,
}

/// Which address space's TLBs are where.
pub struct Spaces {
    shared: Arc<SharedTlbs>,
    /// Number of the address space, as the processor gives it; 0 for none.
    numbers: [u16; SPACES],
    /// Their process-context identifiers.
    pcids: [u16; SPACES],
    last_used: [u64; SPACES],
    clock: u64,
    current: usize,
}

impl Spaces {
    /// Empty TLBs; `number`: the current address space.
    pub fn new(mapping: Arc<Mapping>, number: u16) -> Self {
        let mut numbers = [0; SPACES];
        numbers[0] = number;
        Self {
            shared: Arc::new(SharedTlbs::new(mapping)),
            numbers,
            pcids: [0; SPACES],
            last_used: [0; SPACES],
            clock: 0,
            current: 0,
        }
    }

    /// The TLBs, for other threads.
    pub fn shared(&self) -> &Arc<SharedTlbs> {
        &self.shared
    }

    /// The current address space's place.
    pub fn current(&self) -> usize {
        self.current
    }

    /// Empties stack window and slots.
    pub fn forget_windows(&mut self) {
        self.shared.forget_windows();
        // Translated code, which fills them, isn't executed meanwhile.
        self.shared.mapping.filled_slots().iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Makes the TLBs of an address space the current ones. The first ones of a PCID get what is global of those before;
    /// later ones are its last ones, emptied but for what is global.
    pub fn select(&mut self, number: u16, pcid: u16) {
        self.forget_windows();
        if self.numbers[self.current] == number {
            return;
        }
        self.clock += 1;
        self.last_used[self.current] = self.clock;
        if let Some(place) = self.numbers.iter().position(|&n| n == number) {
            self.current = place;
            return;
        }
        if let Some(place) = (0..SPACES).find(|&place| self.numbers[place] != 0 && self.pcids[place] == pcid)
        {
            (0..CLASSES).for_each(|class| self.shared.clear_local(place, class));
            self.numbers[place] = number;
            self.current = place;
            return;
        }
        let before = self.current;
        // Places that are free first, then the one that was used longest ago.
        let oldest = (0..SPACES)
            .filter(|&place| place != before)
            .min_by_key(|&place| if self.numbers[place] == 0 { 0 } else { self.last_used[place] + 1 });
        let place = oldest.unwrap_or(before);
        for class in 0..CLASSES {
            self.shared.clear(place, class);
            self.take_global(before, place, class);
        }
        self.numbers[place] = number;
        self.pcids[place] = pcid;
        self.current = place;
    }

    fn take_global(&self, from: usize, to: usize, class: usize) {
        let target = &self.shared.mapping.tlbs(to).class[class];
        for (index, entry) in self.shared.used(from, class) {
            let read = entry.read.load(Ordering::Relaxed);
            if entry.global.load(Ordering::Relaxed) == 0 || read == TLB_EMPTY {
                continue;
            }
            self.shared.touched[to][class][index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
            let new = &target.entries[index];
            new.addend.store(entry.addend.load(Ordering::Relaxed), Ordering::Relaxed);
            new.global.store(1, Ordering::Relaxed);
            new.read.store(read, Ordering::Relaxed);
            // Last, and only as far as another thread has not forbidden it meanwhile.
            new.write.store(entry.write.load(Ordering::SeqCst), Ordering::SeqCst);
            if entry.write.load(Ordering::SeqCst) == TLB_EMPTY {
                new.write.store(TLB_EMPTY, Ordering::SeqCst);
            }
        }
    }

    /// Empties everything.
    pub fn flush_all(&mut self, number: u16, pcid: u16) {
        self.forget_windows();
        for space in 0..SPACES {
            if self.numbers[space] != 0 {
                (0..CLASSES).for_each(|class| self.shared.clear(space, class));
                self.numbers[space] = 0;
            }
        }
        self.current = 0;
        self.numbers[0] = number;
        self.pcids[0] = pcid;
    }

    /// Forgets the page of a linear address in every address space.
    pub fn flush_page(&mut self, linear: u64) {
        if self.shared.has_window_to(linear) {
            self.forget_windows();
        }
        let page = linear >> 12;
        let index = page as usize % TLB_ENTRIES;
        for (space, class) in (0..SPACES).flat_map(|space| (0..CLASSES).map(move |class| (space, class))) {
            // Most were never filled. The entries themselves lie where they displace each other in the host's caches.
            let touched = self.shared.touched[space][class][index / 64].load(Ordering::Relaxed);
            if touched >> (index % 64) & 1 != 0 {
                let entry = &self.shared.mapping.tlbs(space).class[class].entries[index];
                if entry.read.load(Ordering::Relaxed) == page || entry.write.load(Ordering::Relaxed) == page {
                    entry.clear();
                }
            }
        }
    }

    /// Enters a page.
    pub fn insert(&mut self, page: &Filling) {
        let class = usize::from(page.class) % CLASSES;
        let number = page.linear >> 12;
        let index = number as usize % TLB_ENTRIES;
        self.shared.touched[self.current][class][index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
        if !page.global {
            self.shared.local[self.current][class][index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed);
        }
        let entry = &self.shared.mapping.tlbs(self.current).class[class].entries[index];
        let other = entry.addend.load(Ordering::Relaxed) != page.addend
            || entry.read.load(Ordering::Relaxed) != number;
        if other && entry.write.swap(TLB_EMPTY, Ordering::Relaxed) != TLB_EMPTY {
            self.shared.evicted.store(true, Ordering::SeqCst);
        }
        entry.addend.store(page.addend, Ordering::Relaxed);
        entry.global.store(page.global.into(), Ordering::Relaxed);
        // What may be written may be read (there is no write-only page).
        entry.read.store(number, Ordering::Relaxed);
        if page.write {
            entry.write.store(number, Ordering::SeqCst);
        }
    }

    /// Makes stores to a page go the slow way again.
    pub fn forbid_write(&mut self, class: u8, linear: u64) {
        let tlb = &self.shared.mapping.tlbs(self.current).class[usize::from(class) % CLASSES];
        tlb.entry(linear).write.store(TLB_EMPTY, Ordering::SeqCst);
    }

    /// Makes stores to the page of RAM at this host address go the slow way.
    pub fn protect(&mut self, host: u64) {
        self.shared.forget_writes(host & PAGE_MASK);
        self.forget_windows();
    }
}

#[cfg(test)]
mod tests {
    use super::super::windows::Windows;
    use super::*;

    fn tags(spaces: &Spaces, linear: u64) -> (bool, bool) {
        let entry = spaces.shared.mapping.tlbs(spaces.current).class[1].entry(linear);
        let page = linear >> 12;
        (entry.read.load(Ordering::Relaxed) == page, entry.write.load(Ordering::Relaxed) == page)
    }

    fn fill(spaces: &mut Spaces, linear: u64, global: bool) {
        spaces.insert(&Filling { class: 1, linear, addend: 0x10_0000, write: true, global });
    }

    #[test]
    fn a_flush_of_a_pcid_keeps_what_is_global() {
        let windows = Windows::new().unwrap();
        let mut spaces = Spaces::new(Arc::clone(windows.mapping()), 1);
        fill(&mut spaces, 0x5000, true);
        spaces.select(2, 7);
        assert_eq!(tags(&spaces, 0x5000), (true, true), "taken along");
        fill(&mut spaces, 0x6000, false);
        fill(&mut spaces, 0x7000, true);
        // A page that is not global takes the place of one that is, and the other way round.
        fill(&mut spaces, 0x8000, true);
        fill(&mut spaces, 0x8000 + ((TLB_ENTRIES as u64) << 12), false);
        fill(&mut spaces, 0x9000, false);
        fill(&mut spaces, 0x9000 + ((TLB_ENTRIES as u64) << 12), true);
        spaces.select(1, 0);
        assert_eq!(tags(&spaces, 0x6000), (false, false));
        spaces.select(3, 7);
        for (linear, kept) in [(0x5000, true), (0x6000, false), (0x7000, true), (0x8000, false)] {
            assert_eq!(tags(&spaces, linear), (kept, kept), "{linear:#x}");
        }
        assert_eq!(tags(&spaces, 0x8000 + ((TLB_ENTRIES as u64) << 12)), (false, false));
        assert_eq!(tags(&spaces, 0x9000 + ((TLB_ENTRIES as u64) << 12)), (true, true));
        spaces.flush_page(0x7000);
        assert_eq!(tags(&spaces, 0x7000), (false, false));
    }

    #[test]
    fn a_flush_of_a_page_empties_the_stack_window_only_if_it_is_there() {
        let windows = Windows::new().unwrap();
        let mut spaces = Spaces::new(Arc::clone(windows.mapping()), 1);
        let stack_page = windows.mapping().stack_page();
        stack_page.store(0x5000, Ordering::Relaxed);
        let resets = spaces.shared.resets();
        spaces.flush_page(0x6000);
        assert_eq!((stack_page.load(Ordering::Relaxed), spaces.shared.resets()), (0x5000, resets));
        spaces.flush_page(0x5fff);
        assert_eq!((stack_page.load(Ordering::Relaxed), spaces.shared.resets()), (NO_STACK_PAGE, resets + 1));
    }
}
