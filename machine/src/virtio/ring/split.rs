//! The split ring (section 2.7): a table of descriptors, a ring of available and one of used chains.

use super::{
    DESCRIPTOR_SIZE, Descriptor, INDIRECT, Layout, MAX_SIZE, NEXT, Options, Position, WRITE, part, table,
};
use crate::dma::Dma;
use crate::virtio::chain::{Builder, Chain, RingError, Token};

/// Offset of the index, and of the ring behind it, in both rings.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
/// Available ring's flag: no interrupts, please.
const NO_INTERRUPT: u16 = 1;

/// Offsets are in RAM.
#[derive(Debug)]
pub struct SplitRing {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    options: Options,
    position: Position,
}

impl SplitRing {
    pub(super) fn new(layout: &Layout, options: Options, dma: &Dma) -> Result<Self, RingError> {
        let size = layout.size;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(RingError::Layout(size));
        }
        let entries = u64::from(size);
        // With the event index behind each ring, whether it is used or not.
        Ok(Self {
            size,
            descriptors: part(dma, layout.descriptors, entries * DESCRIPTOR_SIZE, 16, size)?,
            available: part(dma, layout.driver, ENTRIES + 2 * entries + 2, 2, size)?,
            used: part(dma, layout.device, ENTRIES + 8 * entries + 2, 4, size)?,
            options,
            position: Position::default(),
        })
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index & (self.size - 1))
    }

    pub(super) fn pop(&mut self, dma: &Dma) -> Result<Option<Chain>, RingError> {
        let next = self.position.available;
        let index = dma.load16(self.available + INDEX);
        if index == next {
            return Ok(None);
        }
        // Chains that were taken and not yet given back have their entries, too.
        let taken_or_offered = index.wrapping_sub(self.position.used);
        if taken_or_offered > self.size {
            return Err(RingError::Available(taken_or_offered));
        }
        let head = dma.load16(self.available + ENTRIES + 2 * self.slot(next));
        let chain = self.chain(dma, head)?;
        self.position.available = next.wrapping_add(1);
        Ok(Some(chain))
    }

    fn chain(&self, dma: &Dma, head: u16) -> Result<Chain, RingError> {
        let mut builder = Builder::new(dma);
        let mut number = head;
        // A chain that is no loop has at most all descriptors.
        for _ in 0..self.size {
            if number >= self.size {
                return Err(RingError::Descriptor(number));
            }
            let Descriptor { address, length, words: [flags, next] } =
                Descriptor::load(dma, self.descriptors + u64::from(number) * DESCRIPTOR_SIZE);
            if flags & INDIRECT != 0 {
                if flags & NEXT != 0 || !self.options.indirect {
                    return Err(RingError::Indirect);
                }
                indirect(dma, address, length, &mut builder)?;
            } else {
                builder.add(address, length, flags & WRITE != 0)?;
            }
            if flags & NEXT == 0 {
                return builder.finish(Token { id: head, entries: 1 });
            }
            number = next;
        }
        Err(RingError::TooLong)
    }

    pub(super) fn arm(&mut self, dma: &Dma) -> bool {
        if self.options.event_index {
            dma.store16(self.used + ENTRIES + 8 * u64::from(self.size), self.position.available);
        }
        dma.barrier();
        dma.load16(self.available + INDEX) != self.position.available
    }

    pub(super) fn unpop(&mut self) {
        self.position.available = self.position.available.wrapping_sub(1);
    }

    pub(super) fn push(&mut self, dma: &Dma, chains: &[(Token, u32)]) {
        for (token, written) in chains {
            let entry = u64::from(*written) << 32 | u64::from(token.id);
            dma.store64(self.used + ENTRIES + 8 * self.slot(self.position.used), entry);
            self.position.used = self.position.used.wrapping_add(1);
            self.position.unsignalled = self.position.unsignalled.saturating_add(1);
        }
        dma.store16(self.used + INDEX, self.position.used);
    }

    pub(super) fn wants_interrupt(&mut self, dma: &Dma) -> bool {
        let new = core::mem::take(&mut self.position.unsignalled);
        if !self.options.event_index {
            return new != 0 && dma.load16(self.available) & NO_INTERRUPT == 0;
        }
        // Whether the entry that the driver named is among the new ones.
        let event = dma.load16(self.available + ENTRIES + 2 * u64::from(self.size));
        self.position.used.wrapping_sub(event).wrapping_sub(1) < new
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn set_position(&mut self, position: Position) -> bool {
        self.position = position;
        true
    }
}

/// Adds the descriptors of an indirect table, which are chained as those of the ring (section 2.7.5.3).
fn indirect(dma: &Dma, address: u64, length: u32, builder: &mut Builder<'_>) -> Result<(), RingError> {
    let (table, count) = table(dma, address, length)?;
    let mut number = 0;
    for _ in 0..count {
        if u32::from(number) >= count {
            return Err(RingError::Descriptor(number));
        }
        let Descriptor { address, length, words: [flags, next] } =
            Descriptor::load(dma, table + u64::from(number) * DESCRIPTOR_SIZE);
        if flags & INDIRECT != 0 {
            return Err(RingError::Indirect);
        }
        builder.add(address, length, flags & WRITE != 0)?;
        if flags & NEXT == 0 {
            return Ok(());
        }
        number = next;
    }
    Err(RingError::TooLong)
}
