//! Decimal adjustment (SDM Vol. 2A, AAA to AAS and DAA, DAS) and BOUND.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::{Exception, vector};
use crate::interp::flags::{AF, ARITHMETIC, CF, flag_if, result_flags};
use crate::interp::op::{Op, place};
use crate::interp::operand::{sign_extend, truncate};
use crate::registers::gpr::RAX;

const A: u8 = RAX as u8;
const AH: u8 = place::HIGH_BYTE;

impl Cpu {
    /// DAA, DAS, AAA, AAS, AAM, AAD, BOUND.
    pub(super) fn exec_decimal<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Daa => self.adjust_packed(u8::wrapping_add),
            Mnemonic::Das => self.adjust_packed(u8::wrapping_sub),
            Mnemonic::Aaa => self.adjust_unpacked(|ax| ax.wrapping_add(0x106)),
            Mnemonic::Aas => self.adjust_unpacked(|ax| ax.wrapping_sub(0x106)),
            Mnemonic::Aam => self.split_digits(op.immediate as u8)?,
            Mnemonic::Aad => self.join_digits(op.immediate as u8),
            _ => self.check_bounds(env, op)?,
        }
        Ok(())
    }

    /// Sets AL, with SF, ZF and PF from it, and AF and CF.
    fn set_al(&mut self, al: u8, other_flags: u64) {
        self.set_gpr(A, 1, al.into());
        self.state.rflags = self.state.rflags & !ARITHMETIC | result_flags(al.into(), 1) | other_flags;
    }

    /// DAA and DAS: `adjust` adds or subtracts.
    fn adjust_packed(&mut self, adjust: fn(u8, u8) -> u8) {
        let old = self.gpr(A, 1) as u8;
        let (old_af, old_cf) = (self.state.rflags & AF != 0, self.state.rflags & CF != 0);
        let mut al = old;
        let low = old & 15 > 9 || old_af;
        let mut carry = false;
        if low {
            al = adjust(al, 6);
            // A borrow of DAS counts; a carry of DAA never comes without the second step.
            carry = (al > old) != (adjust(0, 1) == 1);
        }
        let high = old > 0x99 || old_cf;
        if high {
            al = adjust(al, 0x60);
        }
        self.set_al(al, flag_if(AF, low) | flag_if(CF, high || carry));
    }

    /// AAA and AAS: `adjust` adds or subtracts 6 in AL and 1 in AH.
    fn adjust_unpacked(&mut self, adjust: fn(u16) -> u16) {
        let mut ax = self.gpr(A, 2) as u16;
        let needed = ax & 15 > 9 || self.state.rflags & AF != 0;
        if needed {
            ax = adjust(ax);
        }
        self.set_gpr(AH, 1, (ax >> 8).into());
        self.set_al(ax as u8 & 15, flag_if(AF | CF, needed));
    }

    /// AAM.
    fn split_digits(&mut self, radix: u8) -> Result<(), Exception> {
        let al = self.gpr(A, 1) as u8;
        let (Some(high), Some(low)) = (al.checked_div(radix), al.checked_rem(radix)) else {
            return Err(Exception::DE);
        };
        self.set_gpr(AH, 1, high.into());
        self.set_al(low, 0);
        Ok(())
    }

    /// AAD.
    fn join_digits(&mut self, radix: u8) {
        let (al, ah) = (self.gpr(A, 1) as u8, self.gpr(AH, 1) as u8);
        self.set_gpr(AH, 1, 0);
        self.set_al(al.wrapping_add(ah.wrapping_mul(radix)), 0);
    }

    fn check_bounds<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let signed = |value| sign_extend(value, size) as i64;
        let index = signed(self.gpr(op.destination, size));
        let offset = self.effective_offset(op);
        let second = truncate(offset.wrapping_add(size as u64), op.address_size.into());
        let lower = signed(self.read(env, op.segment, offset, size)?);
        let upper = signed(self.read(env, op.segment, second, size)?);
        if index < lower || index > upper {
            return Err(Exception::new(vector::BR));
        }
        Ok(())
    }
}
