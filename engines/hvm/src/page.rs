//! Memory that the processor finds by physical address.

use alloc::boxed::Box;

/// Bytes of a page.
pub(crate) const PAGE_SIZE: u64 = 4096;
/// Bytes of a large page.
pub(crate) const LARGE_SIZE: u64 = 2 << 20;

/// Where things of the hypervisor's address space are in physical memory.
pub trait PhysicalMap: Send + Sync {
    /// The physical address of a mapped address. What is contiguous up to a page's end stays so; RAM of guests and
    /// single allocations stay contiguous as a whole.
    fn physical(&self, address: *const u8) -> u64;
}

/// A page of 64-bit words.
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) [u64; 512]);

impl Page {
    /// A page of zeros.
    pub(crate) fn zeroed() -> Box<Self> {
        Box::new(Self([0; 512]))
    }
}

/// The physical address of a value.
pub(crate) fn physical_of<T: ?Sized>(map: &dyn PhysicalMap, value: &T) -> u64 {
    map.physical(core::ptr::from_ref(value).cast())
}

/// Everything is where its address says, as in the tests.
#[cfg(test)]
pub(crate) struct Identity;

#[cfg(test)]
impl PhysicalMap for Identity {
    fn physical(&self, address: *const u8) -> u64 {
        address as u64
    }
}
