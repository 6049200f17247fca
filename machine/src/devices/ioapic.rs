//! The I/O APIC: 24 redirection entries (Intel 82093AA datasheet; EOI register as in ICH9 and later, version 20h).

use super::Registers;
use super::message::{Delivery, Message, wide_destination};

/// Input pins.
pub const PINS: usize = 24;
/// Default guest-physical address.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes of its range.
pub const SIZE: u64 = 0x1000;

const VERSION: u32 = 0x20;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const REMOTE_IRR: u64 = 1 << 14;
const DELIVERY_STATUS: u64 = 1 << 12;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const LOGICAL: u64 = 1 << 11;
/// What software can write: destination, mask, trigger, polarity, destination and delivery mode, vector.
const WRITABLE: u64 = 0xff00_0000_0001_afff & !DELIVERY_STATUS;

/// The register machine. Inputs are true when asserted: polarity is taken as wired the way software says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoApic {
    id: u8,
    select: u8,
    entries: [u64; PINS],
    /// Levels of the input pins.
    inputs: u32,
}

impl Registers for IoApic {
    const VERSION: u32 = 1;
}

impl Default for IoApic {
    fn default() -> Self {
        Self { id: 0, select: 0, entries: [MASKED; PINS], inputs: 0 }
    }
}

impl IoApic {
    fn message(entry: u64) -> Option<Message> {
        Some(Message {
            destination: wide_destination((entry >> 56) as u8),
            logical: entry & LOGICAL != 0,
            delivery: Delivery::from_bits((entry >> 8) as u32)?,
            vector: entry as u8,
            level: entry & LEVEL != 0,
        })
    }

    /// Sends a level-triggered pin's message, if the pin is asserted and its last message is done with.
    fn service_level(&mut self, pin: usize, send: &mut impl FnMut(Message)) {
        let asserted = self.inputs >> pin & 1 != 0;
        let Some(entry) = self.entries.get_mut(pin) else { return };
        if !asserted || *entry & (LEVEL | MASKED | REMOTE_IRR) != LEVEL {
            return;
        }
        if let Some(message) = Self::message(*entry) {
            // Only fixed and lowest-priority messages end with an EOI that would clear it.
            if matches!(message.delivery, Delivery::Fixed | Delivery::LowestPriority) {
                *entry |= REMOTE_IRR;
            }
            send(message);
        }
    }

    /// Drives an input pin.
    pub fn set_input(&mut self, pin: usize, asserted: bool, send: &mut impl FnMut(Message)) {
        let Some(&entry) = self.entries.get(pin) else { return };
        let before = self.inputs >> pin & 1 != 0;
        self.inputs = self.inputs & !(1 << pin) | u32::from(asserted) << pin;
        if entry & LEVEL != 0 {
            self.service_level(pin, send);
        } else if asserted && !before && entry & MASKED == 0 {
            // An edge at a masked pin is lost (82093AA, section 3.2.4, bit 16).
            if let Some(message) = Self::message(entry) {
                send(message);
            }
        }
    }

    /// A local APIC ended a level-triggered interrupt of this vector, or software wrote the EOI register.
    pub fn end_of_interrupt(&mut self, vector: u8, send: &mut impl FnMut(Message)) {
        for pin in 0..PINS {
            if let Some(entry) = self.entries.get_mut(pin)
                && *entry & LEVEL != 0
                && *entry as u8 == vector
            {
                *entry &= !REMOTE_IRR;
                self.service_level(pin, send);
            }
        }
    }

