//! The two 8259A interrupt controllers (Intel 8259A data sheet), with vectors from 0x20 and 0x28.
use crate::cpu::{inb, outb};

/// Vector of IRQ 0.
pub const BASE: u8 = 0x20;

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xa0;

/// Initialises both; every line masked.
pub fn init() {
    init_with(0);
}

/// As [`init`], with extra bits of ICW4 for the master, such as [`AUTO_EOI`].
pub fn init_with(icw4: u8) {
    outb(MASTER, 0x11);
    outb(SLAVE, 0x11);
    outb(MASTER + 1, BASE);
    outb(SLAVE + 1, BASE + 8);
    outb(MASTER + 1, 4);
    outb(SLAVE + 1, 2);
    outb(MASTER + 1, 1 | icw4);
    outb(SLAVE + 1, 1);
    set_masks(0xffff);
}

/// ICW4: no end of interrupt needed.
pub const AUTO_EOI: u8 = 2;

/// Writes both mask registers; the slave's lines are bits 8 to 15.
pub fn set_masks(masks: u16) {
    outb(MASTER + 1, masks as u8);
    outb(SLAVE + 1, (masks >> 8) as u8);
}

/// Reads both mask registers.
pub fn masks() -> u16 {
    u16::from_le_bytes([inb(MASTER + 1), inb(SLAVE + 1)])
}

/// Opens one line, and the cascade if it is the slave's.
pub fn unmask(line: u8) {
    set_masks(masks() & !(1 << line) & !(1 << 2));
}

/// Reads both request registers.
pub fn requests() -> u16 {
    outb(MASTER, 0x0a);
    outb(SLAVE, 0x0a);
    u16::from_le_bytes([inb(MASTER), inb(SLAVE)])
}

/// Reads both in-service registers.
pub fn in_service() -> u16 {
    outb(MASTER, 0x0b);
    outb(SLAVE, 0x0b);
    u16::from_le_bytes([inb(MASTER), inb(SLAVE)])
}

/// Ends the interrupt of highest priority in service, at both controllers for a line of the slave.
pub fn end_of_interrupt(line: u8) {
    if line >= 8 {
        outb(SLAVE, 0x20);
    }
    outb(MASTER, 0x20);
}
