//! Decimal adjustment (SDM Vol. 2A, AAA to AAS and DAA, DAS) and BOUND.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::{Exception, vector};
use crate::interp::flags::{self, AF, ARITHMETIC, CF, flag_if, result_flags};
use crate::interp::op::{Op, place};
use crate::interp::operand::{sign_extend, truncate};
use crate::registers::gpr::RAX;

const A: u8 = RAX as u8;
const AH: u8 = place::HIGH_BYTE;

/// [`flags::add`] or [`flags::subtract`].
type Operation = fn(u64, u64, u64, usize) -> (u64, u64);

impl Cpu {
    /// DAA, DAS, AAA, AAS, AAM, AAD, BOUND.
    pub(super) fn exec_decimal<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Daa => self.adjust_packed(flags::add),
            Mnemonic::Das => self.adjust_packed(flags::subtract),
            Mnemonic::Aaa => self.adjust_unpacked(flags::add),
            Mnemonic::Aas => self.adjust_unpacked(flags::subtract),
            Mnemonic::Aam => self.split_digits(op.immediate as u8)?,
            Mnemonic::Aad => self.join_digits(op.immediate as u8),
            _ => self.check_bounds(env, op)?,
        }
        Ok(())
    }

    fn set_arithmetic_flags(&mut self, flags: u64) {
        self.state.rflags = self.state.rflags & !ARITHMETIC | flags;
    }

    /// DAA and DAS.
    fn adjust_packed(&mut self, operation: Operation) {
        let old = self.gpr(A, 1);
        let low = old & 15 > 9 || self.state.rflags & AF != 0;
        let high = old > 0x99 || self.state.rflags & CF != 0;
        let adjustment = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
        let (al, flags) = operation(old, adjustment, 0, 1);
        self.set_gpr(A, 1, al);
        // DAS of a digit that is too small borrows even without the second step.
        let carry = high || flags & CF != 0;
        self.set_arithmetic_flags(flags & !(AF | CF) | flag_if(AF, low) | flag_if(CF, carry));
    }

    /// AAA and AAS: 6 in AL and 1 in AH.
    fn adjust_unpacked(&mut self, operation: Operation) {
        let old = self.gpr(A, 2);
        let needed = old & 15 > 9 || self.state.rflags & AF != 0;
        let (ax, flags) = operation(old, if needed { 0x106 } else { 0 }, 0, 2);
        self.set_gpr(A, 2, ax & 0xff0f);
        self.set_arithmetic_flags(flags & !(AF | CF) | flag_if(AF | CF, needed));
    }

    /// AAM.
    fn split_digits(&mut self, radix: u8) -> Result<(), Exception> {
        let al = self.gpr(A, 1) as u8;
        let (Some(high), Some(low)) = (al.checked_div(radix), al.checked_rem(radix)) else {
            return Err(Exception::DE);
        };
        self.set_gpr(AH, 1, high.into());
        self.set_gpr(A, 1, low.into());
        self.set_arithmetic_flags(result_flags(low.into(), 1));
        Ok(())
    }

    /// AAD.
    fn join_digits(&mut self, radix: u8) {
        let tens = truncate(self.gpr(AH, 1).wrapping_mul(radix.into()), 1);
        let (al, flags) = flags::add(self.gpr(A, 1), tens, 0, 1);
        self.set_gpr(A, 2, al);
        self.set_arithmetic_flags(flags);
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
