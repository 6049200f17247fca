//! Types of memory: what the host's memory-type range registers say, which EPT entries have to repeat (SDM Vol. 3A, section
//! 12.11; Vol. 3C, section 29.3.7).

use alloc::vec::Vec;

const UNCACHEABLE: u8 = 0;
const WRITE_THROUGH: u8 = 4;
/// Normal memory.
pub const WRITE_BACK: u8 = 6;

/// IA32_MTRRCAP: number of variable ranges.
const COUNT: u64 = 0xff;
/// IA32_MTRR_DEF_TYPE: type of what is in no range.
const DEFAULT_TYPE: u64 = 0xff;
/// IA32_MTRR_DEF_TYPE: the ranges hold; else all memory is uncacheable.
const ENABLED: u64 = 1 << 11;
/// IA32_MTRR_PHYSMASK: the range holds.
const VALID: u64 = 1 << 11;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Registers by number.
#[allow(missing_docs)]
pub mod register {
    pub const CAPABILITIES: u32 = 0xfe;
    pub const BASE0: u32 = 0x200;
    pub const DEFAULT_TYPE: u32 = 0x2ff;
}

/// A variable range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variable {
    base: u64,
    mask: u64,
    kind: u8,
}

/// The types of memory above the first megabyte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryTypes {
    default: u8,
    ranges: Vec<Variable>,
}

impl MemoryTypes {
    /// From the registers, which `read` reads.
    pub fn new(read: impl Fn(u32) -> u64) -> Self {
        let default = read(register::DEFAULT_TYPE);
        if default & ENABLED == 0 {
            return Self { default: UNCACHEABLE, ranges: Vec::new() };
        }
        let count = (read(register::CAPABILITIES) & COUNT) as u32;
        let ranges = (0..count)
            .map(|number| (read(register::BASE0 + 2 * number), read(register::BASE0 + 2 * number + 1)))
            .filter(|(_, mask)| mask & VALID != 0)
            .map(|(base, mask)| Variable { base: base & ADDRESS, mask: mask & ADDRESS, kind: base as u8 })
            .collect();
        Self { default: (default & DEFAULT_TYPE) as u8, ranges }
    }

    /// The type of the page at a physical address.
    fn of_page(&self, address: u64) -> u8 {
        let here = self.ranges.iter().filter(|range| (address ^ range.base) & range.mask == 0);
        here.map(|range| range.kind)
            .reduce(|first, second| match (first, second) {
                _ if first == second => first,
                (WRITE_THROUGH, WRITE_BACK) | (WRITE_BACK, WRITE_THROUGH) => WRITE_THROUGH,
                // Uncacheable prevails, and everything else is undefined.
                _ => UNCACHEABLE,
            })
            .unwrap_or(self.default)
    }

    /// The type of this many bytes, a power of two, from an address that is a multiple of them; nothing if there are several.
    pub fn of(&self, address: u64, size: u64) -> Option<u8> {
        // Where no range divides them, they are all of the first page's type.
        let whole = self.ranges.iter().all(|range| {
            let inner = range.mask & (size - 1) & ADDRESS;
            inner == 0 || (address ^ range.base) & range.mask & !(size - 1) != 0
        });
        whole.then(|| self.of_page(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Write-back, but for 3 GiB to 4 GiB and the first 64 KiB of 1 GiB; 2 GiB to 2 GiB + 2 MiB is written through.
    fn types() -> MemoryTypes {
        const MASK: u64 = 0xf_ffff_ffff;
        MemoryTypes::new(|register| match register {
            register::CAPABILITIES => 0x508,
            register::DEFAULT_TYPE => ENABLED | 6,
            0x200 => 0xc000_0000,
            0x201 => MASK & !0x3fff_ffff | VALID,
            0x202 => 0x4000_0000,
            0x203 => MASK & !0xffff | VALID,
            0x204 => 0x8000_0000 | 4,
            0x205 => MASK & !0x1f_ffff | VALID,
            // Not valid.
            0x206 => 0,
            _ => 0,
        })
    }

    #[test]
    fn ranges() {
        let types = types();
        assert_eq!(types.ranges.len(), 3);
        assert_eq!(types.of(0x20_0000, 2 << 20), Some(WRITE_BACK));
        assert_eq!(types.of(0xfee0_0000, 2 << 20), Some(UNCACHEABLE));
        assert_eq!(types.of(0x8000_0000, 2 << 20), Some(WRITE_THROUGH));
        assert_eq!(types.of(0x4000_0000, 2 << 20), None);
        assert_eq!(types.of(0x4000_f000, 4096), Some(UNCACHEABLE));
        assert_eq!(types.of(0x4001_0000, 4096), Some(WRITE_BACK));
        assert_eq!(types.of(0x4020_0000, 2 << 20), Some(WRITE_BACK));
    }

    #[test]
    fn without_ranges_nothing_is_cached() {
        let types = MemoryTypes::new(|_| 6);
        assert_eq!(types.of(0x20_0000, 2 << 20), Some(UNCACHEABLE));
    }

    #[test]
    fn overlaps() {
        let range = |base, kind| Variable { base, mask: 0xf_c000_0000, kind };
        let of = |first, second| {
            let ranges = alloc::vec![range(0x4000_0000, first), range(0x4000_0000, second)];
            MemoryTypes { default: WRITE_BACK, ranges }.of(0x4000_0000, 4096)
        };
        assert_eq!((of(6, 4), of(6, 6), of(6, 0)), (Some(4), Some(6), Some(0)));
    }
}
