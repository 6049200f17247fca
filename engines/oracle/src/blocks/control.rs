//! Jumps, calls and returns. Every one that may lead backwards is guarded: it takes from the run's fuel, and ends the
//! sequence when that is used up.

use iced_x86::{Code, Instruction, Register};

use super::build::{Builder, Class, RSP, Way, at, from, made, r32, r64};
use super::code::Form;
use super::layout::{FUEL, TARGETS};

/// Conditional jumps, with displacements of one byte and of four, in the order of their opcodes.
const CONDITIONAL: [(Code, Code); 16] = [
    (Code::Jo_rel8_64, Code::Jo_rel32_64),
    (Code::Jno_rel8_64, Code::Jno_rel32_64),
    (Code::Jb_rel8_64, Code::Jb_rel32_64),
    (Code::Jae_rel8_64, Code::Jae_rel32_64),
    (Code::Je_rel8_64, Code::Je_rel32_64),
    (Code::Jne_rel8_64, Code::Jne_rel32_64),
    (Code::Jbe_rel8_64, Code::Jbe_rel32_64),
    (Code::Ja_rel8_64, Code::Ja_rel32_64),
    (Code::Js_rel8_64, Code::Js_rel32_64),
    (Code::Jns_rel8_64, Code::Jns_rel32_64),
    (Code::Jp_rel8_64, Code::Jp_rel32_64),
    (Code::Jnp_rel8_64, Code::Jnp_rel32_64),
    (Code::Jl_rel8_64, Code::Jl_rel32_64),
    (Code::Jge_rel8_64, Code::Jge_rel32_64),
    (Code::Jle_rel8_64, Code::Jle_rel32_64),
    (Code::Jg_rel8_64, Code::Jg_rel32_64),
];
/// Jumps that look at RCX or ECX.
const COUNTED: [Code; 8] = [
    Code::Jrcxz_rel8_64,
    Code::Jecxz_rel8_64,
    Code::Loop_rel8_64_RCX,
    Code::Loop_rel8_64_ECX,
    Code::Loope_rel8_64_RCX,
    Code::Loopne_rel8_64_RCX,
    Code::Loope_rel8_64_ECX,
    Code::Loopne_rel8_64_ECX,
];

