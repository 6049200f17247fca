//! The MC146818A real-time clock and CMOS RAM (Motorola MC146818A datasheet; PC/AT extensions). Nothing ticks:
//! the time shown follows from the machine's clock, an offset, and the phase of the divider.

use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};

use super::{Registers, RestoreError, Saved};
use crate::device::{IrqLine, Poll, PortIo};
use crate::host::{Clock, Nanos};
use crate::sync::Mutex;
use crate::timer::{Timer, TimerHub};

/// Index port; the data port is the next.
pub const BASE: u16 = 0x70;
/// Ports of the clock.
pub const PORTS: u32 = 2;
/// ISA interrupt.
pub const IRQ: usize = 8;
/// The CMOS byte of the century, for the FADT.
pub const CENTURY: u8 = 0x32;

const SECOND: Nanos = 1_000_000_000;
/// An update begins this long after UIP is set.
const UPDATE_IN_PROGRESS: Nanos = 244_000;
/// After the divider's reset the first update comes after half a second.
const AFTER_DIVIDER_RESET: Nanos = SECOND / 2;
/// Frequency of the divider's input, in Hz.
const CRYSTAL: u128 = 32_768;
/// A day: alarms that passed longer ago have passed again.
const DAY_SECONDS: u64 = 86_400;

/// Register numbers.
mod reg {
    pub const SECONDS: u8 = 0x00;
    pub const SECONDS_ALARM: u8 = 0x01;
    pub const MINUTES: u8 = 0x02;
    pub const MINUTES_ALARM: u8 = 0x03;
    pub const HOURS: u8 = 0x04;
    pub const HOURS_ALARM: u8 = 0x05;
    pub const DAY_OF_WEEK: u8 = 0x06;
    pub const DAY_OF_MONTH: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const C: u8 = 0x0c;
    pub const D: u8 = 0x0d;
}

const A_UIP: u8 = 1 << 7;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Interrupt enables in B, flags in C: periodic, alarm, update-ended.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const C_IRQF: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;
/// Alarm bytes from here on match everything.
const ALARM_ANY: u8 = 0xc0;

/// A point in calendar time, as numbers (not BCD).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    day_of_week: u8,
    day: u8,
    month: u8,
    year: u16,
}

/// Days from 1970-01-01 to this date of the Gregorian calendar.
pub fn days_from_date(year: i64, month: i64, day: i64) -> i64 {
    // The year begins in March, so that the leap day comes last.
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    // 719468 days lie between 0000-03-01 and 1970-01-01.
    year * 365 + leap_days + day_of_year - 719_468
}

/// The date that is this many days after 1970-01-01: year, month, day.
fn date_from_days(days: i64) -> (i64, u8, u8) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year_of_era + carry, month as u8, day as u8)
}

/// Two decimal digits; a larger number loses its hundreds.
fn bcd(value: u8) -> u8 {
    ((value / 10 % 10) << 4) | (value % 10)
}
/// The number of two decimal digits; a digit above 9 counts as 9.
fn from_bcd(value: u8) -> u8 {
    (value >> 4).min(9) * 10 + (value & 15).min(9)
}

impl Calendar {
    fn from_seconds(seconds: i64, day_of_week_offset: u8) -> Self {
        let days = seconds.div_euclid(86_400);
        let rest = seconds.rem_euclid(86_400);
        let (year, month, day) = date_from_days(days);
        // 1970-01-01 was a Thursday.
        let day_of_week = (days + 4 + i64::from(day_of_week_offset)).rem_euclid(7) as u8 + 1;
        Self {
            second: (rest % 60) as u8,
            minute: (rest / 60 % 60) as u8,
            hour: (rest / 3600) as u8,
            day_of_week,
            day,
            month,
            year: year.rem_euclid(10_000) as u16,
        }
    }
    /// Seconds since 1970. A date that does not exist is taken as that many days after the month's first.
    fn to_seconds(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let days = days_from_date(i64::from(self.year), month, 1) + i64::from(self.day) - 1;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

/// The register machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rtc {
    index: u8,
    nmi_masked: bool,
    ram: Box<[u8; 128]>,
    a: u8,
    b: u8,
    flags: u8,
    /// Moment of an update, which fixes the phase of all others.
    base: Nanos,
    /// Seconds since 1970 at `base`.
    seconds: i64,
    /// Days to add to the true day of the week to get the one that software has set.
    day_of_week_offset: u8,
    /// What the registers hold while updates are stopped.
    stopped: Option<Calendar>,
    /// Up to when flags have been raised.
    seen: Nanos,
}

impl Registers for Rtc {
    const VERSION: u32 = 1;

