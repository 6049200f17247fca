//! Routines that blocks call: longer than should stand in each of them. They are called with the return address
//! between RSP and the context, change the flags, and tell by ZF whether they did what was asked.

use std::mem::offset_of;

use bivisor_x86::state::CpuState;

use super::context::{
    self, ADDEND, ADDRESS, CONTEXT, Slot, TEMPORARY, TLB_INDEX_MASK, TLB_INDEX_SHIFT, stack_addend,
    stack_page, tlb_addend, tlb_tag,
};
use super::emit::{Emitter, Mem, Reg, Width, at, condition, indexed, reg};

/// Bytes on the stack: the return address.
const PUSHED: i32 = 8;

/// Leaves the TLB offset of a linear address in `index`.
pub fn tlb_index(e: &mut Emitter, index: Reg, linear: Mem) {
    match linear.register() {
        // What comes in above is masked away.
        Some(linear) => e.rorx(index, linear, TLB_INDEX_SHIFT),
        None => {
            e.lea(Width::W32, index, linear);
            e.shr(Width::W32, index, TLB_INDEX_SHIFT);
        }
    }
    e.and_imm(Width::W32, index, TLB_INDEX_MASK);
}

fn field(mem: Mem) -> Mem {
    mem.plus(PUSHED)
}

/// Makes the page of the bytes from ADDRESS to ADDRESS + TEMPORARY the stack window. ZF: it is now; CF: they
/// lie in two pages.
pub fn stack_window(e: &mut Emitter, class: u8) -> usize {
    let start = e.position();
    tlb_index(e, ADDEND, at(ADDRESS, 0));
    e.add(Width::W64, TEMPORARY, ADDRESS);
    e.xor(Width::W64, ADDRESS, TEMPORARY);
    e.shr(Width::W64, ADDRESS, 12);
    let crosses = e.jump_if(condition::NE);
    e.shr(Width::W64, TEMPORARY, 12);
    e.compare(Width::W64, TEMPORARY, field(tlb_tag(class, true, ADDEND)));
    let other = e.jump_if(condition::NE);
    e.load(Width::W64, ADDEND, field(tlb_addend(class, ADDEND)));
    e.store(Width::W64, field(stack_addend()), ADDEND);
    e.shl(Width::W64, TEMPORARY, 12);
    e.store(Width::W64, field(stack_page()), TEMPORARY);
    e.compare_reg(Width::W32, ADDEND, ADDEND);
    e.ret();
    e.bind(other);
    e.set_carry(false);
    e.ret();
    e.bind(crosses);
    e.set_carry(true);
    e.ret();
    start
}

/// Makes the page of the bytes from ADDRESS to ADDRESS + TEMPORARY that of the slot whose offset ADDEND holds. ZF: it is now;
/// CF: they lie in two pages. ADDRESS stays.
pub fn slot(e: &mut Emitter, class: u8, write: bool) -> usize {
    let start = e.position();
    let own = |offset: usize| indexed(CONTEXT, ADDEND, 0, PUSHED + offset as i32);
    e.store(Width::W64, field(context::saved()), reg::RAX);
    e.add(Width::W64, TEMPORARY, ADDRESS);
    e.copy(Width::W64, reg::RAX, ADDRESS);
    e.xor(Width::W64, reg::RAX, TEMPORARY);
    e.shr(Width::W64, reg::RAX, 12);
    let crosses = e.jump_if(condition::NE);
    tlb_index(e, reg::RAX, at(ADDRESS, 0));
    e.shr(Width::W64, TEMPORARY, 12);
    e.compare(Width::W64, TEMPORARY, field(tlb_tag(class, write, reg::RAX)));
    let other = e.jump_if(condition::NE);
    e.shl(Width::W64, TEMPORARY, 12);
    e.load(Width::W64, reg::RAX, field(tlb_addend(class, reg::RAX)));
    e.store(Width::W64, own(offset_of!(Slot, addend)), reg::RAX);
    e.add(Width::W64, reg::RAX, TEMPORARY);
    e.store(Width::W64, own(offset_of!(Slot, host)), reg::RAX);
    // The slot's number.
    e.lea(Width::W64, reg::RAX, at(ADDEND, -(context::slot(0) as i32)));
    e.shr(Width::W64, reg::RAX, size_of::<Slot>().trailing_zeros() as u8);
    e.set_bit(field(context::filled_slots()), reg::RAX);
    e.store(Width::W64, own(offset_of!(Slot, page)), TEMPORARY);
    e.increment(own(offset_of!(Slot, misses)));
    e.load(Width::W64, reg::RAX, field(context::saved()));
    e.compare_reg(Width::W32, reg::RAX, reg::RAX);
    e.ret();
    for (from, carry) in [(other, false), (crosses, true)] {
        e.bind(from);
        e.load(Width::W64, reg::RAX, field(context::saved()));
        e.set_carry(carry);
        e.ret();
    }
    start
}

