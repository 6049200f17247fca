//! The 8254 interval timer (Intel 8254 datasheet) and system control port B (61h). Nothing ticks: what a
//! counter holds follows from the time since it was loaded.

use alloc::sync::{Arc, Weak};

use super::{Registers, RestoreError, Saved};
use crate::device::{IrqLine, Poll, PortIo};
use crate::host::{Clock, Nanos};
use crate::sync::Mutex;
use crate::timer::{Timer, TimerHub};

/// First port: counters 0 to 2, then the control word.
pub const BASE: u16 = 0x40;
/// Ports of the timer.
pub const PORTS: u32 = 4;
/// System control port B.
pub const PORT_B: u16 = 0x61;
/// ISA interrupt of counter 0.
pub const IRQ: usize = 0;

/// Input clock: 105/88 MHz, 1.193182 MHz.
const CLOCK_NUMERATOR: u128 = 105;
const CLOCK_DENOMINATOR: u128 = 88_000;

/// Least time between two interrupts of counter 0, so that a guest can't keep the host busy with it.
const SHORTEST_PERIOD: Nanos = 50_000;
/// The refresh request toggles every 15 µs.
const REFRESH_PERIOD: Nanos = 15_085;

const PORT_B_GATE: u8 = 1 << 0;
const PORT_B_SPEAKER: u8 = 1 << 1;
/// Software keeps bits 0 to 3.
const PORT_B_WRITABLE: u8 = 0x0f;
const PORT_B_REFRESH: u8 = 1 << 4;
const PORT_B_OUT2: u8 = 1 << 5;

/// A time in periods of the input clock.
type Ticks = u64;

fn ticks(now: Nanos) -> Ticks {
    (u128::from(now) * CLOCK_NUMERATOR / CLOCK_DENOMINATOR) as u64
}
/// The first nanosecond of a tick.
fn nanos(at: Ticks) -> Nanos {
    u64::try_from((u128::from(at) * CLOCK_DENOMINATOR).div_ceil(CLOCK_NUMERATOR)).unwrap_or(u64::MAX)
}

/// Which byte of a counter the next access is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByteOrder {
    Low,
    High,
    Both,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Counter {
    mode: u8,
    bcd: bool,
    order: ByteOrder,
    /// The count register as written, 1 to 10000h.
    reload: u32,
    /// A low byte that waits for its high byte.
    low_written: Option<u8>,
    /// The next read gives the high byte.
    high_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    /// When counting began; `None`: no count yet, or (modes 1 and 5) no trigger.
    start: Option<Ticks>,
    /// Where counting stood when the gate went low (modes 0 and 4).
    stopped: Option<Ticks>,
    /// A count written while another runs: it takes over at the end of the period (modes 2 and 3) or at the next
    /// trigger (modes 1 and 5). Until then this is the one that counts.
    counting: u32,
    /// When `reload` takes over from `counting`.
    switch_at: Option<Ticks>,
}

impl Counter {
    const fn new() -> Self {
        Self {
            mode: 3,
            bcd: false,
            order: ByteOrder::Both,
            reload: 0x1_0000,
            low_written: None,
            high_next: false,
            latched: None,
            latched_status: None,
            gate: true,
            start: None,
            stopped: None,
            counting: 0x1_0000,
            switch_at: None,
        }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }
    fn triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Lets a count that was waiting for the end of a period take over.
    fn settle(&mut self, now: Ticks) {
        if let Some(at) = self.switch_at
            && now >= at
        {
            self.counting = self.reload;
            self.start = Some(at);
            self.switch_at = None;
        }
    }

    /// Ticks counted so far.
    fn elapsed(&self, now: Ticks) -> Option<Ticks> {
        let start = self.start?;
        Some(self.stopped.unwrap_or(now).saturating_sub(start))
    }

    /// The counting element, as a number (not BCD), 0 to FFFFh.
    fn count(&self, now: Ticks) -> u32 {
        let Some(elapsed) = self.elapsed(now) else { return self.counting & 0xffff };
        let full = u64::from(self.counting);
        let wrap = if self.bcd { 10_000 } else { 0x1_0000 };
        let count = match self.mode {
            2 => full - elapsed % full,
            // Counts by two, twice a period; an odd count has a longer high half.
            3 => {
                let phase = elapsed % full;
                let high_half = full.div_ceil(2);
                let in_half = if phase < high_half { phase } else { phase - high_half };
                (full & !1).saturating_sub(in_half * 2)
            }
            // Past zero it goes on from the top.
            _ => (full % wrap + wrap - elapsed % wrap) % wrap,
        };
        (count % wrap) as u32
    }

