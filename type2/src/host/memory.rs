//! Guest RAM: an anonymous mapping of the host.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ptr;

use bivisor_machine::memory::GuestMemory;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The mapping, unmapped when dropped.
struct Mapping {
    base: *mut c_void,
    size: usize,
}

// SAFETY: the pointer is only kept to unmap it, once, in `drop`.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives no access to anything.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `allocate` mapped exactly this, and `GuestMemory` drops its owner last.
        let _ = unsafe { munmap(self.base, self.size) };
    }
}

/// Maps `size` bytes of zeroed RAM. The host gives memory when the guest first touches it, in huge pages where
/// it can.
pub fn allocate(size: u64) -> io::Result<GuestMemory> {
    let length = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
    // SAFETY: without MAP_FIXED a new mapping replaces nothing.
    let base = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    let mapping = Mapping { base, size: length };
    for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
        // SAFETY: neither advice changes what the bytes are. A kernel without one of them refuses, which is fine.
        let _ = unsafe { madvise(base, length, advice) };
    }
    // SAFETY: the mapping is new, of this size, readable and writable until `mapping` is dropped, and its address
    // is given to nobody else.
    Ok(unsafe { GuestMemory::new(base.cast(), size, Box::new(mapping)) })
}

/// Bytes of RAM that this process may have: the host's, or less in a control group.
pub fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let total = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    // Version 2, then version 1, as a container sees its own group.
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
        .fold(total, u64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_zero_and_writable_to_its_last_byte() {
        let ram = allocate(8 << 20).unwrap();
        let (last, mut byte) = (ram.size() - 1, [0xff]);
        ram.read(last, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        ram.write(last, &[7]).unwrap();
        ram.read(last, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn absurd_sizes_fail() {
        assert!(allocate(1 << 50).is_err());
    }

    #[test]
    fn the_host_has_memory() {
        assert!(host_memory() > 64 << 20);
    }
}
