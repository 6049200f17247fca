//! How devices access RAM: as the guest's processors see it, and so that an engine which has cached instructions hears
//! of writes to them.

use alloc::sync::Arc;

use crate::memory::{GuestMemory, OutsideRam};

/// Hears of every write to RAM that no virtual processor makes. Registered by an engine ([`GuestMemory::set_observer`]).
pub trait WriteObserver: Send + Sync {
    /// Bytes from an offset in RAM on were written. Called after the write and before the guest is told of it, by any
    /// thread.
    fn written(&self, offset: u64, length: u64);
}

/// A device's access to RAM, by offset (see [`GuestMemory`]). Loads and stores of naturally aligned words are atomic, and
/// happen in program order as on a processor; [`Dma::barrier`] also orders loads behind stores.
#[derive(Clone)]
pub struct Dma(Arc<GuestMemory>);

impl Dma {
    /// Access to this RAM.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self(memory)
    }
    /// The offset of bytes at a guest-physical address that are RAM from end to end.
    pub fn range(&self, gpa: u64, length: u64) -> Result<u64, OutsideRam> {
        self.0.range(gpa, length)
    }
    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.0.size()
    }
    /// Loads a byte.
    pub fn load8(&self, offset: u64) -> u8 {
        self.0.load8(offset)
    }
    /// Loads two bytes.
    pub fn load16(&self, offset: u64) -> u16 {
        self.0.load16(offset)
    }
    /// Loads four bytes.
    pub fn load32(&self, offset: u64) -> u32 {
        self.0.load32(offset)
    }
    /// Loads eight bytes.
    pub fn load64(&self, offset: u64) -> u64 {
        self.0.load64(offset)
    }
    /// Loads bytes.
    pub fn load_bytes(&self, offset: u64, to: &mut [u8]) {
        self.0.load_bytes(offset, to);
    }
    /// Stores a byte.
    pub fn store8(&self, offset: u64, value: u8) {
        self.0.store8(offset, value);
        self.0.observe(offset, 1);
    }
    /// Stores two bytes.
    pub fn store16(&self, offset: u64, value: u16) {
        self.0.store16(offset, value);
        self.0.observe(offset, 2);
    }
    /// Stores four bytes.
    pub fn store32(&self, offset: u64, value: u32) {
        self.0.store32(offset, value);
        self.0.observe(offset, 4);
    }
    /// Stores a byte and gives the one that was there, in one step.
    pub fn swap8(&self, offset: u64, value: u8) -> u8 {
        let mut old = self.0.load8(offset);
        loop {
            let seen = self.0.compare_exchange(offset, 1, old.into(), value.into()) as u8;
            if seen == old {
                break;
            }
            old = seen;
        }
        self.0.observe(offset, 1);
        old
    }
    /// Stores eight bytes.
    pub fn store64(&self, offset: u64, value: u64) {
        self.0.store64(offset, value);
        self.0.observe(offset, 8);
    }
    /// Stores bytes.
    pub fn store_bytes(&self, offset: u64, from: &[u8]) {
        self.0.store_bytes(offset, from);
        self.0.observe(offset, from.len() as u64);
    }
    /// The host has changed these bytes without storing to them.
    pub fn changed(&self, offset: u64, length: u64) {
        self.0.observe(offset, length);
    }
    /// What was stored before is seen by all before anything is loaded after.
    pub fn barrier(&self) {
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }
}
