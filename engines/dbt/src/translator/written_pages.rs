//! Pages whose code is written about as often as it is executed, so that noticing the writes costs more than translated code
//! saves.

use rustc_hash::FxHashMap;

/// A page whose code was written this often is interpreted for a while.
const WRITES: u32 = 16;
/// So many times code of such a page is entered before translating it is tried again: at first, and at most if it goes on
/// being written.
const ENTRIES: [u32; 2] = [500, 4000];

#[derive(Clone, Copy)]
struct Page {
    /// How often translations were dropped.
    writes: u32,
    /// So many times more it is interpreted.
    entries_left: u32,
    /// How often it will be the next time.
    patience: u32,
}

/// What is known of them, by offset in RAM.
#[derive(Default)]
pub struct WrittenPages {
    pages: FxHashMap<u64, Page>,
}

impl WrittenPages {
    /// Translations of a page were dropped because it was written. Whether it is interpreted from now on.
    pub fn dropped(&mut self, page: u64) -> bool {
        let page =
            self.pages.entry(page).or_insert(Page { writes: 0, entries_left: 0, patience: ENTRIES[0] });
        page.writes += 1;
        let often = page.writes >= WRITES;
        if often {
            page.writes = WRITES / 2;
            page.entries_left = page.patience;
            page.patience = (page.patience * 2).min(ENTRIES[1]);
        }
        often
    }

    /// Whether the page is interpreted now.
    pub fn is_interpreted(&self, page: u64) -> bool {
        self.pages.get(&page).is_some_and(|page| page.entries_left > 0)
    }

    /// Code of a page is entered: whether it is to be interpreted.
    pub fn entered(&mut self, page: u64) -> bool {
        match self.pages.get_mut(&page) {
            Some(page) if page.entries_left > 0 => {
                page.entries_left -= 1;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes until it is interpreted, then executes until it isn't.
    fn round(pages: &mut WrittenPages) -> (u32, u32) {
        let (mut writes, mut entries) = (1, 0);
        while !pages.dropped(0x1000) {
            assert!(!pages.entered(0x1000));
            writes += 1;
        }
        while pages.entered(0x1000) {
            entries += 1;
        }
        (writes, entries)
    }

    #[test]
    fn what_goes_on_being_written_is_interpreted_for_longer_and_longer() {
        let mut pages = WrittenPages::default();
        let rounds = [0; 6].map(|_| round(&mut pages));
        assert_eq!(rounds, [(16, 500), (8, 1000), (8, 2000), (8, 4000), (8, 4000), (8, 4000)]);
        assert!(!pages.entered(0x2000) && !pages.is_interpreted(0x2000));
    }
}
