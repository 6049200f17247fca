//! The serial port COM1, a 16550 UART (National Semiconductor PC16550D data sheet), polled.
use crate::cpu::{inb, outb};
use core::fmt;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 1;
const TRANSMIT_EMPTY: u8 = 1 << 5;

/// Sets 115200 baud, 8N1, FIFOs on, no interrupts.
pub fn init() {
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x80);
    outb(COM1, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3);
    outb(COM1 + 2, 0x07);
    outb(COM1 + 4, 0x0b);
}

/// Sends one byte, waiting for room.
pub fn put(byte: u8) {
    while inb(LINE_STATUS) & TRANSMIT_EMPTY == 0 {}
    outb(COM1, byte);
}

/// Takes one received byte if there is one.
pub fn get() -> Option<u8> {
    (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(COM1))
}

/// Waits until the last byte has left the transmitter.
pub fn flush() {
    while inb(LINE_STATUS) & (1 << 6) == 0 {}
}

/// The port as a target of `write!`; a line feed is sent as CR LF.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

/// Prints on the serial port.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        // The console cannot fail: `Console::write_str` always returns `Ok`.
        let _ = write!($crate::serial::Console, $($arg)*);
    }};
}

/// Prints a line on the serial port.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => {{
        $crate::print!($($arg)*);
        $crate::print!("\n");
    }};
}