/// REP MOVS or REP STOS forwards, elements of 1 << `scale` bytes, page by page as long as no page is missing in the
/// TLB and no event waits. ZF: nothing is left to do. RSI, RDI and RCX tell how far it came.
/// `code32`: they are ESI, EDI and ECX.
pub fn repeat_string(e: &mut Emitter, class: u8, scale: u8, is_move: bool, code32: bool) -> usize {
    let start = e.position();
    let mut failures = Vec::new();
    e.load(Width::W64, TEMPORARY, field(context::state()));
    // RFLAGS.DF is bit 10.
    e.test_mem8(at(TEMPORARY, offset_of!(CpuState, rflags) as i32 + 1), 1 << 2);
    failures.push(e.jump_if(condition::NE));
    let next = e.position();
    if code32 {
        // Addresses and the count have no upper half, and the pointers may have wrapped.
        for register in [reg::RCX, reg::RSI, reg::RDI] {
            e.copy(Width::W32, register, register);
        }
    }
    e.compare_imm(Width::W64, reg::RCX, 0);
    let done = e.jump_if(condition::E);
    e.compare_zero8(field(context::event()));
    failures.push(e.jump_if(condition::NE));
    elements_in_page(e, TEMPORARY, reg::RDI);
    if is_move {
        elements_in_page(e, ADDRESS, reg::RSI);
        e.compare_reg(Width::W32, TEMPORARY, ADDRESS);
        e.move_if(condition::A, TEMPORARY, ADDRESS);
    }
    if scale != 0 {
        e.shr(Width::W32, TEMPORARY, scale);
    }
    e.compare_imm(Width::W32, TEMPORARY, 0);
    failures.push(e.jump_if(condition::E));
    e.compare_reg(Width::W64, TEMPORARY, reg::RCX);
    e.move_if(condition::A, TEMPORARY, reg::RCX);
    e.store(Width::W64, field(context::target()), TEMPORARY);
    failures.push(find_page(e, class, reg::RDI, true));
    e.load(Width::W64, ADDRESS, field(tlb_addend(class, ADDEND)));
    if is_move {
        failures.push(find_page(e, class, reg::RSI, false));
        e.load(Width::W64, ADDEND, field(tlb_addend(class, ADDEND)));
        e.add(Width::W64, reg::RSI, ADDEND);
    }
    e.load(Width::W64, TEMPORARY, field(context::target()));
    e.store(Width::W64, field(context::saved()), reg::RCX);
    e.copy(Width::W64, reg::RCX, TEMPORARY);
    e.add(Width::W64, reg::RDI, ADDRESS);
    e.repeat_string(is_move, scale);
    e.sub(Width::W64, reg::RDI, ADDRESS);
    if is_move {
        e.sub(Width::W64, reg::RSI, ADDEND);
    }
    e.load(Width::W64, reg::RCX, field(context::saved()));
    e.sub(Width::W64, reg::RCX, TEMPORARY);
    let again = e.jump();
    e.bind_to(again, next);
    for failure in failures {
        e.bind(failure);
    }
    // Not zero: RSP never is.
    e.compare_imm(Width::W64, CONTEXT, 0);
    e.bind(done);
    e.ret();
    start
}

/// Bytes from a linear address to the end of its page. Changes ADDEND.
fn elements_in_page(e: &mut Emitter, count: Reg, linear: Reg) {
    e.copy(Width::W32, ADDEND, linear);
    e.and_imm(Width::W32, ADDEND, 0xfff);
    e.load_immediate(count, 0x1000);
    e.sub(Width::W32, count, ADDEND);
}

/// Leaves the TLB offset of the page of a linear address in ADDEND; a jump taken if it isn't there. Changes TEMPORARY.
fn find_page(e: &mut Emitter, class: u8, linear: Reg, write: bool) -> super::emit::Fixup {
    tlb_index(e, ADDEND, at(linear, 0));
    e.copy(Width::W64, TEMPORARY, linear);
    e.shr(Width::W64, TEMPORARY, 12);
    e.compare(Width::W64, TEMPORARY, field(tlb_tag(class, write, ADDEND)));
    e.jump_if(condition::NE)
}
