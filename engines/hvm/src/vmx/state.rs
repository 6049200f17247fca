//! The guest's registers in the control structure: how the architecture's state is laid out there, within the rules of VM entry
//! (SDM Vol. 3C, sections 25.4 and 27.3.1).

use bivisor_x86::registers::{Cr0, Cr4, Efer, Rflags, gpr};
use bivisor_x86::state::{CpuState, SegReg, Segment, TableRegister};

use super::controls::{Controls, Entry};
use super::field::{Field, Vmcs};

/// Selector, limit, access rights, base.
type SegmentFields = [Field; 4];

/// ES, CS, SS, DS, FS, GS, LDTR, TR.
const SEGMENTS: [SegmentFields; 8] = [
    [Field::GuestEsSelector, Field::GuestEsLimit, Field::GuestEsRights, Field::GuestEsBase],
    [Field::GuestCsSelector, Field::GuestCsLimit, Field::GuestCsRights, Field::GuestCsBase],
    [Field::GuestSsSelector, Field::GuestSsLimit, Field::GuestSsRights, Field::GuestSsBase],
    [Field::GuestDsSelector, Field::GuestDsLimit, Field::GuestDsRights, Field::GuestDsBase],
    [Field::GuestFsSelector, Field::GuestFsLimit, Field::GuestFsRights, Field::GuestFsBase],
    [Field::GuestGsSelector, Field::GuestGsLimit, Field::GuestGsRights, Field::GuestGsBase],
    [Field::GuestLdtrSelector, Field::GuestLdtrLimit, Field::GuestLdtrRights, Field::GuestLdtrBase],
    [Field::GuestTrSelector, Field::GuestTrLimit, Field::GuestTrRights, Field::GuestTrBase],
];
const LDTR: usize = 6;
const TR: usize = 7;

/// What the guest changes by itself, beside the segments.
const OWN: [Field; 12] = [
    Field::GuestRip,
    Field::GuestRsp,
    Field::GuestRflags,
    Field::GuestCr3,
    Field::GuestGdtrBase,
    Field::GuestGdtrLimit,
    Field::GuestIdtrBase,
    Field::GuestIdtrLimit,
    Field::GuestPdpte0,
    Field::GuestPdpte1,
    Field::GuestPdpte2,
    Field::GuestPdpte3,
];

/// What only changes in software: each instruction that would do it ends the run.
const OURS: [Field; 11] = [
    Field::GuestCr0,
    Field::Cr0Shadow,
    Field::GuestCr4,
    Field::Cr4Shadow,
    Field::GuestEfer,
    Field::GuestPat,
    Field::GuestDr7,
    Field::GuestSysenterCs,
    Field::GuestSysenterEsp,
    Field::GuestSysenterEip,
    Field::EntryControls,
];

/// Access rights: the register can't be used.
const UNUSABLE: u64 = 1 << 16;
/// Access rights as they are laid out in [`Segment::attributes`] too.
const RIGHTS: u16 = 0xf0ff;
/// Type of a segment that was accessed.
const ACCESSED: u16 = 1;
/// Access rights of all segments in virtual-8086 mode.
const RIGHTS_V86: u64 = 0xf3;
/// Access rights of a task register: a busy 32-bit or 64-bit task state, present.
const BUSY_TASK: u16 = 0x8b;
/// Low bits of a limit that counts pages, all ones.
const PAGE_BITS: u32 = 0xfff;
/// A limit above counts pages.
const MAX_BYTE_LIMIT: u32 = 0xf_ffff;

/// The values of all fields above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestFields {
    segments: [[u64; 4]; SEGMENTS.len()],
    own: [u64; OWN.len()],
    ours: [u64; OURS.len()],
}

/// Whether the limit counts pages: what bytes can't count, or what only pages do as well.
fn granularity(limit: u32, attributes: u16) -> u16 {
    match (limit > MAX_BYTE_LIMIT, limit & PAGE_BITS == PAGE_BITS) {
        (true, _) => attributes | Segment::G,
        (false, false) => attributes & !Segment::G,
        (false, true) => attributes,
    }
}

fn to_fields(segment: &Segment, attributes: u16) -> [u64; 4] {
    let rights = if segment.usable() {
        u64::from(granularity(segment.limit, attributes) & RIGHTS)
    } else {
        u64::from(attributes & RIGHTS) | UNUSABLE
    };
    [segment.selector.into(), segment.limit.into(), rights, segment.base]
}

fn from_fields(fields: &[u64; 4]) -> Segment {
    let [selector, limit, rights, base] = *fields;
    let unusable = if rights & UNUSABLE != 0 { Segment::UNUSABLE } else { 0 };
    Segment {
        base,
        limit: limit as u32,
        selector: selector as u16,
        attributes: rights as u16 & RIGHTS | unusable,
    }
}

