//! Execution of one decoded instruction: the frequent ones here, the others by group.

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::{self, ARITHMETIC, CF};
use crate::interp::op::{Alu, Handler, Op, place};
use crate::interp::operand::sign_extend;

/// The result and all six flags of a two-operand operation.
#[inline(always)]
fn compute(operation: Alu, left: u64, right: u64, rflags: u64, size: usize) -> (u64, u64) {
    // The frequent sizes as constants: their shifts and masks are known when this is compiled.
    match size {
        4 => compute_sized(operation, left, right, rflags, 4),
        8 => compute_sized(operation, left, right, rflags, 8),
        _ => compute_sized(operation, left, right, rflags, size),
    }
}

#[inline(always)]
fn compute_sized(operation: Alu, left: u64, right: u64, rflags: u64, size: usize) -> (u64, u64) {
    let logic = |result: u64| (result, flags::result_flags(result, size));
    match operation {
        Alu::Add => flags::add(left, right, 0, size),
        Alu::Adc => flags::add(left, right, rflags & CF, size),
        Alu::Sub | Alu::Cmp => flags::subtract(left, right, 0, size),
        Alu::Sbb => flags::subtract(left, right, rflags & CF, size),
        Alu::And | Alu::Test => logic(left & right),
        Alu::Or => logic(left | right),
        Alu::Xor => logic(left ^ right),
    }
}

impl Alu {
    /// Whether the result is kept.
    const fn writes(self) -> bool {
        !matches!(self, Self::Cmp | Self::Test)
    }
}

