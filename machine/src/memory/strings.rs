//! Runs of elements, as repeated string instructions go through them: by the host's own string instructions, so
//! that ranges which overlap come out as the architecture says, at the host's own speed.

use core::arch::asm;

use bivisor_x86::env::Compared;

use super::{GuestMemory, copy};

/// One repeated string instruction of each element size: `$size` picks among `$b` to `$q`.
macro_rules! of_size {
    ($size:expr, $before:literal, [$b:literal, $w:literal, $d:literal, $q:literal], $after:literal, $($operands:tt)*) => {
        match $size {
            1 => asm!($before, $b, $after, $($operands)*),
            2 => asm!($before, $w, $after, $($operands)*),
            4 => asm!($before, $d, $after, $($operands)*),
            _ => asm!($before, $q, $after, $($operands)*),
        }
    };
}

/// A comparison that goes on while its elements are equal, or while they differ.
macro_rules! while_equal {
    ($equal:expr, $size:expr, $repe:tt, $repne:tt, $($operands:tt)*) => {
        if $equal {
            of_size!($size, "", $repe, "lahf\n seto al", $($operands)*)
        } else {
            of_size!($size, "", $repne, "lahf\n seto al", $($operands)*)
        }
    };
}

/// What a comparison came to, from the instruction's count before and after, and AX after LAHF and SETO AL.
fn compared(count: u64, left: u64, word: u64) -> Compared {
    const LOW: u64 = 0b1101_0101;
    Compared { count: count - left, flags: word >> 8 & LOW | (word & 1) << 11 }
}

impl GuestMemory {
    /// Copies `count` elements of `size` (1, 2, 4, 8) bytes one after the other, as MOVS does: where the ranges
    /// overlap, what has been copied may be copied again. `from` and `to` are the lowest offsets of the two
    /// ranges; `down` begins with the highest elements.
    pub fn copy_elements(&self, from: u64, to: u64, count: u64, size: u64, down: bool) {
        let Some(bytes) = count.checked_mul(size).filter(|&bytes| bytes > 0) else { return };
        let (Some(mut source), Some(mut target)) = (self.pointer(from, bytes), self.pointer(to, bytes))
        else {
            return;
        };
        if from.abs_diff(to) >= bytes {
            // SAFETY: both ranges lie in the mapping and don't overlap.
            return unsafe { copy(source, target, bytes as usize) };
        }
        if !down {
            // SAFETY: both ranges lie in the mapping; the direction flag is clear by the ABI.
            unsafe {
                of_size!(size, "", ["rep movsb", "rep movsw", "rep movsd", "rep movsq"], "",
                    inout("rcx") count => _, inout("rsi") source => _, inout("rdi") target => _,
                    options(nostack, preserves_flags));
            }
            return;
        }
        let last = (bytes - size) as usize;
        source = source.wrapping_add(last);
        target = target.wrapping_add(last);
        // SAFETY: both ranges lie in the mapping, and the pointers are at their highest elements; the direction
        // flag is clear again at the end, as the ABI wants it.
        unsafe {
            of_size!(size, "std", ["rep movsb", "rep movsw", "rep movsd", "rep movsq"], "cld",
                inout("rcx") count => _, inout("rsi") source => _, inout("rdi") target => _,
                options(nostack));
        }
    }

    /// Stores `value`, cut to `size` (1, 2, 4, 8) bytes, in `count` elements from an offset on.
    pub fn fill_elements(&self, to: u64, value: u64, count: u64, size: u64) {
        let Some(bytes) = count.checked_mul(size) else { return };
        let Some(target) = self.pointer(to, bytes) else { return };
        // SAFETY: the range lies in the mapping, which is writable; the direction flag is clear by the ABI.
        unsafe {
            of_size!(size, "", ["rep stosb", "rep stosw", "rep stosd", "rep stosq"], "",
                inout("rcx") count => _, inout("rdi") target => _, in("rax") value,
                options(nostack, preserves_flags));
        }
    }

    /// Compares up to `count` (not 0) pairs of elements of `size` (1, 2, 4, 8) bytes upwards, while they are
    /// `equal` or while they are not, as REPE or REPNE CMPS does. `None` outside of RAM.
    pub fn compare_elements(
        &self,
        left: u64,
        right: u64,
        count: u64,
        size: u64,
        equal: bool,
    ) -> Option<Compared> {
        let bytes = count.checked_mul(size).filter(|&bytes| bytes > 0)?;
        let (first, second) = (self.pointer(left, bytes)?, self.pointer(right, bytes)?);
        let (rest, word): (u64, u64);
        // SAFETY: both ranges lie in the mapping, which is readable; the direction flag is clear by the ABI.
        unsafe {
            while_equal!(equal, size,
                ["repe cmpsb", "repe cmpsw", "repe cmpsd", "repe cmpsq"],
                ["repne cmpsb", "repne cmpsw", "repne cmpsd", "repne cmpsq"],
                inout("rcx") count => rest, inout("rsi") first => _, inout("rdi") second => _,
                out("rax") word, options(nostack, readonly));
        }
        Some(compared(count, rest, word))
    }

