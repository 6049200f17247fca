//! Memory of a context: mapped once for each of a few address spaces, with the inline TLBs of that address space
//! behind it and a stack below it.
#![allow(unsafe_code)]

use std::io::{Error, Result};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64};

use super::context::{Context, SLOTS, Slot, Tlbs};

/// Address spaces whose TLBs are kept.
pub const SPACES: usize = 8;
/// Bytes of stack below the context: for signal frames, and the shared code's calls.
const STACK: usize = 64 << 10;
/// An inaccessible page below the stack.
const GUARD: usize = 4096;
const CONTEXT: usize = size_of::<Context>();
const TLBS: usize = size_of::<Tlbs>().next_multiple_of(4096);
/// Bytes of a window.
const WINDOW: usize = GUARD + STACK + CONTEXT + TLBS;

/// The mapping of all windows.
pub struct Mapping {
    start: NonNull<u8>,
}

// SAFETY: an address range, which anybody may unmap once nobody uses it; `Arc` sees to that.
unsafe impl Send for Mapping {}
// SAFETY: what it gives out by shared reference are atomics.
unsafe impl Sync for Mapping {}

/// Fields of the context that other threads may see.
macro_rules! atomics {
    ($($field:ident: $type:ty),*) => {
        $(
            #[doc = concat!("[`Context::", stringify!($field), "`].")]
            pub fn $field(&self) -> &$type {
                // SAFETY: in the context, mapped as long as this value lives; atomics, of which any contents are valid.
                unsafe { &(*self.context(0)).$field }
            }
        )*
    };
}

impl Mapping {
    fn window(&self, space: usize) -> NonNull<u8> {
        // SAFETY: within the mapping: there are as many windows.
        unsafe { self.start.add(space % SPACES * WINDOW + GUARD + STACK) }
    }

    /// The inline TLBs of an address space.
    pub fn tlbs(&self, space: usize) -> &Tlbs {
        // SAFETY: behind the context, page-aligned, mapped as long as this value lives; atomics only, of which any
        // contents are valid.
        unsafe { self.window(space).add(CONTEXT).cast::<Tlbs>().as_ref() }
    }

    atomics!(slots: [Slot; SLOTS], filled_slots: [AtomicU64; SLOTS / 64]);
    atomics!(stack_page: AtomicU64, stack_addend: AtomicU64);
    atomics!(jump_bias: AtomicU64, event: AtomicU8, passages: AtomicU64);

    /// The context, as translated code in an address space sees it.
    pub fn context(&self, space: usize) -> *mut Context {
        self.window(space).as_ptr().cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: a mapping of ours; whoever may use it holds a reference to this value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), WINDOW * SPACES) };
    }
}

/// A context and the TLBs of some address spaces, at fixed addresses.
pub struct Windows {
    mapping: Arc<Mapping>,
}

impl Windows {
    /// A context, all zeroes, and TLBs, all zeroes.
    ///
    /// # Errors
    /// The host gives no memory.
    pub fn new() -> Result<Self> {
        // SAFETY: the name is a C string; the call touches no memory of ours.
        let file = unsafe { libc::memfd_create(c"bivisor-context".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(Error::last_os_error());
        }
        let windows = Self::map(file);
        // SAFETY: `file` is open and is closed here only; the mappings keep the memory.
        unsafe { libc::close(file) };
        windows
    }

    fn map(file: i32) -> Result<Self> {
        // SAFETY: `file` is a descriptor of ours.
        if unsafe { libc::ftruncate(file, CONTEXT as libc::off_t) } != 0 {
            return Err(Error::last_os_error());
        }
        const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(null_mut(), WINDOW * SPACES, RW, anonymous, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| Error::other("a mapping at address zero"))?;
        let mapping = Arc::new(Mapping { start });
        for space in 0..SPACES {
            let context = mapping.context(space).cast::<libc::c_void>();
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: replaces a part of the mapping just made, which nobody uses yet.
            if unsafe { libc::mmap(context, CONTEXT, RW, flags, file, 0) } == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            // SAFETY: the first page of a window.
            if unsafe { libc::mprotect(context.byte_sub(GUARD + STACK), GUARD, libc::PROT_NONE) } != 0 {
                return Err(Error::last_os_error());
            }
        }
        Ok(Self { mapping })
    }

    /// The context, by its mapping in the first window.
    pub fn context(&mut self) -> &mut Context {
        // SAFETY: all zeroes are a valid context (numbers and a raw pointer); it lives as long as the mapping. Others
        // access only its atomics, and translated code runs only while nobody holds this reference.
        unsafe { &mut *self.mapping.context(0) }
    }

    /// The mapping, to be shared with other threads.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}
