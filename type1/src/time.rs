//! Time on the bare machine: the time-stamp counter, measured against the PIT, and the CMOS clock for the date.
#![allow(unsafe_code)]

use bivisor_machine::devices::rtc::days_from_date;
use bivisor_machine::host::{Clock, Nanos};

use crate::processor::port::{inb, outb};

/// Frequency of the PIT.
const PIT_HZ: u64 = 1_193_182;
/// What the measurement counts of it: 20 ms, so that reading it (about a microsecond) counts for 1 in 10,000 at most.
const PIT_TICKS: u64 = PIT_HZ / 50;
const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Channel 2, both bytes, mode 0: its output rises when it has counted.
const PIT_ONE_SHOT: u8 = 0b1011_0000;
/// Bit 0 lets channel 2 count, bit 1 is the speaker, bit 5 channel 2's output.
const PORT_B: u16 = 0x61;

/// Measured frequencies in Hz.
pub(crate) struct Speeds {
    pub(crate) tsc_hz: u64,
    pub(crate) apic_hz: u64,
}

/// Something that counts: the local APIC's timer.
pub(crate) trait Counter {
    fn start_counting(&self);
    fn counted(&self) -> u32;
}

/// Measures the time-stamp counter and the APIC's timer against the PIT.
pub(crate) fn measure(apic: &impl Counter) -> Speeds {
    let port_b = inb(PORT_B) & !0b10 | 1;
    outb(PORT_B, port_b & !1);
    outb(PIT_COMMAND, PIT_ONE_SHOT);
    outb(PIT_CHANNEL_2, PIT_TICKS as u8);
    outb(PIT_CHANNEL_2, (PIT_TICKS >> 8) as u8);
    outb(PORT_B, port_b);
    apic.start_counting();
    let start = read_tsc();
    while inb(PORT_B) & 1 << 5 == 0 {}
    let (ticks, counted) = (read_tsc().wrapping_sub(start), apic.counted());
    let hz = |count: u64| count * PIT_HZ / PIT_TICKS;
    Speeds { tsc_hz: hz(ticks).max(1), apic_hz: hz(counted.into()).max(1) }
}

/// Ticks in 2^32 ns at a frequency.
pub(crate) fn per_4s(hz: u64) -> u64 {
    ((u128::from(hz) << 32) / 1_000_000_000) as u64
}

fn read_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The clock of all virtual machines.
pub(crate) struct MetalClock {
    start: u64,
    tsc_hz: u64,
    /// Seconds since 1970 when it started.
    wall: u64,
}

impl MetalClock {
    pub(crate) fn start(tsc_hz: u64) -> Self {
        Self { start: read_tsc(), tsc_hz, wall: read_cmos().map_or(0, |date| date.seconds()) }
    }
}

impl Clock for MetalClock {
    fn now(&self) -> Nanos {
        let ticks = read_tsc().wrapping_sub(self.start);
        (u128::from(ticks) * 1_000_000_000 / u128::from(self.tsc_hz)) as Nanos
    }
    fn wall_seconds(&self) -> u64 {
        self.wall + self.now() / 1_000_000_000
    }
    fn tsc(&self) -> u64 {
        read_tsc()
    }
    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }
}

/// What the CMOS clock says, in the order of its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    second: u8,
    minute: u8,
    hour: u8,
    day: u8,
    month: u8,
    /// In the century that began with 2000.
    year: u8,
}

/// Registers of the CMOS clock (MC146818).
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
const PM: u8 = 1 << 7;
/// Readings until two agree; the clock changes once a second.
const ATTEMPTS: usize = 100_000;

fn cmos(register: u8) -> u8 {
    outb(CMOS_INDEX, register);
    inb(CMOS_DATA)
}

/// Reads the date, twice alike.
fn read_cmos() -> Option<Date> {
    let read = || [0x00, 0x02, 0x04, 0x07, 0x08, 0x09].map(cmos);
    (0..ATTEMPTS).find_map(|_| {
        let first = read();
        let stable = cmos(STATUS_A) & UPDATE_IN_PROGRESS == 0 && first == read();
        stable.then(|| Date::decode(first, cmos(STATUS_B)))
    })
}

impl Date {
    /// From the registers, in the format that status register B says.
    fn decode(registers: [u8; 6], status_b: u8) -> Self {
        let number = |value: u8| {
            if status_b & BINARY != 0 {
                value
            } else {
                (value >> 4).wrapping_mul(10).wrapping_add(value & 15)
            }
        };
        let [second, minute, hour, day, month, year] = registers;
        let hour = match status_b & HOURS_24 != 0 {
            true => number(hour),
            false => number(hour & !PM) % 12 + if hour & PM != 0 { 12 } else { 0 },
        };
        Self {
            second: number(second),
            minute: number(minute),
            hour,
            day: number(day),
            month: number(month),
            year: number(year),
        }
    }

    /// Seconds since 1970-01-01.
    fn seconds(&self) -> u64 {
        // A clock without power may say that it is day 0.
        let days = days_from_date(2000 + i64::from(self.year), self.month.into(), self.day.max(1).into());
        ((days as u64 * 24 + u64::from(self.hour)) * 60 + u64::from(self.minute)) * 60
            + u64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let date = |year, month, day| Date { second: 1, minute: 2, hour: 3, day, month, year };
        assert_eq!(date(0, 1, 1).seconds(), 946_684_800 + 10_921);
        assert_eq!(date(24, 2, 29).seconds(), 1_709_164_800 + 10_921);
        assert_eq!(date(24, 3, 1).seconds(), 1_709_251_200 + 10_921);
        assert_eq!(date(99, 12, 31).seconds(), 4_102_358_400 + 10_921);
        // A clock without power may say anything.
        let _ = Date { second: 255, minute: 255, hour: 255, day: 0, month: 0, year: 255 }.seconds();
    }

    #[test]
    fn formats_of_the_clock() {
        let expected = Date { second: 59, minute: 30, hour: 23, day: 31, month: 12, year: 26 };
        assert_eq!(Date::decode([0x59, 0x30, 0x23, 0x31, 0x12, 0x26], HOURS_24), expected);
        assert_eq!(Date::decode([59, 30, 23, 31, 12, 26], HOURS_24 | BINARY), expected);
        assert_eq!(Date::decode([0x59, 0x30, 0x91, 0x31, 0x12, 0x26], 0), expected);
        assert_eq!(Date::decode([0, 0, 0x92, 1, 1, 0], 0).hour, 12);
        assert_eq!(Date::decode([0, 0, 0x12, 1, 1, 0], 0).hour, 0);
    }

    #[test]
    fn ticks() {
        assert_eq!(per_4s(1_000_000_000), 1 << 32);
        assert_eq!(per_4s(62_500_000), 1 << 28);
    }
}
