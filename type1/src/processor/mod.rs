//! The real processor: its tables, its timer, its time.
#![allow(unsafe_code)]

mod apic;
mod descriptors;
pub(crate) mod port;

use alloc::sync::Arc;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use bivisor_hvm::Hardware;
use bivisor_machine::engine::EngineError;
use bivisor_machine::host::{Clock, Nanos};

use crate::memory::IdentityMap;
use crate::time::{self, MetalClock};
use apic::LocalApic;

/// Ports of the two interrupt controllers' masks.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];
/// The timer is armed for no longer.
const LONGEST: Nanos = 1_000_000_000;

/// The processor that everything runs on.
pub(crate) struct Processor {
    pub(crate) clock: Arc<MetalClock>,
    apic: LocalApic,
    /// Ticks of the APIC's timer in 2^32 ns.
    ticks_per_4s: u64,
    /// Until when the timer sleeps.
    armed: AtomicU64,
}

impl Processor {
    /// Sets it up, and measures how fast it counts.
    ///
    /// # Safety
    /// The contract of [`crate::run`], with our page tables loaded; once.
    pub(crate) unsafe fn take_over() -> Self {
        for port in PIC_MASKS {
            port::outb(port, 0xff);
        }
        // SAFETY: the caller's promise.
        let apic = unsafe {
            descriptors::load();
            LocalApic::enable()
        };
        let speeds = time::measure(&apic);
        Self {
            clock: Arc::new(MetalClock::start(speeds.tsc_hz)),
            apic,
            ticks_per_4s: time::per_4s(speeds.apic_hz),
            armed: AtomicU64::new(0),
        }
    }

    /// Makes the processor's virtualization ready, whichever it has.
    pub(crate) fn enable_virtualization(&self) -> Result<Hardware, EngineError> {
        // SAFETY: at privilege level 0; the processor is ours, and so are its tables from now on. There is no other one, and
        // interrupts are only enabled where they are waited for.
        unsafe { Hardware::enable(&IdentityMap) }
    }

    /// Lets the timer interrupt at this moment, or a little earlier.
    pub(crate) fn arm(&self, deadline: Nanos) {
        let now = self.clock.now();
        let span = deadline.saturating_sub(now).min(LONGEST);
        self.armed.store(now + span, Ordering::Relaxed);
        self.apic.arm((u128::from(span) * u128::from(self.ticks_per_4s) >> 32) as u32);
    }

    /// Lets the timer interrupt at this moment, unless it does so earlier anyway.
    pub(crate) fn arm_by(&self, deadline: Nanos) {
        if deadline < self.armed.load(Ordering::Relaxed) {
            self.arm(deadline);
        }
    }

    /// Waits for an interrupt, the timer's for instance.
    pub(crate) fn wait(&self) {
        // SAFETY: at privilege level 0. STI holds interrupts back until HLT waits for them; their handlers change no register.
        unsafe { asm!("sti", "hlt", "cli", options(nomem, nostack)) };
    }
}

/// Stands still for ever.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: at privilege level 0; nothing is to happen any more.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
