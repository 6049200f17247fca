//! Ends of interrupts that cost no exit (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_PV_EOI_EN).
//!
//! When the processor takes an interrupt behind which nothing waits, a bit in the guest's RAM is set. A guest that finds
//! the bit clears it instead of writing the EOI register, and the local APIC learns of that when it next matters. The guest
//! changes the bit by one instruction, but not an atomic one: so only the processor's own thread may touch it, while no
//! instruction of the guest's executes.

use crate::dma::Dma;

/// The bit.
const NO_EOI: u8 = 1 << 0;

/// A processor's bit.
pub struct EoiFlag {
    dma: Dma,
    offset: u64,
    set: bool,
}

impl EoiFlag {
    /// The bit at an offset in RAM.
    pub fn new(dma: Dma, offset: u64) -> Self {
        Self { dma, offset, set: false }
    }

    /// Whether the bit was set, and nobody has asked [`EoiFlag::take`] since.
    pub fn is_set(&self) -> bool {
        self.set
    }

    /// Sets the bit: the interrupt that is being taken needs no EOI.
    pub fn set(&mut self) {
        let byte = self.dma.load8(self.offset);
        self.dma.store8(self.offset, byte | NO_EOI);
        self.set = true;
    }

    /// Whether the bit was set and the guest has ended the interrupt by it. If it has not yet, that needs an EOI from now
    /// on.
    pub fn take(&mut self) -> bool {
        if !core::mem::take(&mut self.set) {
            return false;
        }
        let byte = self.dma.load8(self.offset);
        if byte & NO_EOI == 0 {
            return true;
        }
        self.dma.store8(self.offset, byte & !NO_EOI);
        false
    }
}