    fn valid(&self) -> bool {
        self.base <= self.seen && self.seconds.unsigned_abs() < 1 << 50 && self.day_of_week_offset < 7
    }
}

impl Rtc {
    /// A clock that shows `wall_seconds` after 1970-01-01 UTC at `now`.
    pub fn new(now: Nanos, wall_seconds: u64) -> Self {
        Self {
            index: 0,
            nmi_masked: false,
            ram: Box::new([0; 128]),
            a: 0x26,
            b: B_24_HOURS,
            flags: 0,
            base: now,
            seconds: wall_seconds.min(1 << 40) as i64,
            day_of_week_offset: 0,
            stopped: None,
            seen: now,
        }
    }

    /// Fills in what a PC's firmware and QEMU tell about memory in CMOS RAM. `below_4g` and `above_4g`: bytes of RAM
    /// on either side of 4 GiB.
    pub fn set_memory(&mut self, below_4g: u64, above_4g: u64) {
        let clamp = |units: u64| units.min(0xffff) as u16;
        let extended = clamp((below_4g >> 10).saturating_sub(1024));
        self.set_word(0x15, 640);
        self.set_word(0x17, extended);
        self.set_word(0x30, extended);
        self.set_word(0x34, clamp((below_4g >> 16).saturating_sub(256)));
        let [a, b, c, ..] = (above_4g >> 16).to_le_bytes();
        self.ram[0x5b..0x5e].copy_from_slice(&[a, b, c]);
    }
    fn set_word(&mut self, at: usize, value: u16) {
        let [low, high] = value.to_le_bytes();
        self.ram[at & 0x7f] = low;
        self.ram[(at + 1) & 0x7f] = high;
    }

    /// The mask bit for NMIs in the index port.
    pub fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    // ---- time ----

    fn divider_reset(&self) -> bool {
        self.a >> 5 & 3 == 3
    }
    fn elapsed(&self, now: Nanos) -> Nanos {
        now.saturating_sub(self.base)
    }
    fn time(&self, now: Nanos) -> i64 {
        self.seconds + (self.elapsed(now) / SECOND) as i64
    }
    fn calendar(&self, now: Nanos) -> Calendar {
        self.stopped.unwrap_or_else(|| Calendar::from_seconds(self.time(now), self.day_of_week_offset))
    }
    /// Shows this time from now on; the phase of updates stays.
    fn set_calendar(&mut self, calendar: Calendar, now: Nanos) {
        self.base += self.elapsed(now) / SECOND * SECOND;
        self.seconds = calendar.to_seconds();
        let plain = Calendar::from_seconds(self.seconds, 0).day_of_week;
        self.day_of_week_offset = (calendar.day_of_week % 7 + 7 - plain % 7) % 7;
    }

