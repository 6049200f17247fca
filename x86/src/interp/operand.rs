//! Reading and writing the operands of an instruction.

use iced_x86::{OpKind, Register};

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::Op;
use crate::state::SegReg;

/// Number of a general register in [`crate::state::CpuState::gpr`], its size in bytes, and whether it is AH, CH, DH or BH.
fn general_register(register: Register) -> (usize, usize, bool) {
    let number = register as usize;
    let from = |first: Register| number - first as usize;
    match register.size() {
        1 if register >= Register::SPL => (from(Register::SPL) + 4, 1, false),
        1 if register >= Register::AH => (from(Register::AH), 1, true),
        1 => (from(Register::AL), 1, false),
        2 => (from(Register::AX), 2, false),
        4 => (from(Register::EAX), 4, false),
        _ => (from(Register::RAX), 8, false),
    }
}

/// The value cut to `size` bytes.
pub fn truncate(value: u64, size: usize) -> u64 {
    if size >= 8 { value } else { value & ((1 << (size * 8)) - 1) }
}

/// The value of `size` bytes, sign-extended to 64 bits.
pub fn sign_extend(value: u64, size: usize) -> u64 {
    let unused = 64 - 8 * size as u32;
    ((value << unused) as i64 >> unused) as u64
}

/// The segment register that iced-x86 names.
pub fn segment_register(register: Register) -> SegReg {
    match register {
        Register::ES => SegReg::Es,
        Register::CS => SegReg::Cs,
        Register::SS => SegReg::Ss,
        Register::FS => SegReg::Fs,
        Register::GS => SegReg::Gs,
        _ => SegReg::Ds,
    }
}

impl Cpu {
    /// A general register's value, zero-extended.
    pub fn register(&self, register: Register) -> u64 {
        let (number, size, high) = general_register(register);
        if high { self.state.gpr[number] >> 8 & 0xff } else { truncate(self.state.gpr[number], size) }
    }

    /// Writes a general register: 4-byte writes clear the upper half, smaller ones leave the rest.
    pub fn set_register(&mut self, register: Register, value: u64) {
        let (number, size, high) = general_register(register);
        let full = &mut self.state.gpr[number];
        *full = match size {
            1 if high => *full & !0xff00 | (value & 0xff) << 8,
            1 => *full & !0xff | value & 0xff,
            2 => *full & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Segment and offset of the instruction's ModRM (or moffs) memory operand.
    pub fn effective_address(&self, op: &Op) -> (SegReg, u64) {
        let instruction = &op.instruction;
        let segment = segment_register(instruction.memory_segment());
        let base = instruction.memory_base();
        let mut offset = instruction.memory_displacement64();
        let mut size = 0;
        match base {
            Register::None => {}
            Register::RIP | Register::EIP => {
                size = base.size();
                offset = offset.wrapping_add(op.ip_delta(self.state.rip));
            }
            _ => {
                size = base.size();
                offset = offset.wrapping_add(self.register(base));
            }
        }
        let index = instruction.memory_index();
        if index.is_gpr() {
            size = index.size();
            offset = offset
                .wrapping_add(self.register(index).wrapping_mul(instruction.memory_index_scale().into()));
        }
        if size == 0 {
            size = instruction.memory_displ_size() as usize;
        }
        (segment, truncate(offset, size))
    }

    /// Size in bytes of an explicit operand.
    pub fn operand_size(op: &Op, operand: u32) -> usize {
        match op.instruction.op_kind(operand) {
            OpKind::Register => op.instruction.op_register(operand).size(),
            OpKind::Memory => op.instruction.memory_size().size(),
            OpKind::Immediate8 => 1,
            OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
            OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
            _ => 8,
        }
    }

    /// Value of a general-register, memory (up to 8 bytes) or immediate operand, zero-extended from its size.
    pub fn read_operand<E: Env>(&mut self, env: &mut E, op: &Op, operand: u32) -> Result<u64, Exception> {
        match op.instruction.op_kind(operand) {
            OpKind::Register => Ok(self.register(op.instruction.op_register(operand))),
            OpKind::Memory => {
                let (segment, offset) = self.effective_address(op);
                self.read(env, segment, offset, op.instruction.memory_size().size())
            }
            _ => Ok(truncate(op.instruction.immediate(operand), Self::operand_size(op, operand))),
        }
    }

    /// Writes a general-register or memory (up to 8 bytes) operand.
    pub fn write_operand<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        operand: u32,
        value: u64,
    ) -> Result<(), Exception> {
        if op.instruction.op_kind(operand) == OpKind::Register {
            self.set_register(op.instruction.op_register(operand), value);
            return Ok(());
        }
        let (segment, offset) = self.effective_address(op);
        self.write(env, segment, offset, op.instruction.memory_size().size(), value)
    }
}
