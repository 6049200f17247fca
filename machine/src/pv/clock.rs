//! Time as a guest computes it from its time-stamp counter (kvmclock; Linux, Documentation/virt/kvm/x86/msr.rst,
//! `pvclock_vcpu_time_info` and `pvclock_wall_clock`).
//!
//! All processors count from one moment of the host's, so that what they read at one time is the same: a processor's
//! structure says what *its* counter showed at that moment. It changes only when the guest sets the counter.

use crate::dma::Dma;
use crate::host::{Clock, Nanos};

/// Bytes of the structure with a processor's time.
pub const TIME_SIZE: u64 = 32;
/// Bytes of the structure with the wall-clock time.
pub const WALL_SIZE: u64 = 12;

/// Flag: processors' times can be compared.
const STABLE: u8 = 1 << 0;
/// Flag: the guest was stopped by its host; cleared by the guest.
const STOPPED: u8 = 1 << 1;

/// Offsets in the structure.
mod field {
    pub const VERSION: u64 = 0;
    pub const COUNTER: u64 = 8;
    pub const TIME: u64 = 16;
    pub const MULTIPLIER: u64 = 24;
    pub const SHIFT: u64 = 28;
    pub const FLAGS: u64 = 29;
}

/// How counter ticks become nanoseconds: shifted left (right if negative), multiplied, divided by 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Multiplier.
    pub multiplier: u32,
    /// Shift.
    pub shift: i8,
}

impl Scale {
    /// For a counter of this frequency in Hz, as exact as the form allows.
    pub fn new(hz: u64) -> Self {
        let hz = u128::from(hz.max(1));
        // The multiplier is to have its highest bit set.
        let mut shift = 0i8;
        let quotient = |shift: i8| {
            let scaled = 1_000_000_000u128 << 64;
            let divisor = hz << 32;
            let (up, down) = (u32::from(shift.min(0).unsigned_abs()), u32::from(shift.max(0).unsigned_abs()));
            ((scaled >> down << up) + divisor / 2) / divisor
        };
        while quotient(shift) > u128::from(u32::MAX) {
            shift += 1;
        }
        while quotient(shift) < 1 << 31 && shift > -32 {
            shift -= 1;
        }
        Self { multiplier: quotient(shift).min(u128::from(u32::MAX)) as u32, shift }
    }

    /// Nanoseconds of so many ticks, as guests compute them.
    pub fn nanos(&self, ticks: u64) -> u64 {
        let shifted = match self.shift {
            0.. => ticks << self.shift,
            _ => ticks >> self.shift.unsigned_abs(),
        };
        (u128::from(shifted) * u128::from(self.multiplier) >> 32) as u64
    }
}

/// The moment that all processors of a machine count from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The host's time-stamp counter then.
    pub counter: u64,
    /// The guest's time then.
    pub time: Nanos,
    /// How counter ticks become nanoseconds.
    pub scale: Scale,
}

impl Origin {
    /// The present moment, at which the guest's clock shows `time`.
    pub fn now(clock: &dyn Clock, time: Nanos) -> Self {
        Self { counter: clock.tsc(), time, scale: Scale::new(clock.tsc_hz()) }
    }

    /// The guest's time when the host's time-stamp counter shows `counter`.
    pub fn time_at(&self, counter: u64) -> Nanos {
        self.time.wrapping_add(self.scale.nanos(counter.wrapping_sub(self.counter)))
    }

    /// Tells a processor the time. `offset`: place of its structure in RAM; `tsc_offset`: what its counter is ahead of the
    /// host's; `stopped`: the guest is to know that it was stopped.
    pub fn publish(&self, dma: &Dma, offset: u64, tsc_offset: u64, stopped: bool) {
        let kept = dma.load8(offset + field::FLAGS) & STOPPED;
        let flags = STABLE | kept | if stopped { STOPPED } else { 0 };
        write_versioned(dma, offset + field::VERSION, || {
            dma.store64(offset + field::COUNTER, self.counter.wrapping_add(tsc_offset));
            dma.store64(offset + field::TIME, self.time);
            dma.store32(offset + field::MULTIPLIER, self.scale.multiplier);
            dma.store8(offset + field::SHIFT, self.scale.shift as u8);
            dma.store8(offset + field::FLAGS, flags);
        });
    }

