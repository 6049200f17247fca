//! The code that all blocks share: the ways in and out of translated code, and what is too long to stand in each.

use std::mem::offset_of;

use bivisor_x86::state::CpuState;

use super::block::SharedCode;
use super::context::{
    self, CONTEXT, Context, HOMES, SPILLED, TEMPORARY, VECTORS_IN_CONTEXT, VECTORS_LOADED, ymm,
};
use super::emit::{Emitter, Mem, Reg, Width, at, condition, indexed, reg};
use super::routines::{self, repeat_string};

/// Registers that a function must preserve (System V ABI for x86-64).
const PRESERVED: [Reg; 6] = [reg::RBX, reg::RBP, reg::R12, reg::R13, reg::R14, reg::R15];
/// The first two arguments of a function.
const FIRST: Reg = reg::RDI;
const SECOND: Reg = reg::RSI;

/// Where the parts of the shared code stand, as offsets in it.
pub struct Parts {
    /// For blocks.
    pub blocks: SharedCode,
    /// `fn(*mut Context, target)`: enters at a host address; returns when the code leaves.
    pub enter: usize,
    /// The same, with the guest's SSE and AVX registers loaded from the context before.
    pub enter_with_vectors: usize,
    /// The same, with x87, SSE and AVX registers loaded before.
    pub enter_with_x87: usize,
    /// Where the signal handler goes on: leaves with the site's number in the context.
    pub fault_exit: usize,
}

fn gpr(number: u8) -> i32 {
    (offset_of!(CpuState, gpr) + usize::from(number) * 8) as i32
}
fn area(offset: usize) -> i32 {
    (offset_of!(CpuState, xsave) + offset) as i32
}

/// Emits the shared code.
pub fn emit() -> (Vec<u8>, Parts) {
    let mut e = Emitter::default();
    let load_vectors = e.position();
    // Called: the return address stands between RSP and the context.
    load_vectors_body(&mut e, 8);
    e.ret();
    let exit = e.position();
    e.pop_mem(context::site());
    let fault_exit = e.position();
    let stored = emit_exit(&mut e);
    let exit_by_block = e.position();
    emit_exit_by_block(&mut e, stored);
    let enter = emit_enter(&mut e, |_| ());
    let enter_with_vectors = emit_enter(&mut e, |e| load_vectors_body(e, 0));
    let enter_with_x87 = emit_enter(&mut e, load_x87_body);
    let mut blocks = SharedCode { exit, exit_by_block, load_vectors, ..SharedCode::default() };
    for class in 0..3u8 {
        blocks.stack_window[usize::from(class)] = routines::stack_window(&mut e, class);
        for write in [false, true] {
            let place = (usize::from(class), usize::from(write));
            blocks.slot[place.0][place.1] = routines::slot(&mut e, class, write);
        }
        for (mode, scale) in
            [false, true].into_iter().flat_map(|mode| (0..4u8).map(move |scale| (mode, scale)))
        {
            let [by_mode, by_class, by_scale]: [usize; 3] = [mode.into(), class.into(), scale.into()];
            blocks.repeat_movs[by_mode][by_class][by_scale] = repeat_string(&mut e, class, scale, true, mode);
            blocks.repeat_stos[by_mode][by_class][by_scale] =
                repeat_string(&mut e, class, scale, false, mode);
        }
    }
    (e.code, Parts { blocks, enter, enter_with_vectors, enter_with_x87, fault_exit })
}

/// Loads SSE and AVX registers from the context. Changes the flags. `pushed`: bytes on the stack below the context.
fn load_vectors_body(e: &mut Emitter, pushed: i32) {
    e.load_mxcsr(context::mxcsr().plus(pushed));
    // Where all upper halves are zero, the processor is to know it: as long as it doesn't, each SSE instruction waits for what
    // its destination held before, since it leaves the upper half of that alone.
    let upper = |number| ymm(number).plus(pushed + 16);
    e.load_lower(0, upper(0));
    for number in 1..16 {
        e.or_to_xmm0(upper(number));
    }
    e.test_xmm0();
    let dirty = e.jump_if(condition::NE);
    for number in 0..16 {
        e.load_lower(number, ymm(number).plus(pushed));
    }
    let loaded = e.jump();
    e.bind(dirty);
    for number in 0..16 {
        e.load_ymm(number, ymm(number).plus(pushed));
    }
    e.bind(loaded);
    e.store_imm8(context::vectors().plus(pushed), VECTORS_LOADED);
}

