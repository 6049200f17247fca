//! Guest-physical memory: one host mapping, cut in two by the hole below 4 GiB.
//!
//! RAM is addressed by *offset* in the mapping, or by guest-physical address (*gpa*). Guest memory is shared
//! with processors that write it at any time, so it is never seen through a Rust reference: every access is one
//! machine instruction in inline assembly, which has the meaning that the host's own memory model gives it.
#![allow(unsafe_code)]

mod strings;

use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::any::Any;
use core::arch::asm;

use crate::dma::WriteObserver;

/// First address of the hole for devices below 4 GiB, when RAM is that large.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Bytes of a page; RAM is a whole number of them.
pub const PAGE_SIZE: u64 = 4096;

/// A range of guest-physical addresses is not RAM from end to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at guest-physical address {gpa:#x} are not all RAM")]
pub struct OutsideRam {
    /// Where the range starts.
    pub gpa: u64,
    /// Its bytes.
    pub length: u64,
}

/// The RAM of one machine. Shared by all vCPUs and devices; every access is a plain machine access, as
/// between the processors of a real machine.
///
/// Offsets outside of RAM read as all ones and are not written.
pub struct GuestMemory {
    base: *mut u8,
    size: u64,
    observer: spin::Once<Arc<dyn WriteObserver>>,
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the mapping may be accessed from any thread (the contract of `GuestMemory::new`), it is accessed by
// machine instructions only, and the owner is Send.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; concurrent accesses through `&self` are machine accesses, which never are data races in the
// sense of the language, because no Rust code reads or writes the memory otherwise.
unsafe impl Sync for GuestMemory {}

/// RAM from the global allocator.
struct HeapRam {
    base: *mut u8,
    layout: Layout,
}

// SAFETY: the pointer is only kept to free the allocation, once, in `drop`.
unsafe impl Send for HeapRam {}
// SAFETY: `&HeapRam` gives no access to anything.
unsafe impl Sync for HeapRam {}

impl Drop for HeapRam {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc_zeroed` with this layout and is freed nowhere else.
        unsafe { dealloc(self.base, self.layout) }
    }
}

/// A load and a store of one size, each one machine instruction.
macro_rules! accessors {
    ($load:ident, $store:ident, $ty:ty, $class:ident, $template:literal, $doc:literal) => {
        #[doc = concat!("Loads ", $doc, " at an offset: one machine access, atomic when naturally aligned.")]
        #[inline(always)]
        pub fn $load(&self, offset: u64) -> $ty {
            let Some(pointer) = self.pointer(offset, size_of::<$ty>() as u64) else { return <$ty>::MAX };
            let value: $ty;
            // SAFETY: `pointer` checked that the bytes lie in the mapping, which is readable.
            unsafe {
                asm!(
                    concat!("mov {value", $template, "}, [{pointer}]"),
                    value = out($class) value,
                    pointer = in(reg) pointer,
                    options(nostack, preserves_flags, readonly)
                );
            }
            value
        }

        #[doc = concat!("Stores ", $doc, " at an offset: one machine access, atomic when naturally aligned.")]
        #[inline(always)]
        pub fn $store(&self, offset: u64, value: $ty) {
            let Some(pointer) = self.pointer(offset, size_of::<$ty>() as u64) else { return };
            // SAFETY: `pointer` checked that the bytes lie in the mapping, which is writable.
            unsafe {
                asm!(
                    concat!("mov [{pointer}], {value", $template, "}"),
                    value = in($class) value,
                    pointer = in(reg) pointer,
                    options(nostack, preserves_flags)
                );
            }
        }
    };
}

/// `lock cmpxchg` of one size.
macro_rules! compare_exchange {
    ($name:ident, $ty:ty, $class:ident, $template:literal, $accumulator:tt) => {
        #[inline(always)]
        fn $name(&self, offset: u64, expected: $ty, new: $ty) -> $ty {
            let Some(pointer) = self.pointer(offset, size_of::<$ty>() as u64) else { return <$ty>::MAX };
            let old: $ty;
            // SAFETY: `pointer` checked that the bytes lie in the mapping, which is writable.
            unsafe {
                asm!(
                    concat!("lock cmpxchg [{pointer}], {new", $template, "}"),
                    new = in($class) new,
                    pointer = in(reg) pointer,
                    inlateout($accumulator) expected => old,
                    options(nostack)
                );
            }
            old
        }
    };
}

impl GuestMemory {
    /// RAM of `size` bytes (cut to whole pages) in the host mapping at `base`. `owner` is dropped with the
    /// value, and unmaps it.
    ///
    /// # Safety
    /// From now until `owner` is dropped, the `size` bytes at `base` are mapped readable and writable, and
    /// nothing accesses them except through the returned value or by machine instructions outside of Rust's
    /// memory model (system calls, translated code). The mapping may be accessed from any thread.
    pub unsafe fn new(base: *mut u8, size: u64, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self { base, size: size & !(PAGE_SIZE - 1), observer: spin::Once::new(), _owner: owner }
    }

    /// RAM of `size` bytes (rounded up to whole pages, at least one), all zero, from the global allocator.
    pub fn on_heap(size: usize) -> Self {
        let page = PAGE_SIZE as usize;
        let size = size.max(page).next_multiple_of(page);
        let Ok(layout) = Layout::from_size_align(size, page) else {
            handle_alloc_error(Layout::new::<u8>());
        };
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: the allocation lives until `HeapRam` frees it, and its address is given to nobody else.
        unsafe { Self::new(base, size as u64, Box::new(HeapRam { base, layout })) }
    }

    /// Has `observer` hear of what devices write from now on. Only the first call counts.
    pub fn set_observer(&self, observer: Arc<dyn WriteObserver>) {
        self.observer.call_once(|| observer);
    }

    /// Tells the observer of a write.
    pub(crate) fn observe(&self, offset: u64, length: u64) {
        if let Some(observer) = self.observer.get() {
            observer.written(offset, length);
        }
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of RAM below the hole: it is at guest-physical addresses from 0 up to this.
    pub fn low_size(&self) -> u64 {
        self.size.min(LOW_RAM_END)
    }

    /// Bytes of RAM from [`HIGH_RAM_START`] on.
    pub fn high_size(&self) -> u64 {
        self.size - self.low_size()
    }

    /// Host address of offset 0. RAM is contiguous from here, see [`GuestMemory::size`]. For engines whose
    /// generated code, or whose operating system, accesses RAM.
    pub fn host_base(&self) -> *mut u8 {
        self.base
    }

    /// The offset in RAM of a guest-physical address, if RAM is there.
    #[inline]
    pub fn offset(&self, gpa: u64) -> Option<u64> {
        if gpa < self.low_size() {
            Some(gpa)
        } else {
            let above = gpa.checked_sub(HIGH_RAM_START)?;
            (above < self.high_size()).then_some(above + LOW_RAM_END)
        }
    }

    /// The guest-physical address of an offset in RAM.
    #[inline]
    pub fn gpa(&self, offset: u64) -> u64 {
        if offset < LOW_RAM_END { offset } else { offset - LOW_RAM_END + HIGH_RAM_START }
    }

    /// The offset of `length` bytes at a guest-physical address that are RAM from end to end. No bytes fit
    /// anywhere that RAM starts, ends or is.
    pub fn range(&self, gpa: u64, length: u64) -> Result<u64, OutsideRam> {
        let outside = OutsideRam { gpa, length };
        let Some(last) = length.checked_sub(1) else { return Ok(self.offset(gpa).unwrap_or(0)) };
        let end = gpa.checked_add(last).ok_or(outside)?;
        let first = self.offset(gpa).ok_or(outside)?;
        // The two parts are contiguous in the mapping but not in the guest's view.
        if self.offset(end) == Some(first + last) { Ok(first) } else { Err(outside) }
    }

    /// Host pointer to `length` bytes at an offset, if they lie in RAM.
    #[inline(always)]
    fn pointer(&self, offset: u64, length: u64) -> Option<*mut u8> {
        let last = self.size.checked_sub(length)?;
        // SAFETY: offset + length is at most size, so the result points into the mapping.
        (offset <= last).then(|| unsafe { self.base.add(offset as usize) })
    }

    accessors!(load8, store8, u8, reg_byte, "", "a byte");
    accessors!(load16, store16, u16, reg, ":x", "two bytes");
    accessors!(load32, store32, u32, reg, ":e", "four bytes");
    accessors!(load64, store64, u64, reg, ":r", "eight bytes");

    /// Loads bytes at an offset, in order of address, in pieces of unspecified size.
    #[inline]
    pub fn load_bytes(&self, offset: u64, to: &mut [u8]) {
        let Some(pointer) = self.pointer(offset, to.len() as u64) else {
            to.fill(u8::MAX);
            return;
        };
        // SAFETY: the source lies in the mapping, the destination is a slice of that length, and they don't
        // overlap, since no slice ever covers guest memory. The direction flag is clear by the ABI.
        unsafe { copy(pointer, to.as_mut_ptr(), to.len()) }
    }

    /// Stores bytes at an offset, in order of address, in pieces of unspecified size.
    #[inline]
    pub fn store_bytes(&self, offset: u64, from: &[u8]) {
        let Some(pointer) = self.pointer(offset, from.len() as u64) else { return };
        // SAFETY: as in `load_bytes`, with the roles exchanged.
        unsafe { copy(from.as_ptr(), pointer, from.len()) }
    }

    compare_exchange!(compare_exchange8, u8, reg_byte, "", "al");
    compare_exchange!(compare_exchange16, u16, reg, ":x", "ax");
    compare_exchange!(compare_exchange32, u32, reg, ":e", "eax");
    compare_exchange!(compare_exchange64, u64, reg, ":r", "rax");

    /// Atomic compare and exchange of `size` (1, 2, 4, else 8) bytes at an offset of any alignment; returns the
    /// old value, zero-extended. The exchange has happened if that equals `expected` cut to `size` bytes.
    #[inline]
    pub fn compare_exchange(&self, offset: u64, size: usize, expected: u64, new: u64) -> u64 {
        match size {
            1 => self.compare_exchange8(offset, expected as u8, new as u8).into(),
            2 => self.compare_exchange16(offset, expected as u16, new as u16).into(),
            4 => self.compare_exchange32(offset, expected as u32, new as u32).into(),
            _ => self.compare_exchange64(offset, expected, new),
        }
    }

    /// Atomic compare and exchange of 16 bytes at an offset aligned to 16; returns the old value. A misaligned
    /// offset is treated as one outside of RAM.
    pub fn compare_exchange128(&self, offset: u64, expected: u128, new: u128) -> u128 {
        let pointer = match self.pointer(offset, 16) {
            Some(pointer) if pointer.addr().is_multiple_of(16) => pointer,
            _ => return u128::MAX,
        };
        let (low, high): (u64, u64);
        // SAFETY: the 16 bytes lie in the mapping, which is writable, and are aligned, so that the instruction
        // does not fault; every x86-64 processor that runs Linux 6 or Windows 8.1 has it. RBX, which the
        // compiler keeps for itself, is exchanged before and after.
        unsafe {
            asm!(
                "xchg rbx, rsi",
                "lock cmpxchg16b [rdi]",
                "mov rbx, rsi",
                inout("rsi") new as u64 => _,
                in("rdi") pointer,
                in("rcx") (new >> 64) as u64,
                inlateout("rax") expected as u64 => low,
                inlateout("rdx") (expected >> 64) as u64 => high,
                options(nostack)
            );
        }
        u128::from(high) << 64 | u128::from(low)
    }

    /// Sets `length` bytes at an offset to `byte`.
    pub fn fill_at(&self, offset: u64, length: u64, byte: u8) {
        let Some(pointer) = self.pointer(offset, length) else { return };
        // SAFETY: the bytes lie in the mapping, which is writable; the direction flag is clear by the ABI.
        unsafe {
            asm!(
                "rep stosb",
                inout("rcx") length => _,
                inout("rdi") pointer => _,
                in("al") byte,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Reads bytes at a guest-physical address; all of them must be RAM.
    pub fn read(&self, gpa: u64, to: &mut [u8]) -> Result<(), OutsideRam> {
        let offset = self.range(gpa, to.len() as u64)?;
        self.load_bytes(offset, to);
        Ok(())
    }

    /// Writes bytes at a guest-physical address; all of them must be RAM, else none is written.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), OutsideRam> {
        let offset = self.range(gpa, from.len() as u64)?;
        self.store_bytes(offset, from);
        Ok(())
    }

    /// Sets bytes at a guest-physical address; all of them must be RAM, else none is set.
    pub fn fill(&self, gpa: u64, length: u64, byte: u8) -> Result<(), OutsideRam> {
        let offset = self.range(gpa, length)?;
        self.fill_at(offset, length, byte);
        Ok(())
    }
}

/// Copies bytes by machine instructions: eight at a time while there are few, else by `rep movsb`, whose start
/// costs some tens of cycles.
///
/// # Safety
/// `from` must be readable and `to` writable for `length` bytes, and they must not overlap.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, length: usize) {
    const FEW: usize = 64;
    if length > FEW {
        // SAFETY: both ranges are accessible by the contract above.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") length => _,
                inout("rsi") from => _,
                inout("rdi") to => _,
                options(nostack, preserves_flags)
            );
        }
        return;
    }
    let mut done = 0;
    while length - done >= 8 {
        // SAFETY: done + 8 is at most length.
        unsafe {
            asm!(
                "mov {value}, [{from} + {done}]",
                "mov [{to} + {done}], {value}",
                value = out(reg) _, from = in(reg) from, to = in(reg) to, done = in(reg) done,
                options(nostack, preserves_flags)
            );
        }
        done += 8;
    }
    while done < length {
        // SAFETY: done is less than length.
        unsafe {
            asm!(
                "mov {value}, [{from} + {done}]",
                "mov [{to} + {done}], {value}",
                value = out(reg_byte) _, from = in(reg) from, to = in(reg) to, done = in(reg) done,
                options(nostack, preserves_flags)
            );
        }
        done += 1;
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use alloc::vec;

    /// A mapping that pretends to be of this size; only offsets and addresses may be computed in it.
    fn unmapped(size: u64) -> GuestMemory {
        GuestMemory {
            base: core::ptr::dangling_mut(),
            size,
            observer: spin::Once::new(),
            _owner: Box::new(()),
        }
    }

    #[test]
    fn addresses_and_offsets_around_the_hole() {
        let memory = unmapped(LOW_RAM_END + 0x1000);
        assert_eq!(memory.offset(LOW_RAM_END - 1), Some(LOW_RAM_END - 1));
        assert_eq!(memory.offset(LOW_RAM_END), None);
        assert_eq!(memory.offset(HIGH_RAM_START - 1), None);
        assert_eq!(memory.offset(HIGH_RAM_START), Some(LOW_RAM_END));
        assert_eq!(memory.offset(HIGH_RAM_START + 0xfff), Some(LOW_RAM_END + 0xfff));
        assert_eq!(memory.offset(HIGH_RAM_START + 0x1000), None);
        assert_eq!(memory.offset(u64::MAX), None);
        assert_eq!(memory.gpa(LOW_RAM_END), HIGH_RAM_START);
        assert_eq!(memory.gpa(0x1234), 0x1234);
        assert!(memory.range(LOW_RAM_END - 1, 2).is_err());
        assert!(memory.range(u64::MAX, 2).is_err());
        assert!(memory.range(0, u64::MAX).is_err());
        assert_eq!(memory.range(LOW_RAM_END - 2, 2), Ok(LOW_RAM_END - 2));

        let small = unmapped(0x2000);
        assert_eq!(small.offset(0x1fff), Some(0x1fff));
        assert_eq!(small.offset(0x2000), None);
        assert_eq!(small.offset(HIGH_RAM_START), None);
    }

    #[test]
    fn every_size_loads_what_it_stored() {
        let memory = GuestMemory::on_heap(0x1000);
        memory.store64(8, 0x1122_3344_5566_7788);
        assert_eq!(memory.load64(8), 0x1122_3344_5566_7788);
        assert_eq!(memory.load32(9), 0x4455_6677);
        assert_eq!(memory.load16(14), 0x1122);
        assert_eq!(memory.load8(15), 0x11);
        memory.store8(8, 1);
        memory.store16(9, 0x0203);
        memory.store32(11, 0x0405_0607);
        assert_eq!(memory.load64(8), 0x1104_0506_0702_0301);
    }

    #[test]
    fn nothing_leaves_ram() {
        let memory = GuestMemory::on_heap(0x1000);
        for offset in [0xff9, 0x1000, u64::MAX - 3, u64::MAX] {
            memory.store64(offset, 0);
            assert_eq!(memory.load64(offset), u64::MAX, "{offset:#x}");
            assert_eq!(memory.compare_exchange(offset, 8, 0, 1), u64::MAX);
        }
        assert_eq!(memory.load64(0xff8), 0);
        assert_eq!(memory.compare_exchange128(0xff8, 0, 1), u128::MAX);
        let mut bytes = [0; 16];
        memory.load_bytes(0xff1, &mut bytes);
        assert_eq!(bytes, [0xff; 16]);
        memory.store_bytes(0xff1, &[7; 16]);
        assert_eq!(memory.load8(0xff1), 0);
        memory.fill_at(1, 0x1000, 7);
        assert_eq!(memory.load8(1), 0);
    }

    #[test]
    fn runs_of_all_lengths() {
        let memory = GuestMemory::on_heap(0x1000);
        for length in (0..100).chain([1000]) {
            let from: vec::Vec<u8> = (0..length).map(|i: usize| i as u8 ^ length as u8).collect();
            memory.fill_at(0, 0x1000, 0xee);
            memory.store_bytes(3, &from);
            assert_eq!((memory.load8(2), memory.load8(3 + length as u64)), (0xee, 0xee));
            let mut to = vec![0; length];
            memory.load_bytes(3, &mut to);
            assert_eq!(from, to);
        }
    }

    #[test]
    fn compare_and_exchange() {
        let memory = GuestMemory::on_heap(0x1000);
        memory.store64(0x3d, 0x1122_3344_5566_7788);
        assert_eq!(memory.compare_exchange(0x3d, 1, 0x87, 0), 0x88);
        assert_eq!(memory.compare_exchange(0x3d, 1, 0x88, 0xaa), 0x88);
        assert_eq!(memory.compare_exchange(0x3d, 2, 0x77aa, 0xbbbb), 0x77aa);
        assert_eq!(memory.compare_exchange(0x3d, 4, 0x5566_bbbb, 0xcccc_cccc), 0x5566_bbbb);
        assert_eq!(memory.compare_exchange(0x3d, 8, 0x1122_3344_cccc_cccc, 5), 0x1122_3344_cccc_cccc);
        assert_eq!(memory.load64(0x3d), 5);

        let old = memory.compare_exchange128(0x20, 0, 1 << 100 | 9);
        assert_eq!(old, 0);
        assert_eq!(memory.compare_exchange128(0x20, 0, 1), 1 << 100 | 9);
        assert_eq!(memory.compare_exchange128(0x20, 1 << 100 | 9, 3), 1 << 100 | 9);
        assert_eq!((memory.load64(0x20), memory.load64(0x28)), (3, 0));
        assert_eq!(memory.compare_exchange128(0x28, 0, 1), u128::MAX);
    }

    #[test]
    fn exchanges_of_two_threads_are_atomic() {
        let memory = Arc::new(GuestMemory::on_heap(0x1000));
        let add = |memory: &GuestMemory| {
            for _ in 0..20_000 {
                // Misaligned but within a cache line.
                let mut old = memory.load32(0x21);
                loop {
                    let seen = memory.compare_exchange(0x21, 4, old.into(), u64::from(old) + 1) as u32;
                    if seen == old {
                        break;
                    }
                    old = seen;
                }
            }
        };
        let other = std::thread::spawn({
            let memory = Arc::clone(&memory);
            move || add(&memory)
        });
        add(&memory);
        other.join().unwrap();
        assert_eq!(memory.load32(0x21), 40_000);
    }

    #[test]
    fn by_guest_physical_address() {
        let memory = GuestMemory::on_heap(0x2000);
        memory.write(0xffe, b"abcd").unwrap();
        let mut bytes = [0; 4];
        memory.read(0xffe, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abcd");
        assert_eq!(memory.write(0x1fff, b"xy"), Err(OutsideRam { gpa: 0x1fff, length: 2 }));
        memory.fill(0xfff, 2, b'z').unwrap();
        memory.read(0xffe, &mut bytes).unwrap();
        assert_eq!(&bytes, b"azzd");
        assert!(memory.fill(0x1000, 0x1001, 0).is_err());
        assert!(memory.write(0x5000, b"").is_ok());
    }

    #[test]
    fn the_owner_goes_with_the_memory() {
        let owner = Arc::new(());
        // SAFETY: no byte is mapped and none is accessed.
        let memory = unsafe { GuestMemory::new(core::ptr::dangling_mut(), 0, Box::new(Arc::clone(&owner))) };
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(memory);
        assert_eq!(Arc::strong_count(&owner), 1);
    }
}