    fn read_indirect(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION | (PINS as u32 - 1) << 16,
            select => {
                let entry = self.entries.get(usize::from(select.wrapping_sub(0x10) >> 1)).copied();
                match entry {
                    Some(entry) if select >= 0x10 => (entry >> (32 * (select & 1))) as u32,
                    _ => 0,
                }
            }
        }
    }

    fn write_indirect(&mut self, value: u32, send: &mut impl FnMut(Message)) {
        if self.select == 0 {
            self.id = (value >> 24 & 0xf) as u8;
            return;
        }
        let Some(index) = self.select.checked_sub(0x10) else { return };
        let pin = usize::from(index >> 1);
        let Some(entry) = self.entries.get_mut(pin) else { return };
        let shift = 32 * u32::from(index & 1);
        let written = *entry & !(0xffff_ffff << shift) | u64::from(value) << shift;
        *entry = written & WRITABLE | *entry & REMOTE_IRR;
        if *entry & LEVEL == 0 {
            // Software clears a stuck remote IRR by switching to edge and back.
            *entry &= !REMOTE_IRR;
        }
        self.service_level(pin, send);
    }

    /// Reads a register: 32 bits at 00h (select) and 10h (window).
    pub fn read(&self, offset: u64, size: usize) -> u32 {
        match offset {
            SELECT => u32::from(self.select),
            WINDOW if size >= 4 => self.read_indirect(),
            _ => 0,
        }
    }

    /// Writes a register: 00h (select), 10h (window), 40h (EOI).
    pub fn write(&mut self, offset: u64, size: usize, value: u32, send: &mut impl FnMut(Message)) {
        match offset {
            SELECT => self.select = value as u8,
            WINDOW if size >= 4 => self.write_indirect(value, send),
            EOI if size >= 4 => self.end_of_interrupt(value as u8, send),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// An I/O APIC with pin 14 set up, and the vectors it sent.
    struct Rig(IoApic, Vec<Message>);
    impl Rig {
        fn new(low: u32) -> Self {
            let mut rig = Self(IoApic::default(), Vec::new());
            rig.set(0x10 + 28, low);
            rig
        }
        fn set(&mut self, register: u8, value: u32) {
            self.0.write(SELECT, 4, register.into(), &mut |m| self.1.push(m));
            self.0.write(WINDOW, 4, value, &mut |m| self.1.push(m));
        }
        fn get(&mut self, register: u8) -> u32 {
            self.0.write(SELECT, 4, register.into(), &mut |_| {});
            self.0.read(WINDOW, 4)
        }
        fn pin(&mut self, asserted: bool) {
            self.0.set_input(14, asserted, &mut |m| self.1.push(m));
        }
        fn eoi(&mut self, vector: u8) {
            self.0.end_of_interrupt(vector, &mut |m| self.1.push(m));
        }
        fn sent(&self) -> usize {
            self.1.len()
        }
    }
    const LEVEL_LOW: u32 = LEVEL as u32;
    const MASKED_LOW: u32 = MASKED as u32;
    const REMOTE_IRR_LOW: u32 = REMOTE_IRR as u32;

    #[test]
    fn identification_registers() {
        let mut rig = Rig::new(0);
        assert_eq!(rig.get(1), 0x0017_0020);
        rig.set(1, 0xffff_ffff);
        assert_eq!(rig.get(1), 0x0017_0020);
        rig.set(0, 0xffff_ffff);
        assert_eq!((rig.get(0), rig.get(2)), (0x0f00_0000, 0x0f00_0000));
        assert_eq!(rig.get(0x3f), 0);
        assert_eq!((rig.get(0x40), rig.get(0xff), rig.get(5)), (0, 0, 0));
    }

    #[test]
    fn an_edge_sends_once() {
        let mut rig = Rig::new(0x76);
        rig.pin(true);
        rig.pin(true);
        assert_eq!(rig.sent(), 1);
        assert_eq!((rig.1[0].vector, rig.1[0].level), (0x76, false));
        rig.pin(false);
        rig.pin(true);
        assert_eq!(rig.sent(), 2);
    }

    #[test]
    fn a_masked_edge_is_lost_and_a_masked_level_is_not() {
        let mut rig = Rig::new(0x76 | MASKED_LOW);
        rig.pin(true);
        rig.set(0x10 + 28, 0x76);
        assert_eq!(rig.sent(), 0);
        rig.set(0x10 + 28, 0x76 | MASKED_LOW | LEVEL_LOW);
        assert_eq!(rig.sent(), 0);
        rig.set(0x10 + 28, 0x76 | LEVEL_LOW);
        assert_eq!(rig.sent(), 1);
    }

    #[test]
    fn a_level_is_sent_again_only_after_eoi() {
        let mut rig = Rig::new(0x98 | LEVEL_LOW);
        rig.pin(true);
        rig.pin(false);
        rig.pin(true);
        assert_eq!(rig.sent(), 1);
        assert_ne!(rig.get(0x10 + 28) & REMOTE_IRR_LOW, 0);
        rig.eoi(0x97);
        assert_eq!(rig.sent(), 1);
        rig.eoi(0x98);
        assert_eq!(rig.sent(), 2);
        rig.pin(false);
        rig.eoi(0x98);
        assert_eq!(rig.sent(), 2);
        assert_eq!(rig.get(0x10 + 28) & REMOTE_IRR_LOW, 0);
    }

    #[test]
    fn eoi_register_and_switch_to_edge_clear_remote_irr() {
        let mut rig = Rig::new(0x40 | LEVEL_LOW);
        rig.pin(true);
        rig.pin(false);
        rig.0.write(EOI, 4, 0x40, &mut |_| {});
        assert_eq!(rig.get(0x10 + 28) & REMOTE_IRR_LOW, 0);
        rig.pin(true);
        rig.pin(false);
        rig.set(0x10 + 28, 0x40);
        assert_eq!(rig.get(0x10 + 28), 0x40);
    }

    #[test]
    fn status_bits_are_read_only() {
        let mut rig = Rig::new(0xffff_ffff);
        assert_eq!(rig.get(0x10 + 28), 0x0001_afff);
        rig.set(0x10 + 29, 0xffff_ffff);
        assert_eq!(rig.get(0x10 + 29), 0xff00_0000);
    }

    #[test]
    fn destination_fields_are_sent() {
        let mut rig = Rig::new(MASKED_LOW);
        rig.set(0x10 + 29, 0x0d00_0000);
        rig.set(0x10 + 28, 0x86 | 0x800 | 0x100);
        rig.pin(true);
        let expected = Message {
            destination: 0xd,
            logical: true,
            delivery: Delivery::LowestPriority,
            vector: 0x86,
            level: false,
        };
        assert_eq!(rig.1, [expected]);
    }

    #[test]
    fn a_reserved_delivery_mode_sends_nothing() {
        let mut rig = Rig::new(0x340);
        rig.pin(true);
        assert_eq!(rig.sent(), 0);
    }

    #[test]
    fn save_and_restore() {
        let mut rig = Rig::new(0x40 | LEVEL_LOW);
        rig.pin(true);
        let mut other = IoApic::default();
        other.restore(&rig.0.save()).unwrap();
        assert_eq!(other, rig.0);
        let mut saved = rig.0.save();
        saved.version = 9;
        assert!(other.restore(&saved).is_err());
    }
}
