//! Which pages of RAM hold instructions that some virtual processor has cached, and when they were written.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Shift from an offset in RAM to a page number.
const PAGE_SHIFT: u32 = 12;
/// Bit of a page's word: instructions of the page are cached somewhere.
const CACHED: u32 = 1;
/// Bits of a page's word that count its writes while it is marked.
const WRITES: u32 = 31 << 1;
/// The other bits count the page's generations.
const GENERATION_SHIFT: u32 = 6;
/// Log2 of the bytes of a line, of which a page has 64.
const LINE_SHIFT: u64 = 6;
/// Epochs whose writes are remembered.
const RECENT: usize = 1024;
/// `membarrier` command: a full barrier on every running thread of this process.
const MEMBARRIER_PRIVATE_EXPEDITED: i32 = 1 << 3;
/// `membarrier` command: announces the use of the former.
const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

/// A write to a page that holds cached instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeWrite {
    /// Offset in RAM of the page.
    pub page: u64,
    /// Its lines of 64 bytes that were written, a bit each; all of them if everything cached of the page is to go.
    pub lines: u64,
}

/// Lines of its page that the bytes from an offset on lie in, as far as they lie in that page.
pub fn lines(offset: u64, length: u64) -> u64 {
    let first = offset & 0xfff;
    let last = (first + length.max(1) - 1).min(0xfff);
    let (first, last) = (first >> LINE_SHIFT, last >> LINE_SHIFT);
    u64::MAX << first & u64::MAX >> (63 - last)
}

/// The record of cached code, shared by all virtual processors of a machine.
///
/// The order that makes it right between threads: who caches marks the page first and reads the instructions then;
/// who writes stores first and looks for the mark then. A barrier on all threads, issued by the one who marks,
/// keeps a writer's store from being delayed past its look, so that stores need no barrier of their own.
///
/// A page stays marked when it is written, since its other instructions stay cached; after a few writes the mark goes
/// and with it all that is cached of the page, so that memory that holds data now is written at full speed.
pub struct CodeTracker {
    pages: Box<[AtomicU32]>,
    epoch: AtomicU64,
    /// The writes of the last epochs: that of epoch n stands at n modulo the length.
    recent: Mutex<Box<[CodeWrite; RECENT]>>,
    has_barrier: bool,
    /// Several threads store to RAM.
    is_shared: AtomicBool,
}

fn membarrier(command: i32) -> bool {
    // SAFETY: the system call takes two integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0) == 0 }
}

/// A full barrier on every running thread of this process, once a record has been made.
pub fn barrier() {
    membarrier(MEMBARRIER_PRIVATE_EXPEDITED);
}

impl CodeTracker {
    /// A record for RAM of this many bytes.
    pub fn new(ram_size: u64) -> Self {
        let pages = ram_size.div_ceil(1 << PAGE_SHIFT) as usize;
        Self {
            pages: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            epoch: AtomicU64::new(0),
            recent: Mutex::new(Box::new([CodeWrite::default(); RECENT])),
            has_barrier: membarrier(MEMBARRIER_REGISTER_PRIVATE_EXPEDITED),
            is_shared: AtomicBool::new(false),
        }
    }

    /// From now on another thread stores to RAM, too. Call before it starts.
    pub fn share(&self) {
        self.is_shared.store(true, Ordering::SeqCst);
    }

    fn page(&self, offset: u64) -> Option<&AtomicU32> {
        self.pages.get((offset >> PAGE_SHIFT) as usize)
    }

    /// Notes that instructions of the page at this offset are about to be read and cached. Returns the generation,
    /// and whether nothing of the page was cached before.
    pub fn mark(&self, offset: u64) -> (u32, bool) {
        let Some(page) = self.page(offset) else { return (0, false) };
        let mut before = page.load(Ordering::SeqCst);
        if before & CACHED == 0 {
            before = page.fetch_or(CACHED, Ordering::SeqCst);
        }
        let is_new = before & CACHED == 0;
        if is_new && self.has_barrier && self.is_shared.load(Ordering::Relaxed) {
            barrier();
        }
        (before >> GENERATION_SHIFT, is_new)
    }

    /// Whether instructions of the page at this offset are cached.
    pub fn is_cached(&self, offset: u64) -> bool {
        self.page(offset).is_some_and(|page| page.load(Ordering::SeqCst) & CACHED != 0)
    }

    /// The page's generation.
    pub fn generation(&self, offset: u64) -> u32 {
        self.page(offset).map_or(0, |page| page.load(Ordering::Acquire) >> GENERATION_SHIFT)
    }

    /// A count that grows whenever a generation changes.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Notes a store of bytes to the page at this offset; call after storing. Whether instructions of it are cached.
    #[inline]
    pub fn written(&self, offset: u64, length: u64) -> bool {
        match self.page(offset) {
            Some(page) if page.load(Ordering::Relaxed) & CACHED != 0 => {
                self.new_generation(page, offset, length, false)
            }
            _ => false,
        }
    }

