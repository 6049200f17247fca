//! The PC's clocks: the 8254 timer, the CMOS clock, ACPI's power management timer, the time stamp counter.
use crate::{
    Global, acpi,
    cpu::{self, inb, outb},
    memory::read,
};

/// Input clock of the 8254 in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Programs a channel (0 to 2) of the 8254 with a mode (0 to 5) and a count; 0 counts 65536.
pub fn pit(channel: u8, mode: u8, count: u16) {
    outb(0x43, channel << 6 | 0x30 | mode << 1);
    let [low, high] = count.to_le_bytes();
    outb(0x40 + u16::from(channel), low);
    outb(0x40 + u16::from(channel), high);
}

/// Latches and reads a channel's count.
pub fn pit_count(channel: u8) -> u16 {
    outb(0x43, channel << 6);
    let port = 0x40 + u16::from(channel);
    u16::from_le_bytes([inb(port), inb(port)])
}

/// Reads a channel's status by the read-back command: OUT, null count, access, mode, BCD.
pub fn pit_status(channel: u8) -> u8 {
    outb(0x43, 0xe0 | 2 << channel);
    inb(0x40 + u16::from(channel))
}

/// Sets the gate of channel 2 (port 0x61 bit 0); the speaker stays off.
pub fn pit_gate(open: bool) {
    outb(0x61, inb(0x61) & !3 | u8::from(open));
}

/// The output of channel 2 (port 0x61 bit 5).
pub fn pit_output() -> bool {
    inb(0x61) & 0x20 != 0
}

static TICKS_PER_MS: Global<u64> = Global::new(0);

/// Time stamp ticks per millisecond, measured against the 8254: the least of several measurements, because a
/// machine that was held up in between only ever counts too many.
pub fn ticks_per_ms() -> u64 {
    if TICKS_PER_MS.get() == 0 {
        pit_gate(true);
        let measure = |_| {
            pit(2, 0, (PIT_HZ / 100) as u16);
            let start = cpu::rdtsc();
            while !pit_output() {}
            (cpu::rdtsc() - start) / 10
        };
        TICKS_PER_MS.set((0..5).map(measure).min().unwrap_or(1));
    }
    TICKS_PER_MS.get()
}

/// Spins until `done` or until so many milliseconds are over; says whether it was done.
pub fn wait(milliseconds: u64, mut done: impl FnMut() -> bool) -> bool {
    let ticks = milliseconds * ticks_per_ms();
    let start = cpu::rdtsc();
    while cpu::rdtsc().wrapping_sub(start) < ticks {
        if done() {
            return true;
        }
    }
    done()
}

/// Reads a register of the CMOS clock (Motorola MC146818 data sheet).
pub fn cmos(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

/// Writes a register of the CMOS clock.
pub fn set_cmos(register: u8, value: u8) {
    outb(0x70, register);
    outb(0x71, value);
}

/// Reads the power management timer (3.579545 MHz, 24 bits at least), if the FADT names its port.
pub fn pm_timer() -> Option<u32> {
    let port: u32 = read(acpi::find()?.get(b"FACP")? + 76);
    (port != 0).then(|| cpu::inl(port as u16) & 0xff_ffff)
}

/// Frequency of the power management timer in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;