impl Builder<'_> {
    /// A jump, call or return of some kind, with what it needs.
    pub fn control_flow(&mut self) {
        let way = if self.random.once_in(2) { Way::Forward } else { Way::Anywhere };
        match self.random.below(20) {
            0..=7 => self.conditional(way),
            8 | 9 => self.counted(way),
            10 | 11 => self.direct(way),
            12 | 13 => self.call(way),
            14 | 15 => self.indirect(),
            16 | 17 => self.pushed_return(),
            _ => self.plain_return(),
        }
        self.targetable = true;
    }

    /// What must stand before a jump that may lead backwards. Jumps must not lead between it and the jump.
    pub fn guard(&mut self) {
        self.settle_flags();
        if self.random.once_in(3) {
            self.guard_without_flags();
        } else {
            self.assemble(made(Instruction::with1(Code::Dec_rm64, at(FUEL))));
            self.targetable = false;
            self.jump(Code::Jle_rel32_64, Way::End);
        }
        self.targetable = false;
    }

    /// The same, but it leaves flags alone and changes RCX.
    fn guard_without_flags(&mut self) {
        self.assemble(made(Instruction::with2(Code::Mov_r64_rm64, Register::RCX, at(FUEL))));
        self.targetable = false;
        self.assemble(made(Instruction::with2(Code::Lea_r64_m, Register::RCX, from(1, -1))));
        self.assemble(made(Instruction::with2(Code::Mov_rm64_r64, at(FUEL), Register::RCX)));
        // jrcxz 1f; jmp 2f; 1: jmp END; 2:
        let next = self.items.len() + 1;
        self.skip(&[0xe3, 0], next + 1);
        self.skip(&[0xeb, 0], next + 2);
        self.jump(Code::Jmp_rel32_64, Way::End);
    }

    fn guard_if_backwards(&mut self, way: Way) {
        if way == Way::Anywhere {
            self.guard();
        }
    }

    fn conditional(&mut self, way: Way) {
        self.guard_if_backwards(way);
        if self.random.once_in(3) {
            let (one, other) = (r32(self.any()), r32(self.any()));
            self.assemble(made(Instruction::with2(Code::Cmp_r32_rm32, one, other)));
        }
        let (short, near) = self.random.pick(&CONDITIONAL);
        let code = if self.random.once_in(3) { near } else { short };
        self.jump(code, way);
    }

    fn counted(&mut self, way: Way) {
        self.guard_if_backwards(way);
        if self.random.once_in(2) {
            let count = self.random.below(3) as u32;
            self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count)));
        }
        let code = self.random.pick(&COUNTED);
        self.jump(code, way);
    }

    fn direct(&mut self, way: Way) {
        self.guard_if_backwards(way);
        let code = if self.random.once_in(3) { Code::Jmp_rel32_64 } else { Code::Jmp_rel8_64 };
        self.jump(code, way);
    }

    fn call(&mut self, way: Way) {
        self.establish(RSP, Class::Pointer);
        self.guard_if_backwards(way);
        self.jump(Code::Call_rel32_64, way);
    }

    /// Not RDI: how much a string instruction stores that overwrites itself is the processor's own affair.
    fn target_register(&mut self) -> usize {
        match self.any_free() {
            7 => 2,
            number => number,
        }
    }

    /// Loads the address of an instruction into a register.
    fn target_in(&mut self, number: usize) {
        // lea r64, [rip + target] or mov r32, target
        let rex = 0x48 | (number >> 3 << 2) as u8;
        let low = (number & 7) as u8;
        if self.mode.is_32bit {
            self.refer(&[0xb8 | low, 0, 0, 0, 0], 1, Form::Absolute, Way::Anywhere, 4);
        } else if self.random.once_in(2) {
            self.refer(&[rex, 0x8d, low << 3 | 5, 0, 0, 0, 0], 3, Form::Relative, Way::Anywhere, 4);
        } else {
            let rex = 0x40 | (number >> 3) as u8;
            self.refer(&[rex, 0xb8 | low, 0, 0, 0, 0], 2, Form::Absolute, Way::Anywhere, 4);
        }
    }

    /// A jump or call through a register or memory.
    fn indirect(&mut self) {
        let is_call = self.random.once_in(2);
        if is_call {
            self.establish(RSP, Class::Pointer);
        }
        self.guard();
        let number = self.target_register();
        self.target_in(number);
        let target = r64(number);
        if self.random.once_in(2) {
            let code = if is_call { Code::Call_rm64 } else { Code::Jmp_rm64 };
            self.assemble(made(Instruction::with1(code, target)));
            return;
        }
        let slot = TARGETS + 8 * self.random.below(16);
        self.assemble(made(Instruction::with2(Code::Mov_rm64_r64, at(slot), target)));
        let code = if is_call { Code::Call_rm64 } else { Code::Jmp_rm64 };
        let pointer = self.any_pointer();
        match pointer {
            Some(pointer) if self.random.once_in(2) => {
                self.assemble(made(Instruction::with2(Code::Mov_rm64_r64, from(pointer, 8), target)));
                self.assemble(made(Instruction::with1(code, from(pointer, 8))));
            }
            _ => self.assemble(made(Instruction::with1(code, at(slot)))),
        }
    }

    /// A return to an address that was pushed just before.
    fn pushed_return(&mut self) {
        self.establish(RSP, Class::Pointer);
        self.guard();
        if self.random.once_in(2) {
            // push imm32
            self.refer(&[0x68, 0, 0, 0, 0], 1, Form::Absolute, Way::Anywhere, 4);
        } else {
            let number = self.target_register();
            self.target_in(number);
            self.assemble(made(Instruction::with1(Code::Push_r64, r64(number))));
        }
        self.emit_return();
    }

    /// A return to whatever is on the stack: mostly behind a call, if there was one.
    fn plain_return(&mut self) {
        if !self.random.once_in(4) {
            // Often nothing good is there: skip it then.
            self.jump(Code::Jmp_rel8_64, Way::Forward);
        }
        self.establish(RSP, Class::Pointer);
        self.guard();
        self.emit_return();
    }

    fn emit_return(&mut self) {
        let popped = 8 * self.random.below(4) as u8;
        let plain = if self.random.once_in(4) { vec![0xc2, popped, 0] } else { vec![0xc3] };
        let bytes = match self.random.below(30) {
            0 | 1 => [&[0xf3][..], &plain].concat(),
            2 if !self.mode.is_32bit => [&[0x48][..], &plain].concat(),
            3 if self.random.once_in(4) => [&[0x66][..], &plain].concat(),
            _ => plain,
        };
        self.emit(&bytes, None);
    }
}
