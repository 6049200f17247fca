//! The virtual processors of a machine that execute translated code, as they see each other: whoever caches code takes
//! the quick way of storing to it from all, and whoever writes cached code tells all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use bivisor_machine::host::Waker;

use crate::code_tracker;
use crate::host_thread::HostThread;

/// What a virtual processor lets others do to it, from their threads.
pub trait Peer: Send + Sync {
    /// Makes its stores to the page of RAM at this offset go the slow way, but for what [`Peer::forget_windows`] leaves.
    /// Whether any could go the quick way.
    fn forget_writes(&self, page: u64) -> bool;
    /// Forgets what its translated code has checked already.
    fn forget_windows(&self);
    /// Counts its entries into translated code and its exits from it: odd while it is inside.
    fn passages(&self) -> &AtomicU64;
    /// The thread that executes it.
    fn thread(&self) -> &HostThread;
    /// Lets it leave translated code soon.
    fn waker(&self) -> &dyn Waker;
}

/// Other processors that one that spins looks at: each look is a system call or two.
const LOOKED_AT: usize = 7;

/// All virtual processors of a machine, by number.
#[derive(Default)]
pub struct Peers {
    all: RwLock<Vec<(u32, Arc<dyn Peer>)>>,
}

impl Peers {
    /// Adds a virtual processor.
    pub fn add(&self, index: u32, peer: Arc<dyn Peer>) {
        self.all.write().unwrap_or_else(PoisonError::into_inner).push((index, peer));
    }

    /// Tells all that cached code was written by none of them.
    pub fn wake_all(&self) {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.iter().for_each(|(_, peer)| peer.waker().wake());
    }

    fn others(&self, own: u32, mut each: impl FnMut(&dyn Peer)) {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|(index, _)| *index != own).for_each(|(_, peer)| each(&**peer));
    }

    /// Takes the quick way of storing to a page from all others, and waits until none is in the middle of such a store.
    /// The caller must not be in translated code. Call after marking the page.
    pub fn forget_writes(&self, own: u32, page: u64) {
        self.others(own, |peer| {
            if !peer.forget_writes(page) {
                return;
            }
            // So that either its entry is seen here, or it sees the TLB as it is now.
            code_tracker::barrier();
            // It may be between its look at the TLB and its store. Once it has left, it will look again.
            let seen = peer.passages().load(Ordering::SeqCst);
            if !seen.is_multiple_of(2) {
                peer.waker().wake();
                while peer.passages().load(Ordering::SeqCst) == seen {
                    std::thread::yield_now();
                }
            }
            // Not before: it may have filled them from what it had read of the TLB.
            peer.forget_windows();
        });
    }

    /// Whether the host lets another one wait that has something to execute. Looks at a few of them only.
    pub fn others_starve(&self, own: u32) -> bool {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        let first = all.iter().position(|(index, _)| *index == own).unwrap_or(0) + 1;
        let others = all.len().saturating_sub(1).min(LOOKED_AT);
        (first..first + others).any(|place| all[place % all.len()].1.thread().is_starved())
    }

    /// Tells all others that cached code was written.
    pub fn wake(&self, own: u32) {
        self.others(own, |peer| peer.waker().wake());
    }
}
