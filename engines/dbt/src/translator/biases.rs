//! Biases: what tells address spaces, modes and times apart in the jump cache.
//!
//! An entry's tag is the linear address of its code, exclusive-or a bias. Bits 47 to 61 of a bias are its own among all that
//! hold at a time, bits 62 and 63 are zero. Two canonical addresses differ in all bits from 47 to 63 or in none, and so do
//! not make the same tag with two different biases, nor with one whose [`EVENT_BIT`] is set. The lower bits are random: a
//! guest would have to guess the difference of two biases to make an address that is not canonical hit.

use rustc_hash::FxHashMap;

use super::context::EVENT_BIT;

const NUMBER_SHIFT: u32 = 47;
/// Biases that hold at a time, at most.
const NUMBERS: u64 = 1 << (62 - NUMBER_SHIFT);
const _: () = assert!(NUMBERS << NUMBER_SHIFT < EVENT_BIT);

/// The biases that hold, by address space and mode.
#[derive(Default)]
pub struct Biases {
    known: FxHashMap<(u16, u16), u64>,
    /// Number of the last one.
    last: u64,
}

impl Biases {
    /// The bias of an address space and a mode; `None` if there is no number left: the jump cache is to be emptied, and
    /// [`Biases::start_anew`] called.
    pub fn get(&mut self, space: u16, mode: u16, random: impl Fn() -> u64) -> Option<u64> {
        if let Some(&bias) = self.known.get(&(space, mode)) {
            return Some(bias);
        }
        if self.last == NUMBERS - 1 {
            return None;
        }
        self.last += 1;
        let bias = self.last << NUMBER_SHIFT | random() & ((1 << NUMBER_SHIFT) - 1);
        self.known.insert((space, mode), bias);
        Some(bias)
    }

    /// Those of an address space hold no longer.
    pub fn forget_space(&mut self, space: u16) {
        self.known.retain(|&(of, _), _| of != space);
    }

    /// None holds any longer.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    /// No tag is left that was made with any.
    pub fn start_anew(&mut self) {
        self.known.clear();
        self.last = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses_make_different_tags() {
        let mut biases = Biases::default();
        let random = || u64::MAX;
        let first = biases.get(1, 0, random).unwrap();
        let second = biases.get(1, 1, || 0).unwrap();
        assert_eq!(biases.get(1, 0, || 5), Some(first));
        biases.forget_space(1);
        let third = biases.get(1, 0, random).unwrap();
        for (one, other) in [(first, second), (first, third), (second, third), (first, first | EVENT_BIT)] {
            let upper = (one ^ other) >> NUMBER_SHIFT;
            assert!(upper != 0 && upper != (1 << 17) - 1, "{one:x} {other:x}");
        }
        // Nor the tag of an empty entry.
        assert!([first, first | EVENT_BIT].iter().all(|bias| !bivisor_x86::memory::is_canonical(*bias)));
    }

    #[test]
    fn they_run_out_and_start_anew() {
        let mut biases = Biases::default();
        let all = (0..).map_while(|space| biases.get(space, 0, || u64::MAX)).count() as u64;
        assert_eq!(all, NUMBERS - 1);
        biases.forget();
        assert_eq!(biases.get(1, 0, || 0), None);
        biases.start_anew();
        assert!(biases.get(1, 0, || 0).is_some());
    }
}
