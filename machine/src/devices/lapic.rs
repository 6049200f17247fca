//! The registers of a local APIC (SDM Vol. 3A, chapter 11): xAPIC and x2APIC.

use bivisor_x86::cpuid::APIC_BUS_HZ;

use super::Registers;
use super::message::{BROADCAST, Delivery, Message, wide_destination};
use crate::host::Nanos;

/// Guest-physical address after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// MSR number of IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// MSR number of IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First MSR of the x2APIC registers; there are 256.
pub const MSR_X2APIC: u32 = 0x800;

/// IA32_APIC_BASE: the processor is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: enabled.
pub const BASE_ENABLED: u64 = 1 << 11;

/// Version 14h, six LVT entries, EOI broadcast can be suppressed.
const VERSION: u32 = 0x0105_0014;

/// Register numbers: xAPIC offset / 16, x2APIC MSR − 800h.
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const IRR_LAST: u32 = 0x27;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Indexes of the local vector table.
const LVT_TIMER: usize = 0;
const LVT_LINT0: usize = 3;
const LVT_LINT1: usize = 4;
const LVT_ERROR: usize = 5;
const LVT_COUNT: usize = 6;

const LVT_MASKED: u32 = 1 << 16;
const LVT_LEVEL: u32 = 1 << 15;
const LVT_REMOTE_IRR: u32 = 1 << 14;
const LVT_DELIVERY_STATUS: u32 = 1 << 12;
/// Bits that software can write, by entry: timer, thermal, performance counters, LINT0, LINT1, error.
const LVT_WRITABLE: [u32; LVT_COUNT] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

const SVR_ENABLED: u32 = 1 << 8;
const SVR_SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
const SVR_WRITABLE: u32 = 0x13ff;

const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

const ICR_LOGICAL: u64 = 1 << 11;
const ICR_DELIVERY_STATUS: u64 = 1 << 12;
const ICR_ASSERT: u64 = 1 << 14;
const ICR_LEVEL: u64 = 1 << 15;
/// Vector, delivery mode, destination mode, level, trigger, shorthand.
const ICR_WRITABLE: u64 = 0x000c_cfff;

const DIVIDE_WRITABLE: u32 = 0xb;

/// Nanoseconds of the timer's input clock.
const INPUT_PERIOD: Nanos = 1_000_000_000 / APIC_BUS_HZ;
/// Least period of the periodic timer. A count of one asks for an interrupt every 10 ns: longer than any handler
/// takes, so the guest would never get past it, and the host would do nothing but set alarms. KVM's bound is the
/// same (its parameter `min_timer_period_us`): 5 kHz is above every tick that systems ask for, and guests know it.
/// The other modes need none, because there each interrupt costs the guest an access to a register.
const SHORTEST_PERIOD: Nanos = 200_000;

/// What a read or write needs to know of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// The machine's clock.
    pub now: Nanos,
    /// The guest's time-stamp counter at `now`.
    pub tsc: u64,
    /// Its frequency, in Hz.
    pub tsc_hz: u64,
}

/// There is no such register in this mode, or the value has reserved bits: #GP for an MSR access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAccess;

/// To which processors an inter-processor interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Those that the message's destination names.
    Destination,
    /// The sender alone.
    Myself,
    /// Everybody.
    All,
    /// Everybody but the sender.
    Others,
}

/// What a register write causes outside of this local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// An inter-processor interrupt.
    Send(Target, Message),
    /// An EOI to tell the I/O APICs, with the vector.
    EndOfInterrupt(u8),
}

/// What is waiting for the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// The interrupt of this vector.
    Vector(u8),
    /// An interrupt whose vector the PIC has.
    ExtInt,
}

/// 256 bits, one a vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, vector: u8, to: bool) {
        let word = &mut self.0[usize::from(vector >> 5)];
        *word = *word & !(1 << (vector & 31)) | u32::from(to) << (vector & 31);
    }
    fn get(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
    }
    fn highest(&self) -> Option<u8> {
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        Some((index as u32 * 32 + word.ilog2()) as u8)
    }
    fn word(&self, index: u32) -> u32 {
        self.0[(index & 7) as usize]
    }
}

