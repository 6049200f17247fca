//! Shifts and rotates, bit tests, scans and counts, and the BMI1 and BMI2 extensions.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::{self, AF, ARITHMETIC, CF, OF, Shift, ZF, flag_if};
use crate::interp::op::{Op, place};
use crate::interp::operand::{sign_extend, truncate};
use crate::registers::gpr::RCX;

/// Bits of a shift count that are used (SDM Vol. 2B, SAL/SAR/SHL/SHR).
const fn count_mask(size: usize) -> u64 {
    if size == 8 { 63 } else { 31 }
}

/// PDEP: the low bits of `source` to the places of the ones in `mask`.
fn deposit(source: u64, mut mask: u64) -> u64 {
    let (mut result, mut bit) = (0, 0);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source >> bit & 1 != 0 {
            result |= lowest;
        }
        mask ^= lowest;
        bit += 1;
    }
    result
}

/// PEXT: the bits of `source` at the places of the ones in `mask`, packed.
fn extract(source: u64, mut mask: u64) -> u64 {
    let (mut result, mut bit) = (0, 0);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & lowest != 0 {
            result |= 1 << bit;
        }
        mask ^= lowest;
        bit += 1;
    }
    result
}

impl Cpu {
    /// Shifts and rotates by CL or an immediate.
    #[inline(always)]
    pub(super) fn shift<E: Env>(&mut self, env: &mut E, op: &Op, kind: Shift) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let count = if op.source == place::IMMEDIATE { op.immediate } else { self.state.gpr[RCX] };
        let count = (count & count_mask(size)) as u32;
        self.modify(env, op, |old, rflags| flags::shift(kind, old, count, size, rflags))?;
        Ok(())
    }

    /// Everything else of this file.
    pub(super) fn exec_bits<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => self.bit_test(env, op),
            Mnemonic::Shld | Mnemonic::Shrd => self.double_shift(env, op),
            Mnemonic::Bsf
            | Mnemonic::Bsr
            | Mnemonic::Tzcnt
            | Mnemonic::Lzcnt
            | Mnemonic::Popcnt
            | Mnemonic::Blsi
            | Mnemonic::Blsmsk
            | Mnemonic::Blsr => self.bit_scan(env, op),
            _ => self.bit_manipulation(env, op),
        }
    }

    fn bit_test<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let bits = 8 * size as u64;
        let index = if op.source == place::IMMEDIATE { op.immediate } else { self.gpr(op.source, size) };
        let bit = 1u64 << (index & (bits - 1));
        let mnemonic = op.instruction.mnemonic();
        let update = move |old: u64| match mnemonic {
            Mnemonic::Bts => old | bit,
            Mnemonic::Btr => old & !bit,
            Mnemonic::Btc => old ^ bit,
            _ => old,
        };
        let old = if op.destination == place::MEMORY {
            let mut offset = self.effective_offset(op);
            if op.source != place::IMMEDIATE {
                // The register addresses a bit string that reaches both ways from the operand.
                let unit = (sign_extend(index, size) as i64 >> bits.trailing_zeros()) as u64;
                offset = offset.wrapping_add(unit.wrapping_mul(size as u64));
                offset = truncate(offset, op.address_size.into());
            }
            if mnemonic == Mnemonic::Bt {
                self.read(env, op.segment, offset, size)?
            } else {
                self.read_modify_write(env, op.segment, offset, size, op.locked, &mut |old| update(old))?
            }
        } else {
            let old = self.gpr(op.destination, size);
            if mnemonic != Mnemonic::Bt {
                self.set_gpr(op.destination, size, update(old));
            }
            old
        };
        self.state.rflags = self.state.rflags & !CF | flag_if(CF, old & bit != 0);
        Ok(())
    }

    fn double_shift<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let left = op.instruction.mnemonic() == Mnemonic::Shld;
        let fill = self.gpr(op.source, size);
        // The third operand is an immediate or CL.
        let by_cl = op.instruction.op_kind(2) == iced_x86::OpKind::Register;
        let count = if by_cl { self.state.gpr[RCX] } else { op.immediate };
        let count = (count & count_mask(size)) as u32;
        self.modify(env, op, |old, rflags| flags::double_shift(left, old, fill, count, size, rflags))?;
        Ok(())
    }

    /// Instructions with a destination register and one source.
    fn bit_scan<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let bits = 8 * size as u64;
        let mnemonic = op.instruction.mnemonic();
        let three = matches!(mnemonic, Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr);
        let value = self.read_source(env, op)?;
        let leading = u64::from(value.leading_zeros()).wrapping_sub(64 - bits);
        let trailing = u64::from(value.trailing_zeros()).min(bits);
        let overflow = self.state.rflags & OF;
        let (result, flags) = match mnemonic {
            Mnemonic::Bsf | Mnemonic::Bsr if value == 0 => {
                // The destination stays as it is.
                self.state.rflags |= ZF;
                return Ok(());
            }
            Mnemonic::Bsf => (trailing, self.state.rflags & ARITHMETIC & !ZF),
            Mnemonic::Bsr => (bits - 1 - leading, self.state.rflags & ARITHMETIC & !ZF),
            Mnemonic::Tzcnt => (trailing, overflow | flag_if(CF, value == 0) | flag_if(ZF, trailing == 0)),
            Mnemonic::Lzcnt => (leading, overflow | flag_if(CF, value == 0) | flag_if(ZF, leading == 0)),
            Mnemonic::Popcnt => (value.count_ones().into(), flag_if(ZF, value == 0)),
            Mnemonic::Blsi => (value & value.wrapping_neg(), flag_if(CF, value != 0)),
            Mnemonic::Blsmsk => (value ^ value.wrapping_sub(1), flag_if(CF, value == 0)),
            _ => (value & value.wrapping_sub(1), flag_if(CF, value == 0)),
        };
        let result = truncate(result, size);
        let flags = if three { flags | flags::result_flags(result, size) } else { flags };
        self.set_gpr(op.destination, size, result);
        self.state.rflags = self.state.rflags & !ARITHMETIC | flags;
        Ok(())
    }

    /// Instructions of BMI1 and BMI2 with two sources.
    fn bit_manipulation<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let first = self.read_source(env, op)?;
        let second = self.read_operand(env, op, 2)?;
        let count = (second & count_mask(size)) as u32;
        let bits = 8 * size as u64;
        // The result, whether flags follow it, and CF and other flags that do not.
        let (result, changes, flags) = match op.instruction.mnemonic() {
            Mnemonic::Andn => (!first & second, true, 0),
            Mnemonic::Bextr => {
                let (start, length) = (second & 0xff, second >> 8 & 0xff);
                let shifted = if start < 64 { first >> start } else { 0 };
                let field = if length < 64 { shifted & ((1 << length) - 1) } else { shifted };
                (field, true, AF)
            }
            Mnemonic::Bzhi => {
                let index = second & 0xff;
                let kept = if index < bits { first & ((1 << index) - 1) } else { first };
                (kept, true, flag_if(CF, index >= bits))
            }
            Mnemonic::Rorx => (flags::shift(Shift::Ror, first, count, size, 0).0, false, 0),
            Mnemonic::Sarx => (flags::shift(Shift::Sar, first, count, size, 0).0, false, 0),
            Mnemonic::Shlx => (first << count, false, 0),
            Mnemonic::Shrx => (first >> count, false, 0),
            Mnemonic::Pdep => (deposit(first, second), false, 0),
            _ => (extract(first, second), false, 0),
        };
        let result = truncate(result, size);
        self.set_gpr(op.destination, size, result);
        if changes {
            let flags = flags | flags::result_flags(result, size);
            self.state.rflags = self.state.rflags & !ARITHMETIC | flags;
        }
        Ok(())
    }
}
