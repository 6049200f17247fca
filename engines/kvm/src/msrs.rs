//! Model-specific registers: which KVM keeps, and which the machine.

use bivisor_machine::devices::lapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE};
use bivisor_machine::pv::msr;
use bivisor_x86::msr::number;
use bivisor_x86::state::Msrs;

/// A register that KVM keeps, and its place in the state.
type Kept = (u32, fn(&mut Msrs) -> &mut u64);

/// Registers that KVM would keep but are the machine's.
pub const TAKEN: [u32; 6] =
    [number::TSC, MSR_APIC_BASE, number::TSC_ADJUST, MSR_TSC_DEADLINE, msr::PV_EOI, msr::POLL_CONTROL];

/// Those that KVM keeps, but EFER. Not every KVM has all of them.
const KEPT: [Kept; 15] = [
    (number::STAR, |m| &mut m.star),
    (number::LSTAR, |m| &mut m.lstar),
    (number::CSTAR, |m| &mut m.cstar),
    (number::SFMASK, |m| &mut m.sfmask),
    (number::KERNEL_GS_BASE, |m| &mut m.kernel_gs_base),
    (number::TSC_AUX, |m| &mut m.tsc_aux),
    (number::SYSENTER_CS, |m| &mut m.sysenter_cs),
    (number::SYSENTER_ESP, |m| &mut m.sysenter_esp),
    (number::SYSENTER_EIP, |m| &mut m.sysenter_eip),
    (number::PAT, |m| &mut m.pat),
    (number::MISC_ENABLE, |m| &mut m.misc_enable),
    (number::DEBUGCTL, |m| &mut m.debugctl),
    (number::MTRR_DEF_TYPE, |m| &mut m.mtrr_def_type),
    (number::SPEC_CTRL, |m| &mut m.spec_ctrl),
    (number::HWCR, |m| &mut m.hwcr),
];

/// Calls `each` with the number of every register that KVM keeps and its place in the state.
pub fn for_each(msrs: &mut Msrs, mut each: impl FnMut(u32, &mut u64)) {
    for (number, place) in KEPT {
        each(number, place(msrs));
    }
    // In the order of the memory that they are for.
    let fixed = [number::MTRR_FIX64K, number::MTRR_FIX16K_80000, number::MTRR_FIX16K_A0000];
    let fixed = fixed.into_iter().chain(number::MTRR_FIX4K_C0000..=number::MTRR_FIX4K_F8000);
    for (number, place) in fixed.zip(&mut msrs.mtrr_fixed) {
        each(number, place);
    }
    // Base and mask take turns.
    for (number, place) in (number::MTRR_PHYSBASE0..).zip(&mut msrs.mtrr_variable) {
        each(number, place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_has_a_place_of_its_own() {
        let mut msrs = Msrs::default();
        let mut numbers = Vec::new();
        for_each(&mut msrs, |number, place| {
            *place = number.into();
            numbers.push(number);
        });
        for_each(&mut msrs, |number, place| assert_eq!(*place, u64::from(number)));
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!((numbers.len(), count), (42, 42));
        assert!(TAKEN.iter().all(|taken| !numbers.contains(taken)));
    }
}
