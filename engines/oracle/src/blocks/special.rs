//! What random bytes seldom make sense of: the stack, flags as a whole, vectors of indices, saved states, divisions,
//! code that writes code.

use bivisor_x86::registers::Rflags;
use iced_x86::{Code, CpuidFeature, Instruction, MemoryOperand, Register};

use super::build::{Builder, Class, MARGIN, RBP, RSP, at, from, made, r32, r64};
use super::code::Item;
use super::layout::{
    CONTROL_WORD_COUNT, CONTROL_WORDS, HOST_AREA_SIZE, INDEX_COUNT, INDICES, MXCSR_COUNT, MXCSRS, NUDGE,
    XSAVE_AREAS,
};
use crate::layout::{DATA, DATA_SIZE};

/// Gathers of four- and eight-byte elements, each with whether its indices have eight bytes.
const GATHERS: [(Code, bool); 16] = [
    (Code::VEX_Vpgatherdd_xmm_vm32x_xmm, false),
    (Code::VEX_Vpgatherdd_ymm_vm32y_ymm, false),
    (Code::VEX_Vpgatherdq_xmm_vm32x_xmm, false),
    (Code::VEX_Vpgatherdq_ymm_vm32x_ymm, false),
    (Code::VEX_Vpgatherqd_xmm_vm64x_xmm, true),
    (Code::VEX_Vpgatherqd_xmm_vm64y_xmm, true),
    (Code::VEX_Vpgatherqq_xmm_vm64x_xmm, true),
    (Code::VEX_Vpgatherqq_ymm_vm64y_ymm, true),
    (Code::VEX_Vgatherdps_xmm_vm32x_xmm, false),
    (Code::VEX_Vgatherdps_ymm_vm32y_ymm, false),
    (Code::VEX_Vgatherdpd_xmm_vm32x_xmm, false),
    (Code::VEX_Vgatherdpd_ymm_vm32x_ymm, false),
    (Code::VEX_Vgatherqps_xmm_vm64x_xmm, true),
    (Code::VEX_Vgatherqps_xmm_vm64y_xmm, true),
    (Code::VEX_Vgatherqpd_xmm_vm64x_xmm, true),
    (Code::VEX_Vgatherqpd_ymm_vm64y_ymm, true),
];

