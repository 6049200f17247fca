//! Exchanges, conversions, byte order.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::{self, ARITHMETIC, ZF, flag_if};
use crate::interp::op::{Op, place};
use crate::interp::operand::{sign_extend, truncate};
use crate::registers::gpr::{RAX, RBX, RCX, RDX};

const A: u8 = RAX as u8;
const D: u8 = RDX as u8;

/// The low `size` bytes in reverse order.
const fn reverse_bytes(value: u64, size: usize) -> u64 {
    value.swap_bytes() >> (64 - 8 * size as u32 & 63)
}

impl Cpu {
    /// XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B, BSWAP, MOVBE, XLAT, CBW and its kin.
    pub(super) fn exec_data<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        match op.instruction.mnemonic() {
            Mnemonic::Xchg => {
                let source = self.gpr(op.source, size);
                let old = self.modify(env, op, |_, rflags| (source, rflags))?;
                self.set_gpr(op.source, size, old);
            }
            Mnemonic::Xadd => self.exchange_add(env, op)?,
            Mnemonic::Cmpxchg => self.compare_exchange(env, op)?,
            Mnemonic::Cmpxchg8b => self.compare_exchange_8_bytes(env, op)?,
            Mnemonic::Cmpxchg16b => self.compare_exchange_16_bytes(env, op)?,
            Mnemonic::Bswap => {
                // The result for 16 bits is undefined; processors of both vendors give zero.
                let old = self.gpr(op.destination, size);
                let new = if size == 2 { 0 } else { reverse_bytes(old, size) };
                self.set_gpr(op.destination, size, new);
            }
            Mnemonic::Movbe => {
                let value = self.read_source(env, op)?;
                self.write_destination(env, op, reverse_bytes(value, size))?;
            }
            Mnemonic::Xlatb => {
                let offset = self.effective_offset(op).wrapping_add(self.gpr(A, 1));
                let value = self.read(env, op.segment, truncate(offset, op.address_size.into()), 1)?;
                self.set_gpr(A, 1, value);
            }
            Mnemonic::Cbw => self.set_gpr(A, 2, sign_extend(self.gpr(A, 1), 1)),
            Mnemonic::Cwde => self.set_gpr(A, 4, sign_extend(self.gpr(A, 2), 2)),
            Mnemonic::Cdqe => self.set_gpr(A, 8, sign_extend(self.gpr(A, 4), 4)),
            Mnemonic::Cwd => self.spread_sign(2),
            Mnemonic::Cdq => self.spread_sign(4),
            _ => self.spread_sign(8),
        }
        Ok(())
    }

    /// CWD, CDQ, CQO: rDX gets the sign of rAX.
    fn spread_sign(&mut self, size: usize) {
        let negative = flags::sign(self.state.gpr[RAX], size) != 0;
        self.set_gpr(D, size, if negative { u64::MAX } else { 0 });
    }

    fn exchange_add<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let source = self.gpr(op.source, size);
        let old = self.modify(env, op, |old, rflags| {
            let (sum, flags) = flags::add(old, source, 0, size);
            (sum, rflags & !ARITHMETIC | flags)
        })?;
        // With the same register twice, the sum stays.
        if op.source != op.destination {
            self.set_gpr(op.source, size, old);
        }
        Ok(())
    }

    fn compare_exchange<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let size = usize::from(op.size);
        let (expected, new) = (self.gpr(A, size), self.gpr(op.source, size));
        let update = |old, rflags| {
            let (_, flags) = flags::subtract(expected, old, 0, size);
            (if old == expected { new } else { old }, rflags & !ARITHMETIC | flags)
        };
        let old = if op.destination == place::MEMORY {
            // Written in either case.
            self.modify(env, op, update)?
        } else {
            // Not written, nor its upper half cleared, if they differ.
            let old = self.gpr(op.destination, size);
            let (value, rflags) = update(old, self.state.rflags);
            self.state.rflags = rflags;
            if old == expected {
                self.set_gpr(op.destination, size, value);
            }
            old
        };
        if old != expected {
            self.set_gpr(A, size, old);
        }
        Ok(())
    }

    fn compare_exchange_8_bytes<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let pair = |high: u64, low: u64| high << 32 | truncate(low, 4);
        let gpr = &self.state.gpr;
        let (expected, new) = (pair(gpr[RDX], gpr[RAX]), pair(gpr[RCX], gpr[RBX]));
        let offset = self.effective_offset(op);
        let old = self.read_modify_write(env, op.segment, offset, 8, op.locked, &mut |old| {
            if old == expected { new } else { old }
        })?;
        self.state.rflags = self.state.rflags & !ZF | flag_if(ZF, old == expected);
        if old != expected {
            self.set_gpr(A, 4, old);
            self.set_gpr(D, 4, old >> 32);
        }
        Ok(())
    }

    fn compare_exchange_16_bytes<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let gpr = &self.state.gpr;
        let (expected, new) = (pair(gpr[RDX], gpr[RAX]), pair(gpr[RCX], gpr[RBX]));
        let offset = self.effective_offset(op);
        let old = self.read_modify_write128(env, op.segment, offset, &mut |old| {
            if old == expected { new } else { old }
        })?;
        self.state.rflags = self.state.rflags & !ZF | flag_if(ZF, old == expected);
        if old != expected {
            self.state.gpr[RAX] = old as u64;
            self.state.gpr[RDX] = (old >> 64) as u64;
        }
        Ok(())
    }
}