    /// Periods of the periodic interrupt until now.
    fn periods(&self, now: Nanos) -> Option<u64> {
        Some(self.crystal_ticks(now) / self.period_ticks()?)
    }
    fn crystal_ticks(&self, now: Nanos) -> u64 {
        (u128::from(self.elapsed(now)) * CRYSTAL / u128::from(SECOND)) as u64
    }
    /// Ticks of the crystal a period (datasheet, table 5), unless the rate is none.
    fn period_ticks(&self) -> Option<u64> {
        match self.a & 15 {
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Raises the flags of what has happened until now.
    fn advance(&mut self, now: Nanos) {
        if now <= self.seen {
            return;
        }
        if !self.divider_reset() && self.periods(now) != self.periods(self.seen) {
            self.flags |= PERIODIC;
        }
        if self.stopped.is_none() {
            let (before, after) = (self.time(self.seen), self.time(now));
            if before != after {
                self.flags |= UPDATE;
                let first = (before + 1).max(after - DAY_SECONDS as i64 + 1);
                if self.flags & ALARM == 0 && (first..=after).any(|second| self.alarm_matches(second)) {
                    self.flags |= ALARM;
                }
            }
        }
        self.seen = now;
    }

    fn alarm_matches(&self, seconds: i64) -> bool {
        let rest = seconds.rem_euclid(86_400);
        let fields = [
            (reg::SECONDS_ALARM, self.encode((rest % 60) as u8)),
            (reg::MINUTES_ALARM, self.encode((rest / 60 % 60) as u8)),
            (reg::HOURS_ALARM, self.encode_hour((rest / 3600) as u8)),
        ];
        fields.iter().all(|&(register, value)| {
            let alarm = self.ram[usize::from(register)];
            alarm >= ALARM_ANY || alarm == value
        })
    }

    /// Level of the interrupt line.
    pub fn irq(&self) -> bool {
        self.flags & self.b & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// When something next happens that raises the interrupt; [`Rtc::poll`] must be called then.
    pub fn deadline(&self, now: Nanos) -> Option<Nanos> {
        let wanted = self.b & !self.flags;
        let periodic =
            self.period_ticks().filter(|_| wanted & PERIODIC != 0 && !self.divider_reset()).map(|period| {
                let next = u128::from(self.crystal_ticks(now) / period + 1) * u128::from(period);
                (next * u128::from(SECOND)).div_ceil(CRYSTAL) as u64
            });
        let update = (wanted & (UPDATE | ALARM) != 0 && self.stopped.is_none())
            .then(|| (self.elapsed(now) / SECOND + 1).saturating_mul(SECOND));
        let next = match (periodic, update) {
            (Some(a), Some(b)) => a.min(b),
            (a, b) => a.or(b)?,
        };
        Some(self.base.saturating_add(next))
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Nanos) {
        self.advance(now);
    }

    // ---- registers ----

    fn encode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 { value } else { bcd(value) }
    }
    fn decode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 { value } else { from_bcd(value) }
    }
    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let half = if hour >= 12 { PM } else { 0 };
        let hour = match hour % 12 {
            0 => 12,
            hour => hour,
        };
        self.encode(hour) | half
    }
    fn decode_hour(&self, value: u8) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let half = if value & PM != 0 { 12 } else { 0 };
        self.decode(value & !PM) % 12 + half
    }

    /// Reads the data port (71h): the register that the index port selected.
    pub fn read_data(&mut self, now: Nanos) -> u8 {
        self.advance(now);
        let calendar = self.calendar(now);
        match self.index {
            reg::SECONDS => self.encode(calendar.second),
            reg::MINUTES => self.encode(calendar.minute),
            reg::HOURS => self.encode_hour(calendar.hour),
            reg::DAY_OF_WEEK => self.encode(calendar.day_of_week),
            reg::DAY_OF_MONTH => self.encode(calendar.day),
            reg::MONTH => self.encode(calendar.month),
            reg::YEAR => self.encode((calendar.year % 100) as u8),
            // Always BCD: no datasheet knows it.
            CENTURY => bcd((calendar.year / 100) as u8),
            reg::A => {
                let updating =
                    self.stopped.is_none() && self.elapsed(now) % SECOND >= SECOND - UPDATE_IN_PROGRESS;
                self.a | if updating { A_UIP } else { 0 }
            }
            reg::B => self.b,
            reg::C => {
                let flags = self.flags | if self.irq() { C_IRQF } else { 0 };
                self.flags = 0;
                flags
            }
            reg::D => D_VALID,
            index => self.ram[usize::from(index & 0x7f)],
        }
    }

    /// Writes the index port (70h): register number and, in bit 7, the mask for NMIs.
    pub fn write_index(&mut self, value: u8) {
        self.index = value & 0x7f;
        self.nmi_masked = value & 0x80 != 0;
    }

    /// Writes the data port (71h).
    pub fn write_data(&mut self, value: u8, now: Nanos) {
        self.advance(now);
        match self.index {
            reg::SECONDS
            | reg::MINUTES
            | reg::HOURS
            | reg::DAY_OF_WEEK
            | reg::DAY_OF_MONTH
            | reg::MONTH
            | reg::YEAR
            | CENTURY => self.write_time(value, now),
            reg::A => self.write_a(value & 0x7f, now),
            reg::B => self.write_b(value, now),
            reg::C | reg::D => {}
            index => self.ram[usize::from(index & 0x7f)] = value,
        }
    }

