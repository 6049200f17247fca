//! How long a processor was ready to execute but the host let it wait, and whether it stands still
//! (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME, `kvm_steal_time`).

use super::clock::write_versioned;
use crate::dma::Dma;
use crate::host::Nanos;

/// Bytes of the structure, which are its alignment too.
pub const SIZE: u64 = 64;

/// Offsets in the structure.
mod field {
    pub const STEAL: u64 = 0;
    pub const VERSION: u64 = 8;
    pub const PREEMPTED: u64 = 16;
}

/// The processor executes nothing.
const PREEMPTED: u8 = 1 << 0;
/// Set by other processors of the guest, only while the processor executes nothing: before it goes on, its cached
/// translations are to be dropped.
const FLUSH_TLB: u8 = 1 << 1;

/// A processor's structure.
pub struct StealTime {
    dma: Dma,
    offset: u64,
    /// What the host had told last.
    told: Option<Nanos>,
}

impl StealTime {
    /// The structure at an offset in RAM.
    pub fn new(dma: Dma, offset: u64) -> Self {
        Self { dma, offset, told: None }
    }

    /// The host tells of so much in all; what it told first is where counting begins.
    pub fn update(&mut self, stolen: Nanos) {
        let more = stolen.saturating_sub(self.told.unwrap_or(stolen));
        self.told = Some(stolen);
        if more == 0 {
            return;
        }
        let place = self.offset + field::STEAL;
        write_versioned(&self.dma, self.offset + field::VERSION, || {
            self.dma.store64(place, self.dma.load64(place).wrapping_add(more));
        });
    }

    /// The processor stands still from now on.
    pub fn parked(&self) {
        self.dma.store8(self.offset + field::PREEMPTED, PREEMPTED);
    }

    /// The processor is about to go on; whether its cached translations are to be dropped first.
    pub fn unparked(&self) -> bool {
        self.dma.swap8(self.offset + field::PREEMPTED, 0) & FLUSH_TLB != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use alloc::sync::Arc;

    #[test]
    fn only_what_is_new_is_added() {
        let dma = Dma::new(Arc::new(GuestMemory::on_heap(0x1000)));
        dma.store64(0x40, 1_000);
        let mut steal = StealTime::new(dma.clone(), 0x40);
        steal.update(500);
        assert_eq!((dma.load64(0x40), dma.load32(0x48)), (1_000, 0));
        steal.update(700);
        steal.update(650);
        assert_eq!((dma.load64(0x40), dma.load32(0x48)), (1_200, 2));
    }

    #[test]
    fn flushes_asked_for_meanwhile_are_told_once() {
        let dma = Dma::new(Arc::new(GuestMemory::on_heap(0x1000)));
        let steal = StealTime::new(dma.clone(), 0);
        steal.parked();
        assert_eq!(dma.load8(16), PREEMPTED);
        assert!(!steal.unparked());
        steal.parked();
        dma.store8(16, PREEMPTED | FLUSH_TLB);
        assert!(steal.unparked());
        assert!(!steal.unparked());
        assert_eq!(dma.load8(16), 0);
    }
}
