//! The machine's memory: who has which frames, what is mapped how, and the heap.
#![allow(unsafe_code)]

mod frames;
pub mod heap;
mod paging;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ops::{Deref, DerefMut};

use bivisor_hvm::PhysicalMap;
use bivisor_machine::memory::GuestMemory;
use bivisor_machine::sync::Mutex;

use crate::boot::{BootInfo, Range};
use frames::Frames;
use heap::Heap;
use paging::{Layout, PageTables};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes of a large page.
const LARGE_PAGE: u64 = 2 << 20;
/// Everything below is left alone: firmware's tables, the loader's information.
const LOW_MEMORY_END: u64 = 0x10_0000;
/// Least bytes of the heap: devices, tables, and what they queue.
const MIN_HEAP: u64 = 8 << 20;
/// Most bytes of the heap.
const MAX_HEAP: u64 = 64 << 20;

/// Where the hypervisor's own image lies. All bounds are multiples of a page.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// First address, of code.
    pub start: u64,
    /// End of the code, start of constants.
    pub text_end: u64,
    /// End of the constants, start of variables.
    pub rodata_end: u64,
    /// End.
    pub end: u64,
}

/// Not enough memory, or in too many pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// No range is large enough.
    #[error("no {} MiB of memory are free in one piece: the machine needs more", .0.div_ceil(1 << 20))]
    Full(u64),
}

static FRAMES: Mutex<Frames> = Mutex::new(Frames::new());

/// Takes the memory over: frames, page tables of our own, the heap.
///
/// # Safety
/// The contract of [`crate::run`]; once.
///
/// # Errors
/// There is not enough.
pub(crate) unsafe fn take_over(info: &BootInfo, image: &Image, heap: &Heap) -> Result<(), MemoryError> {
    let mut frames = FRAMES.lock();
    for range in info.memory() {
        frames.add(*range);
    }
    frames.remove(Range { start: 0, end: LOW_MEMORY_END });
    frames.remove(Range { start: image.start, end: image.end });
    for module in info.modules() {
        frames.remove(*module);
    }
    let layout = Layout { image: *image, memory: info.memory() };
    let mut tables = PageTables::new(|| frames.allocate(PAGE, PAGE).ok_or(MemoryError::Full(PAGE)))?;
    // SAFETY: the frames are free, mapped as they are (they lie where the loader said that there is RAM, and the
    // allocator gives low ones first), and the layout maps everything that is in use where it is.
    unsafe {
        tables.map_all(&layout)?;
        tables.load();
    }
    let size = (frames.free() / 8).clamp(MIN_HEAP, MAX_HEAP) & !(LARGE_PAGE - 1);
    let start = frames.allocate(size, LARGE_PAGE).ok_or(MemoryError::Full(size))?;
    // SAFETY: these frames are nobody else's from now on, and mapped readable and writable at their addresses.
    unsafe { heap.set_up(start, size) };
    Ok(())
}

/// A module's bytes.
pub fn module(range: &Range) -> &'static [u8] {
    // SAFETY: the loader has put it there; `take_over` has kept it from everybody else, and has mapped it, as it lies in
    // RAM. Nobody writes it.
    unsafe { core::slice::from_raw_parts(range.start as *const u8, range.size() as usize) }
}

/// Frames that hold what is a guest's, given back, and wiped, when dropped.
struct GuestFrames(Range);

impl Drop for GuestFrames {
    fn drop(&mut self) {
        // SAFETY: whoever made this has made sure that they are RAM of ours; nobody uses them any more.
        unsafe { core::ptr::write_bytes(self.0.start as *mut u8, 0, self.0.size() as usize) };
        FRAMES.lock().add(self.0);
    }
}

/// Memory of the hypervisor's, given back, and wiped, when dropped.
pub(crate) struct Memory(GuestFrames);

impl Deref for Memory {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let Range { start, .. } = self.0.0;
        // SAFETY: the frames are RAM, mapped at their addresses, and this value's alone.
        unsafe { core::slice::from_raw_parts(start as *const u8, self.0.0.size() as usize) }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Range { start, .. } = self.0.0;
        // SAFETY: as in `deref`, and borrowed as a whole.
        unsafe { core::slice::from_raw_parts_mut(start as *mut u8, self.0.0.size() as usize) }
    }
}

/// Memory of zeros, of whole pages.
///
/// # Errors
/// There is none in one piece.
pub(crate) fn allocate(size: u64) -> Result<Memory, MemoryError> {
    let size = size.next_multiple_of(PAGE);
    let start = FRAMES.lock().allocate(size, PAGE).ok_or(MemoryError::Full(size))?;
    // SAFETY: the frames are RAM, mapped at their addresses, and nobody else's from now on.
    unsafe { core::ptr::write_bytes(start as *mut u8, 0, size as usize) };
    Ok(Memory(GuestFrames(Range { start, end: start + size })))
}

/// RAM of zeros for a guest, in one piece, aligned to large pages where it is large.
///
/// # Errors
/// There is no such piece.
pub(crate) fn allocate_guest(size: u64) -> Result<Arc<GuestMemory>, MemoryError> {
    let size = size.next_multiple_of(PAGE);
    let start = FRAMES.lock().allocate(size, LARGE_PAGE).ok_or(MemoryError::Full(size))?;
    let frames = GuestFrames(Range { start, end: start + size });
    // SAFETY: the frames are RAM, mapped readable and writable at their addresses, and ours alone until they are dropped,
    // which the returned value does last.
    Ok(Arc::new(unsafe {
        core::ptr::write_bytes(start as *mut u8, 0, size as usize);
        GuestMemory::new(start as *mut u8, size, Box::new(frames))
    }))
}

/// Everything is mapped where it is.
pub(crate) struct IdentityMap;

impl PhysicalMap for IdentityMap {
    fn physical(&self, address: *const u8) -> u64 {
        address as u64
    }
}
