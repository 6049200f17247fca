//! The local APIC, in both its modes, and the I/O APIC (Intel SDM volume 3, chapter 10; 82093AA data sheet).
use crate::{
    Global,
    cpu::{self, msr},
    memory::{read, write},
};

const LOCAL: u64 = 0xfee0_0000;
const IO: u64 = 0xfec0_0000;

/// Registers of the local APIC, by their offset in memory.
pub mod register {
    #![allow(missing_docs)]
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LOGICAL: u32 = 0xd0;
    pub const SPURIOUS: u32 = 0xf0;
    pub const IN_SERVICE: u32 = 0x100;
    pub const REQUEST: u32 = 0x200;
    pub const ERROR: u32 = 0x280;
    pub const COMMAND: u32 = 0x300;
    pub const COMMAND_HIGH: u32 = 0x310;
    pub const TIMER: u32 = 0x320;
    pub const LINT0: u32 = 0x350;
    pub const LINT1: u32 = 0x360;
    pub const ERROR_VECTOR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Mask bit of a local vector table entry.
pub const MASKED: u32 = 1 << 16;
/// Timer modes.
pub const PERIODIC: u32 = 1 << 17;
/// Timer mode: a deadline in the time stamp counter.
pub const DEADLINE: u32 = 2 << 17;
/// Vector of spurious interrupts.
pub const SPURIOUS_VECTOR: u8 = 0xff;

static X2APIC: Global<bool> = Global::new(false);

/// Whether the CPU has x2APIC mode.
pub fn has_x2apic() -> bool {
    cpu::feature_1_ecx(21)
}

/// Whether the timer has a TSC-deadline mode.
pub fn has_deadline() -> bool {
    cpu::feature_1_ecx(24)
}

/// Enables the local APIC in xAPIC mode, with the 8259A on LINT0 and everything else masked.
pub fn init() {
    let base = cpu::rdmsr(msr::APIC_BASE);
    if base & 1 << 10 != 0 {
        cpu::wrmsr(msr::APIC_BASE, base & !(3 << 10));
    }
    cpu::wrmsr(msr::APIC_BASE, base & !(1 << 10) | 1 << 11);
    X2APIC.set(false);
    set(register::SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    set(register::TPR, 0);
    set(register::LINT0, 0x700);
    set(register::LINT1, 0x400);
    set(register::TIMER, MASKED);
    set(register::ERROR_VECTOR, MASKED);
    set(register::LOGICAL, 1 << 24);
}

/// Switches to x2APIC mode.
pub fn init_x2apic() {
    cpu::wrmsr(msr::APIC_BASE, cpu::rdmsr(msr::APIC_BASE) | 1 << 10);
    X2APIC.set(true);
}

/// Reads a register.
pub fn get(register: u32) -> u32 {
    if X2APIC.get() { cpu::rdmsr(0x800 + (register >> 4)) as u32 } else { read(LOCAL + u64::from(register)) }
}

/// Writes a register.
pub fn set(register: u32, value: u32) {
    if X2APIC.get() {
        cpu::wrmsr(0x800 + (register >> 4), value.into());
    } else {
        write(LOCAL + u64::from(register), value);
    }
}

/// This CPU's ID.
pub fn id() -> u32 {
    if X2APIC.get() { get(register::ID) } else { get(register::ID) >> 24 }
}

/// Sends an interrupt to a destination; `command` is the low half of the interrupt command register.
pub fn send(destination: u32, command: u32) {
    if X2APIC.get() {
        cpu::wrmsr(0x830, u64::from(destination) << 32 | u64::from(command));
    } else {
        set(register::COMMAND_HIGH, destination << 24);
        set(register::COMMAND, command);
        while get(register::COMMAND) & 1 << 12 != 0 {}
    }
}

/// Destination shorthand: this CPU.
pub const TO_SELF: u32 = 1 << 18;
/// Destination shorthand: all CPUs.
pub const TO_ALL: u32 = 2 << 18;
/// Delivery mode: non-maskable interrupt.
pub const NMI: u32 = 4 << 8;
/// Destination mode: logical.
pub const LOGICAL_MODE: u32 = 1 << 11;

/// Ends the interrupt of highest priority in service.
pub fn end_of_interrupt() {
    set(register::EOI, 0);
}

/// Whether a vector's bit is set in one of the 256-bit registers, [`register::IN_SERVICE`] or [`register::REQUEST`].
pub fn vector_bit(base: u32, vector: u8) -> bool {
    get(base + u32::from(vector >> 5) * 0x10) >> (vector & 31) & 1 == 1
}

/// Reads a register of the I/O APIC.
pub fn io_get(index: u32) -> u32 {
    write(IO, index);
    read(IO + 0x10)
}

/// Writes a register of the I/O APIC.
pub fn io_set(index: u32, value: u32) {
    write(IO, index);
    write(IO + 0x10, value);
}

/// I/O APIC entry bit: level-triggered.
pub const LEVEL: u32 = 1 << 15;
/// I/O APIC entry bit: a level-triggered interrupt that was accepted and not ended.
pub const REMOTE_REQUEST: u32 = 1 << 14;

/// Writes the low half of a redirection entry, with this CPU as its physical destination.
pub fn route(pin: u32, entry: u32) {
    io_set(0x11 + pin * 2, id() << 24);
    io_set(0x10 + pin * 2, entry);
}

/// Reads the low half of a redirection entry.
pub fn routed(pin: u32) -> u32 {
    io_get(0x10 + pin * 2)
}

/// Pins of the I/O APIC.
pub fn pins() -> u32 {
    (io_get(1) >> 16 & 0xff) + 1
}
