//! Which physical memory is free.

use super::PAGE;
use crate::boot::Range;
use crate::list::List;

/// Ranges that are kept apart. More pieces than this are lost, not given out twice.
const MAX_RANGES: usize = 1024;

/// The free ranges, ascending, apart from each other, of whole pages.
pub(crate) struct Frames {
    free: List<Range, MAX_RANGES>,
}

impl Frames {
    /// Nothing is free.
    pub(crate) const fn new() -> Self {
        Self { free: List::EMPTY }
    }

    /// Bytes that are free.
    pub(crate) fn free(&self) -> u64 {
        self.free.as_slice().iter().map(Range::size).sum()
    }

    /// These are free from now on, as far as they are whole pages.
    pub(crate) fn add(&mut self, range: Range) {
        let start = range.start.next_multiple_of(PAGE);
        let end = range.end & !(PAGE - 1);
        if start >= end {
            return;
        }
        let mut merged = Range { start, end };
        while let Some(at) = self
            .free
            .as_slice()
            .iter()
            .position(|other| other.start <= merged.end && merged.start <= other.end)
        {
            let other = self.free.as_slice()[at];
            merged = Range { start: merged.start.min(other.start), end: merged.end.max(other.end) };
            self.free.remove(at);
        }
        let at = self.free.as_slice().partition_point(|other| other.start < merged.start);
        self.free.insert(at, merged);
    }

    /// These are not free any more, nor are the pages that they lie in in part.
    pub(crate) fn remove(&mut self, range: Range) {
        let taken = Range { start: range.start & !(PAGE - 1), end: range.end.next_multiple_of(PAGE) };
        while let Some(at) =
            self.free.as_slice().iter().position(|other| other.start < taken.end && taken.start < other.end)
        {
            let other = self.free.as_slice()[at];
            self.free.remove(at);
            let (below, above) = (
                Range { start: other.start, end: taken.start.min(other.end) },
                Range { start: taken.end.max(other.start), end: other.end },
            );
            let mut place = at;
            for part in [below, above] {
                if part.start < part.end && self.free.insert(place, part) {
                    place += 1;
                }
            }
        }
    }

    /// Takes the lowest `size` bytes, a multiple of a page, that start at a multiple of `alignment`, a power of two.
    pub(crate) fn allocate(&mut self, size: u64, alignment: u64) -> Option<u64> {
        let start = self.free.as_slice().iter().find_map(|range| {
            let start = range.start.checked_next_multiple_of(alignment)?;
            (start.checked_add(size)? <= range.end).then_some(start)
        })?;
        self.remove(Range { start, end: start + size });
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range { start: start << 12, end: end << 12 }
    }
    fn frames(ranges: &[(u64, u64)]) -> Frames {
        let mut frames = Frames::new();
        ranges.iter().for_each(|&(start, end)| frames.add(range(start, end)));
        frames
    }
    fn free(frames: &Frames) -> alloc::vec::Vec<(u64, u64)> {
        frames.free.as_slice().iter().map(|range| (range.start >> 12, range.end >> 12)).collect()
    }

    #[test]
    fn neighbours_become_one() {
        assert_eq!(free(&frames(&[(8, 9), (1, 3), (5, 8), (3, 4)])), [(1, 4), (5, 9)]);
        assert_eq!(free(&frames(&[(1, 3), (5, 8), (2, 6)])), [(1, 8)]);
    }

    #[test]
    fn only_whole_pages_count() {
        let mut frames = Frames::new();
        frames.add(Range { start: 0x1001, end: 0x3fff });
        frames.add(Range { start: 0x8001, end: 0x8fff });
        assert_eq!(free(&frames), [(2, 3)]);
        frames.add(range(4, 8));
        frames.remove(Range { start: 0x5fff, end: 0x6001 });
        assert_eq!(free(&frames), [(2, 3), (4, 5), (7, 8)]);
    }

    #[test]
    fn what_is_removed_is_removed_everywhere() {
        let mut frames = frames(&[(1, 3), (5, 8), (10, 20)]);
        frames.remove(range(2, 12));
        assert_eq!(free(&frames), [(1, 2), (12, 20)]);
        frames.remove(range(0, 100));
        assert_eq!((free(&frames).len(), frames.free()), (0, 0));
    }

    #[test]
    fn allocations_are_aligned_apart_and_come_back() {
        let mut frames = frames(&[(1, 9)]);
        let a = frames.allocate(2 << 12, 4 << 12).unwrap();
        let b = frames.allocate(1 << 12, 1 << 12).unwrap();
        assert_eq!((a >> 12, b >> 12), (4, 1));
        assert_eq!(frames.allocate(4 << 12, 1 << 12), None);
        assert_eq!(frames.allocate(!0xfff, 1 << 12), None);
        frames.add(Range { start: a, end: a + (2 << 12) });
        assert_eq!(free(&frames), [(2, 9)]);
    }
}
