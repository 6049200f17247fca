//! The virtqueue as a pure machine over guest memory: what the driver offers comes out as [`Chain`]s, and goes back as
//! used. It holds no lock, interrupts nobody, and believes nothing that the guest has written.

mod packed;
#[cfg(test)]
mod property_tests;
mod split;

use super::chain::{Chain, RingError, Token};
use super::feature::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use crate::dma::Dma;
use packed::PackedRing;
use split::SplitRing;

/// Entries of a ring at most.
pub const MAX_SIZE: u16 = 1 << 15;

/// Descriptor flag: the chain goes on.
const NEXT: u16 = 1 << 0;
/// Descriptor flag: the device writes.
const WRITE: u16 = 1 << 1;
/// Descriptor flag: the piece is a table of descriptors.
const INDIRECT: u16 = 1 << 2;
/// Bytes of a descriptor, in both formats.
const DESCRIPTOR_SIZE: u64 = 16;

/// Where a ring is: guest-physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Number of entries.
    pub size: u16,
    /// The descriptors.
    pub descriptors: u64,
    /// What the driver writes: available ring, or event suppression.
    pub driver: u64,
    /// What the device writes: used ring, or event suppression.
    pub device: u64,
}

/// How far a ring has got: all that is not in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Where the next chain is taken from. Packed ring: bit 15 is the wrap counter.
    pub available: u16,
    /// Where the next one is given back. Packed ring: bit 15 is the wrap counter.
    pub used: u16,
    /// Entries given back since it was last considered whether to interrupt.
    pub unsignalled: u16,
}

/// A ring of either format.
#[derive(Debug)]
pub enum Ring {
    /// Section 2.7.
    Split(SplitRing),
    /// Section 2.8.
    Packed(PackedRing),
}

impl Ring {
    /// A ring as the driver has set it up, of the format that the negotiated features say.
    ///
    /// # Errors
    /// It is not all in RAM, or breaks the rules for size and alignment.
    pub fn new(layout: &Layout, features: u64, dma: &Dma) -> Result<Self, RingError> {
        let options =
            Options { event_index: features & EVENT_IDX != 0, indirect: features & INDIRECT_DESC != 0 };
        if features & RING_PACKED != 0 {
            PackedRing::new(layout, options, dma).map(Self::Packed)
        } else {
            SplitRing::new(layout, options, dma).map(Self::Split)
        }
    }

    /// Takes the next chain, if the driver offers one.
    pub fn pop(&mut self, dma: &Dma) -> Result<Option<Chain>, RingError> {
        match self {
            Self::Split(ring) => ring.pop(dma),
            Self::Packed(ring) => ring.pop(dma),
        }
    }

    /// Asks the driver to tell of the next chain. True: one has come meanwhile.
    pub fn arm(&mut self, dma: &Dma) -> bool {
        match self {
            Self::Split(ring) => ring.arm(dma),
            Self::Packed(ring) => ring.arm(dma),
        }
    }

    /// Puts the chain that was taken last back, as if it had not been.
    pub fn unpop(&mut self, token: Token) {
        match self {
            Self::Split(ring) => ring.unpop(),
            Self::Packed(ring) => ring.unpop(token),
        }
    }

    /// Gives chains back, all at once, each with the number of bytes that were written to it.
    pub fn push(&mut self, dma: &Dma, chains: &[(Token, u32)]) {
        match self {
            Self::Split(ring) => ring.push(dma, chains),
            Self::Packed(ring) => ring.push(dma, chains),
        }
    }

    /// Whether the driver wants to be interrupted for what was given back since the last call.
    pub fn wants_interrupt(&mut self, dma: &Dma) -> bool {
        // What was given back must be visible before it is read what the driver wants.
        dma.barrier();
        match self {
            Self::Split(ring) => ring.wants_interrupt(dma),
            Self::Packed(ring) => ring.wants_interrupt(dma),
        }
    }

    /// How far it has got.
    pub fn position(&self) -> Position {
        match self {
            Self::Split(ring) => ring.position(),
            Self::Packed(ring) => ring.position(),
        }
    }

    /// Goes on from a position. False: the ring has no such place.
    pub fn set_position(&mut self, position: Position) -> bool {
        match self {
            Self::Split(ring) => ring.set_position(position),
            Self::Packed(ring) => ring.set_position(position),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Options {
    event_index: bool,
    indirect: bool,
}

/// A descriptor of either format: the first half is the address.
struct Descriptor {
    address: u64,
    length: u32,
    /// Split: flags, next. Packed: buffer ID, flags.
    words: [u16; 2],
}

impl Descriptor {
    fn load(dma: &Dma, offset: u64) -> Self {
        // The second half first: in a packed ring it says whether the first is valid.
        let rest = dma.load64(offset + 8);
        Self {
            address: dma.load64(offset),
            length: rest as u32,
            words: [(rest >> 32) as u16, (rest >> 48) as u16],
        }
    }
}

/// Offset in RAM and number of descriptors of an indirect table.
fn table(dma: &Dma, address: u64, length: u32) -> Result<(u64, u32), RingError> {
    if length == 0 || !length.is_multiple_of(DESCRIPTOR_SIZE as u32) {
        return Err(RingError::Table(length));
    }
    Ok((dma.range(address, length.into())?, length / DESCRIPTOR_SIZE as u32))
}

/// The offset in RAM of a part of a ring.
fn part(dma: &Dma, gpa: u64, length: u64, align: u64, size: u16) -> Result<u64, RingError> {
    if !gpa.is_multiple_of(align) {
        return Err(RingError::Layout(size));
    }
    Ok(dma.range(gpa, length)?)
}