/// CS, SS, DS, ES, FS or GS.
fn segment_fields(state: &CpuState, register: usize) -> [u64; 4] {
    let segment = &state.seg[register];
    if state.cr0_has(Cr0::PE) && state.has_flags(Rflags::VM) {
        return [segment.selector.into(), 0xffff, RIGHTS_V86, u64::from(segment.selector) << 4];
    }
    let mut attributes = segment.attributes | ACCESSED;
    if register == SegReg::Ss as usize {
        // Its DPL is the CPL, even where it can't be used.
        attributes = attributes & !(3 << 5) | u16::from(state.cpl) << 5;
    }
    to_fields(segment, attributes)
}

impl GuestFields {
    /// The fields for a state.
    pub fn of(state: &CpuState, controls: &Controls) -> Self {
        let mut segments = [[0; 4]; SEGMENTS.len()];
        for (register, fields) in segments.iter_mut().take(state.seg.len()).enumerate() {
            *fields = segment_fields(state, register);
        }
        segments[LDTR] = to_fields(&state.ldtr, state.ldtr.attributes);
        // There is no guest without a task register, and in long mode it is a 64-bit one.
        let long = state.msr.efer & Efer::LMA.bits() != 0;
        let odd = !state.tr.usable() || long;
        let task = Segment { attributes: state.tr.attributes & !Segment::UNUSABLE, ..state.tr };
        segments[TR] =
            to_fields(&task, if odd { task.attributes & 0xf000 | BUSY_TASK } else { task.attributes });
        let own = [
            state.rip,
            state.gpr[gpr::RSP],
            state.rflags,
            state.cr3,
            state.gdtr.base,
            state.gdtr.limit.into(),
            state.idtr.base,
            state.idtr.limit.into(),
            state.pdpte[0],
            state.pdpte[1],
            state.pdpte[2],
            state.pdpte[3],
        ];
        Self { segments, own, ours: ours(state, controls, long) }
    }

    /// Brings a state up to date.
    pub fn store(&self, state: &mut CpuState) {
        for (register, fields) in state.seg.iter_mut().zip(&self.segments) {
            *register = from_fields(fields);
        }
        state.ldtr = from_fields(&self.segments[LDTR]);
        state.tr = from_fields(&self.segments[TR]);
        state.cpl = (self.segments[SegReg::Ss as usize][2] >> 5 & 3) as u8;
        let [rip, rsp, rflags, cr3, gdt_base, gdt_limit, idt_base, idt_limit, pdpte @ ..] = self.own;
        (state.rip, state.gpr[gpr::RSP], state.rflags, state.cr3) = (rip, rsp, rflags, cr3);
        state.gdtr = TableRegister { base: gdt_base, limit: gdt_limit as u16 };
        state.idtr = TableRegister { base: idt_base, limit: idt_limit as u16 };
        state.pdpte = pdpte;
    }

    /// Reads what the guest may have changed.
    pub fn read(&mut self, vmcs: &impl Vmcs) {
        for (values, fields) in self.segments.iter_mut().zip(SEGMENTS) {
            *values = fields.map(|field| vmcs.read(field));
        }
        self.own = OWN.map(|field| vmcs.read(field));
    }

    /// Writes what is not the same as in `known`, or all of it.
    pub fn write(&self, vmcs: &mut impl Vmcs, known: Option<&Self>) {
        for (at, (fields, values)) in SEGMENTS.iter().zip(&self.segments).enumerate() {
            write_changed(vmcs, fields, values, known.map(|known| &known.segments[at]));
        }
        write_changed(vmcs, &OWN, &self.own, known.map(|known| &known.own));
        write_changed(vmcs, &OURS, &self.ours, known.map(|known| &known.ours));
    }
}

/// Writes the values that are not the same as the known ones.
fn write_changed<const N: usize>(
    vmcs: &mut impl Vmcs,
    fields: &[Field; N],
    values: &[u64; N],
    known: Option<&[u64; N]>,
) {
    if known == Some(values) {
        return;
    }
    for at in 0..N {
        if known.is_none_or(|known| known[at] != values[at]) {
            vmcs.write(fields[at], values[at]);
        }
    }
}

