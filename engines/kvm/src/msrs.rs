//! Model-specific registers: which KVM keeps, and which the machine.

use bivisor_machine::devices::lapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE};
use bivisor_machine::pv::msr;
use bivisor_x86::state::Msrs;

/// A register that KVM keeps, and its place in the state.
type Kept = (u32, fn(&mut Msrs) -> &mut u64);

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// IA32_TSC_ADJUST.
pub const TSC_ADJUST: u32 = 0x3b;

/// Registers that KVM would keep but are the machine's.
pub const TAKEN: [u32; 6] =
    [TSC, MSR_APIC_BASE, TSC_ADJUST, MSR_TSC_DEADLINE, msr::PV_EOI, msr::POLL_CONTROL];

/// Those that KVM keeps, but EFER. Not every KVM has all of them.
const KEPT: [Kept; 15] = [
    (0xc000_0081, |m| &mut m.star),
    (0xc000_0082, |m| &mut m.lstar),
    (0xc000_0083, |m| &mut m.cstar),
    (0xc000_0084, |m| &mut m.sfmask),
    (0xc000_0102, |m| &mut m.kernel_gs_base),
    (0xc000_0103, |m| &mut m.tsc_aux),
    (0x174, |m| &mut m.sysenter_cs),
    (0x175, |m| &mut m.sysenter_esp),
    (0x176, |m| &mut m.sysenter_eip),
    (0x277, |m| &mut m.pat),
    (0x1a0, |m| &mut m.misc_enable),
    (0x1d9, |m| &mut m.debugctl),
    (0x2ff, |m| &mut m.mtrr_def_type),
    (0x48, |m| &mut m.spec_ctrl),
    (0xc001_0015, |m| &mut m.hwcr),
];
/// Fixed-range MTRRs, in the order of their addresses.
const FIXED_MTRRS: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// The first variable-range MTRR; base and mask take turns.
const VARIABLE_MTRRS: u32 = 0x200;

/// Calls `each` with the number of every register that KVM keeps and its place in the state.
pub fn for_each(msrs: &mut Msrs, mut each: impl FnMut(u32, &mut u64)) {
    for (number, place) in KEPT {
        each(number, place(msrs));
    }
    for (number, place) in FIXED_MTRRS.into_iter().zip(&mut msrs.mtrr_fixed) {
        each(number, place);
    }
    for (number, place) in (VARIABLE_MTRRS..).zip(&mut msrs.mtrr_variable) {
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
