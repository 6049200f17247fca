//! Where jumps may lead without a look at the page tables, and when that ends.

use super::key::USER;
use super::vcpu::{DbtVcpu, GLOBAL_SPACE, PAGE_MASK, following_page};

/// No place in RAM: a page was found in several.
pub(super) const ELSEWHERE: u64 = u64::MAX;
/// Words of the filter of pages with code: linear page numbers are reduced to its bits.
pub(super) const FILTER_WORDS: usize = 1024;

impl DbtVcpu {
    fn filter_place(linear: u64) -> (usize, u64) {
        let page = (linear >> 12 ^ linear >> 28) as usize;
        (page / 64 % FILTER_WORDS, 1 << (page % 64))
    }

    pub(super) fn may_hold_code(&self, linear: u64) -> bool {
        let (word, bit) = Self::filter_place(linear);
        (self.code_filter[word] | self.global_code_filter[word]) & bit != 0
    }

    /// No jump leads to a page any more without a look at the page tables: not in the current address space, and if the page
    /// may be global, in none.
    pub(super) fn forget_jumps_to(&mut self, linear: u64) {
        let (word, bit) = Self::filter_place(linear);
        if self.global_code_filter[word] & bit != 0 && !self.is_kernel_page(linear) {
            self.forget_jumps();
        } else if self.code_filter[word] & bit != 0 {
            self.biases.forget_space(self.cpu.address_space());
            self.forgotten += 1;
            self.unlink(false);
        }
    }

    /// Whether a page of supervisor code that jumps lead to is still where it was.
    fn is_kernel_page(&self, linear: u64) -> bool {
        let page = self.kernel_pages.get_key_value(&(linear & PAGE_MASK));
        page.is_some_and(|(&page, &place)| self.cpu.global_code(&self.env, page) == Some(place))
    }

    /// Whether all supervisor code that jumps lead to is still where it was: guests flush everything for other reasons, and
    /// to find all jumps again takes longer.
    pub(super) fn kernel_stays(&self) -> bool {
        let stays = |(&page, &place): (&u64, &u64)| self.cpu.global_code(&self.env, page) == Some(place);
        self.global_kernel && self.kernel_pages.iter().all(stays)
    }

    /// Notes that jumps to this instruction pointer, where the block begins, may be taken without a look at the page tables.
    pub(super) fn note_code(&mut self, rip: u64, block: u32) {
        let Some(block) = self.cache.block(block) else { return };
        let second = block.second().map(|place| (following_page(rip), place));
        let user = block.key.class() == USER;
        for (linear, place) in [(rip, block.offset)].into_iter().chain(second) {
            let (word, bit) = Self::filter_place(linear);
            let global = self.cpu.is_global(linear);
            let filter = if global { &mut self.global_code_filter } else { &mut self.code_filter };
            filter[word] |= bit;
            if self.global_kernel && !user {
                let place = place & PAGE_MASK;
                let known = self.kernel_pages.entry(linear & PAGE_MASK).or_insert(place);
                if *known != place {
                    *known = ELSEWHERE;
                }
            }
        }
    }

    /// No jump leads anywhere any more without a look at the page tables.
    pub(super) fn forget_jumps(&mut self) {
        self.statistics.jumps_forgotten += 1;
        self.biases.forget();
        self.forgotten += 1;
        self.unlink(true);
        self.code_filter.fill(0);
        self.global_code_filter.fill(0);
        self.kernel_pages.clear();
    }

    /// The same, but to supervisor code.
    pub(super) fn forget_local_jumps(&mut self) {
        self.biases.forget_all_but(GLOBAL_SPACE);
        self.forgotten += 1;
        self.unlink(false);
        self.code_filter.fill(0);
    }
}
