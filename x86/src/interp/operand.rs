//! Reading and writing the operands of an instruction.

use iced_x86::{CodeSize, Instruction, OpKind, Register};

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::{Op, place};
use crate::state::SegReg;

/// Number of a general register in [`crate::state::CpuState::gpr`], its size in bytes, and whether it is AH, CH, DH or BH.
fn general_register(register: Register) -> (usize, usize, bool) {
    let number = register as usize;
    let from = |first: Register| number.wrapping_sub(first as usize) & 15;
    match register.size() {
        1 if register >= Register::SPL => (from(Register::SPL) + 4, 1, false),
        1 if register >= Register::AH => (from(Register::AH), 1, true),
        1 => (from(Register::AL), 1, false),
        2 => (from(Register::AX), 2, false),
        4 => (from(Register::EAX), 4, false),
        _ => (from(Register::RAX), 8, false),
    }
}

/// The value cut to `size` (1 to 8) bytes.
#[inline(always)]
pub const fn truncate(value: u64, size: usize) -> u64 {
    value & u64::MAX >> (64u32.wrapping_sub(8 * size as u32) & 63)
}

/// The value of `size` (1 to 8) bytes, sign-extended to 64 bits.
#[inline(always)]
pub const fn sign_extend(value: u64, size: usize) -> u64 {
    let unused = 64u32.wrapping_sub(8 * size as u32) & 63;
    ((value << unused) as i64 >> unused) as u64
}

/// The segment of the instruction's memory operand. 64-bit mode ignores the prefixes of ES, CS, SS and DS (SDM
/// Vol. 1, section 3.4.2.1), also in which exception a non-canonical address raises.
pub fn memory_segment(instruction: &Instruction) -> SegReg {
    let ignored = instruction.code_size() == CodeSize::Code64
        && matches!(instruction.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS);
    if !ignored {
        return segment_register(instruction.memory_segment());
    }
    match instruction.memory_base().full_register() {
        Register::RSP | Register::RBP => SegReg::Ss,
        _ => SegReg::Ds,
    }
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
        let full = self.state.gpr[number & 15];
        if high { full >> 8 & 0xff } else { truncate(full, size) }
    }

    /// Writes a general register: 4-byte writes clear the upper half, smaller ones leave the rest.
    pub fn set_register(&mut self, register: Register, value: u64) {
        let (number, size, high) = general_register(register);
        let number = number as u8 & 15;
        self.set_gpr(if high { number | place::HIGH_BYTE } else { number }, size, value);
    }

    /// Value of the register at a [`place`], zero-extended from `size` bytes.
    #[inline(always)]
    pub(crate) fn gpr(&self, place: u8, size: usize) -> u64 {
        let full = self.state.gpr[usize::from(place & 15)];
        let shift = if place & place::HIGH_BYTE != 0 { 8 } else { 0 };
        truncate(full >> shift, size)
    }

    /// Writes `size` bytes of the register at a [`place`].
    #[inline(always)]
    pub(crate) fn set_gpr(&mut self, place: u8, size: usize, value: u64) {
        let full = &mut self.state.gpr[usize::from(place & 15)];
        *full = match size {
            4.. => truncate(value, size),
            2 => *full & !0xffff | value & 0xffff,
            _ if place & place::HIGH_BYTE != 0 => *full & !0xff00 | (value & 0xff) << 8,
            _ => *full & !0xff | value & 0xff,
        };
    }

    /// Offset of the instruction's ModRM (or moffs) memory operand in its segment.
    #[inline(always)]
    pub(crate) fn effective_offset(&self, op: &Op) -> u64 {
        let mut offset = op.displacement;
        if op.base & 0xf0 == 0 {
            offset = offset.wrapping_add(self.state.gpr[usize::from(op.base & 15)]);
        } else if op.base == place::RIP {
            offset = offset.wrapping_add(self.state.rip);
        }
        if op.index & 0xf0 == 0 {
            offset = offset.wrapping_add(self.state.gpr[usize::from(op.index & 15)] << (op.scale & 3));
        }
        truncate(offset, op.address_size.into())
    }

    /// Segment and offset of the instruction's ModRM (or moffs) memory operand.
    #[inline(always)]
    pub fn effective_address(&self, op: &Op) -> (SegReg, u64) {
        (op.segment, self.effective_offset(op))
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

    /// Value of the second operand (register, memory or immediate), zero-extended from its size.
    #[inline(always)]
    pub(crate) fn read_source<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<u64, Exception> {
        let size = op.source_size.into();
        match op.source {
            place::IMMEDIATE => Ok(op.immediate),
            place::MEMORY => self.read(env, op.segment, self.effective_offset(op), size),
            register => Ok(self.gpr(register, size)),
        }
    }

    /// Value of the first operand (register or memory), zero-extended from its size.
    #[inline(always)]
    pub(crate) fn read_destination<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<u64, Exception> {
        let size = op.size.into();
        if op.destination == place::MEMORY {
            return self.read(env, op.segment, self.effective_offset(op), size);
        }
        Ok(self.gpr(op.destination, size))
    }

    /// Writes the first operand (register or memory).
    #[inline(always)]
    pub(crate) fn write_destination<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        value: u64,
    ) -> Result<(), Exception> {
        let size = op.size.into();
        if op.destination == place::MEMORY {
            return self.write(env, op.segment, self.effective_offset(op), size, value);
        }
        self.set_gpr(op.destination, size, value);
        Ok(())
    }

    /// Replaces the first operand (register or memory) by what `update` makes of it and of RFLAGS; returns its
    /// old value. In memory that is one read-modify-write, atomic with a LOCK prefix.
    #[inline(always)]
    pub(crate) fn modify<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        update: impl Fn(u64, u64) -> (u64, u64),
    ) -> Result<u64, Exception> {
        let size = op.size.into();
        let rflags = self.state.rflags;
        if op.destination == place::MEMORY {
            let offset = self.effective_offset(op);
            let mut new_flags = rflags;
            let old = self.read_modify_write(env, op.segment, offset, size, op.locked, &mut |old| {
                let (new, flags) = update(old, rflags);
                new_flags = flags;
                new
            })?;
            self.state.rflags = new_flags;
            return Ok(old);
        }
        let old = self.gpr(op.destination, size);
        let (new, flags) = update(old, rflags);
        self.set_gpr(op.destination, size, new);
        self.state.rflags = flags;
        Ok(old)
    }
}