/// The register machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lapic {
    /// The x2APIC ID, and after reset the xAPIC ID.
    initial_id: u32,
    /// Bits of IA32_APIC_BASE that hold an address.
    base_mask: u64,
    base: u64,
    /// xAPIC ID, which software can change.
    id: u8,
    tpr: u8,
    /// xAPIC logical destination, bits 24 to 31.
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    esr: u32,
    /// Errors since software last wrote ESR.
    errors: u32,
    icr: u64,
    lvt: [u32; LVT_COUNT],
    initial_count: u32,
    divide: u32,
    /// When the counter reaches zero, in one-shot and periodic mode.
    expiry: Option<Nanos>,
    /// IA32_TSC_DEADLINE; 0 when not armed.
    tsc_deadline: u64,
    /// Level of the LINT0 input (the PIC's output).
    lint0: bool,
    /// Level of the LINT1 input.
    lint1: bool,
    /// An ExtINT message has come.
    ext_int: bool,
}

impl Registers for Lapic {
    const VERSION: u32 = 1;
}

impl Lapic {
    /// The local APIC with this ID, after reset; `bootstrap`: of the bootstrap processor. `physical_bits`: size of
    /// a physical address (CPUID 8000_0008h).
    pub fn new(id: u32, bootstrap: bool, physical_bits: u32) -> Self {
        let base_mask = 1u64.checked_shl(physical_bits).map_or(u64::MAX, |limit| limit - 1) & !0xfff;
        let base = DEFAULT_BASE | BASE_ENABLED | if bootstrap { BASE_BSP } else { 0 };
        Self {
            initial_id: id,
            base_mask,
            base,
            id: id as u8,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; LVT_COUNT],
            initial_count: 0,
            divide: 0,
            expiry: None,
            tsc_deadline: 0,
            lint0: false,
            lint1: false,
            ext_int: false,
        }
    }

    /// State after INIT: as after reset, but its base, mode and ID stay (section 11.4.7.3).
    pub fn init(&mut self) {
        *self = Self {
            base_mask: self.base_mask,
            base: self.base,
            id: self.id,
            lint0: self.lint0,
            lint1: self.lint1,
            ..Self::new(self.initial_id, false, 0)
        };
    }

    /// Sets what a PC's firmware leaves on the bootstrap processor (virtual wire mode, MultiProcessor
    /// Specification, section 3.6.2.2): enabled, PIC on LINT0, NMI on LINT1.
    pub fn enter_virtual_wire_mode(&mut self) {
        self.svr |= SVR_ENABLED;
        self.lvt[LVT_LINT0] = 7 << 8 | LVT_LEVEL;
        self.lvt[LVT_LINT1] = 4 << 8;
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }
    /// Guest-physical address of the registers, if they are in memory space now.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.enabled() && !self.x2apic()).then_some(self.base & self.base_mask)
    }
    fn enabled(&self) -> bool {
        self.base & BASE_ENABLED != 0
    }
    fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }
    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLED != 0
    }
    /// The ID that messages name.
    pub fn id(&self) -> u32 {
        if self.x2apic() { self.initial_id } else { u32::from(self.id) }
    }

    /// Writes IA32_APIC_BASE (section 11.12.5: which changes of mode are allowed).
    pub fn set_base(&mut self, value: u64) -> Result<(), BadAccess> {
        if value & !(self.base_mask | BASE_BSP | BASE_X2APIC | BASE_ENABLED) != 0 {
            return Err(BadAccess);
        }
        let mode = |base: u64| (base & BASE_ENABLED != 0, base & BASE_X2APIC != 0);
        match (mode(self.base), mode(value)) {
            (_, (false, true)) | ((true, true), (true, false)) | ((false, _), (true, true)) => {
                return Err(BadAccess);
            }
            ((true, _), (false, _)) => {
                let tpr = self.tpr;
                self.init();
                self.id = self.initial_id as u8;
                // CR8 stays with the processor.
                self.tpr = tpr;
            }
            _ => {}
        }
        self.base = value;
        Ok(())
    }

    // ---- priorities ----

    /// The processor priority (section 11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let serving = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= serving { self.tpr } else { serving }
    }
    /// CR8: the task priority class.
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }
    /// Sets CR8.
    pub fn set_cr8(&mut self, value: u8) {
        self.tpr = value << 4;
    }

    /// What the processor would get now if it took interrupts.
    pub fn pending(&self) -> Option<Pending> {
        if self.ext_int || self.lint0 && self.accepts_pic() {
            return Some(Pending::ExtInt);
        }
        let vector = self.irr.highest()?;
        (self.enabled() && vector & 0xf0 > self.ppr() & 0xf0).then_some(Pending::Vector(vector))
    }
    /// With the local APIC disabled the PIC's output is the processor's INTR pin.
    fn accepts_pic(&self) -> bool {
        !self.enabled() || self.lvt[LVT_LINT0] & (LVT_MASKED | 0x700) == 0x700
    }

    /// The processor takes what is pending: a vector goes into service.
    pub fn acknowledge(&mut self) -> Option<Pending> {
        let pending = self.pending()?;
        match pending {
            Pending::Vector(vector) => {
                self.irr.set(vector, false);
                self.isr.set(vector, true);
            }
            Pending::ExtInt => self.ext_int = false,
        }
        Some(pending)
    }

    /// Whether any interrupt was requested that the processor has not taken.
    pub fn requested(&self) -> bool {
        self.irr.highest().is_some()
    }
    /// Whether the end of this vector's interrupt matters to nobody but this local APIC, and nothing waits for it.
    pub fn ends_quietly(&self, vector: u8) -> bool {
        !self.tmr.get(vector) && !self.requested()
    }

    /// EOI: the interrupt of the highest priority in service ends.
    pub fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.set(vector, false);
        for entry in [LVT_LINT0, LVT_LINT1] {
            if self.lvt[entry] as u8 == vector {
                self.lvt[entry] &= !LVT_REMOTE_IRR;
            }
        }
        self.service_lint();
        if self.tmr.get(vector) && self.svr & SVR_SUPPRESS_EOI_BROADCAST == 0 {
            Effect::EndOfInterrupt(vector)
        } else {
            Effect::None
        }
    }

    // ---- messages ----

    /// Whether a message is meant for this local APIC.
    pub fn matches(&self, message: &Message) -> bool {
        let destination = message.destination;
        if !self.enabled() {
            return false;
        }
        if destination == BROADCAST {
            // Flat logical destinations have no broadcast but "any bit".
            return self.x2apic() || !message.logical || self.dfr >> 28 != 0xf || self.ldr != 0;
        }
        match (message.logical, self.x2apic()) {
            (false, true) => destination == self.initial_id,
            (false, false) => {
                wide_destination(self.id) == wide_destination(destination as u8) && destination < 256
            }
            (true, true) => {
                let ldr = self.x2apic_ldr();
                destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0
            }
            (true, false) => {
                let (own, destination) = ((self.ldr >> 24) as u8, destination as u8);
                match self.dfr >> 28 {
                    0xf => own & destination != 0,
                    0 => own >> 4 == destination >> 4 && own & destination & 0xf != 0,
                    _ => false,
                }
            }
        }
    }

    fn x2apic_ldr(&self) -> u32 {
        self.initial_id >> 4 << 16 | 1 << (self.initial_id & 15)
    }

    /// Accepts a fixed interrupt.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if !self.enabled() || !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        self.irr.set(vector, true);
        self.tmr.set(vector, level);
    }
    /// Accepts an ExtINT message.
    pub fn accept_ext_int(&mut self) {
        if self.enabled() && self.software_enabled() {
            self.ext_int = true;
        }
    }

    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        let entry = self.lvt[LVT_ERROR];
        if entry & LVT_MASKED != 0 {
            return;
        }
        if entry as u8 >= 16 {
            self.accept(entry as u8, false);
        } else {
            self.errors |= ESR_RECEIVE_ILLEGAL_VECTOR;
        }
    }

    /// Drives LINT0, where the PIC is. True: it is wired to NMI and has raised one.
    pub fn set_lint0(&mut self, high: bool) -> bool {
        let rising = high && !self.lint0;
        self.lint0 = high;
        self.lint_changed(LVT_LINT0, rising)
    }
    /// Drives LINT1. True: it is wired to NMI and has raised one.
    pub fn set_lint1(&mut self, high: bool) -> bool {
        let rising = high && !self.lint1;
        self.lint1 = high;
        self.lint_changed(LVT_LINT1, rising)
    }
    fn lint_changed(&mut self, index: usize, rising: bool) -> bool {
        let entry = self.lvt[index];
        let mode = entry >> 8 & 7;
        if rising && entry & (LVT_MASKED | LVT_LEVEL) == 0 && mode == 0 {
            self.accept(entry as u8, false);
        }
        self.service_lint();
        rising && self.enabled() && entry & LVT_MASKED == 0 && mode == 4
    }
    /// Accepts the level-triggered local interrupts whose input is high.
    fn service_lint(&mut self) {
        for (index, high) in [(LVT_LINT0, self.lint0), (LVT_LINT1, self.lint1)] {
            let entry = self.lvt[index];
            let fixed_level = entry & (LVT_MASKED | LVT_LEVEL | LVT_REMOTE_IRR | 0x700) == LVT_LEVEL;
            if high && fixed_level && self.enabled() {
                self.lvt[index] |= LVT_REMOTE_IRR;
                self.accept(entry as u8, false);
            }
        }
    }

    // ---- the timer ----

    fn timer_mode(&self) -> u32 {
        self.lvt[LVT_TIMER] >> 17 & 3
    }
    fn periodic_mode(&self) -> bool {
        self.timer_mode() == 1
    }
    fn tsc_deadline_mode(&self) -> bool {
        self.timer_mode() == 2
    }
    /// Nanoseconds a count.
    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        INPUT_PERIOD << (code.wrapping_add(1) & 7)
    }
    /// Time that the initial count takes. A period that is stretched stays at that count until the rest of it fits.
    fn period(&self) -> Nanos {
        let shortest = if self.periodic_mode() { SHORTEST_PERIOD } else { 0 };
        (u64::from(self.initial_count) * self.divisor()).max(shortest)
    }
    fn current_count(&self, now: Nanos) -> u32 {
        let Some(expiry) = self.expiry else { return 0 };
        let counts = expiry.saturating_sub(now).div_ceil(self.divisor());
        counts.min(u64::from(self.initial_count)) as u32
    }
    fn fire_timer(&mut self) {
        let entry = self.lvt[LVT_TIMER];
        if entry & LVT_MASKED == 0 {
            self.accept(entry as u8, false);
        }
    }

    /// Does what the timer has to do until this moment. Every access does it first.
    pub fn advance(&mut self, moment: &Moment) {
        if self.tsc_deadline != 0 && moment.tsc >= self.tsc_deadline {
            self.tsc_deadline = 0;
            self.fire_timer();
        }
        let Some(expiry) = self.expiry else { return };
        if expiry > moment.now {
            return;
        }
        self.expiry = if self.periodic_mode() && self.initial_count != 0 {
            let period = self.period();
            let passed = (moment.now - expiry) / period + 1;
            Some(expiry.saturating_add(passed.saturating_mul(period)))
        } else {
            None
        };
        self.fire_timer();
    }

    /// When [`Lapic::advance`] must be called at the latest.
    pub fn deadline(&self, moment: &Moment) -> Option<Nanos> {
        if self.lvt[LVT_TIMER] & LVT_MASKED != 0 {
            return None;
        }
        if self.tsc_deadline != 0 {
            let ticks = u128::from(self.tsc_deadline.saturating_sub(moment.tsc));
            let nanos = (ticks * 1_000_000_000).div_ceil(u128::from(moment.tsc_hz.max(1)));
            return Some(moment.now.saturating_add(u64::try_from(nanos).unwrap_or(u64::MAX)));
        }
        self.expiry
    }

    /// What decides about [`Lapic::deadline`]: the same value means the same deadline.
    pub fn timer_armed(&self) -> (Option<Nanos>, u64, bool) {
        (self.expiry, self.tsc_deadline, self.lvt[LVT_TIMER] & LVT_MASKED == 0)
    }

    fn set_divide(&mut self, value: u32, now: Nanos) {
        let count = u64::from(self.current_count(now));
        self.divide = value & DIVIDE_WRITABLE;
        if self.expiry.is_some() {
            self.expiry = Some(now.saturating_add(count * self.divisor()));
        }
    }

    fn set_initial_count(&mut self, value: u32, now: Nanos) {
        if self.tsc_deadline_mode() {
            return;
        }
        self.initial_count = value;
        self.expiry = (value != 0).then(|| now.saturating_add(self.period()));
    }

    fn set_lvt(&mut self, index: usize, value: u32) {
        let was_deadline = self.tsc_deadline_mode();
        let old = self.lvt[index];
        let mut entry = value & LVT_WRITABLE[index] | old & LVT_REMOTE_IRR;
        if !self.software_enabled() {
            entry |= LVT_MASKED;
        }
        if entry & LVT_LEVEL == 0 {
            entry &= !LVT_REMOTE_IRR;
        }
        self.lvt[index] = entry;
        if index == LVT_TIMER && was_deadline != self.tsc_deadline_mode() {
            // Section 11.5.4.1: changing to or from TSC-deadline mode disarms.
            self.tsc_deadline = 0;
            self.expiry = None;
        }
        self.service_lint();
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value & SVR_WRITABLE;
        if !self.software_enabled() {
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
        }
    }

    // ---- registers ----

    fn read(&self, register: u32, moment: &Moment) -> Result<u32, BadAccess> {
        Ok(match register {
            reg::ID if self.x2apic() => self.initial_id,
            reg::ID => u32::from(self.id) << 24,
            reg::VERSION => VERSION,
            reg::TPR => u32::from(self.tpr),
            reg::APR if !self.x2apic() => 0,
            reg::PPR => u32::from(self.ppr()),
            reg::EOI if !self.x2apic() => 0,
            reg::LDR if self.x2apic() => self.x2apic_ldr(),
            reg::LDR => self.ldr,
            reg::DFR if !self.x2apic() => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr.word(register),
            reg::TMR..reg::IRR => self.tmr.word(register),
            reg::IRR..=reg::IRR_LAST => self.irr.word(register),
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[(register - reg::LVT_TIMER) as usize],
            reg::INITIAL_COUNT => self.initial_count,
            reg::CURRENT_COUNT => self.current_count(moment.now),
            reg::DIVIDE => self.divide,
            _ => return Err(BadAccess),
        })
    }

    fn write(&mut self, register: u32, value: u32, moment: &Moment) -> Result<Effect, BadAccess> {
        match register {
            reg::ID if !self.x2apic() => self.id = (value >> 24) as u8,
            // Read-only: xAPIC drops writes.
            reg::VERSION | reg::APR | reg::PPR | reg::CURRENT_COUNT if !self.x2apic() => {}
            reg::ISR..=reg::IRR_LAST if !self.x2apic() => {}
            reg::TPR => self.tpr = value as u8,
            reg::EOI => return Ok(self.end_of_interrupt()),
            reg::LDR if !self.x2apic() => self.ldr = value & 0xff00_0000,
            reg::DFR if !self.x2apic() => self.dfr = value | 0x0fff_ffff,
            reg::SVR => self.set_svr(value),
            reg::ESR => {
                self.esr = self.errors;
                self.errors = 0;
            }
            reg::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value) & ICR_WRITABLE;
                return Ok(self.send());
            }
            reg::ICR_HIGH if !self.x2apic() => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => self.set_lvt((register - reg::LVT_TIMER) as usize, value),
            reg::INITIAL_COUNT => self.set_initial_count(value, moment.now),
            reg::DIVIDE => self.set_divide(value, moment.now),
            _ => return Err(BadAccess),
        }
        Ok(Effect::None)
    }

    /// Sends what ICR says.
    fn send(&mut self) -> Effect {
        let icr = self.icr;
        let Some(delivery) = Delivery::from_bits((icr >> 8) as u32) else { return Effect::None };
        let vector = icr as u8;
        match delivery {
            Delivery::Fixed | Delivery::LowestPriority if vector < 16 => {
                self.error(ESR_SEND_ILLEGAL_VECTOR);
                return Effect::None;
            }
            // INIT level de-assert only sets arbitration IDs, which nobody has any more.
            Delivery::Init if icr & ICR_LEVEL != 0 && icr & ICR_ASSERT == 0 => return Effect::None,
            Delivery::ExtInt => return Effect::None,
            _ => {}
        }
        let high = (icr >> 32) as u32;
        let message = Message {
            destination: if self.x2apic() { high } else { wide_destination((high >> 24) as u8) },
            logical: icr & ICR_LOGICAL != 0,
            delivery,
            vector,
            // Inter-processor interrupts are edge triggered whatever ICR says (section 11.6.1).
            level: false,
        };
        let target = match icr >> 18 & 3 {
            0 => Target::Destination,
            1 => Target::Myself,
            2 => Target::All,
            _ => Target::Others,
        };
        Effect::Send(target, message)
    }

    /// Reads `size` bytes in memory space. Registers are 32 bits at multiples of 16; smaller reads inside them work
    /// as on processors of Intel.
    pub fn mmio_read(&mut self, offset: u64, size: usize, moment: &Moment) -> u64 {
        self.advance(moment);
        let byte = (offset & 15) as usize;
        if byte >= 4 {
            return 0;
        }
        let value = self.read((offset >> 4 & 0xff) as u32, moment).unwrap_or_else(|BadAccess| {
            self.error(ESR_ILLEGAL_REGISTER);
            0
        });
        let value = u64::from(value) >> (byte * 8);
        if size >= 4 { value } else { value & ((1 << (size * 8)) - 1) }
    }

    /// Writes in memory space: 32 bits at a multiple of 16, or it is dropped.
    pub fn mmio_write(&mut self, offset: u64, size: usize, value: u64, moment: &Moment) -> Effect {
        self.advance(moment);
        if size != 4 || offset & 15 != 0 {
            return Effect::None;
        }
        let effect = self.write((offset >> 4 & 0xff) as u32, value as u32, moment);
        self.advance(moment);
        effect.unwrap_or_else(|BadAccess| {
            self.error(ESR_ILLEGAL_REGISTER);
            Effect::None
        })
    }

    /// Reads an x2APIC register as an MSR.
    pub fn msr_read(&mut self, msr: u32, moment: &Moment) -> Result<u64, BadAccess> {
        self.advance(moment);
        let register = msr.wrapping_sub(MSR_X2APIC);
        if !self.x2apic() {
            return Err(BadAccess);
        }
        match register {
            reg::ICR => Ok(self.icr),
            _ => self.read(register, moment).map(u64::from),
        }
    }

    /// Writes an x2APIC register as an MSR (section 11.12.1.2: which bits are reserved).
    pub fn msr_write(&mut self, msr: u32, value: u64, moment: &Moment) -> Result<Effect, BadAccess> {
        self.advance(moment);
        let register = msr.wrapping_sub(MSR_X2APIC);
        if !self.x2apic() {
            return Err(BadAccess);
        }
        let allowed = match register {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => u64::from(SVR_WRITABLE),
            reg::ICR => ICR_WRITABLE | ICR_DELIVERY_STATUS | 0xffff_ffff << 32,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let read_only = LVT_DELIVERY_STATUS | LVT_REMOTE_IRR;
                u64::from(LVT_WRITABLE[(register - reg::LVT_TIMER) as usize] | read_only)
            }
            reg::INITIAL_COUNT => 0xffff_ffff,
            reg::DIVIDE => u64::from(DIVIDE_WRITABLE),
            _ => return Err(BadAccess),
        };
        if value & !allowed != 0 {
            return Err(BadAccess);
        }
        let effect = match register {
            reg::ICR => {
                self.icr = value & (ICR_WRITABLE | 0xffff_ffff << 32);
                self.send()
            }
            reg::SELF_IPI => self.self_ipi(value as u8),
            _ => self.write(register, value as u32, moment)?,
        };
        self.advance(moment);
        Ok(effect)
    }

    fn self_ipi(&mut self, vector: u8) -> Effect {
        if vector < 16 {
            self.error(ESR_SEND_ILLEGAL_VECTOR);
        } else {
            self.accept(vector, false);
        }
        Effect::None
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&mut self, moment: &Moment) -> u64 {
        self.advance(moment);
        self.tsc_deadline
    }
    /// Arms or disarms the timer in TSC-deadline mode; without effect in the others.
    pub fn set_tsc_deadline(&mut self, value: u64, moment: &Moment) {
        self.advance(moment);
        if self.tsc_deadline_mode() {
            self.tsc_deadline = value;
            self.advance(moment);
        }
    }
}

#[cfg(test)]
#[path = "lapic_tests.rs"]
mod tests;