    fn write_time(&mut self, value: u8, now: Nanos) {
        let mut calendar = self.calendar(now);
        let number = self.decode(value);
        match self.index {
            reg::SECONDS => calendar.second = number,
            reg::MINUTES => calendar.minute = number,
            reg::HOURS => calendar.hour = self.decode_hour(value),
            reg::DAY_OF_WEEK => calendar.day_of_week = number,
            reg::DAY_OF_MONTH => calendar.day = number,
            reg::MONTH => calendar.month = number,
            reg::YEAR => calendar.year = calendar.year / 100 * 100 + u16::from(number) % 100,
            _ => {
                let century = u16::from(from_bcd(value));
                calendar.year = century * 100 + calendar.year % 100;
            }
        }
        match &mut self.stopped {
            Some(stopped) => *stopped = calendar,
            None => self.set_calendar(calendar, now),
        }
    }

    fn write_a(&mut self, value: u8, now: Nanos) {
        let was_reset = self.divider_reset();
        self.stop_or_go(now, |rtc| rtc.a = value);
        if was_reset && !self.divider_reset() {
            let time = self.time(now);
            self.base = now.saturating_sub(AFTER_DIVIDER_RESET);
            self.seconds = time;
            self.seen = now;
        }
    }

    fn write_b(&mut self, value: u8, now: Nanos) {
        // Setting SET clears the enable of the update-ended interrupt.
        let value = if value & B_SET != 0 { value & !UPDATE } else { value };
        self.stop_or_go(now, |rtc| rtc.b = value);
    }

    /// Changes A or B, which may stop updates or let them go on.
    fn stop_or_go(&mut self, now: Nanos, change: impl FnOnce(&mut Self)) {
        let calendar = self.calendar(now);
        change(self);
        if self.b & B_SET != 0 || self.divider_reset() {
            self.stopped = Some(calendar);
        } else if self.stopped.take().is_some() {
            self.set_calendar(calendar, now);
        }
    }
}

/// The clock on its ports and its interrupt line.
pub struct RealTimeClock {
    registers: Mutex<Rtc>,
    irq: Arc<dyn IrqLine>,
    clock: Arc<dyn Clock>,
    timer: Timer,
}

impl RealTimeClock {
    /// A clock that shows the host's time. `below_4g` and `above_4g`: bytes of RAM on either side of 4 GiB.
    pub fn new(
        irq: Arc<dyn IrqLine>,
        clock: Arc<dyn Clock>,
        timers: &Arc<TimerHub>,
        below_4g: u64,
        above_4g: u64,
    ) -> Arc<Self> {
        let mut registers = Rtc::new(clock.now(), clock.wall_seconds());
        registers.set_memory(below_4g, above_4g);
        Arc::new_cyclic(|me: &Weak<Self>| Self {
            registers: Mutex::new(registers),
            irq,
            clock,
            timer: timers.register(me.clone()),
        })
    }

    fn access<R>(&self, access: impl FnOnce(&mut Rtc, Nanos) -> R) -> R {
        let mut registers = self.registers.lock();
        let now = self.clock.now();
        let result = access(&mut registers, now);
        self.irq.set(registers.irq());
        self.timer.set(registers.deadline(now));
        result
    }

    /// A copy of the registers.
    pub fn save(&self) -> Saved<Rtc> {
        self.registers.lock().save()
    }
    /// Takes over saved registers.
    pub fn restore(&self, saved: &Saved<Rtc>) -> Result<(), RestoreError> {
        self.access(|registers, _| registers.restore(saved))
    }
}

impl PortIo for RealTimeClock {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        // The index port is write-only.
        if port == BASE {
            return u32::MAX;
        }
        self.access(|registers, now| registers.read_data(now)).into()
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        let value = value as u8;
        if port == BASE {
            self.registers.lock().write_index(value);
        } else {
            self.access(|registers, now| registers.write_data(value, now));
        }
    }
}

impl Poll for RealTimeClock {
    fn poll(&self, now: Nanos) -> Option<Nanos> {
        let mut registers = self.registers.lock();
        registers.poll(now);
        self.irq.set(registers.irq());
        registers.deadline(now)
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
