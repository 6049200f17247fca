//! Memory for generated code, mapped twice: once writable, once executable, never both at one address.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io::{Error, Result};
use std::ptr::{NonNull, null_mut};

/// A block of memory with a writable and an executable view.
pub struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    used: usize,
    /// Where the part begins in which code is appended apart from the rest.
    boundary: usize,
    /// Where code is appended there.
    apart: usize,
}

// SAFETY: the mappings are owned by this value alone, and its methods that write take `&mut self`.
unsafe impl Send for CodeMemory {}

/// Unmaps a view.
///
/// # Safety
/// `view` is a mapping of this size that nobody uses any more.
unsafe fn unmap(view: NonNull<u8>, size: usize) {
    // SAFETY: the caller's word.
    unsafe { libc::munmap(view.as_ptr().cast::<c_void>(), size) };
}

/// The address of a mapping that the kernel was asked for.
fn mapped(address: *mut c_void) -> Result<NonNull<u8>> {
    if address == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| Error::other("a mapping at address zero"))
}

/// Maps the memory of a shared mapping of this size a second time, to be executed.
fn executable_view(writable: NonNull<u8>, size: usize) -> Result<NonNull<u8>> {
    // SAFETY: with an old size of zero, nothing is moved: a shared mapping gets a second view at an address that the
    // kernel chooses.
    let view = unsafe { libc::mremap(writable.as_ptr().cast::<c_void>(), 0, size, libc::MREMAP_MAYMOVE) };
    let view = mapped(view)?;
    // SAFETY: a mapping of this size that nobody else has seen yet.
    if unsafe { libc::mprotect(view.as_ptr().cast::<c_void>(), size, libc::PROT_READ | libc::PROT_EXEC) } != 0
    {
        let error = Error::last_os_error();
        // SAFETY: as above.
        unsafe { unmap(view, size) };
        return Err(error);
    }
    Ok(view)
}

impl CodeMemory {
    /// `size` bytes of memory for code; from `boundary` on, code stands apart from the rest. It has no name, as a
    /// memfd would have: perf looks for names of code that it
    /// takes for made at run time in mappings without one only.
    pub fn new(size: usize, boundary: usize) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address that the kernel chooses; nothing existing is touched.
        let writable = mapped(unsafe { libc::mmap(null_mut(), size, protection, flags, -1, 0) })?;
        let executable = executable_view(writable, size)
            // SAFETY: the first view, which nobody else has seen yet.
            .inspect_err(|_| unsafe { unmap(writable, size) })?;
        let boundary = boundary.min(size);
        Ok(Self { writable, executable, size, used: 0, boundary, apart: boundary })
    }

    /// Appends code and returns where it can be executed, or `None` when the memory is full.
    pub fn append(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.next_offset();
        self.used = self.write(start, code, self.boundary)?;
        // SAFETY: `start` lies in the executable view.
        Some(unsafe { self.executable.add(start) })
    }

    /// Appends code apart from the rest. Whether there was room.
    pub fn append_apart(&mut self, code: &[u8]) -> bool {
        let Some(end) = self.write(self.apart, code, self.size) else { return false };
        self.apart = end;
        true
    }

    /// Writes code that must end before an offset in the memory, and returns the offset behind it.
    fn write(&mut self, start: usize, code: &[u8], limit: usize) -> Option<usize> {
        let end = start.checked_add(code.len()).filter(|&end| end <= limit)?;
        // SAFETY: `start..end` lies in the writable view, which no reference points into.
        unsafe {
            self.writable.as_ptr().add(start).copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        Some(end)
    }

    /// Offset from the start of the memory at which the next code will stand.
    pub fn next_offset(&self) -> usize {
        self.used.next_multiple_of(16)
    }

    /// Offset at which code that is appended apart will stand next.
    pub fn next_apart(&self) -> usize {
        self.apart
    }

    /// Where the code at an offset is executed.
    pub fn address(&self, offset: usize) -> u64 {
        self.executable.as_ptr() as u64 + offset as u64
    }

    /// Offset of an address in the executable view, if it lies in code.
    pub fn offset_of(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.executable.as_ptr() as u64)? as usize;
        (offset < self.used).then_some(offset)
    }

    /// Bytes left for code, in the part that has less of them.
    pub fn free(&self) -> usize {
        let first = self.boundary.saturating_sub(self.next_offset());
        first.min(self.size.saturating_sub(self.apart))
    }

    /// Replaces four bytes of code at an offset, in one store where that is aligned. Offsets outside of the code
    /// are ignored.
    pub fn patch(&mut self, offset: usize, bytes: [u8; 4]) {
        let written = |end| end <= self.used || offset >= self.boundary && end <= self.apart;
        if offset.checked_add(4).is_none_or(|end| !written(end)) {
            return;
        }
        // SAFETY: the bytes lie in the writable view, which no reference points into.
        unsafe { self.writable.as_ptr().add(offset).cast::<[u8; 4]>().write(bytes) };
    }

    /// Forgets all code behind an offset that [`CodeMemory::next_offset`] once gave, and all that stands apart. It must
    /// not be executed any more.
    pub fn truncate(&mut self, offset: usize) {
        self.used = self.used.min(offset);
        self.apart = self.boundary;
    }

    /// Forgets all code. What `append` returned before must not be executed any more.
    pub fn clear(&mut self) {
        self.truncate(0);
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        for view in [self.writable, self.executable] {
            // SAFETY: the two views are mappings of this size, owned by this value.
            unsafe { unmap(view, self.size) };
        }
    }
}