    /// The OUT pin.
    fn out(&self, now: Ticks) -> bool {
        let full = u64::from(self.counting);
        match (self.mode, self.elapsed(now)) {
            (0, None) => false,
            (_, None) => true,
            // Low while counting.
            (0 | 1, Some(elapsed)) => elapsed >= full,
            (2 | 3, _) if !self.gate => true,
            (2, Some(elapsed)) => elapsed % full != full - 1,
            (3, Some(elapsed)) => elapsed % full < full.div_ceil(2),
            // A strobe of one tick.
            (_, Some(elapsed)) => elapsed != full,
        }
    }

    /// The first rising edge of OUT after `after`, if nothing is written until then.
    fn next_rise(&self, after: Ticks) -> Option<Ticks> {
        let start = self.start?;
        if self.stopped.is_some() || self.periodic() && !self.gate {
            return None;
        }
        let full = u64::from(self.counting);
        let rise = match self.mode {
            0 | 1 => start.saturating_add(full),
            2 | 3 => {
                let periods = after.saturating_sub(start) / full + 1;
                start.saturating_add(periods.saturating_mul(full))
            }
            _ => start.saturating_add(full + 1),
        };
        (rise > after).then_some(rise)
    }

    fn control(&mut self, word: u8) {
        self.order = match word >> 4 & 3 {
            1 => ByteOrder::Low,
            2 => ByteOrder::High,
            _ => ByteOrder::Both,
        };
        self.mode = match word >> 1 & 7 {
            6 => 2,
            7 => 3,
            mode => mode,
        };
        self.bcd = word & 1 != 0;
        self.low_written = None;
        self.high_next = false;
        self.latched = None;
        self.latched_status = None;
        self.start = None;
        self.stopped = None;
        self.switch_at = None;
    }

    fn latch(&mut self, now: Ticks) {
        if self.latched.is_none() {
            self.latched = Some(self.encode(self.count(now)));
        }
    }

    /// Status byte: OUT, null count (the count is not yet in the counting element), control word.
    fn latch_status(&mut self, now: Ticks) {
        let order = match self.order {
            ByteOrder::Low => 1,
            ByteOrder::High => 2,
            ByteOrder::Both => 3,
        };
        let null = self.start.is_none() || self.switch_at.is_some();
        let status = u8::from(self.out(now)) << 7
            | u8::from(null) << 6
            | order << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    fn encode(&self, count: u32) -> u16 {
        if !self.bcd {
            return count as u16;
        }
        (0..4).fold(0, |value, digit| value | ((count / 10u32.pow(digit) % 10) as u16) << (4 * digit))
    }
    fn decode(&self, written: u16) -> u32 {
        let count = if self.bcd {
            (0..4).fold(0, |value, digit| value + u32::from(written >> (4 * digit) & 15) * 10u32.pow(digit))
        } else {
            u32::from(written)
        };
        match (count, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (count, _) => count,
        }
    }

    fn read(&mut self, now: Ticks) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.encode(self.count(now)));
        let [low, high] = value.to_le_bytes();
        match self.order {
            ByteOrder::Low => {
                self.latched = None;
                low
            }
            ByteOrder::High => {
                self.latched = None;
                high
            }
            ByteOrder::Both if self.high_next => {
                self.high_next = false;
                self.latched = None;
                high
            }
            ByteOrder::Both => {
                self.high_next = true;
                low
            }
        }
    }

    fn write(&mut self, byte: u8, now: Ticks) {
        let written = match (self.order, self.low_written.take()) {
            (ByteOrder::Low, _) => u16::from(byte),
            (ByteOrder::High, _) => u16::from(byte) << 8,
            (ByteOrder::Both, None) => {
                self.low_written = Some(byte);
                if self.mode == 0 {
                    // The first byte of a new count stops counting and drives OUT low.
                    self.start = None;
                }
                return;
            }
            (ByteOrder::Both, Some(low)) => u16::from_le_bytes([low, byte]),
        };
        self.load(self.decode(written), now);
    }

    fn load(&mut self, count: u32, now: Ticks) {
        self.reload = count;
        match self.start {
            // The count is loaded one tick after it is written.
            _ if matches!(self.mode, 0 | 4) => self.begin(now + 1),
            None if self.periodic() => self.begin(now + 1),
            Some(start) if self.periodic() => {
                let full = u64::from(self.counting);
                let period_end = start + (now.saturating_sub(start) / full + 1) * full;
                self.switch_at = self.gate.then_some(period_end);
            }
            // Modes 1 and 5 wait for a trigger; one that runs goes on.
            _ => {}
        }
    }

    fn begin(&mut self, at: Ticks) {
        self.counting = self.reload;
        self.start = Some(at);
        self.stopped = (!self.gate).then_some(at);
        self.switch_at = None;
    }

    fn set_gate(&mut self, gate: bool, now: Ticks) {
        let rising = gate && !self.gate;
        let falling = !gate && self.gate;
        self.gate = gate;
        if rising && self.triggered() || rising && self.periodic() && self.start.is_some() {
            self.begin(now + 1);
        } else if rising && let (Some(stopped), Some(start)) = (self.stopped.take(), self.start) {
            // Goes on where it stood.
            self.start = Some(start + now.saturating_sub(stopped));
        } else if falling && !self.triggered() && self.start.is_some() {
            self.switch_at = None;
            self.stopped = Some(now);
        }
    }
}

