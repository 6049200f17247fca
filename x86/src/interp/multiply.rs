//! Multiplication, division, multi-precision addition, CRC32.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::{self, CF, OF, flag_if};
use crate::interp::op::Op;
use crate::interp::operand::{sign_extend, truncate};
use crate::registers::gpr::{RAX, RDX};

const A: u8 = RAX as u8;
const D: u8 = RDX as u8;
const AH: u8 = crate::interp::op::place::HIGH_BYTE;

/// The CRC-32C polynomial 0x11EDC6F41 with its bits reversed (SDM Vol. 2A, CRC32).
const CRC32C: u32 = 0x82f6_3b78;

impl Cpu {
    /// MUL, IMUL, DIV, IDIV, MULX, ADCX, ADOX, CRC32.
    pub(super) fn exec_multiply<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Mul => self.multiply_unsigned(env, op),
            Mnemonic::Imul if op.instruction.op_count() == 1 => self.multiply_wide_signed(env, op),
            Mnemonic::Imul => self.multiply_signed(env, op),
            Mnemonic::Div => self.divide_unsigned(env, op),
            Mnemonic::Idiv => self.divide_signed(env, op),
            Mnemonic::Mulx => self.multiply_without_flags(env, op),
            Mnemonic::Adcx => self.add_with_one_flag(env, op, CF),
            Mnemonic::Adox => self.add_with_one_flag(env, op, OF),
            _ => self.crc32(env, op),
        }
    }

    /// Sets CF and OF alike.
    fn set_overflow(&mut self, overflow: bool) {
        self.state.rflags = self.state.rflags & !(CF | OF) | flag_if(CF | OF, overflow);
    }

    /// Writes a double-size result to AX, DX:AX, EDX:EAX or RDX:RAX.
    fn set_wide(&mut self, size: usize, low: u64, high: u64) {
        self.set_gpr(A, size, low);
        self.set_gpr(if size == 1 { AH } else { D }, size, high);
    }

    /// AX, DX:AX, EDX:EAX or RDX:RAX.
    fn wide(&self, size: usize) -> u128 {
        let high = self.gpr(if size == 1 { AH } else { D }, size);
        u128::from(high) << (8 * size) | u128::from(self.gpr(A, size))
    }

    fn multiply_unsigned<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let factor = self.read_destination(env, op)?;
        let product = u128::from(self.gpr(A, size)) * u128::from(factor);
        let high = (product >> (8 * size)) as u64;
        self.set_wide(size, product as u64, high);
        self.set_overflow(high != 0);
        Ok(())
    }

    fn multiply_wide_signed<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let factor = self.read_destination(env, op)?;
        let signed = |value| i128::from(sign_extend(value, size) as i64);
        let product = signed(self.gpr(A, size)) * signed(factor);
        self.set_wide(size, product as u64, (product >> (8 * size)) as u64);
        self.set_overflow(signed(product as u64) != product);
        Ok(())
    }

    /// IMUL with two or three operands.
    fn multiply_signed<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let left = self.read_source(env, op)?;
        let right =
            if op.instruction.op_count() == 3 { op.immediate } else { self.gpr(op.destination, size) };
        let signed = |value| i128::from(sign_extend(value, size) as i64);
        let product = signed(left) * signed(right);
        self.set_gpr(op.destination, size, product as u64);
        self.set_overflow(signed(product as u64) != product);
        Ok(())
    }

    fn divide_unsigned<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let divisor = u128::from(self.read_destination(env, op)?);
        let dividend = self.wide(size);
        let (Some(quotient), Some(remainder)) =
            (dividend.checked_div(divisor), dividend.checked_rem(divisor))
        else {
            return Err(Exception::DE);
        };
        if quotient >> (8 * size) != 0 {
            return Err(Exception::DE);
        }
        self.set_wide(size, quotient as u64, remainder as u64);
        Ok(())
    }

    fn divide_signed<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let signed = |value| i128::from(sign_extend(value, size) as i64);
        let divisor = signed(self.read_destination(env, op)?);
        let unused = 128 - 16 * size;
        let dividend = (self.wide(size) << unused) as i128 >> unused;
        let (Some(quotient), Some(remainder)) =
            (dividend.checked_div(divisor), dividend.checked_rem(divisor))
        else {
            return Err(Exception::DE);
        };
        if signed(quotient as u64) != quotient {
            return Err(Exception::DE);
        }
        self.set_wide(size, quotient as u64, remainder as u64);
        Ok(())
    }

    /// MULX: the high half to the first operand, the low half to the second; the high one wins.
    fn multiply_without_flags<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let factor = self.read_operand(env, op, 2)?;
        let product = u128::from(self.gpr(D, size)) * u128::from(factor);
        self.set_gpr(op.source, size, product as u64);
        self.set_gpr(op.destination, size, (product >> (8 * size)) as u64);
        Ok(())
    }

    /// ADCX and ADOX: `carry` is both the carry in and the only flag that changes.
    fn add_with_one_flag<E: Env>(&mut self, env: &mut E, op: &Op, carry: u64) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let right = self.read_source(env, op)?;
        let carry_in = u64::from(self.state.rflags & carry != 0);
        let (sum, flags) = flags::add(self.gpr(op.destination, size), right, carry_in, size);
        self.set_gpr(op.destination, size, sum);
        self.state.rflags = self.state.rflags & !carry | flag_if(carry, flags & CF != 0);
        Ok(())
    }

    fn crc32<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let data = self.read_source(env, op)?;
        let mut crc = self.gpr(op.destination, 4) as u32;
        for byte in data.to_le_bytes().iter().take(op.source_size.into()) {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 != 0 { CRC32C } else { 0 };
            }
        }
        self.set_gpr(op.destination, 8, truncate(crc.into(), 4));
        Ok(())
    }
}
