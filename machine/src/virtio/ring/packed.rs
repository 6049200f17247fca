//! The packed ring (section 2.8): one ring of descriptors, which the device overwrites with what it has used. Whether a
//! descriptor is available or used is told by two of its bits and by how often either side has gone around.

use super::{
    DESCRIPTOR_SIZE, Descriptor, INDIRECT, Layout, MAX_SIZE, NEXT, Options, Position, WRITE, part, table,
};
use crate::dma::Dma;
use crate::virtio::chain::{Builder, Chain, RingError, Token};

/// Descriptor flags: the driver's wrap counter when it made it available, and the device's when it used it.
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// The wrap counter beside an offset.
const WRAP: u16 = 1 << 15;
/// Bytes of an event suppression structure: offset with wrap counter, then flags.
const EVENT_SIZE: u64 = 4;
const EVENT_FLAGS: u64 = 2;
/// Event flags: never, and at one descriptor only (always is 0).
const EVENT_DISABLE: u16 = 1;
const EVENT_AT: u16 = 2;

/// Offsets are in RAM. Positions have the wrap counter in bit 15.
#[derive(Debug)]
pub struct PackedRing {
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
    options: Options,
    position: Position,
}

impl PackedRing {
    pub(super) fn new(layout: &Layout, options: Options, dma: &Dma) -> Result<Self, RingError> {
        let size = layout.size;
        if size == 0 || size > MAX_SIZE {
            return Err(RingError::Layout(size));
        }
        Ok(Self {
            size,
            descriptors: part(dma, layout.descriptors, u64::from(size) * DESCRIPTOR_SIZE, 16, size)?,
            driver: part(dma, layout.driver, EVENT_SIZE, 4, size)?,
            device: part(dma, layout.device, EVENT_SIZE, 4, size)?,
            options,
            // Both wrap counters start at 1 (section 2.8.1).
            position: Position { available: WRAP, used: WRAP, unsignalled: 0 },
        })
    }

    /// The position so many entries further on. `count` is at most the ring's size.
    fn forward(&self, position: u16, count: u16) -> u16 {
        let (index, wrap) = (u32::from(position & !WRAP) + u32::from(count), position & WRAP);
        match index.checked_sub(self.size.into()) {
            Some(index) => index as u16 | wrap ^ WRAP,
            None => index as u16 | wrap,
        }
    }

    fn backward(&self, position: u16, count: u16) -> u16 {
        let (index, wrap) = (position & !WRAP, position & WRAP);
        match index.checked_sub(count) {
            Some(index) => index | wrap,
            None => (index + self.size - count) | wrap ^ WRAP,
        }
    }

    fn descriptor(&self, position: u16) -> u64 {
        self.descriptors + u64::from(position & !WRAP) * DESCRIPTOR_SIZE
    }

    /// Whether a descriptor with these flags is available at this position.
    fn is_available(flags: u16, position: u16) -> bool {
        let wrap = position & WRAP != 0;
        (flags & AVAILABLE != 0) == wrap && (flags & USED != 0) != wrap
    }

    pub(super) fn pop(&mut self, dma: &Dma) -> Result<Option<Chain>, RingError> {
        let mut builder = Builder::new(dma);
        let mut at = self.position.available;
        for count in 1..=self.size {
            let Descriptor { address, length, words: [id, flags] } =
                Descriptor::load(dma, self.descriptor(at));
            // The driver makes the first one of a chain available last.
            if count == 1 && !Self::is_available(flags, at) {
                return Ok(None);
            }
            if flags & INDIRECT != 0 {
                if flags & NEXT != 0 || !self.options.indirect {
                    return Err(RingError::Indirect);
                }
                indirect(dma, address, length, &mut builder)?;
            } else {
                builder.add(address, length, flags & WRITE != 0)?;
            }
            at = self.forward(at, 1);
            if flags & NEXT == 0 {
                // Chains that were taken and not yet given back have their entries, too.
                let taken = self.distance(self.position.used, at);
                if taken > self.size.into() {
                    return Err(RingError::Available(taken as u16));
                }
                let chain = builder.finish(Token { id, entries: count })?;
                self.position.available = at;
                return Ok(Some(chain));
            }
        }
        Err(RingError::TooLong)
    }

    pub(super) fn arm(&mut self, dma: &Dma) -> bool {
        let at = self.position.available;
        if self.options.event_index {
            dma.store16(self.device, at);
            dma.store16(self.device + EVENT_FLAGS, EVENT_AT);
        }
        dma.barrier();
        Self::is_available(Descriptor::load(dma, self.descriptor(at)).words[1], at)
    }

    pub(super) fn unpop(&mut self, token: Token) {
        self.position.available = self.backward(self.position.available, token.entries);
    }

    pub(super) fn push(&mut self, dma: &Dma, chains: &[(Token, u32)]) {
        let first = self.position.used;
        let mut first_word = None;
        for (token, written) in chains {
            let at = self.position.used;
            let wrapped = if at & WRAP != 0 { AVAILABLE | USED } else { 0 };
            let flags = wrapped | if *written != 0 { WRITE } else { 0 };
            let word = u64::from(flags) << 48 | u64::from(token.id) << 32 | u64::from(*written);
            // The driver must see all of them when it sees the first.
            if first_word.is_none() {
                first_word = Some(word);
            } else {
                dma.store64(self.descriptor(at) + 8, word);
            }
            self.position.used = self.forward(at, token.entries);
            self.position.unsignalled = self.position.unsignalled.saturating_add(token.entries);
        }
        if let Some(word) = first_word {
            dma.store64(self.descriptor(first) + 8, word);
        }
    }

    pub(super) fn wants_interrupt(&mut self, dma: &Dma) -> bool {
        let new = core::mem::take(&mut self.position.unsignalled);
        match dma.load16(self.driver + EVENT_FLAGS) {
            EVENT_DISABLE => false,
            EVENT_AT if self.options.event_index => {
                let behind = self.distance(dma.load16(self.driver), self.position.used);
                (1..=u32::from(new)).contains(&behind)
            }
            _ => new != 0,
        }
    }

    /// Entries from one position to another, which is at most two rounds ahead.
    fn distance(&self, from: u16, to: u16) -> u32 {
        let size = u32::from(self.size);
        let place =
            |position: u16| u32::from(position & !WRAP) % size + if position & WRAP != 0 { size } else { 0 };
        (place(to) + 2 * size - place(from)) % (2 * size)
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn set_position(&mut self, position: Position) -> bool {
        self.position = position;
        position.available & !WRAP < self.size && position.used & !WRAP < self.size
    }
}

/// Adds the descriptors of an indirect table, which follow each other (section 2.8.7).
fn indirect(dma: &Dma, address: u64, length: u32, builder: &mut Builder<'_>) -> Result<(), RingError> {
    let (table, count) = table(dma, address, length)?;
    for number in 0..u64::from(count) {
        let Descriptor { address, length, words: [_, flags] } =
            Descriptor::load(dma, table + number * DESCRIPTOR_SIZE);
        if flags & INDIRECT != 0 {
            return Err(RingError::Indirect);
        }
        builder.add(address, length, flags & WRITE != 0)?;
    }
    Ok(())
}
