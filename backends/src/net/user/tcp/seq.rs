//! Sequence numbers (RFC 9293, section 3.4). Whatever a guest sends, no operation on them panics.

use std::cmp::Ordering;
use std::hash::{BuildHasher, Hash, RandomState};
use std::ops::{Add, AddAssign, Sub};
use std::time::Instant;

use smoltcp::wire::TcpSeqNumber;

/// A sequence number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seq(u32);

impl Seq {
    /// Bytes from `earlier` to here; 0 where it is not earlier.
    pub fn since(self, earlier: Self) -> usize {
        (self.0.wrapping_sub(earlier.0) as i32).max(0) as usize
    }
}

/// Time in which the first sequence number of a connection grows by one, in nanoseconds (RFC 9293, section 3.4.1).
const TICK: u128 = 4000;

/// Makes first sequence numbers that nobody can guess, and that come behind those of earlier connections between the same
/// two ends: a guest that still remembers such a one knows the new one for new (RFC 6528, section 3).
pub struct Initial {
    secret: RandomState,
    began: Instant,
}

impl Default for Initial {
    fn default() -> Self {
        Self { secret: RandomState::new(), began: Instant::now() }
    }
}

impl Initial {
    /// The first sequence number of a connection between these ends.
    pub fn number(&self, ends: &impl Hash, now: Instant) -> Seq {
        let ticks = now.saturating_duration_since(self.began).as_nanos() / TICK;
        Seq((self.secret.hash_one(ends) as u32).wrapping_add(ticks as u32))
    }
}

impl From<TcpSeqNumber> for Seq {
    fn from(number: TcpSeqNumber) -> Self {
        Self(number.0 as u32)
    }
}

impl From<Seq> for TcpSeqNumber {
    fn from(number: Seq) -> Self {
        Self(number.0 as i32)
    }
}

impl Add<usize> for Seq {
    type Output = Self;
    fn add(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes as u32))
    }
}

impl Sub<usize> for Seq {
    type Output = Self;
    fn sub(self, bytes: usize) -> Self {
        Self(self.0.wrapping_sub(bytes as u32))
    }
}

impl AddAssign<usize> for Seq {
    fn add_assign(&mut self, bytes: usize) {
        *self = *self + bytes;
    }
}

impl PartialOrd for Seq {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some((self.0.wrapping_sub(other.0) as i32).cmp(&0))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn first_numbers_grow_and_are_secret() {
        let initial = Initial::default();
        let later = initial.began + Duration::from_millis(8);
        let first = initial.number(&1, initial.began);
        assert_eq!(initial.number(&1, later).since(first), 2000);
        let others = (2..12).map(|ends| initial.number(&ends, initial.began));
        assert!(others.into_iter().any(|other| other != first));
        assert_ne!(Initial::default().number(&1, later), initial.number(&1, later));
    }
}
