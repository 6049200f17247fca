//! A request as the guest has put it together: pieces of its RAM, first those that the device reads, then those that it
//! writes (section 2.6).

use alloc::vec::Vec;

use crate::dma::Dma;
use crate::memory::OutsideRam;

/// Pieces of a chain at most.
pub const MAX_SEGMENTS: usize = 1024;

/// What is wrong with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The driver offers more than the ring has room for.
    #[error("{0} entries are in use or offered, more than the ring has")]
    Available(u16),
    /// A descriptor number outside of its table.
    #[error("there is no descriptor {0}")]
    Descriptor(u16),
    /// More descriptors than a chain can have, or a loop.
    #[error("a chain of descriptors is too long or has no end")]
    TooLong,
    /// An indirect table of no whole number of descriptors, or of none.
    #[error("an indirect table has {0} bytes")]
    Table(u32),
    /// An indirect descriptor inside an indirect table, or with a successor, or without being negotiated.
    #[error("an indirect descriptor is where there must be none")]
    Indirect,
    /// A piece that the device reads, behind one that it writes.
    #[error("a descriptor to be read follows one to be written")]
    Order,
    /// An address that is no RAM.
    #[error(transparent)]
    Memory(#[from] OutsideRam),
    /// More bytes than 32 bits count.
    #[error("a chain has 4 GiB or more")]
    TooLarge,
    /// The ring itself can't be used.
    #[error("the ring has {0} entries, or lies at an address of the wrong alignment")]
    Layout(u16),
}

/// A piece of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its offset in RAM.
    pub offset: u64,
    /// Its bytes.
    pub length: u32,
}

/// A request. Its pieces are known to lie in RAM; what they hold may change at any time.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    /// What the ring needs to give it back.
    pub token: Token,
    segments: Vec<Segment>,
    readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
}

/// A chain's name in its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Split ring: number of the first descriptor. Packed ring: the driver's buffer ID.
    pub id: u16,
    /// Entries of the ring that it takes.
    pub entries: u16,
}

impl Chain {
    /// Bytes for the device to read.
    pub fn readable(&self) -> u32 {
        self.readable_bytes
    }
    /// Bytes for the device to write.
    pub fn writable(&self) -> u32 {
        self.writable_bytes
    }
    /// The pieces that the device reads.
    pub fn readable_segments(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }
    /// The pieces that the device writes.
    pub fn writable_segments(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }
    /// The bytes to read, from the first on.
    pub fn reader<'a>(&'a self, dma: &'a Dma) -> Cursor<'a> {
        Cursor { dma, segments: self.readable_segments(), done: 0, left: self.readable_bytes }
    }
    /// The bytes to write, from the first on.
    pub fn writer<'a>(&'a self, dma: &'a Dma) -> Cursor<'a> {
        Cursor { dma, segments: self.writable_segments(), done: 0, left: self.writable_bytes }
    }
}

/// A place in the pieces of a chain.
pub struct Cursor<'a> {
    dma: &'a Dma,
    segments: &'a [Segment],
    /// Bytes of the first segment that lie behind.
    done: u32,
    left: u32,
}

impl Cursor<'_> {
    /// Bytes from here on.
    pub fn left(&self) -> u32 {
        self.left
    }

    /// Calls `each(offset in RAM, position, bytes)` for the pieces of the next `length` bytes, as far as there are so
    /// many; returns how many there were.
    fn advance(&mut self, length: usize, mut each: impl FnMut(&Dma, u64, core::ops::Range<usize>)) -> usize {
        let mut position = 0;
        while position < length
            && let Some((segment, rest)) = self.segments.split_first()
        {
            let piece = ((segment.length - self.done) as usize).min(length - position);
            each(self.dma, segment.offset + u64::from(self.done), position..position + piece);
            position += piece;
            self.done += piece as u32;
            if self.done == segment.length {
                (self.segments, self.done) = (rest, 0);
            }
        }
        self.left -= position as u32;
        position
    }

    /// Reads bytes of RAM; returns how many there were.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        self.advance(to.len(), |dma, offset, at| {
            if let Some(to) = to.get_mut(at) {
                dma.load_bytes(offset, to);
            }
        })
    }
    /// Reads an array; `None` if fewer bytes are left.
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read(&mut bytes) == N).then_some(bytes)
    }
    /// Writes bytes to RAM; returns how many found room.
    pub fn write(&mut self, from: &[u8]) -> usize {
        self.advance(from.len(), |dma, offset, at| {
            if let Some(from) = from.get(at) {
                dma.store_bytes(offset, from);
            }
        })
    }
    /// Passes over bytes; returns how many there were.
    pub fn skip(&mut self, length: u32) -> usize {
        self.advance(length as usize, |_, _, _| {})
    }
}

/// Puts a chain together from descriptors.
pub(super) struct Builder<'a> {
    dma: &'a Dma,
    segments: Vec<Segment>,
    descriptors: usize,
    readable: usize,
    bytes: [u64; 2],
}

impl<'a> Builder<'a> {
    pub fn new(dma: &'a Dma) -> Self {
        Self { dma, segments: Vec::new(), descriptors: 0, readable: 0, bytes: [0; 2] }
    }

    /// Adds the piece of a descriptor. Empty ones are allowed and mean nothing.
    pub fn add(&mut self, address: u64, length: u32, writable: bool) -> Result<(), RingError> {
        self.descriptors += 1;
        if self.descriptors > MAX_SEGMENTS {
            return Err(RingError::TooLong);
        }
        if !writable && self.segments.len() > self.readable {
            return Err(RingError::Order);
        }
        if length == 0 {
            return Ok(());
        }
        let offset = self.dma.range(address, length.into())?;
        self.segments.push(Segment { offset, length });
        self.readable += usize::from(!writable);
        self.bytes[usize::from(writable)] += u64::from(length);
        Ok(())
    }

    pub fn finish(self, token: Token) -> Result<Chain, RingError> {
        let [readable, writable] = self.bytes.map(u32::try_from);
        Ok(Chain {
            token,
            segments: self.segments,
            readable: self.readable,
            readable_bytes: readable.map_err(|_| RingError::TooLarge)?,
            writable_bytes: writable.map_err(|_| RingError::TooLarge)?,
        })
    }
}