    /// Notes that bytes were written, which may lie in several pages. Whether instructions of any are cached.
    pub fn written_range(&self, offset: u64, length: u64) -> bool {
        let end = offset.saturating_add(length);
        let mut from = offset;
        let mut cached = false;
        while from < end {
            let to = ((from >> PAGE_SHIFT) + 1 << PAGE_SHIFT).min(end);
            cached |= self.written(from, to - from);
            from = to;
        }
        cached
    }

    /// The writes after `epoch` (got from [`CodeTracker::epoch`]), up to the returned one; `None` if they were too
    /// many to remember.
    pub fn written_since(&self, epoch: u64) -> (u64, Option<Vec<CodeWrite>>) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.epoch.load(Ordering::Acquire);
        let count = now.wrapping_sub(epoch);
        let writes = (count <= RECENT as u64)
            .then(|| (epoch..now).map(|epoch| recent[epoch as usize % RECENT]).collect());
        (now, writes)
    }

    /// Nothing of the page at this offset is to be cached any more, as after many writes: the next ones are quick. Whether
    /// anything was.
    pub fn release(&self, offset: u64) -> bool {
        self.page(offset).is_some_and(|page| self.new_generation(page, offset, 1, true))
    }

    #[cold]
    fn new_generation(&self, page: &AtomicU32, offset: u64, length: u64, release: bool) -> bool {
        let mut last = false;
        let changed = page.fetch_update(Ordering::SeqCst, Ordering::Relaxed, |word| {
            last = release || word & WRITES == WRITES;
            let next = (word & !(CACHED | WRITES)).wrapping_add(1 << GENERATION_SHIFT);
            let kept = if last { 0 } else { (word & WRITES) + (1 << 1) | CACHED };
            (word & CACHED != 0).then_some(next | kept)
        });
        if changed.is_err() {
            return false;
        }
        let lines = if last { u64::MAX } else { lines(offset, length) };
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let epoch = self.epoch.load(Ordering::Acquire);
        recent[epoch as usize % RECENT] = CodeWrite { page: offset >> PAGE_SHIFT << PAGE_SHIFT, lines };
        self.epoch.store(epoch.wrapping_add(1), Ordering::SeqCst);
        true
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
        assert!(!tracker.written(0x2000, 8));
        assert_eq!((tracker.generation(0x1000), tracker.epoch()), (first, epoch));
        assert!(tracker.written(0x1fff, 1));
        assert_ne!(tracker.generation(0x1000), first);
        let write = CodeWrite { page: 0x1000, lines: 1 << 63 };
        assert_eq!(tracker.written_since(epoch), (epoch + 1, Some(vec![write])));
    }

    #[test]
    fn after_some_writes_nothing_is_cached_any_more() {
        let tracker = CodeTracker::new(0x3000);
        tracker.mark(0x1000);
        let mut epoch = 0;
        while tracker.is_cached(0x1000) {
            epoch = tracker.epoch();
            assert!(tracker.written(0x1000, 4));
        }
        assert_eq!(epoch, 31);
        let all = CodeWrite { page: 0x1000, lines: u64::MAX };
        assert_eq!(tracker.written_since(epoch), (32, Some(vec![all])));
        assert!(!tracker.written(0x1000, 4));
        let generation = tracker.generation(0x1000);
        assert_eq!(tracker.mark(0x1000), (generation, true));
    }

    #[test]
    fn a_page_is_released_at_once() {
        let tracker = CodeTracker::new(0x3000);
        let (generation, _) = tracker.mark(0x1000);
        let epoch = tracker.epoch();
        assert!(tracker.release(0x1000));
        assert!(!tracker.release(0x2000));
        let all = CodeWrite { page: 0x1000, lines: u64::MAX };
        assert_eq!(tracker.written_since(epoch), (epoch + 1, Some(vec![all])));
        assert!(!tracker.is_cached(0x1000));
        assert_eq!(tracker.mark(0x1000), (generation + 1, true));
        assert!(tracker.written(0x1000, 4) && tracker.is_cached(0x1000));
    }

    #[test]
    fn lines_of_a_page() {
        assert_eq!(lines(0x1000, 1), 1);
        assert_eq!(lines(0x103f, 2), 3);
        assert_eq!(lines(0x1fff, 8), 1 << 63);
        assert_eq!(lines(0, 0x1000), u64::MAX);
        assert_eq!(lines(64, 0), 2);
    }

    #[test]
    fn offsets_outside_of_ram_are_ignored() {
        let tracker = CodeTracker::new(0x1000);
        assert_eq!(tracker.mark(u64::MAX), (0, false));
        assert!(!tracker.written(0x1000, 1));
        assert_eq!(tracker.epoch(), 0);
    }
}
