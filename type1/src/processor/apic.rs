//! The local APIC of the real processor, of which only the timer is used (SDM Vol. 3A, chapter 11).
#![allow(unsafe_code)]

use core::sync::atomic::Ordering;

use bivisor_hvm::host::{read_msr, write_msr};

use super::descriptors::{END_OF_INTERRUPT, SPURIOUS_VECTOR, TIMER_VECTOR};
use crate::time::Counter;

const APIC_BASE: u32 = 0x1b;
const BASE_ENABLED: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const X2APIC: u32 = 0x800;

/// Registers, by their offset in memory.
mod register {
    pub(super) const END_OF_INTERRUPT: u32 = 0xb0;
    pub(super) const SPURIOUS: u32 = 0xf0;
    pub(super) const TIMER: u32 = 0x320;
    pub(super) const INITIAL_COUNT: u32 = 0x380;
    pub(super) const CURRENT_COUNT: u32 = 0x390;
    pub(super) const DIVIDE: u32 = 0x3e0;
}

const SOFTWARE_ENABLE: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0b1011;

/// The current processor's local APIC.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalApic {
    /// Address of the registers; 0 if they are MSRs.
    base: u64,
}

impl LocalApic {
    /// Switches it on, in the mode in which firmware left it.
    ///
    /// # Safety
    /// At privilege level 0, with our page tables and interrupt table loaded.
    pub(super) unsafe fn enable() -> Self {
        // SAFETY: the caller's promise; every processor with 64-bit mode has the register, and enabling delivers nothing that is
        // not handled.
        let base = unsafe {
            let value = read_msr(APIC_BASE) | BASE_ENABLED;
            write_msr(APIC_BASE, value);
            if value & BASE_X2APIC != 0 { 0 } else { value & BASE_ADDRESS }
        };
        let acknowledge = if base == 0 { 0 } else { base + u64::from(register::END_OF_INTERRUPT) };
        END_OF_INTERRUPT.store(acknowledge, Ordering::Relaxed);
        let apic = Self { base };
        apic.write(register::DIVIDE, DIVIDE_BY_1);
        apic.write(register::TIMER, MASKED | u32::from(TIMER_VECTOR));
        apic.write(register::SPURIOUS, SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR));
        apic
    }

    fn read(&self, register: u32) -> u32 {
        // SAFETY: `enable`, at level 0, found the registers there; device memory is mapped as such. Reading these changes
        // nothing.
        unsafe {
            match self.base {
                0 => read_msr(X2APIC + (register >> 4)) as u32,
                base => ((base + u64::from(register)) as *const u32).read_volatile(),
            }
        }
    }

    fn write(&self, register: u32, value: u32) {
        // SAFETY: as in `read`; what is written here arms a timer whose interrupt is handled.
        unsafe {
            match self.base {
                0 => write_msr(X2APIC + (register >> 4), value.into()),
                base => ((base + u64::from(register)) as *mut u32).write_volatile(value),
            }
        }
    }

    /// Interrupts once after this many ticks, at least one.
    pub(crate) fn arm(&self, ticks: u32) {
        self.write(register::TIMER, TIMER_VECTOR.into());
        self.write(register::INITIAL_COUNT, ticks.max(1));
    }
}

impl Counter for LocalApic {
    /// Lets the timer count down from its largest value, silently.
    fn start_counting(&self) {
        self.write(register::TIMER, MASKED | u32::from(TIMER_VECTOR));
        self.write(register::INITIAL_COUNT, u32::MAX);
    }
    fn counted(&self) -> u32 {
        u32::MAX - self.read(register::CURRENT_COUNT)
    }
}
