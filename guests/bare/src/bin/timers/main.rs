//! Timers and interrupts: every clock of the PC against another one, and every way of an interrupt to the CPU.
//!
//! Lower bounds of time are exact, upper bounds generous: the machine may be slow, but no timer may be early.
#![no_std]
#![no_main]

mod cpu_side;
mod ioapic;
mod lapic;
mod pic;

use kit::{
    Suite, cpu,
    time::{self, PM_TIMER_HZ},
};

/// Milliseconds after which an interrupt that should come counts as lost.
const PATIENCE: u64 = 2000;

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let mut suite = Suite::new("timers");
    let s = &mut suite;
    kit::apic::init();
    kit::pic::init();
    clocks(s);
    pic::all(s);
    lapic::all(s);
    ioapic::all(s);
    cpu_side::all(s);
    suite.finish()
}

fn clocks(s: &mut Suite) {
    s.check("the time stamp counter moves", time::ticks_per_ms() > 1000, true);
    time::pit_gate(true);
    time::pit(2, 0, 0xffff);
    let first = time::pit_count(2);
    let counted = time::wait(PATIENCE, || time::pit_count(2) < first.saturating_sub(100));
    s.check("the 8254 counts down", counted, true);
    time::pit_gate(false);
    let held = time::pit_count(2);
    time::wait(1, || false);
    s.check("a closed gate holds its count", time::pit_count(2), held);
    time::pit_gate(true);
    time::pit(2, 0, 1000);
    s.check("mode 0 starts with the output low", time::pit_output(), false);
    s.check("and ends with it high", time::wait(PATIENCE, time::pit_output), true);
    time::pit(2, 2, 5000);
    let seen = (0..1000).all(|_| (1..=5000).contains(&time::pit_count(2)));
    s.check("mode 2 counts between its count and 1", seen, true);
    s.check("the read-back command shows mode 2", time::pit_status(2) & 0x3f, 0x34);

    let ticks = time::ticks_per_ms();
    match time::pm_timer() {
        Some(start) => {
            let before = cpu::rdtsc();
            time::wait(20, || false);
            let elapsed = cpu::rdtsc() - before;
            let counted = u64::from(time::pm_timer().unwrap_or(start).wrapping_sub(start) & 0xff_ffff);
            let milliseconds = counted * 1000 / PM_TIMER_HZ;
            // The two clocks are read at different times, and a busy host may come in between.
            let close = milliseconds + 2 >= elapsed / ticks && milliseconds <= elapsed / ticks * 2 + 50;
            s.check("the power management timer agrees with the time stamp counter", close, true);
        }
        None => {
            s.skip("the power management timer agrees with the time stamp counter", "the FADT names none")
        }
    }
    cmos(s);
}

fn cmos(s: &mut Suite) {
    const STATUS_B: u8 = 11;
    const BINARY: u8 = 4;
    while time::cmos(10) & 0x80 != 0 {}
    let binary = time::cmos(STATUS_B) & BINARY != 0;
    let number = |register: u8| {
        let value = time::cmos(register);
        if binary { value } else { (value >> 4) * 10 + (value & 15) }
    };
    let (month, day, hour) = (number(8), number(7), number(4) & 0x7f);
    let sane = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24;
    s.check("the CMOS clock shows a date", sane, true);
    let second = number(0);
    s.check("and its second moves", time::wait(PATIENCE, || number(0) != second), true);
    let before = time::cmos(0x40);
    time::set_cmos(0x40, !before);
    let after = time::cmos(0x40);
    time::set_cmos(0x40, before);
    s.check("CMOS memory keeps what is written", after, !before);
    s.check("the CMOS battery is good", time::cmos(13) & 0x80, 0x80);
}
