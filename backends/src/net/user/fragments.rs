//! Datagrams that the guest sends in pieces (RFC 791, section 3.2; RFC 8200, section 4.5), put together.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use smoltcp::wire::IpProtocol;

/// Datagrams in pieces at once, at most: a guest that never sends the last piece costs no more.
const SETS: usize = 16;

/// Pieces of one datagram, at most: 64 KiB in those of the smallest MTU of IPv6.
const PIECES: usize = 64;

/// How long the pieces of one datagram may take (RFC 8200 says 60 s; here there is no way to take long).
const LASTS: Duration = Duration::from_secs(10);

/// The largest datagram, without its IP header.
const LARGEST: usize = 65535;

/// What pieces of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub source: IpAddr,
    pub dest: IpAddr,
    pub protocol: IpProtocol,
    pub ident: u32,
}

struct Set {
    key: Key,
    began: Instant,
    /// Pieces by their place, which is a multiple of 8 bytes.
    pieces: Vec<(usize, Vec<u8>)>,
    /// Known with the last piece.
    length: Option<usize>,
}

/// Datagrams of which pieces are missing.
#[derive(Default)]
pub struct Fragments {
    sets: Vec<Set>,
}

impl Fragments {
    /// A piece, at this place, with more to follow or not. The answer is the datagram, if it was the one missing.
    pub fn add(&mut self, now: Instant, key: Key, at: usize, more: bool, bytes: &[u8]) -> Option<Vec<u8>> {
        self.sets.retain(|set| now < set.began + LASTS);
        if bytes.is_empty() || at + bytes.len() > LARGEST || (more && !bytes.len().is_multiple_of(8)) {
            return None;
        }
        let index = match self.sets.iter().position(|set| set.key == key) {
            Some(index) => index,
            None => {
                if self.sets.len() >= SETS {
                    self.sets.remove(0);
                }
                self.sets.push(Set { key, began: now, pieces: Vec::new(), length: None });
                self.sets.len() - 1
            }
        };
        let set = &mut self.sets[index];
        if set.pieces.len() >= PIECES || !set.add(at, more, bytes) {
            // Pieces that overlap are an attack (RFC 5722): nothing of the datagram is kept.
            self.sets.remove(index);
            return None;
        }
        let whole = set.whole()?;
        self.sets.remove(index);
        Some(whole)
    }
}

impl Set {
    /// False: the piece doesn't go with the others.
    fn add(&mut self, at: usize, more: bool, bytes: &[u8]) -> bool {
        let end = at + bytes.len();
        if !more && self.length.replace(end).is_some() {
            return false;
        }
        let beyond = self.length.is_some_and(|length| {
            end > length || self.pieces.iter().any(|(at, bytes)| at + bytes.len() > length)
        });
        let place = self.pieces.partition_point(|(other, _)| *other < at);
        let before =
            place.checked_sub(1).map_or(0, |index| self.pieces[index].0 + self.pieces[index].1.len());
        let after = self.pieces.get(place).map_or(LARGEST, |(other, _)| *other);
        if beyond || before > at || end > after {
            return false;
        }
        self.pieces.insert(place, (at, bytes.to_vec()));
        true
    }

    fn whole(&self) -> Option<Vec<u8>> {
        let length = self.length?;
        let have: usize = self.pieces.iter().map(|(_, bytes)| bytes.len()).sum();
        // They don't overlap, so that the sum tells.
        (have == length).then(|| self.pieces.iter().flat_map(|(_, bytes)| bytes).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn key(ident: u32) -> Key {
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Key { source: address, dest: address, protocol: IpProtocol::Udp, ident }
    }

    #[test]
    fn pieces_in_any_order_make_a_whole() {
        let now = Instant::now();
        let data: Vec<u8> = (0..50).collect();
        let pieces = [(0, &data[..16]), (16, &data[16..40]), (40, &data[40..])];
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut fragments = Fragments::default();
            let mut results =
                order.map(|index| fragments.add(now, key(1), pieces[index].0, index != 2, pieces[index].1));
            assert_eq!(results[2].take().as_deref(), Some(&data[..]), "{order:?}");
            assert_eq!(results, [None, None, None]);
            assert!(fragments.sets.is_empty());
        }
    }

    #[test]
    fn overlaps_and_nonsense_are_dropped() {
        let now = Instant::now();
        let mut fragments = Fragments::default();
        for (at, more, length) in [(8, true, 16), (16, true, 8)] {
            assert_eq!(fragments.add(now, key(1), at, more, &vec![0; length]), None);
        }
        assert!(fragments.sets.is_empty(), "an overlap");
        fragments.add(now, key(2), 0, false, &[0; 8]);
        fragments.add(now, key(3), 16, true, &[0; 8]);
        fragments.add(now, key(3), 0, false, &[0; 8]);
        assert!(fragments.sets.is_empty(), "a piece beyond the last");
        assert_eq!(fragments.add(now, key(4), 65528, false, &[0; 8]), None);
        assert_eq!(fragments.add(now, key(4), 0, true, &[0; 7]), None);
        assert_eq!(fragments.add(now, key(4), 0, true, &[]), None);
        assert!(fragments.sets.is_empty());
    }

    #[test]
    fn what_is_missing_pieces_has_a_bound_and_an_end() {
        let now = Instant::now();
        let mut fragments = Fragments::default();
        for ident in 0..1000 {
            fragments.add(now, key(ident), 0, true, &[0; 8]);
        }
        assert_eq!(fragments.sets.len(), SETS);
        fragments.add(now + LASTS, key(0), 0, true, &[0; 8]);
        assert_eq!(fragments.sets.len(), 1);
    }
}
