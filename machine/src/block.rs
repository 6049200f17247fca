//! What a disk device asks of its host: a block store, with requests that end when they end.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Why a request failed. What the user must know is in the store's own log; the guest learns only the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The store could not read or write.
    #[error("input/output error")]
    Io,
    /// The store has no room for what was written.
    #[error("no space left")]
    NoSpace,
    /// A write to a store that is read only.
    #[error("read only")]
    ReadOnly,
    /// A range that does not lie inside the store.
    #[error("outside the disk")]
    OutOfRange,
    /// The store can't do this.
    #[error("unsupported")]
    Unsupported,
}

/// What is asked of a store. Offsets and lengths are bytes, multiples of 512.
#[derive(Debug, PartialEq, Eq)]
pub enum BlockOperation {
    /// Fill this buffer from the store.
    Read {
        /// Where in the store.
        offset: u64,
        /// Overwritten, and handed back.
        buffer: Vec<u8>,
    },
    /// Write this buffer to the store.
    Write {
        /// Where in the store.
        offset: u64,
        /// Handed back as it was.
        buffer: Vec<u8>,
    },
    /// Everything that was completed before is to survive a crash of the host.
    Flush,
    /// The content of this range matters no more.
    Discard {
        /// Where in the store.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// This range is to read as zeroes.
    WriteZeroes {
        /// Where in the store.
        offset: u64,
        /// How much.
        length: u64,
        /// The store may give the room back.
        unmap: bool,
    },
}

/// Called once when a request has ended, by whatever thread ended it, with the request's buffer (empty where it
/// had none).
pub type BlockDone = Box<dyn FnOnce(Result<(), BlockError>, Vec<u8>) + Send>;

/// A disk's content. Requests may overtake each other; who needs an order waits for the first to end.
pub trait BlockStore: Send + Sync {
    /// Size in bytes, a multiple of 512.
    fn size(&self) -> u64;
    /// Writes are refused.
    fn read_only(&self) -> bool;
    /// The store gives room back for [`BlockOperation::Discard`].
    fn can_discard(&self) -> bool;
    /// Starts a request. Returns soon; `done` may be called before it does.
    fn submit(&self, operation: BlockOperation, done: BlockDone);
    /// Ends when all requests have ended and, unless the store is read only, are safe on the host's disk.
    fn drain(&self);
}
