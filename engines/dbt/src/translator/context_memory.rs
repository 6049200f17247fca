//! Memory of a context, with a stack below it.
#![allow(unsafe_code)]

use std::any::Any;
use std::io::{Error, Result};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use super::context::Context;

/// Bytes of stack below the context: for signal frames, and the shared code's calls.
const STACK: usize = 128 << 10;

/// The mapping: an inaccessible page, the stack, the context.
struct Mapping {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: an address range, which anybody may unmap once nobody uses it; `Arc` sees to that.
unsafe impl Send for Mapping {}
// SAFETY: no method gives access to it.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: a mapping of ours; whoever may use it holds a reference to this value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// A context in memory of its own, at a fixed address.
pub struct ContextMemory {
    mapping: Arc<Mapping>,
    context: NonNull<Context>,
}

impl ContextMemory {
    /// A context, all zeroes.
    ///
    /// # Errors
    /// The host gives no memory.
    pub fn new() -> Result<Self> {
        const GUARD: usize = 4096;
        let offset = GUARD + STACK;
        let size = (offset + size_of::<Context>()).next_multiple_of(4096);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let address = unsafe {
            libc::mmap(
                null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start =
            NonNull::new(address.cast::<u8>()).ok_or_else(|| Error::other("a mapping at address zero"))?;
        let mapping = Arc::new(Mapping { start, size });
        // SAFETY: the first page of the mapping, which nobody uses yet.
        if unsafe { libc::mprotect(address, GUARD, libc::PROT_NONE) } != 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: within the mapping, and aligned: `offset` is a multiple of a page.
        let context = unsafe { start.add(offset) }.cast::<Context>();
        Ok(Self { mapping, context })
    }

    /// The context.
    pub fn get(&mut self) -> &mut Context {
        // SAFETY: all zeroes are a valid context (numbers and a raw pointer); it lives as long as the mapping. Others
        // access only its atomics.
        unsafe { self.context.as_mut() }
    }

    /// Something that keeps the memory mapped.
    pub fn keep_alive(&self) -> Arc<dyn Any + Send + Sync> {
        self.mapping.clone()
    }
}