    /// Tells at an offset in RAM the wall-clock time at which the guest's clock showed nothing.
    pub fn publish_wall(&self, dma: &Dma, offset: u64, clock: &dyn Clock) {
        let start = clock.wall().saturating_sub(self.time_at(clock.tsc()));
        write_versioned(dma, offset, || {
            // Seconds have 32 bits in this structure.
            dma.store32(offset + 4, (start / 1_000_000_000) as u32);
            dma.store32(offset + 8, (start % 1_000_000_000) as u32);
        });
    }
}

/// Changes a structure whose readers look at its version before and after: odd while it changes.
pub(super) fn write_versioned(dma: &Dma, version: u64, write: impl FnOnce()) {
    let odd = dma.load32(version).wrapping_add(1) | 1;
    dma.store32(version, odd);
    write();
    dma.store32(version, odd.wrapping_add(1));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Time;
    use crate::memory::GuestMemory;
    use alloc::sync::Arc;

    #[test]
    fn scales_are_exact_to_a_billionth() {
        for hz in
            [1_000_000, 32_768, 999_999_999, 1_000_000_000, 2_250_000_000, 3_700_000_001, 10_000_000_000]
        {
            let scale = Scale::new(hz);
            assert!(scale.multiplier >= 1 << 31, "{hz} {scale:?}");
            // A day.
            let expected = 86_400_000_000_000;
            let error = scale.nanos(hz * 86_400).abs_diff(expected);
            assert!(error <= expected / 1_000_000_000, "{hz} {scale:?} {error}");
        }
        assert!(Scale::new(0).nanos(1) > 0, "a frequency that nobody knows");
    }

    #[test]
    fn processors_with_different_counters_read_the_same_time() {
        let time = Time::new();
        let origin = Origin::now(&*time, 5_000);
        let dma = Dma::new(Arc::new(GuestMemory::on_heap(0x1000)));
        let offsets = [(0x100, 0u64), (0x200, 0u64.wrapping_sub(1_234_567)), (0x300, 77)];
        for (place, tsc_offset) in offsets {
            origin.publish(&dma, place, tsc_offset, false);
        }
        time.advance(1_000_000_000);
        for (place, tsc_offset) in offsets {
            let counter = time.tsc().wrapping_add(tsc_offset);
            let scale = Scale { multiplier: dma.load32(place + 24), shift: dma.load8(place + 28) as i8 };
            let read = dma.load64(place + 16) + scale.nanos(counter.wrapping_sub(dma.load64(place + 8)));
            assert!(read.abs_diff(1_000_005_000) <= 1, "{read}");
            assert_eq!((dma.load32(place), dma.load8(place + 29)), (2, STABLE));
        }
    }

    #[test]
    fn the_guest_clears_what_it_knows_of_a_stop() {
        let time = Time::new();
        let origin = Origin::now(&*time, 0);
        let dma = Dma::new(Arc::new(GuestMemory::on_heap(0x1000)));
        dma.store32(0, 7);
        origin.publish(&dma, 0, 0, true);
        origin.publish(&dma, 0, 0, false);
        assert_eq!((dma.load32(0), dma.load8(29)), (12, STABLE | STOPPED));
        dma.store8(29, STABLE);
        origin.publish(&dma, 0, 0, false);
        assert_eq!(dma.load8(29), STABLE);
    }

    #[test]
    fn the_wall_clock_is_that_of_the_clocks_beginning() {
        let time = Time::new();
        let origin = Origin::now(&*time, 0);
        let dma = Dma::new(Arc::new(GuestMemory::on_heap(0x1000)));
        time.advance(3_000_000_001);
        origin.publish_wall(&dma, 8, &*time);
        assert_eq!((dma.load32(8), dma.load32(12), dma.load32(16)), (2, 999_999_996, 999_999_999));
    }
}