impl Builder<'_> {
    /// One of the special things.
    pub fn special(&mut self) {
        match self.random.below(46) {
            0..=8 => self.push_and_pop(),
            9..=13 => self.stack_frame(),
            14..=16 => self.repeated(),
            17..=19 => self.division(),
            20 | 21 => self.flags_as_a_whole(),
            22..=24 => self.gather(),
            25 | 26 => self.controls(),
            27 if self.watched && self.with_privileged => {}
            27 => self.save_state(),
            28 => self.restore_state(),
            29..=31 => self.write_code(),
            32..=35 => self.locked(),
            36..=38 => self.segment_access(),
            39 => self.single_step(),
            40..=42 => self.bit_string(),
            _ => self.nudge(),
        }
    }

    /// Makes the engine look for events, of which there may be one.
    fn nudge(&mut self) {
        let value = self.random.below(4) as i32;
        let place = at(NUDGE + 8 * self.random.below(8));
        let instruction = match self.random.below(3) {
            0 => Instruction::with2(Code::Mov_rm8_imm8, place, value),
            1 => Instruction::with2(Code::Mov_rm64_r64, place, r64(self.any())),
            _ => Instruction::with2(Code::Mov_rm32_imm32, place, value),
        };
        self.assemble(made(instruction));
    }

    fn push_and_pop(&mut self) {
        self.establish(RSP, Class::Pointer);
        let (pushed, popped) = (self.any(), self.any_free());
        let value = self.random.integer() as i32;
        let place = at(self.data_address());
        let pointer = self.any_pointer();
        let push = match (self.random.below(7), pointer) {
            (0, _) => Instruction::with1(Code::Pushq_imm32, value),
            (1, _) => Instruction::with1(Code::Pushq_imm8, i32::from(value as i8)),
            (2, _) => Instruction::with1(Code::Push_rm64, place),
            (3, Some(pointer)) => Instruction::with1(Code::Push_rm64, from(pointer, 16)),
            (4, _) => Instruction::with1(Code::Push_rm64, from(RSP, i64::from(value as i8))),
            _ => Instruction::with1(Code::Push_r64, r64(pushed)),
        };
        let pop = match (self.random.below(7), pointer) {
            (0, _) => Instruction::with1(Code::Pop_rm64, place),
            (1, Some(pointer)) => Instruction::with1(Code::Pop_rm64, from(pointer, 16)),
            (2, _) => Instruction::with1(Code::Pop_rm64, from(RSP, i64::from(value as i8))),
            (3, _) => Instruction::with1(Code::Pop_r16, word(popped)),
            _ => Instruction::with1(Code::Pop_r64, r64(popped)),
        };
        match self.random.below(4) {
            0 => self.assemble(made(push)),
            1 => self.assemble(made(pop)),
            _ => {
                self.assemble(made(push));
                if self.random.once_in(2) {
                    self.ordinary();
                }
                self.assemble(made(pop));
            }
        }
    }

    /// What functions do at their start and end, and accesses between.
    fn stack_frame(&mut self) {
        self.establish(RSP, Class::Pointer);
        let size = 8 * self.random.below(12) as i64;
        let number = self.any_free();
        let inside = from(RSP, 8 * self.random.below(12) as i64);
        let down = match self.random.below(4) {
            0 => Instruction::with2(Code::Lea_r64_m, Register::RSP, from(RSP, -size)),
            1 => Instruction::with2(Code::Sub_rm64_imm32, Register::RSP, size as i32),
            _ => Instruction::with2(Code::Sub_rm64_imm8, Register::RSP, size as i32),
        };
        self.keeping_rsp(made(down));
        for _ in 0..self.random.below(3) {
            let access = match self.random.below(5) {
                0 => Instruction::with2(Code::Mov_rm64_r64, inside, r64(number)),
                1 => Instruction::with2(Code::Mov_r32_rm32, r32(number), inside),
                2 => Instruction::with2(Code::Add_rm32_r32, inside, r32(number)),
                3 => Instruction::with2(Code::Movups_xmmm128_xmm, inside, Register::XMM3),
                _ => Instruction::with2(Code::Mov_rm8_imm8, inside, size as i32),
            };
            self.assemble(made(access));
        }
        let up = match self.random.below(6) {
            0 => Instruction::with2(Code::And_rm64_imm8, Register::RSP, -16),
            1 => Instruction::with2(Code::Mov_r64_rm64, Register::RBP, Register::RSP),
            2 => Instruction::with2(Code::Enterq_imm16_imm8, size as u32, self.random.below(4) as u32),
            3 if self.classes[RBP] == Class::Pointer => Ok(Instruction::with(Code::Leaveq)),
            4 => Instruction::with2(Code::Lea_r64_m, Register::RSP, from(RSP, size)),
            _ => Instruction::with2(Code::Add_rm64_imm8, Register::RSP, size as i32),
        };
        let up = made(up);
        self.keeping_rsp(up);
        if up.op0_register() == Register::RBP {
            self.classes[RBP] = Class::Pointer;
        }
    }

    /// Appends an instruction that moves RSP a little.
    fn keeping_rsp(&mut self, instruction: Instruction) {
        self.assemble(instruction);
        self.classes[RSP] = Class::Pointer;
    }

    fn repeated(&mut self) {
        self.establish(6, Class::Pointer);
        self.establish(7, Class::Pointer);
        if self.random.once_in(8) {
            let direction = self.random.pick(&[0xfc, 0xfd]);
            self.emit(&[direction], None);
        }
        // The longest cover more than a page.
        let limit = self.random.pick(&[700, 80, 12, 12, 12, 12, 12, 12, 12, 12]);
        let count = self.random.below(limit) as u32;
        self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count)));
        let prefix = self.random.pick(&[0xf2, 0xf3, 0xf3]);
        let opcode = self.random.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf]);
        match self.random.below(3) {
            0 => self.emit(&[prefix, opcode], None),
            1 if !self.mode.is_32bit => self.emit(&[prefix, 0x48, opcode], None),
            _ => self.emit(&[0x66, prefix, opcode], None),
        }
    }

    /// BT and its kin by a register, whose bits lie before or behind the operand, often in another page.
    fn bit_string(&mut self) {
        let codes = [
            [Code::Bt_rm16_r16, Code::Bt_rm32_r32, Code::Bt_rm64_r64],
            [Code::Bts_rm16_r16, Code::Bts_rm32_r32, Code::Bts_rm64_r64],
            [Code::Btr_rm16_r16, Code::Btr_rm32_r32, Code::Btr_rm64_r64],
            [Code::Btc_rm16_r16, Code::Btc_rm32_r32, Code::Btc_rm64_r64],
        ];
        let (operation, size) = (self.random.below(4) as usize, self.random.below(3) as usize);
        let index = self.any_free();
        let limit = self.random.pick(&[0x100, 0x2000, 0x8000]);
        let bit = self.random.below(2 * limit) as i32 - limit as i32;
        self.assemble(made(Instruction::with2(Code::Mov_rm64_imm32, r64(index), bit)));
        let pointer = self.any_pointer().filter(|&pointer| pointer != index);
        let operand = match pointer {
            Some(pointer) if !self.random.once_in(3) => from(pointer, 4 * self.random.below(16) as i64),
            _ => at(self.data_address()),
        };
        let register = [word(index), r32(index), r64(index)][size];
        let mut instruction = made(Instruction::with2(codes[operation][size], operand, register));
        instruction.set_has_lock_prefix(operation != 0 && self.random.once_in(4));
        self.assemble(instruction);
    }

    fn division(&mut self) {
        let divisors = [3usize, 6, 7, 8, 11, 13, 15];
        let divisor = self.random.pick(if self.mode.is_32bit { &divisors[..3] } else { &divisors });
        if self.classes[divisor] == Class::Pointer && !self.random.once_in(3) {
            return;
        }
        if !self.random.once_in(4) {
            let value = self.random.integer() as u32 | 0x100;
            self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, r32(divisor), value)));
        }
        let size = self.random.below(3);
        let is_signed = self.random.once_in(2);
        let extend = match (is_signed, size) {
            _ if self.random.once_in(6) => Instruction::with(Code::Nopd),
            (true, 0) => Instruction::with(Code::Cqo),
            (true, _) => Instruction::with(Code::Cdq),
            (false, _) => made(Instruction::with2(Code::Mov_r32_imm32, Register::EDX, 0)),
        };
        self.assemble(extend);
        let code = match (is_signed, size) {
            (true, 0) => Code::Idiv_rm64,
            (true, _) => Code::Idiv_rm32,
            (false, 0) => Code::Div_rm64,
            (false, _) => Code::Div_rm32,
        };
        let register = if size == 0 { r64(divisor) } else { r32(divisor) };
        self.assemble(made(Instruction::with1(code, register)));
    }

    /// PUSHF, something, POPF.
    fn flags_as_a_whole(&mut self) {
        self.establish(RSP, Class::Pointer);
        let flags =
            Rflags::ARITHMETIC | Rflags::DF | if self.random.once_in(8) { Rflags::AC } else { Rflags::ID };
        let change = (self.random.bits() & flags.bits()) as i32;
        let top = MemoryOperand::with_base(Register::RSP);
        self.assemble(Instruction::with(Code::Pushfq));
        self.assemble(made(Instruction::with2(Code::Xor_rm32_imm32, top, change)));
        self.assemble(Instruction::with(Code::Popfq));
    }

    /// A trap behind the next instruction.
    fn single_step(&mut self) {
        self.establish(RSP, Class::Pointer);
        let top = MemoryOperand::with_base(Register::RSP);
        self.assemble(Instruction::with(Code::Pushfq));
        self.assemble(made(Instruction::with2(Code::Or_rm32_imm32, top, Rflags::TF.bits() as i32)));
        self.assemble(Instruction::with(Code::Popfq));
    }

    fn gather(&mut self) {
        if !self.model.offers(CpuidFeature::AVX2) {
            return;
        }
        let (code, is_wide) = self.random.pick(&GATHERS);
        let Some(base) = self.any_pointer() else { return };
        let vectors = [2, 5, 9, 14];
        let first = self.random.below(4) as usize;
        let [result, index, mask] = [0, 1, 2].map(|i| vectors[(first + i) & 3]);
        let table =
            INDICES + 32 * self.random.below(INDEX_COUNT) + if is_wide { 32 * INDEX_COUNT } else { 0 };
        let ymm = |number: usize| vector(Register::YMM0, number);
        self.assemble(made(Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, ymm(index), at(table))));
        let info = code.op_code();
        let sized = |number: usize, operand: u32| {
            let is_large = format!("{:?}", info.op_kind(operand)).contains("ymm");
            vector(if is_large { Register::YMM0 } else { Register::XMM0 }, number)
        };
        let is_large_index = format!("{:?}", info.op1_kind()).ends_with('y');
        let index = vector(if is_large_index { Register::YMM0 } else { Register::XMM0 }, index);
        let scale = 1 << self.random.below(4);
        let operand = MemoryOperand::with_base_index_scale(r64(base), index, scale);
        self.assemble(made(Instruction::with3(code, sized(result, 0), operand, sized(mask, 2))));
    }

    /// Loads MXCSR or the x87 control word.
    fn controls(&mut self) {
        let mxcsr = at(MXCSRS + 4 * self.random.below(MXCSR_COUNT));
        let word = at(CONTROL_WORDS + 2 * self.random.below(CONTROL_WORD_COUNT));
        let place = at(self.data_address());
        let instruction = match self.random.below(5) {
            0 => Instruction::with1(Code::Fldcw_m2byte, word),
            1 => Instruction::with1(Code::Stmxcsr_m32, place),
            2 => Instruction::with1(Code::Fnstcw_m2byte, place),
            3 if self.model.offers(CpuidFeature::AVX) => Instruction::with1(Code::VEX_Vldmxcsr_m32, mxcsr),
            _ => Instruction::with1(Code::Ldmxcsr_m32, mxcsr),
        };
        self.assemble(made(instruction));
    }

    /// EDX:EAX for XSAVE and its kin: only components that the guest has, too. Nothing may jump behind this.
    fn components(&mut self) {
        let components = self.random.below(8) as i32;
        self.assemble(made(Instruction::with2(Code::Mov_rm32_imm32, Register::EAX, components)));
        self.targetable = false;
        self.assemble(made(Instruction::with2(Code::Mov_rm32_imm32, Register::EDX, 0)));
    }

    fn save_state(&mut self) {
        // Some hosts look at the whole area, as large as they have it.
        let room = DATA_SIZE as u64 - 2 * MARGIN - HOST_AREA_SIZE;
        let address = (DATA + MARGIN + self.random.below(room)) & !63;
        let codes = [Code::Fxsave_m512byte, Code::Fxsave64_m512byte, Code::Xsave_mem, Code::Xsave64_mem];
        let code = self.random.pick(&codes);
        let is_extended = matches!(code, Code::Xsave_mem | Code::Xsave64_mem);
        if is_extended {
            self.components();
        } else {
            // If there is a trap after an instruction, it is after this one.
            self.assemble(Instruction::with(Code::Nopd));
            self.targetable = false;
        }
        self.assemble(made(Instruction::with1(code, at(address))));
        // MXCSR_MASK differs (the guest has no misaligned SSE mode), and the pointers to the last x87 instruction,
        // which AMD processors store only with an exception pending.
        self.assemble(made(Instruction::with2(Code::Mov_rm32_imm32, at(address + 28), 0)));
        self.assemble(made(Instruction::with2(Code::Mov_rm16_imm16, at(address + 6), 0)));
        // XSTATE_BV: whether a component counts as used is the processor's own affair.
        for word in if is_extended { &[8, 16, 512][..] } else { &[8, 16] } {
            self.assemble(made(Instruction::with2(Code::Mov_rm32_imm32, at(address + word), 0)));
            self.assemble(made(Instruction::with2(Code::Mov_rm32_imm32, at(address + word + 4), 0)));
        }
        self.targetable = true;
    }

    fn restore_state(&mut self) {
        let area = at(self.random.pick(&XSAVE_AREAS));
        let code = match self.random.below(4) {
            0 => Code::Fxrstor_m512byte,
            1 => Code::Fxrstor64_m512byte,
            _ => Code::Xrstor_mem,
        };
        if code == Code::Xrstor_mem {
            self.components();
        }
        self.assemble(made(Instruction::with1(code, area)));
        self.targetable = true;
    }

    /// Overwrites the immediate operand of an instruction of some sequence, in the page that may be written.
    fn write_code(&mut self) {
        let is_load = |item: &Item| match item {
            Item::Instruction { bytes, field: None } => {
                matches!(bytes[..], [0xb8..=0xbf, ..] if bytes.len() == 5)
            }
            _ => false,
        };
        let loads: Vec<usize> =
            (0..self.items.len()).filter(|&number| is_load(&self.items[number])).collect();
        let value = self.random.bits().to_le_bytes();
        if loads.is_empty() || self.random.once_in(2) {
            // One that follows: mov byte [rip + next], value; mov ecx, …
            let next = self.items.len() + 1;
            self.targetable = false;
            self.refer_to_memory(&[0xc6, 0x05, 0, 0, 0, 0, value[0]], 2, next, 1);
            self.emit(&[0xb9, value[1], value[2], value[3], value[4]], None);
            self.targetable = true;
            return;
        }
        let load = self.random.pick(&loads);
        let store = [0xc7, 0x05, 0, 0, 0, 0, value[0], value[1], 0, 0];
        // The 16-bit form: 66 C7 05.
        if self.random.once_in(2) {
            let mut short = vec![0x66];
            short.extend(&store[..8]);
            self.refer_to_memory(&short, 3, load, 1);
        } else {
            self.refer_to_memory(&store, 2, load, 1);
        }
    }

    /// A read-modify-write instruction with a lock prefix.
    fn locked(&mut self) {
        let place = at(self.data_address());
        let pointer = self.any_pointer();
        let operand = match pointer {
            Some(pointer) if !self.random.once_in(3) => from(pointer, 4 * self.random.below(16) as i64),
            _ => place,
        };
        let (number, other) = (self.any(), self.any());
        let instruction = match self.random.below(8) {
            0 => Instruction::with2(Code::Xadd_rm64_r64, operand, r64(self.any_free())),
            1 => Instruction::with2(Code::Cmpxchg_rm32_r32, operand, r32(number)),
            2 => Instruction::with2(Code::Cmpxchg_rm64_r64, operand, r64(other)),
            3 => Instruction::with2(Code::Add_rm32_r32, operand, r32(number)),
            4 => Instruction::with1(Code::Inc_rm64, operand),
            5 => Instruction::with2(Code::Bts_rm32_imm8, operand, number as i32),
            6 => Instruction::with1(Code::Cmpxchg8b_m64, operand),
            _ => Instruction::with2(Code::Xchg_rm32_r32, operand, r32(self.any_free())),
        };
        let mut instruction = made(instruction);
        instruction.set_has_lock_prefix(true);
        self.assemble(instruction);
    }

    /// An access relative to the base of FS or GS.
    fn segment_access(&mut self) {
        let segment = self.random.pick(&[Register::FS, Register::GS]);
        let displacement = 8 * self.random.below(0x60) as i64;
        let base = self.any_free();
        let operand = if self.random.once_in(2) {
            MemoryOperand::new(Register::None, Register::None, 1, displacement, 8, false, segment)
        } else {
            self.establish(base, Class::Small);
            MemoryOperand::new(r64(base), Register::None, 1, displacement, 8, false, segment)
        };
        let number = self.any_free();
        let instruction = match self.random.below(5) {
            0 => Instruction::with2(Code::Mov_rm64_r64, operand, r64(self.any())),
            1 => Instruction::with2(Code::Add_rm32_r32, operand, r32(self.any())),
            2 => Instruction::with2(Code::Lea_r64_m, r64(number), operand),
            3 => Instruction::with2(Code::Movdqu_xmm_xmmm128, Register::XMM7, operand),
            _ => Instruction::with2(Code::Mov_r64_rm64, r64(number), operand),
        };
        self.assemble(made(instruction));
    }
}

fn word(number: usize) -> Register {
    Register::try_from(Register::AX as usize + number).unwrap_or_default()
}

fn vector(first: Register, number: usize) -> Register {
    Register::try_from(first as usize + number).unwrap_or_default()
}