/// The values of [`OURS`].
fn ours(state: &CpuState, controls: &Controls, long: bool) -> [u64; OURS.len()] {
    // VMX wants PE and PG as well, but not of an unrestricted guest. The caches' control bits are kept from the hardware.
    let cr0_ones = controls.cr0.0 & !(Cr0::PE | Cr0::PG).bits();
    let cr0 = (state.cr0 | cr0_ones) & controls.cr0.1 & !(Cr0::CD | Cr0::NW).bits();
    let cr4 = (state.cr4 | controls.cr4.0 | Cr4::VMXE.bits()) & controls.cr4.1;
    let entry = controls.entry | if long { Entry::LONG_MODE_GUEST.bits() } else { 0 };
    let msr = &state.msr;
    [
        cr0,
        state.cr0,
        cr4,
        state.cr4,
        msr.efer,
        msr.pat,
        state.dr[7] & 0xffff_ffff,
        msr.sysenter_cs,
        msr.sysenter_esp,
        msr.sysenter_eip,
        entry.into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::controls::tests::able;
    use crate::vmx::field::Written;

    fn controls() -> Controls {
        Controls::new(able).unwrap()
    }
    fn written(state: &CpuState) -> Written {
        let mut vmcs = Written::default();
        GuestFields::of(state, &controls()).write(&mut vmcs, None);
        vmcs
    }

    #[test]
    fn what_is_loaded_is_stored() {
        let mut state = CpuState { cpl: 3, cr3: 0x1000, pdpte: [1, 2, 3, 4], ..CpuState::default() };
        state.gpr[gpr::RSP] = 0x7fff_0000_1000;
        state.cr0 = 0x8005_0033;
        state.msr.efer = 0xd01;
        state.seg = [Segment { base: 0, limit: u32::MAX, selector: 0x2b, attributes: 0xc0f3 }; 6];
        state.seg[SegReg::Cs as usize] =
            Segment { base: 0, limit: u32::MAX, selector: 0x33, attributes: 0xa0fb };
        state.seg[SegReg::Fs as usize] =
            Segment { base: 0x7fff_0000_0000, limit: 0, selector: 0, attributes: Segment::UNUSABLE | 1 };
        let mut fields = GuestFields::of(&state, &controls());
        let mut vmcs = written(&state);
        assert_eq!(vmcs.read(Field::GuestCsRights), 0xa0fb);
        assert_eq!(vmcs.read(Field::GuestFsRights), 0x1_0001);
        assert_eq!(vmcs.read(Field::EntryControls) & 1 << 9, 1 << 9);
        vmcs.write(Field::GuestRip, 0x1234);
        fields.read(&vmcs);
        let mut back = state.clone();
        back.seg = [Segment::default(); 6];
        (back.cr3, back.cpl, back.pdpte) = (0, 0, [0; 4]);
        fields.store(&mut back);
        assert_eq!(back, CpuState { rip: 0x1234, ..state });
    }

    #[test]
    fn after_reset_the_rules_of_entry_are_kept() {
        let vmcs = written(&CpuState::default());
        assert_eq!((vmcs.read(Field::GuestCr0), vmcs.read(Field::Cr0Shadow)), (0x30, 0x6000_0010));
        assert_eq!((vmcs.read(Field::GuestCr4), vmcs.read(Field::Cr4Shadow)), (0x2000, 0));
        assert_eq!((vmcs.read(Field::GuestTrRights), vmcs.read(Field::GuestLdtrRights)), (0x8b, 0x82));
        assert_eq!(vmcs.read(Field::GuestCsBase), 0xffff_0000);
        assert_eq!(vmcs.read(Field::EntryControls) & 1 << 9, 0);
    }

    #[test]
    fn segments_are_what_entry_wants_them_to_be() {
        let mut state = CpuState { cr0: 0x11, rflags: 0x2_0002, cpl: 3, ..CpuState::default() };
        state.seg[SegReg::Ds as usize] =
            Segment { base: 0x1_2340, limit: 0xffff, selector: 0x1234, attributes: 0x93 };
        let vmcs = written(&state);
        assert_eq!((vmcs.read(Field::GuestDsRights), vmcs.read(Field::GuestSsRights)), (0xf3, 0xf3));
        assert_eq!(vmcs.read(Field::GuestDsBase), 0x1_2340);
        // Without a task register; with a stack segment of the null selector, which still tells the privilege level.
        let mut state = CpuState { cr0: 0x11, cpl: 2, ..CpuState::default() };
        state.tr.attributes = Segment::UNUSABLE;
        state.seg[SegReg::Ss as usize] = Segment { attributes: Segment::UNUSABLE, ..Segment::default() };
        let vmcs = written(&state);
        assert_eq!((vmcs.read(Field::GuestTrRights), vmcs.read(Field::GuestSsRights)), (0x8b, 0x1_0041));
        assert_eq!(granularity(0x1_0000, Segment::G), 0);
        assert_eq!(granularity(0xffff_ffff, 0x93), 0x8093);
        assert_eq!(granularity(0xffff, 0x8093), 0x8093);
    }

    #[test]
    fn only_what_has_changed_is_written() {
        let state = CpuState::default();
        let known = GuestFields::of(&state, &controls());
        let mut vmcs = Written::default();
        known.write(&mut vmcs, Some(&known));
        assert!(vmcs.0.is_empty());
        GuestFields::of(&CpuState { cr3: 0x5000, ..state }, &controls()).write(&mut vmcs, Some(&known));
        assert_eq!(vmcs.0.into_iter().collect::<alloc::vec::Vec<_>>(), [(Field::GuestCr3, 0x5000)]);
    }
}
