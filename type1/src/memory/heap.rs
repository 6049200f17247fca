//! The global allocator: one piece of memory, given out by the crate linked_list_allocator.
#![allow(unsafe_code)]

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use bivisor_machine::sync::Mutex;

/// The heap. Nothing allocates in an interrupt handler, so a lock is enough.
pub struct Heap(Mutex<linked_list_allocator::Heap>);

impl Heap {
    /// A heap that has nothing to give yet.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(Mutex::new(linked_list_allocator::Heap::empty()))
    }

    /// Gives it memory.
    ///
    /// # Safety
    /// `size` bytes at `start` are mapped, writable and nobody else's, for ever; once.
    pub(super) unsafe fn set_up(&self, start: u64, size: u64) {
        // SAFETY: the caller's promise.
        unsafe { self.0.lock().init(start as *mut u8, size as usize) }
    }
}

// SAFETY: what the inner allocator gives is a piece of its memory that fits the layout and is not given to anybody else; the
// lock keeps it whole.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.lock().allocate_first_fit(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: it came from `alloc` with this layout, by the contract of the trait.
            unsafe { self.0.lock().deallocate(pointer, layout) }
        }
    }
}
