//! MSI-X: a table of interrupt messages with a mask each (PCI Local Bus Specification 3.0, section 6.8.2).

use alloc::vec;
use alloc::vec::Vec;

use crate::devices::Registers;

/// Capability ID.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Vectors of a table at most.
pub const MAX_VECTORS: u16 = 2048;
/// Message control: MSI-X is used instead of the interrupt pin.
pub const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const FUNCTION_MASK: u16 = 1 << 14;

/// Vector control: this vector is masked.
const MASKED: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// Address, low and high, data, vector control.
    words: [u32; 4],
    pending: bool,
}

/// A message that is to be sent: address and data.
pub type Sent = (u64, u32);

/// Table, pending bits and message control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
    /// The function may write to memory, so also send messages.
    bus_master: bool,
}

impl Registers for Msix {
    const VERSION: u32 = 1;
}

impl Msix {
    /// A table of this many vectors, all masked, as after a reset.
    pub fn new(vectors: u16) -> Self {
        let entry = Entry { words: [0, 0, 0, MASKED], pending: false };
        Self {
            entries: vec![entry; usize::from(vectors.clamp(1, MAX_VECTORS))],
            control: 0,
            bus_master: false,
        }
    }
    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }
    /// Whether messages are used instead of the interrupt pin.
    pub fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }
    fn may_send(&self) -> bool {
        self.control & (ENABLE | FUNCTION_MASK) == ENABLE && self.bus_master
    }

    /// Software has set message control, or the command register's bus master bit. Sends what may be sent now.
    pub fn set_control(&mut self, control: u16, bus_master: bool, send: &mut impl FnMut(Sent)) {
        self.control = control & (ENABLE | FUNCTION_MASK);
        self.bus_master = bus_master;
        self.send_pending(0..self.entries.len(), send);
    }

    fn send_pending(&mut self, which: core::ops::Range<usize>, send: &mut impl FnMut(Sent)) {
        if !self.may_send() {
            return;
        }
        for entry in self.entries.get_mut(which).unwrap_or_default() {
            if entry.pending && entry.words[3] & MASKED == 0 {
                entry.pending = false;
                send(message(entry));
            }
        }
    }

    /// Sends a vector's message, or notes it as pending. There is no message before MSI-X is enabled.
    pub fn trigger(&mut self, vector: u16, send: &mut impl FnMut(Sent)) {
        let may_send = self.may_send();
        let enabled = self.enabled();
        let Some(entry) = self.entries.get_mut(usize::from(vector)) else { return };
        if may_send && entry.words[3] & MASKED == 0 {
            send(message(entry));
        } else if enabled {
            entry.pending = true;
        }
    }

    /// Reads `size` (4 or 8, aligned) bytes of the table; narrower reads give a part of a word.
    pub fn read_table(&self, offset: u64, size: usize) -> u64 {
        let word = |offset: u64| {
            let entry = self.entries.get((offset / ENTRY_SIZE) as usize);
            entry.map_or(0, |entry| entry.words[(offset / 4 % 4) as usize])
        };
        let low = u64::from(word(offset) >> (8 * (offset % 4)));
        if size > 4 { low | u64::from(word(offset + 4)) << 32 } else { low }
    }

    /// Writes `size` (4 or 8, aligned) bytes of the table. Narrower writes are undefined, and ignored.
    pub fn write_table(&mut self, offset: u64, size: usize, value: u64, send: &mut impl FnMut(Sent)) {
        if size < 4 || !offset.is_multiple_of(size as u64) {
            return;
        }
        let index = (offset / ENTRY_SIZE) as usize;
        let Some(entry) = self.entries.get_mut(index) else { return };
        for (word, half) in ((offset / 4 % 4) as usize..4).zip(0..size / 4) {
            entry.words[word] = (value >> (32 * half)) as u32;
        }
        self.send_pending(index..index + 1, send);
    }

    /// Reads `size` bytes of the pending bits.
    pub fn read_pending(&self, offset: u64, size: usize) -> u64 {
        let first = usize::try_from(offset * 8).unwrap_or(usize::MAX);
        let bits = self.entries.iter().skip(first).take(size * 8).zip(0u32..);
        bits.fold(0, |value, (entry, bit)| value | u64::from(entry.pending) << bit)
    }
}

fn message(entry: &Entry) -> Sent {
    (u64::from(entry.words[1]) << 32 | u64::from(entry.words[0]), entry.words[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Rig(Vec<Sent>);

    fn table() -> (Msix, Rig) {
        let (mut msix, mut rig) = (Msix::new(3), Rig::default());
        for vector in 0..3 {
            let at = vector * ENTRY_SIZE;
            msix.write_table(at, 8, 0xfee0_1000, &mut |m| rig.0.push(m));
            msix.write_table(at + 8, 4, 0x40 + vector, &mut |m| rig.0.push(m));
        }
        (msix, rig)
    }

    #[test]
    fn an_unmasked_vector_is_sent_at_once() {
        let (mut msix, mut rig) = table();
        msix.set_control(ENABLE, true, &mut |m| rig.0.push(m));
        msix.write_table(28, 4, 0, &mut |m| rig.0.push(m));
        msix.trigger(1, &mut |m| rig.0.push(m));
        msix.trigger(3, &mut |m| rig.0.push(m));
        assert_eq!(rig.0, [(0xfee0_1000, 0x41)]);
        assert_eq!(msix.read_pending(0, 8), 0);
        assert_eq!(msix.read_table(24, 8), 0x41);
        assert_eq!(msix.read_table(26, 2), 0);
        assert_eq!(msix.read_table(12, 4), 1);
        assert_eq!(msix.read_table(48, 8), 0);
    }

    #[test]
    fn what_is_masked_is_pending_until_every_mask_is_off() {
        let (mut msix, mut rig) = table();
        msix.trigger(2, &mut |m| rig.0.push(m));
        assert_eq!(msix.read_pending(0, 4), 0);
        msix.set_control(ENABLE | FUNCTION_MASK, false, &mut |m| rig.0.push(m));
        msix.trigger(2, &mut |m| rig.0.push(m));
        msix.trigger(2, &mut |m| rig.0.push(m));
        assert_eq!((msix.read_pending(0, 8), msix.read_pending(8, 8)), (4, 0));
        msix.set_control(ENABLE, false, &mut |m| rig.0.push(m));
        msix.write_table(2 * ENTRY_SIZE + 12, 4, 0, &mut |m| rig.0.push(m));
        assert!(rig.0.is_empty());
        msix.set_control(ENABLE, true, &mut |m| rig.0.push(m));
        assert_eq!(rig.0, [(0xfee0_1000, 0x42)]);
        assert_eq!(msix.read_pending(0, 8), 0);
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let (mut msix, mut rig) = table();
        let before = msix.clone();
        for (offset, size) in [(0, 1), (2, 2), (4, 8), (6, 4), (48, 4), (u64::MAX - 7, 8)] {
            msix.write_table(offset, size, u64::MAX, &mut |m| rig.0.push(m));
        }
        assert_eq!(msix, before);
        assert_eq!(msix.read_pending(u64::MAX / 8, 8), 0);
    }
}