/// The register machine. Times are of the machine's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pit {
    counters: [Counter; 3],
    port_b: u8,
}

impl Registers for Pit {
    const VERSION: u32 = 1;

    fn valid(&self) -> bool {
        let count_fits = |count| (1..=0x1_0000).contains(&count);
        self.counters.iter().all(|c| c.mode < 6 && count_fits(c.reload) && count_fits(c.counting))
    }
}

impl Default for Pit {
    fn default() -> Self {
        let mut counters = [Counter::new(), Counter::new(), Counter::new()];
        // The gate of counter 2 is bit 0 of port B.
        counters[2].gate = false;
        Self { counters, port_b: 0 }
    }
}

impl Pit {
    fn settled(&mut self, now: Nanos) -> Ticks {
        let now = ticks(now);
        for counter in &mut self.counters {
            counter.settle(now);
        }
        now
    }

    /// Reads port 0 to 3 of the timer.
    pub fn read(&mut self, port: u16, now: Nanos) -> u8 {
        let now = self.settled(now);
        // The control word can't be read.
        self.counters.get_mut(usize::from(port & 3)).map_or(0xff, |counter| counter.read(now))
    }

    /// Writes port 0 to 3 of the timer.
    pub fn write(&mut self, port: u16, value: u8, now: Nanos) {
        let now = self.settled(now);
        match self.counters.get_mut(usize::from(port & 3)) {
            Some(counter) => counter.write(value, now),
            None if value >> 6 == 3 => self.read_back(value, now),
            None => {
                if let Some(counter) = self.counters.get_mut(usize::from(value >> 6)) {
                    if value & 0x30 == 0 {
                        counter.latch(now);
                    } else {
                        counter.control(value);
                    }
                }
            }
        }
    }

    fn read_back(&mut self, command: u8, now: Ticks) {
        for (index, counter) in self.counters.iter_mut().enumerate() {
            if command >> (index + 1) & 1 == 0 {
                continue;
            }
            if command & 0x20 == 0 {
                counter.latch(now);
            }
            if command & 0x10 == 0 {
                counter.latch_status(now);
            }
        }
    }

    /// Reads port B: what software wrote, the refresh toggle, the output of counter 2.
    pub fn read_port_b(&mut self, now: Nanos) -> u8 {
        let refresh = if (now / REFRESH_PERIOD) & 1 != 0 { PORT_B_REFRESH } else { 0 };
        let now = self.settled(now);
        let out = if self.counters[2].out(now) { PORT_B_OUT2 } else { 0 };
        self.port_b | refresh | out
    }

    /// Writes port B: bit 0 is the gate of counter 2, bit 1 lets its output to the speaker, which is not there.
    pub fn write_port_b(&mut self, value: u8, now: Nanos) {
        let now = self.settled(now);
        self.port_b = value & PORT_B_WRITABLE;
        self.counters[2].set_gate(value & PORT_B_GATE != 0, now);
    }

    /// Whether counter 2 is let to the speaker.
    pub fn speaker(&self) -> bool {
        self.port_b & (PORT_B_GATE | PORT_B_SPEAKER) == PORT_B_GATE | PORT_B_SPEAKER
    }