impl Cpu {
    /// Executes one instruction; `state.rip` is its address and `next_rip` that of the following one.
    #[inline(always)]
    pub(crate) fn execute<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        match op.handler {
            Handler::Nop => {}
            Handler::MovRegReg => self.set_gpr(op.destination, size, self.gpr(op.source, size)),
            Handler::MovRegImm => self.set_gpr(op.destination, size, op.immediate),
            Handler::MovRegMem => {
                let value = self.read(env, op.segment, self.effective_offset(op), size)?;
                self.set_gpr(op.destination, size, value);
            }
            Handler::MovMemReg => {
                let value = self.gpr(op.source, size);
                self.write(env, op.segment, self.effective_offset(op), size, value)?;
            }
            Handler::MovMemImm => {
                self.write(env, op.segment, self.effective_offset(op), size, op.immediate)?;
            }
            Handler::MovzxReg => {
                self.set_gpr(op.destination, size, self.gpr(op.source, op.source_size.into()));
            }
            Handler::MovzxMem => {
                let value = self.read_source(env, op)?;
                self.set_gpr(op.destination, size, value);
            }
            Handler::MovsxReg => {
                let value = self.gpr(op.source, op.source_size.into());
                self.set_gpr(op.destination, size, sign_extend(value, op.source_size.into()));
            }
            Handler::MovsxMem => {
                let value = self.read_source(env, op)?;
                self.set_gpr(op.destination, size, sign_extend(value, op.source_size.into()));
            }
            Handler::Lea => self.set_gpr(op.destination, size, self.effective_offset(op)),
            Handler::AluRegReg(operation) => {
                self.alu_to_register(op, operation, self.gpr(op.source, size));
            }
            Handler::AluRegImm(operation) => self.alu_to_register(op, operation, op.immediate),
            Handler::AluRegMem(operation) => {
                let right = self.read(env, op.segment, self.effective_offset(op), size)?;
                self.alu_to_register(op, operation, right);
            }
            Handler::AluMem(operation) => self.alu_to_memory(env, op, operation)?,
            Handler::Push => self.push_operand(env, op)?,
            Handler::Pop => self.pop_operand(env, op)?,
            Handler::JumpIf => {
                if flags::condition(op.condition, self.state.rflags) {
                    self.branch(op, self.relative_target(op))?;
                }
            }
            Handler::Jump => self.branch(op, self.relative_target(op))?,
            Handler::Call => self.call(env, op, self.relative_target(op))?,
            Handler::Return => self.near_return(env, op)?,
            Handler::SetIf => {
                let value = flags::condition(op.condition, self.state.rflags);
                self.write_destination(env, op, value.into())?;
            }
            Handler::MoveIf => {
                // The source is read, and the upper half cleared, even if the condition is false.
                let value = self.read_source(env, op)?;
                let holds = flags::condition(op.condition, self.state.rflags);
                let value = if holds { value } else { self.gpr(op.destination, size) };
                self.set_gpr(op.destination, size, value);
            }
            Handler::Inc => self.step(env, op, |old| flags::add(old, 1, 0, size))?,
            Handler::Dec => self.step(env, op, |old| flags::subtract(old, 1, 0, size))?,
            Handler::Shift(kind) => self.shift(env, op, kind)?,
            _ => self.execute_group(env, op)?,
        }
        Ok(())
    }

    /// The instructions that are executed by their group.
    #[inline(never)]
    fn execute_group<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        match op.handler {
            Handler::Neg => {
                self.modify(env, op, |old, rflags| {
                    let (new, flags) = flags::subtract(0, old, 0, size);
                    (new, rflags & !ARITHMETIC | flags)
                })?;
                Ok(())
            }
            Handler::Not => {
                self.modify(env, op, |old, rflags| (!old, rflags))?;
                Ok(())
            }
            Handler::JumpIndirect => {
                let target = self.read_destination(env, op)?;
                self.branch(op, target)
            }
            Handler::CallIndirect => {
                let target = self.read_destination(env, op)?;
                self.call(env, op, target)
            }
            Handler::Multiply => self.exec_multiply(env, op),
            Handler::Bits => self.exec_bits(env, op),
            Handler::Data => self.exec_data(env, op),
            Handler::Stack => self.exec_stack(env, op),
            Handler::Loop => self.exec_loop(op),
            Handler::Flags => self.exec_flags(op),
            Handler::Decimal => self.exec_decimal(env, op),
            Handler::String => self.exec_string(env, op),
            Handler::Port => self.exec_port(env, op),
            Handler::Processor => self.exec_processor(env, op),
            Handler::Vector => {
                if self.exec_vector_op(env, op)? || self.exec_system_op(env, op)? {
                    return Ok(());
                }
                Err(Exception::UD)
            }
            Handler::System => {
                if self.exec_segment_op(env, op)?
                    || self.exec_system_op(env, op)?
                    || self.exec_vector_op(env, op)?
                {
                    return Ok(());
                }
                Err(Exception::UD)
            }
            Handler::TooLong => Err(Exception::GP0),
            _ => Err(Exception::UD),
        }
    }

    #[inline(always)]
    fn alu_to_register(&mut self, op: &Op, operation: Alu, right: u64) {
        let size = usize::from(op.size);
        let left = self.gpr(op.destination, size);
        let (result, flags) = compute(operation, left, right, self.state.rflags, size);
        self.state.rflags = self.state.rflags & !ARITHMETIC | flags;
        if operation.writes() {
            self.set_gpr(op.destination, size, result);
        }
    }

    #[inline(always)]
    fn alu_to_memory<E: Env>(&mut self, env: &mut E, op: &Op, operation: Alu) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let right = if op.source == place::IMMEDIATE { op.immediate } else { self.gpr(op.source, size) };
        if operation.writes() {
            self.modify(env, op, |left, rflags| {
                let (result, flags) = compute(operation, left, right, rflags, size);
                (result, rflags & !ARITHMETIC | flags)
            })?;
            return Ok(());
        }
        let left = self.read(env, op.segment, self.effective_offset(op), size)?;
        let (_, flags) = compute(operation, left, right, self.state.rflags, size);
        self.state.rflags = self.state.rflags & !ARITHMETIC | flags;
        Ok(())
    }

    /// INC and DEC: all flags but CF.
    #[inline(always)]
    fn step<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        compute: impl Fn(u64) -> (u64, u64),
    ) -> Result<(), Exception> {
        const CHANGED: u64 = ARITHMETIC & !CF;
        self.modify(env, op, |old, rflags| {
            let (new, flags) = compute(old);
            (new, rflags & !CHANGED | flags & CHANGED)
        })?;
        Ok(())
    }
}
