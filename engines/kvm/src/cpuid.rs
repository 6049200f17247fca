//! What CPUID says on a vCPU: the machine's model, as far as the host's KVM executes it.

use bivisor_machine::pv::cpuid::{FEATURE_LEAF, feature};
use bivisor_x86::cpuid::{CpuModel, Leaf, Vendor, Word};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Features of leaf 1 ECX that are the machine's, whatever KVM says: x2APIC, and that there is a hypervisor.
const OF_THE_MACHINE: u32 = 1 << 21 | 1 << 31;
/// The deadline mode of the local APIC's timer. It is the machine's too, but where the processor has a timer of its own for
/// guests, which Intel's have, KVM takes the writes for its own local APIC and drops them.
const TSC_DEADLINE: u32 = 1 << 24;
/// Of the paravirtual interface, what is KVM's own without a local APIC in it.
const OF_KVM: u32 = feature::CLOCK_SOURCE
    | feature::NO_IO_DELAY
    | feature::CLOCK_SOURCE2
    | feature::STEAL_TIME
    | feature::PV_TLB_FLUSH
    | feature::CLOCK_STABLE;
/// What is the machine's here too. Hypercalls end in KVM, which knows nothing of the local APICs.
const OF_THE_INTERFACE: u32 = feature::PV_EOI | feature::POLL_CONTROL;

/// The entries for a vCPU: `index` is its APIC ID.
pub fn entries(model: &CpuModel, supported: &[kvm_cpuid_entry2], index: u32) -> Vec<kvm_cpuid_entry2> {
    let machine = OF_THE_MACHINE | if model.vendor == Vendor::Amd { TSC_DEADLINE } else { 0 };
    let made = model.leaves.iter().map(|leaf| entry(leaf, supported, index, machine));
    let mut entries: Vec<_> = made.collect();
    // Levels beyond the last of leaf Bh: type 0.
    entries.push(kvm_cpuid_entry2 {
        function: 0xb,
        index: 2,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ecx: 2,
        edx: index,
        ..Default::default()
    });
    entries
}

/// The entries in the form in which KVM takes them; `None` if they are more than it takes.
pub fn list(entries: &[kvm_cpuid_entry2]) -> Option<CpuId> {
    CpuId::from_entries(entries).ok()
}

fn entry(leaf: &Leaf, supported: &[kvm_cpuid_entry2], index: u32, machine: u32) -> kvm_cpuid_entry2 {
    let mut registers = leaf.registers;
    let there = find(supported, leaf.function, leaf.index.unwrap_or(0));
    for word in Word::ALL {
        let (function, sub_leaf, register) = word.place();
        if (function, sub_leaf) == (leaf.function, leaf.index.unwrap_or(0)) {
            let there = there.map_or(0, |registers| registers[register]);
            registers[register] &= match word {
                Word::L1Ecx => there & !TSC_DEADLINE | machine,
                _ => there,
            };
        }
    }
    let [eax, ebx, _, edx] = &mut registers;
    match leaf.function {
        1 => *ebx |= index << 24,
        0xb => *edx = index,
        FEATURE_LEAF => *eax &= OF_THE_INTERFACE | OF_KVM & there.map_or(0, |registers| registers[0]),
        0x8000_001e => {
            *eax = index;
            *ebx = index & 0xff;
        }
        _ => {}
    }
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index.unwrap_or(0),
        flags: if leaf.index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<[u32; 4]> {
    let is_it = |entry: &&kvm_cpuid_entry2| {
        entry.function == function
            && (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || entry.index == index)
    };
    entries.iter().find(is_it).map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_machine::pv::cpuid::announce;
    use bivisor_x86::cpuid::HYPERVISOR_LEAF;

    /// Whether the guest is told of the paravirtual interface.
    fn is_announced(model: &CpuModel) -> bool {
        model.query(FEATURE_LEAF, 0)[0] != 0 && model.query(HYPERVISOR_LEAF, 0)[0] >= FEATURE_LEAF
    }

    /// A KVM that supports everything, but for some bits of a leaf.
    fn all_but(function: u32, eax: u32, ecx: u32) -> Vec<kvm_cpuid_entry2> {
        let all = |leaf: &Leaf| {
            let without = |bits: u32| if leaf.function == function { !bits } else { u32::MAX };
            kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index.unwrap_or(0),
                flags: u32::from(leaf.index.is_some()),
                eax: without(eax),
                ebx: u32::MAX,
                ecx: without(ecx),
                edx: u32::MAX,
                ..Default::default()
            }
        };
        announce(&CpuModel::reference(2)).leaves.iter().map(all).collect()
    }

    #[test]
    fn what_kvm_does_not_execute_is_not_offered() {
        const AVX: u32 = 1 << 28;
        let model = CpuModel::reference(2);
        let leaf1 = |supported: &[kvm_cpuid_entry2]| find(&entries(&model, supported, 1), 1, 0).unwrap();
        assert_eq!(leaf1(&all_but(1, 0, 0))[2], model.query(1, 0)[2]);
        assert_eq!(
            leaf1(&all_but(1, 0, AVX | 1 << 21))[2],
            model.query(1, 0)[2] & !AVX,
            "x2APIC is the machine's"
        );
        assert_eq!(leaf1(&[])[2] & !(OF_THE_MACHINE | TSC_DEADLINE), 0);
    }

    #[test]
    fn processors_have_numbers() {
        let entries = entries(&CpuModel::reference(4), &all_but(0, 0, 0), 3);
        assert_eq!(find(&entries, 1, 0).unwrap()[1] >> 24, 3);
        assert_eq!([0, 1, 2].map(|level| find(&entries, 0xb, level).unwrap()[3]), [3; 3]);
        assert_eq!(find(&entries, 0x8000_001e, 0).unwrap()[0], 3);
    }

    #[test]
    fn hypercalls_of_an_apic_that_kvm_does_not_have_are_not_offered() {
        let model = announce(&CpuModel::reference(2));
        let features = |supported: &[kvm_cpuid_entry2]| {
            find(&entries(&model, supported, 0), FEATURE_LEAF, 0).unwrap()[0]
        };
        let all = features(&all_but(0, 0, 0));
        assert_eq!(all, OF_KVM | OF_THE_INTERFACE);
        assert_eq!(features(&all_but(FEATURE_LEAF, feature::STEAL_TIME, 0)), all & !feature::STEAL_TIME);
        assert!(is_announced(&model) && !is_announced(&CpuModel::reference(2)));
    }
}