    /// The output of counter 0, the timer interrupt.
    pub fn out0(&mut self, now: Nanos) -> bool {
        let now = self.settled(now);
        self.counters[0].out(now)
    }

    /// The first rising edge of counter 0's output after `after`.
    pub fn next_rise0(&self, after: Nanos) -> Option<Nanos> {
        let counter = &self.counters[0];
        let after = ticks(after);
        let rise = counter.next_rise(after)?;
        // A period that is to end before then ends with a rising edge too.
        Some(nanos(counter.switch_at.filter(|&at| at > after && at < rise).unwrap_or(rise)))
    }
}

struct State {
    pit: Pit,
    /// Until when the interrupt line has followed the output.
    followed: Nanos,
    /// What the timer was set to last. Counters 1 and 2 leave it as it is, and then nobody has to wait for the lock of
    /// all timers: software measures time with counter 2, and would measure that.
    armed: Option<Nanos>,
}

/// The timer on its ports, with counter 0 on an interrupt line.
pub struct IntervalTimer {
    state: Mutex<State>,
    irq: Arc<dyn IrqLine>,
    clock: Arc<dyn Clock>,
    timer: Timer,
}

impl IntervalTimer {
    /// The timer after reset.
    pub fn new(irq: Arc<dyn IrqLine>, clock: Arc<dyn Clock>, timers: &Arc<TimerHub>) -> Arc<Self> {
        let state = State { pit: Pit::default(), followed: clock.now(), armed: None };
        Arc::new_cyclic(|me: &Weak<Self>| Self {
            state: Mutex::new(state),
            irq,
            clock,
            timer: timers.register(me.clone()),
        })
    }

    /// Brings the line up to `now`. Edges that came since the last time are one pulse: the line is not followed
    /// into the low phases of modes 2 and 3, whose falling edges mean nothing to anybody.
    fn follow(&self, state: &mut State, now: Nanos) {
        let rise = state.pit.next_rise0(state.followed);
        if rise.is_some_and(|at| at <= now) {
            self.irq.set(false);
            self.irq.set(true);
        }
        let out = state.pit.out0(now);
        if !(out || state.pit.counters[0].periodic() && state.pit.counters[0].start.is_some()) {
            self.irq.set(false);
        }
        state.followed = now;
    }

    fn deadline(state: &State, now: Nanos) -> Option<Nanos> {
        let rise = state.pit.next_rise0(now)?;
        let counter = &state.pit.counters[0];
        let short = counter.periodic() && nanos(u64::from(counter.counting)) < SHORTEST_PERIOD;
        Some(if short { rise.max(now.saturating_add(SHORTEST_PERIOD)) } else { rise })
    }

    fn access<R>(&self, access: impl FnOnce(&mut Pit, Nanos) -> R) -> R {
        let mut state = self.state.lock();
        let now = self.clock.now();
        self.follow(&mut state, now);
        let result = access(&mut state.pit, now);
        self.follow(&mut state, now);
        result
    }

    fn change<R>(&self, access: impl FnOnce(&mut Pit, Nanos) -> R) -> R {
        let mut state = self.state.lock();
        let now = self.clock.now();
        self.follow(&mut state, now);
        let result = access(&mut state.pit, now);
        self.follow(&mut state, now);
        let deadline = Self::deadline(&state, now);
        if deadline != state.armed {
            state.armed = deadline;
            self.timer.set(deadline);
        }
        result
    }

    /// A copy of the registers.
    pub fn save(&self) -> Saved<Pit> {
        self.state.lock().pit.save()
    }
    /// Takes over saved registers.
    pub fn restore(&self, saved: &Saved<Pit>) -> Result<(), RestoreError> {
        self.change(|pit, _| pit.restore(saved))
    }
}

impl PortIo for IntervalTimer {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        let value =
            self.access(|pit, now| if port == PORT_B { pit.read_port_b(now) } else { pit.read(port, now) });
        value.into()
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        self.change(|pit, now| {
            if port == PORT_B {
                pit.write_port_b(value as u8, now);
            } else {
                pit.write(port, value as u8, now);
            }
        });
    }
}

impl Poll for IntervalTimer {
    fn poll(&self, now: Nanos) -> Option<Nanos> {
        let mut state = self.state.lock();
        let now = now.max(state.followed);
        self.follow(&mut state, now);
        state.armed = Self::deadline(&state, now);
        state.armed
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
