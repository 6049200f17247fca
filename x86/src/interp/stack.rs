//! PUSH, POP and what else works on the stack.

use iced_x86::{Code, Mnemonic};

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::{Op, place};
use crate::interp::operand::truncate;
use crate::registers::Rflags;
use crate::registers::gpr::{RBP, RSP};
use crate::state::SegReg;

/// Flags that POPF writes at every privilege level.
const POPF_ALWAYS: u64 = Rflags::ARITHMETIC.bits()
    | Rflags::TF.bits()
    | Rflags::DF.bits()
    | Rflags::NT.bits()
    | Rflags::AC.bits()
    | Rflags::ID.bits();

impl Cpu {
    /// PUSH of a register, an immediate or memory.
    #[inline(always)]
    pub(crate) fn push_operand<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let value = match op.destination {
            place::IMMEDIATE => op.immediate,
            place::MEMORY => self.read(env, op.segment, self.effective_offset(op), size)?,
            register => self.gpr(register, size),
        };
        self.push(env, size, value)
    }

    /// POP to a register or memory. The address of a memory operand is computed with RSP already incremented.
    #[inline(always)]
    pub(crate) fn pop_operand<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let rsp = self.state.gpr[RSP];
        let value = self.pop(env, size)?;
        let written = self.write_destination(env, op, value);
        if written.is_err() {
            self.state.gpr[RSP] = rsp;
        }
        written
    }

    /// PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE.
    pub(super) fn exec_stack<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let (rsp, rbp) = (self.state.gpr[RSP], self.state.gpr[RBP]);
        let result = match op.instruction.mnemonic() {
            Mnemonic::Pusha => self.push_all(env, 2),
            Mnemonic::Pushad => self.push_all(env, 4),
            Mnemonic::Popa => self.pop_all(env, 2),
            Mnemonic::Popad => self.pop_all(env, 4),
            Mnemonic::Pushf => self.push_flags(env, 2),
            Mnemonic::Pushfd => self.push_flags(env, 4),
            Mnemonic::Pushfq => self.push_flags(env, 8),
            Mnemonic::Popf => self.pop_flags(env, 2),
            Mnemonic::Popfd => self.pop_flags(env, 4),
            Mnemonic::Popfq => self.pop_flags(env, 8),
            Mnemonic::Enter => self.enter_frame(env, op),
            _ => self.leave_frame(env, op),
        };
        if result.is_err() {
            self.state.gpr[RSP] = rsp;
            self.state.gpr[RBP] = rbp;
        }
        result
    }

    fn push_all<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        let rsp = self.state.gpr[RSP];
        for register in 0..8 {
            let value = if register == RSP { rsp } else { self.state.gpr[register] };
            self.push(env, size, truncate(value, size))?;
        }
        Ok(())
    }

    fn pop_all<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        let mut values = [0; 8];
        for value in values.iter_mut().rev() {
            *value = self.pop(env, size)?;
        }
        for (register, value) in values.into_iter().enumerate() {
            if register != RSP {
                self.set_gpr(register as u8, size, value);
            }
        }
        Ok(())
    }

    fn io_privilege_level(&self) -> u8 {
        (self.state.rflags >> 12 & 3) as u8
    }

    /// In virtual-8086 mode PUSHF and POPF need IOPL 3 (SDM Vol. 3B, section 20.2.7; without VME).
    fn check_virtual_8086_flags(&self) -> Result<(), Exception> {
        if self.state.has_flags(Rflags::VM) && self.io_privilege_level() < 3 {
            return Err(Exception::GP0);
        }
        Ok(())
    }

    fn push_flags<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        self.check_virtual_8086_flags()?;
        let image = self.state.rflags & !(Rflags::RF | Rflags::VM).bits();
        self.push(env, size, truncate(image, size))
    }

    fn pop_flags<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        self.check_virtual_8086_flags()?;
        let image = self.pop(env, size)?;
        let mut changed = POPF_ALWAYS;
        if self.state.cpl <= self.io_privilege_level() {
            changed |= Rflags::IF.bits();
        }
        if self.state.cpl == 0 {
            changed |= Rflags::IOPL.bits();
        }
        changed = truncate(changed, size);
        let kept = self.state.rflags & !Rflags::RF.bits();
        self.state.rflags = kept & !changed | image & changed;
        Ok(())
    }

    /// ENTER (SDM Vol. 2A): a stack frame, with the frame pointers of the enclosing procedures.
    fn enter_frame<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let stack_pointer = self.state.gpr[RSP];
        self.push_frame(env, op).inspect_err(|_| self.state.gpr[RSP] = stack_pointer)
    }

    fn push_frame<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = match op.instruction.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let allocated = u64::from(op.instruction.immediate16());
        let level = op.instruction.immediate8_2nd() & 31;
        let mut outer = self.state.gpr[RBP];
        self.push(env, size, truncate(outer, size))?;
        let frame = self.state.gpr[RSP];
        if level > 0 {
            for _ in 1..level {
                outer = outer.wrapping_sub(size as u64);
                let pointer = self.read(env, SegReg::Ss, outer & self.stack_mask(), size)?;
                self.push(env, size, pointer)?;
            }
            self.push(env, size, truncate(frame, size))?;
        }
        self.set_stack_pointer(self.state.gpr[RSP].wrapping_sub(allocated));
        // The new top of the stack must be writable (SDM Vol. 2A, ENTER).
        let top = self.state.gpr[RSP] & self.stack_mask();
        self.check_alignment(self.address_of(SegReg::Ss, top), size)?;
        self.check_write(env, SegReg::Ss, top, size)?;
        self.set_gpr(RBP as u8, size, frame);
        Ok(())
    }

    fn leave_frame<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = match op.instruction.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        self.set_stack_pointer(self.state.gpr[RBP]);
        let value = self.pop(env, size)?;
        self.set_gpr(RBP as u8, size, value);
        Ok(())
    }
}
