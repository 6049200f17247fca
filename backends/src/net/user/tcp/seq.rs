//! Sequence numbers (RFC 9293, section 3.4). Whatever a guest sends, no operation on them panics.

use std::cmp::Ordering;
use std::ops::{Add, AddAssign, Sub};

use rustix::rand::{GetRandomFlags, getrandom};
use smoltcp::wire::TcpSeqNumber;

/// A sequence number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seq(u32);

impl Seq {
    /// One that nobody can guess.
    pub fn random() -> Self {
        let mut bytes = [0; 4];
        // Fails only on kernels that lack the call; a known number then costs no more than it did in 1981.
        let _ = getrandom(&mut bytes, GetRandomFlags::empty());
        Self(u32::from_ne_bytes(bytes))
    }

    /// Bytes from `earlier` to here; 0 where it is not earlier.
    pub fn since(self, earlier: Self) -> usize {
        (self.0.wrapping_sub(earlier.0) as i32).max(0) as usize
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
