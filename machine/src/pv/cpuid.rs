//! The leaves by which a guest finds the interface (Linux, Documentation/virt/kvm/x86/cpuid.rst).

use bivisor_x86::cpuid::{CpuModel, HYPERVISOR_LEAF, Leaf};

/// Features, leaf 4000_0001h EAX.
pub const FEATURE_LEAF: u32 = HYPERVISOR_LEAF + 1;

/// Bits of leaf 4000_0001h EAX.
#[allow(missing_docs)]
pub mod feature {
    pub const CLOCK_SOURCE: u32 = 1 << 0;
    /// Port accesses need no delay.
    pub const NO_IO_DELAY: u32 = 1 << 1;
    /// The clock by its newer MSRs.
    pub const CLOCK_SOURCE2: u32 = 1 << 3;
    pub const STEAL_TIME: u32 = 1 << 5;
    pub const PV_EOI: u32 = 1 << 6;
    /// HLT ends by a hypercall: spinlocks that sleep.
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const POLL_CONTROL: u32 = 1 << 12;
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
    /// The clocks of all processors agree.
    pub const CLOCK_STABLE: u32 = 1 << 24;
}

/// What this machine offers.
pub const OFFERED: u32 = feature::CLOCK_SOURCE
    | feature::NO_IO_DELAY
    | feature::CLOCK_SOURCE2
    | feature::STEAL_TIME
    | feature::PV_EOI
    | feature::PV_UNHALT
    | feature::PV_TLB_FLUSH
    | feature::PV_SEND_IPI
    | feature::POLL_CONTROL
    | feature::PV_SCHED_YIELD
    | feature::CLOCK_STABLE;

/// The model with the interface's leaves in it. The highest of the hypervisor's leaves stays what it is.
pub fn announce(model: &CpuModel) -> CpuModel {
    let word = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
    let signature = [word(*b"KVMK"), word(*b"VMKV"), word(*b"M\0\0\0")];
    let highest = model.query(HYPERVISOR_LEAF, 0)[0].max(FEATURE_LEAF);
    let mut model = model.clone();
    let leaf = |function, registers| Leaf { function, index: None, registers };
    model.set_leaf(leaf(HYPERVISOR_LEAF, [highest, signature[0], signature[1], signature[2]]));
    model.set_leaf(leaf(FEATURE_LEAF, [OFFERED, 0, 0, 0]));
    model
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_finds_the_interface_and_what_was_there_before() {
        let plain = CpuModel::reference(2);
        let model = announce(&plain);
        let [highest, ebx, ecx, edx] = model.query(HYPERVISOR_LEAF, 0);
        let name: alloc::vec::Vec<u8> = [ebx, ecx, edx].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!((name.as_slice(), highest), (b"KVMKVMKVM\0\0\0".as_slice(), 0x4000_0010));
        assert_eq!(model.query(FEATURE_LEAF, 0)[0] & feature::CLOCK_SOURCE2, feature::CLOCK_SOURCE2);
        assert_eq!(model.query(0x4000_0010, 0), plain.query(0x4000_0010, 0));
        assert_eq!(plain.query(FEATURE_LEAF, 0), [0; 4]);
    }
}
