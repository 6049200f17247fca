//! Guest RAM: an anonymous mapping of the host.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::Arc;

use bivisor_machine::memory::GuestMemory;
use bivisor_machine::virtio::balloon::MemoryHost;
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

/// Takes pages of a machine's RAM back.
pub struct Returned(pub Arc<GuestMemory>);

impl MemoryHost for Returned {
    fn discard(&self, offset: u64, length: u64) {
        if offset.checked_add(length).is_none_or(|end| end > self.0.size()) {
            return;
        }
        // SAFETY: the range lies in the mapping that `allocate` made, which lives as long as the memory, and the caller says
        // that what it holds matters no more; a kernel that refuses leaves it as it is.
        let _ = unsafe {
            madvise(self.0.host_base().add(offset as usize).cast(), length as usize, Advice::LinuxDontNeed)
        };
    }
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
    fn returned_pages_read_as_zero_and_the_others_stay() {
        let ram = Arc::new(allocate(8 << 20).unwrap());
        ram.fill(0, 8 << 20, 7).unwrap();
        let host = Returned(ram.clone());
        host.discard(0x1000, 0x2000);
        host.discard(8 << 20, 0x1000);
        host.discard(u64::MAX - 0xfff, 0x1000);
        assert_eq!([0xfff, 0x1000, 0x2fff, 0x3000].map(|at| ram.load8(at)), [7, 0, 0, 7]);
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