fn load_x87_body(e: &mut Emitter) {
    e.load(Width::W64, TEMPORARY, context::state());
    // Its SSE part is older than the context's, which is loaded over it.
    e.fxrstor(at(TEMPORARY, area(0)));
    load_vectors_body(e, 0);
    e.store_imm8(context::x87_in_memory(), 0);
}

/// Leaves translated code. Returns the position where ADDRESS and TEMPORARY are stored.
fn emit_exit(e: &mut Emitter) -> usize {
    e.store(Width::W64, context::address(), context::ADDRESS);
    e.store(Width::W64, context::temporary(), TEMPORARY);
    let stored = e.position();
    e.store(Width::W64, context::saved(), reg::RAX);
    e.flags_to_ax();
    e.store16(context::flags(), reg::RAX);
    e.load(Width::W64, reg::RAX, context::saved());
    e.load(Width::W64, TEMPORARY, context::state());
    for (guest, host) in HOMES {
        e.store(Width::W64, at(TEMPORARY, gpr(guest)), host);
    }
    for number in SPILLED {
        e.load(Width::W64, reg::RAX, context::spilled(number));
        e.store(Width::W64, at(TEMPORARY, gpr(number)), reg::RAX);
    }
    save_vectors(e);
    e.load(Width::W64, CONTEXT, context::host_rsp());
    for register in PRESERVED.iter().rev() {
        e.pop(*register);
    }
    e.ret();
    stored
}

/// Leaves by the site whose number is the sum of two that are on the stack. `stored`: see [`emit_exit`].
fn emit_exit_by_block(e: &mut Emitter, stored: usize) {
    let pushed = |mem: Mem| mem.plus(16);
    e.store(Width::W64, pushed(context::address()), context::ADDRESS);
    e.store(Width::W64, pushed(context::temporary()), TEMPORARY);
    e.pop(context::ADDRESS);
    e.pop(TEMPORARY);
    // By LEA: the flags are the guest's.
    e.lea(Width::W32, context::ADDRESS, indexed(context::ADDRESS, TEMPORARY, 0, 0));
    e.store(Width::W64, context::site(), context::ADDRESS);
    let rest = e.jump();
    e.bind_to(rest, stored);
}

/// Stores what is loaded of vector and x87 registers, and makes the host's own settings be in force.
fn save_vectors(e: &mut Emitter) {
    e.compare_zero8(context::vectors());
    let nothing = e.jump_if(condition::NE);
    e.compare_zero8(context::x87_in_memory());
    let no_x87 = e.jump_if(condition::NE);
    // x87 registers are only ever loaded together with the others.
    e.fxsave(at(TEMPORARY, area(0)));
    // Instruction and operand pointer are ours, not the guest's.
    e.store_imm32_as_64(at(TEMPORARY, area(8)), 0);
    e.store_imm32_as_64(at(TEMPORARY, area(16)), 0);
    e.fninit();
    e.store_imm8(context::x87_in_memory(), 1);
    e.bind(no_x87);
    e.store_mxcsr(context::mxcsr());
    for number in 0..16 {
        e.store_ymm(ymm(number), number);
    }
    e.load_mxcsr(context::host_mxcsr());
    e.vzeroupper();
    e.store_imm8(context::vectors(), VECTORS_IN_CONTEXT);
    e.bind(nothing);
}

fn emit_enter(e: &mut Emitter, load: impl FnOnce(&mut Emitter)) -> usize {
    let start = e.position();
    for register in PRESERVED {
        e.push(register);
    }
    e.store(Width::W64, at(FIRST, offset_of!(Context, host_rsp) as i32), reg::RSP);
    e.copy(Width::W64, CONTEXT, FIRST);
    e.store(Width::W64, context::target(), SECOND);
    load(e);
    e.load(Width::W64, TEMPORARY, context::state());
    for number in SPILLED {
        e.load(Width::W64, reg::RAX, at(TEMPORARY, gpr(number)));
        e.store(Width::W64, context::spilled(number), reg::RAX);
    }
    e.load_zx16(reg::RAX, context::flags());
    e.flags_from_ax();
    for (guest, host) in HOMES {
        e.load(Width::W64, host, at(TEMPORARY, gpr(guest)));
    }
    e.load(Width::W64, context::ADDRESS, context::address());
    e.jump_mem(context::target());
    start
}