    /// Compares `value` with up to `count` (not 0) elements of `size` (1, 2, 4, 8) bytes upwards, while they are
    /// `equal` or while they are not, as REPE or REPNE SCAS does. `None` outside of RAM.
    pub fn scan_elements(
        &self,
        value: u64,
        right: u64,
        count: u64,
        size: u64,
        equal: bool,
    ) -> Option<Compared> {
        let bytes = count.checked_mul(size).filter(|&bytes| bytes > 0)?;
        let second = self.pointer(right, bytes)?;
        let (rest, word): (u64, u64);
        // SAFETY: the range lies in the mapping, which is readable; the direction flag is clear by the ABI.
        unsafe {
            while_equal!(equal, size,
                ["repe scasb", "repe scasw", "repe scasd", "repe scasq"],
                ["repne scasb", "repne scasw", "repne scasd", "repne scasq"],
                inout("rcx") count => rest, inout("rdi") second => _,
                inout("rax") value => word, options(nostack, readonly));
        }
        Some(compared(count, rest, word))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::vec::Vec;

    const SIZES: [u64; 4] = [1, 2, 4, 8];

    fn memory() -> GuestMemory {
        let memory = GuestMemory::on_heap(0x1000);
        (0..0x1000).for_each(|offset| memory.store8(offset, (offset * 7 + offset / 256) as u8));
        memory
    }

    fn element(memory: &GuestMemory, offset: u64, size: u64) -> u64 {
        let mut bytes = [0; 8];
        memory.load_bytes(offset, &mut bytes[..size as usize]);
        u64::from_le_bytes(bytes)
    }

    fn contents(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = std::vec![0; 0x1000];
        memory.load_bytes(0, &mut bytes);
        bytes
    }

    #[test]
    fn copies_are_as_if_made_element_by_element() {
        let from = 0x500u64;
        for size in SIZES {
            for distance in (-40i64..40).chain([-0x300, 0x300]) {
                for count in [0, 1, 3, 17, 64] {
                    for down in [false, true] {
                        let to = from.wrapping_add_signed(distance);
                        let (tried, expected) = (memory(), memory());
                        tried.copy_elements(from, to, count, size, down);
                        for index in 0..count {
                            let at = if down { count - 1 - index } else { index } * size;
                            let value = element(&expected, from + at, size);
                            expected.store_bytes(to + at, &value.to_le_bytes()[..size as usize]);
                        }
                        let what = (size, distance, count, down);
                        assert_eq!(contents(&tried), contents(&expected), "{what:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn fills_with_elements() {
        for size in SIZES {
            let memory = memory();
            let before = contents(&memory);
            memory.fill_elements(0x101, 0x8877_6655_4433_2211, 5, size);
            let after = contents(&memory);
            let end = 0x101 + 5 * size as usize;
            for (index, &byte) in after[0x101..end].iter().enumerate() {
                assert_eq!(u64::from(byte), 0x11 * (index as u64 % size + 1));
            }
            assert_eq!((&after[..0x101], &after[end..]), (&before[..0x101], &before[end..]));
        }
    }

    #[test]
    fn comparisons_stop_where_they_should() {
        const CF: u64 = 1;
        const ZF: u64 = 1 << 6;
        const OF: u64 = 1 << 11;
        for size in SIZES {
            let memory = GuestMemory::on_heap(0x1000);
            memory.store8(0x100 + 9 * size, 1);
            let compare = |left, right, count, equal| {
                let compared = memory.compare_elements(left, right, count, size, equal).unwrap();
                (compared.count, compared.flags & (CF | ZF))
            };
            assert_eq!(compare(0x100, 0x200, 20, true), (10, 0));
            assert_eq!(compare(0x200, 0x100, 20, true), (10, CF));
            assert_eq!(compare(0x100, 0x200, 9, true), (9, ZF));
            assert_eq!(compare(0x100 + 9 * size, 0x200, 8, false), (2, ZF));
            let scan = |value, right, count, equal| {
                let compared = memory.scan_elements(value, right, count, size, equal).unwrap();
                (compared.count, compared.flags & (CF | ZF))
            };
            assert_eq!(scan(1, 0x100, 20, false), (10, ZF));
            assert_eq!(scan(1, 0x100, 9, false), (9, 0));
            assert_eq!(scan(0, 0x100, 20, true), (10, CF));
            let lowest = 1 << (8 * size - 1);
            let compared = memory.scan_elements(lowest, 0x100 + 9 * size, 1, size, false).unwrap();
            assert_eq!(compared.flags & (CF | ZF | OF), OF);
        }
    }

    #[test]
    fn nothing_leaves_ram() {
        let memory = memory();
        let before = contents(&memory);
        for (from, to) in [(0xff9, 0), (0, 0xff9), (u64::MAX, 0), (0, u64::MAX - 3)] {
            for down in [false, true] {
                memory.copy_elements(from, to, 1, 8, down);
                memory.copy_elements(from, to, u64::MAX / 4, 8, down);
            }
            assert_eq!(memory.compare_elements(from, to, 1, 8, true), None);
        }
        memory.fill_elements(0xff9, 0, 1, 8);
        memory.fill_elements(0, 0, u64::MAX, 8);
        assert_eq!(memory.scan_elements(0, 0xff9, 1, 8, true), None);
        assert_eq!(memory.scan_elements(0, 0, 0, 8, true), None, "no elements, no flags");
        assert_eq!(contents(&memory), before);
    }
}
