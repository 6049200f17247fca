//! The architectural state in the forms in which KVM has it.

use bivisor_x86::state::{CpuState, SegReg, Segment, TableRegister};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// A segment register as KVM has it.
fn to_segment(segment: &Segment) -> kvm_segment {
    let bit = |mask: u16| u8::from(segment.attributes & mask != 0);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (segment.attributes & 0xf) as u8,
        s: bit(Segment::S),
        dpl: segment.dpl(),
        present: bit(Segment::P),
        avl: bit(1 << 12),
        l: bit(Segment::L),
        db: bit(Segment::DB),
        g: bit(Segment::G),
        unusable: bit(Segment::UNUSABLE),
        padding: 0,
    }
}

fn from_segment(segment: &kvm_segment) -> Segment {
    let bits = [
        (segment.s, Segment::S),
        (segment.present, Segment::P),
        (segment.avl, 1 << 12),
        (segment.l, Segment::L),
        (segment.db, Segment::DB),
        (segment.g, Segment::G),
        (segment.unusable, Segment::UNUSABLE),
    ];
    let start = u16::from(segment.type_ & 0xf) | u16::from(segment.dpl & 3) << 5;
    let attributes = bits.iter().filter(|(set, _)| *set != 0).fold(start, |all, (_, bit)| all | bit);
    Segment { base: segment.base, limit: segment.limit, selector: segment.selector, attributes }
}

fn to_table(table: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, ..Default::default() }
}

fn from_table(table: &kvm_dtable) -> TableRegister {
    TableRegister { base: table.base, limit: table.limit }
}

/// General registers, RIP and RFLAGS.
pub fn general(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// Takes over what [`general`] gives.
pub fn take_general(state: &mut CpuState, regs: &kvm_regs) {
    state.gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    (state.rip, state.rflags) = (regs.rip, regs.rflags);
}

/// Segments, tables and control registers. `apic_base` and `cr8` are the local APIC's.
pub fn system(state: &CpuState, apic_base: u64, cr8: u8) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.seg.each_ref().map(to_segment);
    kvm_sregs {
        es,
        cs,
        // KVM takes the privilege level from it.
        ss: kvm_segment { dpl: state.cpl, ..ss },
        ds,
        fs,
        gs,
        ldt: to_segment(&state.ldtr),
        tr: to_segment(&state.tr),
        gdt: to_table(&state.gdtr),
        idt: to_table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: cr8.into(),
        efer: state.msr.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// Takes over what [`system`] gives.
pub fn take_system(state: &mut CpuState, sregs: &kvm_sregs) {
    state.seg = [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs].each_ref().map(from_segment);
    state.cpl = sregs.ss.dpl & 3;
    state.ldtr = from_segment(&sregs.ldt);
    state.tr = from_segment(&sregs.tr);
    state.gdtr = from_table(&sregs.gdt);
    state.idtr = from_table(&sregs.idt);
    (state.cr0, state.cr2, state.cr3, state.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    state.msr.efer = sregs.efer;
    // In real mode the privilege level is 0, whatever the segment says.
    if state.cr0 & 1 == 0 {
        state.cpl = 0;
    }
    let stack = &mut state.seg[SegReg::Ss as usize];
    if stack.attributes & Segment::UNUSABLE != 0 {
        stack.attributes &= !(3 << 5);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_on_the_way() {
        let mut state = CpuState::default();
        for (number, register) in state.gpr.iter_mut().enumerate() {
            *register = 0x1111 * number as u64;
        }
        state.seg[SegReg::Cs as usize] =
            Segment { base: 1, limit: u32::MAX, selector: 0x33, attributes: 0xa0fb };
        state.seg[SegReg::Ss as usize] = Segment { base: 2, limit: 7, selector: 0x2b, attributes: 0xd0f3 };
        state.seg[SegReg::Gs as usize] =
            Segment { base: 3, limit: 0, selector: 0, attributes: Segment::UNUSABLE };
        (state.rip, state.rflags, state.cpl) = (0x1234, 0x246, 3);
        (state.cr0, state.cr2, state.cr3, state.cr4) = (0x8000_0011, 5, 0x1000, 0x20);
        state.msr.efer = 0xd01;
        state.gdtr = TableRegister { base: 0xffff_8000_0000_0000, limit: 0x7f };
        let mut other = CpuState::default();
        take_general(&mut other, &general(&state));
        take_system(&mut other, &system(&state, 0xfee0_0900, 3));
        assert_eq!(other, state);
    }
}
