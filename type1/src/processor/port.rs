//! Ports of the real machine.
#![allow(unsafe_code)]

use core::arch::asm;

/// IN of a byte. What is read has an effect on devices that the hypervisor owns only.
pub(crate) fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: at privilege level 0, as all of this program; the callers name devices that are theirs, and ports reach no
    // memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// OUT of a byte.
pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: as in `inb`.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

/// IN of two bytes.
pub(crate) fn inw(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as in `inb`.
    unsafe {
        asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// OUT of two bytes.
pub(crate) fn outw(port: u16, value: u16) {
    // SAFETY: as in `inb`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags));
    }
}

/// OUT of four bytes.
pub(crate) fn outl(port: u16, value: u32) {
    // SAFETY: as in `inb`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags));
    }
}
