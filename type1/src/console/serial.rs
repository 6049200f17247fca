//! The real first serial port, a 16550.

use core::fmt::{self, Arguments, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::processor::port::{inb, outb};

const PORT: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = PORT + 1;
const FIFO_CONTROL: u16 = PORT + 2;
const LINE_CONTROL: u16 = PORT + 3;
const MODEM_CONTROL: u16 = PORT + 4;
const LINE_STATUS: u16 = PORT + 5;
const DIVISOR_ACCESS: u8 = 1 << 7;
const EIGHT_BITS: u8 = 3;
/// Enabled and emptied.
const FIFO: u8 = 0b111;
/// DTR and RTS.
const READY: u8 = 0b11;
const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// How often the port is asked whether it has room, before a byte is lost: nobody may be there.
const PATIENCE: usize = 1_000_000;

/// Whether the last byte ended a line.
static AT_LINE_START: AtomicBool = AtomicBool::new(true);

/// Sets the port up: 115,200 bit/s, 8 bits, no interrupts.
pub(crate) fn set_up() {
    outb(INTERRUPT_ENABLE, 0);
    outb(LINE_CONTROL, DIVISOR_ACCESS);
    outb(PORT, 1);
    outb(PORT + 1, 0);
    outb(LINE_CONTROL, EIGHT_BITS);
    outb(FIFO_CONTROL, FIFO);
    outb(MODEM_CONTROL, READY);
}

/// Sends bytes.
pub(crate) fn write(bytes: &[u8]) {
    for byte in bytes {
        if (0..PATIENCE).any(|_| inb(LINE_STATUS) & TRANSMITTER_EMPTY != 0) {
            outb(PORT, *byte);
        }
    }
    if let Some(last) = bytes.last() {
        AT_LINE_START.store(*last == b'\n', Ordering::Relaxed);
    }
}

/// A byte that has come in.
pub(crate) fn read() -> Option<u8> {
    (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(PORT))
}

struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

/// Prints a line, on a line of its own.
pub(crate) fn line(text: Arguments<'_>) {
    if !AT_LINE_START.load(Ordering::Relaxed) {
        write(b"\r\n");
    }
    // The port never fails, and a value that can't be shown is its own fault.
    let _ = Port.write_fmt(text);
    write(b"\r\n");
}
