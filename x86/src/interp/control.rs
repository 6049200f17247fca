//! Near transfers of control: jumps, calls, returns, loops.

use iced_x86::{Code, Mnemonic};

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::ZF;
use crate::interp::op::Op;
use crate::interp::operand::truncate;
use crate::memory::is_canonical;
use crate::registers::gpr::{RCX, RSP};
use crate::state::SegReg;

/// Size in bytes of the counter of LOOP and JCXZ: that of an address.
pub(crate) const fn loop_counter_size(code: Code) -> u8 {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}

impl Cpu {
    /// Where a relative branch goes.
    #[inline(always)]
    pub(crate) fn relative_target(&self, op: &Op) -> u64 {
        self.state.rip.wrapping_add(op.immediate)
    }

    /// Continues at `target`, cut to the branch's operand size.
    #[inline(always)]
    pub(crate) fn branch(&mut self, op: &Op, target: u64) -> Result<(), Exception> {
        self.next_rip = self.checked_target(op, target)?;
        Ok(())
    }

    /// `target`, cut to the operand size, if it is canonical or within the limit of CS (else #GP(0)).
    #[inline(always)]
    fn checked_target(&self, op: &Op, target: u64) -> Result<u64, Exception> {
        let target = truncate(target, op.size.into());
        let valid = if self.in_64bit_mode() {
            is_canonical(target)
        } else {
            target <= self.state.seg[SegReg::Cs as usize].limit.into()
        };
        if valid { Ok(target) } else { Err(Exception::GP0) }
    }

    /// Near CALL.
    #[inline(always)]
    pub(crate) fn call<E: Env>(&mut self, env: &mut E, op: &Op, target: u64) -> Result<(), Exception> {
        match self.checked_target(op, target) {
            Ok(target) => {
                self.push(env, op.size.into(), self.next_rip)?;
                self.next_rip = target;
                Ok(())
            }
            Err(exception) => {
                // Zen reports a fault of the stack first.
                let top = self.state.gpr[RSP].wrapping_sub(op.size.into()) & self.stack_mask();
                self.check_alignment(self.address_of(SegReg::Ss, top), op.size.into())?;
                self.check_write(env, SegReg::Ss, top, op.size.into())?;
                Err(exception)
            }
        }
    }

    /// Near RET.
    #[inline(always)]
    pub(crate) fn near_return<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let rsp = self.state.gpr[RSP];
        let target = self.pop(env, op.size.into())?;
        match self.checked_target(op, target) {
            Ok(target) => self.next_rip = target,
            Err(exception) => {
                self.state.gpr[RSP] = rsp;
                return Err(exception);
            }
        }
        if op.immediate != 0 {
            self.set_stack_pointer(self.state.gpr[RSP].wrapping_add(op.immediate));
        }
        Ok(())
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ, JRCXZ.
    pub(super) fn exec_loop(&mut self, op: &Op) -> Result<(), Exception> {
        let size = op.address_size.into();
        let counter = self.gpr(RCX as u8, size);
        let zero = self.state.rflags & ZF != 0;
        let (new, taken) = match op.instruction.mnemonic() {
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => (None, counter == 0),
            mnemonic => {
                let new = truncate(counter.wrapping_sub(1), size);
                let wanted = match mnemonic {
                    Mnemonic::Loope => zero,
                    Mnemonic::Loopne => !zero,
                    _ => true,
                };
                (Some(new), new != 0 && wanted)
            }
        };
        if taken {
            self.branch(op, self.relative_target(op))?;
        }
        if let Some(new) = new {
            self.set_gpr(RCX as u8, size, new);
        }
        Ok(())
    }
}
