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
}

// SAFETY: the mappings are owned by this value alone, and its methods that write take `&mut self`.
unsafe impl Send for CodeMemory {}

/// Maps a shared view of the file.
fn map(file: i32, size: usize, protection: i32) -> Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address that the kernel chooses; nothing existing is touched.
    let address = unsafe { libc::mmap(null_mut(), size, protection, libc::MAP_SHARED, file, 0) };
    if address == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| Error::other("a mapping at address zero"))
}

impl CodeMemory {
    /// `size` bytes of memory for code.
    pub fn new(size: usize) -> Result<Self> {
        // SAFETY: the name is a C string; the call touches no memory of ours.
        let file = unsafe { libc::memfd_create(c"bivisor-code".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: `file` is a descriptor of ours.
        let resized = unsafe { libc::ftruncate(file, size as libc::off_t) };
        let mapped = if resized != 0 {
            Err(Error::last_os_error())
        } else {
            map(file, size, libc::PROT_READ | libc::PROT_WRITE).and_then(|writable| {
                let executable = map(file, size, libc::PROT_READ | libc::PROT_EXEC)
                    // SAFETY: the first view, which nobody else has seen yet.
                    .inspect_err(|_| unsafe {
                        libc::munmap(writable.as_ptr().cast::<c_void>(), size);
                    })?;
                Ok(Self { writable, executable, size, used: 0 })
            })
        };
        // SAFETY: `file` is open and is closed here only; the mappings keep the memory.
        unsafe { libc::close(file) };
        mapped
    }

    /// Appends code and returns where it can be executed, or `None` when the memory is full.
    pub fn append(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(16);
        let end = start.checked_add(code.len()).filter(|&end| end <= self.size)?;
        // SAFETY: `start..end` lies in the writable view, which no reference points into.
        unsafe {
            self.writable.as_ptr().add(start).copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        self.used = end;
        // SAFETY: as above, in the executable view.
        Some(unsafe { self.executable.add(start) })
    }

    /// Offset from the start of the memory at which the next code will stand.
    pub fn next_offset(&self) -> usize {
        self.used.next_multiple_of(16)
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

    /// Bytes left for code.
    pub fn free(&self) -> usize {
        self.size - self.next_offset().min(self.size)
    }

    /// Replaces four bytes of code at an offset, in one store where that is aligned. Offsets outside of the code
    /// are ignored.
    pub fn patch(&mut self, offset: usize, bytes: [u8; 4]) {
        if offset.checked_add(4).is_none_or(|end| end > self.used) {
            return;
        }
        // SAFETY: the bytes lie in the writable view, which no reference points into.
        unsafe { self.writable.as_ptr().add(offset).cast::<[u8; 4]>().write(bytes) };
    }

    /// Forgets all code behind an offset that [`CodeMemory::next_offset`] once gave. It must not be executed any more.
    pub fn truncate(&mut self, offset: usize) {
        self.used = self.used.min(offset);
    }

    /// Forgets all code. What `append` returned before must not be executed any more.
    pub fn clear(&mut self) {
        self.used = 0;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        for view in [self.writable, self.executable] {
            // SAFETY: the two views are mappings of this size, owned by this value.
            unsafe { libc::munmap(view.as_ptr().cast::<c_void>(), self.size) };
        }
    }
}
