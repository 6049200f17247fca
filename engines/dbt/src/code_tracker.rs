//! Which pages of RAM hold instructions that some virtual processor has cached, and when they were written.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Shift from an offset in RAM to a page number.
const PAGE_SHIFT: u32 = 12;
/// Bit of a page's word: instructions of the page are cached somewhere. The other bits count its generations.
const CACHED: u32 = 1;
/// Epochs whose pages are remembered.
const RECENT: usize = 1024;
/// `membarrier` command: a full barrier on every running thread of this process.
const MEMBARRIER_PRIVATE_EXPEDITED: i32 = 1 << 3;
/// `membarrier` command: announces the use of the former.
const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

/// The record of cached code, shared by all virtual processors of a machine.
///
/// The order that makes it right between threads: who caches marks the page first and reads the instructions then;
/// who writes stores first and looks for the mark then. A barrier on all threads, issued by the one who marks,
/// keeps a writer's store from being delayed past its look, so that stores need no barrier of their own.
pub struct CodeTracker {
    pages: Box<[AtomicU32]>,
    epoch: AtomicU64,
    /// The pages of the last epochs: that of epoch n stands at n modulo the length.
    recent: Mutex<[u64; RECENT]>,
    has_barrier: bool,
}

fn membarrier(command: i32) -> bool {
    // SAFETY: the system call takes two integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0) == 0 }
}

impl CodeTracker {
    /// A record for RAM of this many bytes.
    pub fn new(ram_size: u64) -> Self {
        let pages = ram_size.div_ceil(1 << PAGE_SHIFT) as usize;
        Self {
            pages: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            epoch: AtomicU64::new(0),
            recent: Mutex::new([0; RECENT]),
            has_barrier: membarrier(MEMBARRIER_REGISTER_PRIVATE_EXPEDITED),
        }
    }

    fn page(&self, offset: u64) -> Option<&AtomicU32> {
        self.pages.get((offset >> PAGE_SHIFT) as usize)
    }

    /// Notes that instructions of the page at this offset are about to be read and cached. Returns the generation,
    /// and whether nothing of the page was cached before.
    pub fn mark(&self, offset: u64) -> (u32, bool) {
        let Some(page) = self.page(offset) else { return (0, false) };
        let before = page.fetch_or(CACHED, Ordering::SeqCst);
        let is_new = before & CACHED == 0;
        if is_new && self.has_barrier {
            membarrier(MEMBARRIER_PRIVATE_EXPEDITED);
        }
        (before >> 1, is_new)
    }

    /// Whether instructions of the page at this offset are cached.
    pub fn is_cached(&self, offset: u64) -> bool {
        self.page(offset).is_some_and(|page| page.load(Ordering::SeqCst) & CACHED != 0)
    }

    /// The page's generation.
    pub fn generation(&self, offset: u64) -> u32 {
        self.page(offset).map_or(0, |page| page.load(Ordering::Acquire) >> 1)
    }

    /// A count that grows whenever a generation changes.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Notes a store to the page at this offset; call after storing.
    #[inline]
    pub fn written(&self, offset: u64) {
        if let Some(page) = self.page(offset)
            && page.load(Ordering::Relaxed) & CACHED != 0
        {
            self.new_generation(page, offset);
        }
    }

    /// Offsets of the pages whose generation changed after `epoch` (got from [`CodeTracker::epoch`]), up to the
    /// returned one; `None` if they were too many to remember.
    pub fn written_since(&self, epoch: u64) -> (u64, Option<Vec<u64>>) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.epoch.load(Ordering::Acquire);
        let count = now.wrapping_sub(epoch);
        let pages = (count <= RECENT as u64)
            .then(|| (epoch..now).map(|epoch| recent[epoch as usize % RECENT]).collect());
        (now, pages)
    }

    #[cold]
    fn new_generation(&self, page: &AtomicU32, offset: u64) {
        // Clears the mark (bit 0 is set, so adding one carries into the count).
        let changed = page.fetch_update(Ordering::SeqCst, Ordering::Relaxed, |word| {
            (word & CACHED != 0).then(|| word.wrapping_add(1))
        });
        if changed.is_ok() {
            let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            let epoch = self.epoch.load(Ordering::Acquire);
            recent[epoch as usize % RECENT] = offset >> PAGE_SHIFT << PAGE_SHIFT;
            self.epoch.store(epoch.wrapping_add(1), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_to_cached_code_starts_a_new_generation() {
        let tracker = CodeTracker::new(0x3000);
        let (first, is_new) = tracker.mark(0x1234);
        assert!(is_new && !tracker.mark(0x1000).1);
        let epoch = tracker.epoch();
        tracker.written(0x2000);
        assert_eq!((tracker.generation(0x1000), tracker.epoch()), (first, epoch));
        tracker.written(0x1fff);
        assert_ne!(tracker.generation(0x1000), first);
        assert_ne!(tracker.epoch(), epoch);
        let second = tracker.generation(0x1000);
        tracker.written(0x1000);
        assert_eq!(tracker.generation(0x1000), second, "nothing is cached any more");
    }

    #[test]
    fn offsets_outside_of_ram_are_ignored() {
        let tracker = CodeTracker::new(0x1000);
        assert_eq!(tracker.mark(u64::MAX), (0, false));
        tracker.written(0x1000);
        assert_eq!(tracker.epoch(), 0);
    }
}
