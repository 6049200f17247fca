//! A list of bounded length, for the time before there is a heap.

use crate::boot::Range;

/// Up to `N` values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List<T, const N: usize> {
    items: [T; N],
    count: usize,
}

impl<const N: usize> List<Range, N> {
    /// No ranges.
    pub(crate) const EMPTY: Self = Self::of(Range { start: 0, end: 0 });
}

impl<T: Copy, const N: usize> List<T, N> {
    /// Nothing; `filler` is what stands where no value is yet.
    pub(crate) const fn of(filler: T) -> Self {
        Self { items: [filler; N], count: 0 }
    }

    /// Adds a value; false if there is no room.
    pub(crate) fn push(&mut self, item: T) -> bool {
        let Some(slot) = self.items.get_mut(self.count) else { return false };
        *slot = item;
        self.count += 1;
        true
    }

    /// Puts a value at a place, and moves those behind it; false if there is no room.
    pub(crate) fn insert(&mut self, at: usize, item: T) -> bool {
        if !self.push(item) {
            return false;
        }
        if let Some(tail) = self.items.get_mut(at..self.count) {
            tail.rotate_right(1);
        }
        true
    }

    /// Removes the value at a place.
    pub(crate) fn remove(&mut self, at: usize) {
        if let Some(tail) = self.items.get_mut(at..self.count) {
            tail.rotate_left(1);
            self.count -= 1;
        }
    }

    /// The last value.
    pub(crate) fn last_mut(&mut self) -> Option<&mut T> {
        self.items.get_mut(..self.count)?.last_mut()
    }

    /// The values.
    pub(crate) fn as_slice(&self) -> &[T] {
        self.items.get(..self.count).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_in_order() {
        let mut list = List::<u32, 4>::of(0);
        assert!(list.push(1) && list.push(3) && list.insert(1, 2) && list.insert(0, 0));
        assert!(!list.push(9) && !list.insert(0, 9));
        assert_eq!(list.as_slice(), [0, 1, 2, 3]);
        list.remove(1);
        list.remove(7);
        assert_eq!(list.as_slice(), [0, 2, 3]);
    }
}
