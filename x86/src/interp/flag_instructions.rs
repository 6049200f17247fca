//! Instructions on single flags, CLI and STI.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::interp::flags::{AF, CF, PF, SF, ZF};
use crate::interp::op::{Op, place};
use crate::registers::gpr::RAX;
use crate::registers::{Cr4, Rflags};

const A: u8 = RAX as u8;
/// The flags of LAHF and SAHF.
const IN_AH: u64 = SF | ZF | AF | PF | CF;

impl Cpu {
    /// CLC, STC, CMC, CLD, STD, LAHF, SAHF, SALC, CLI, STI.
    pub(super) fn exec_flags(&mut self, op: &Op) -> Result<(), Exception> {
        let rflags = &mut self.state.rflags;
        match op.instruction.mnemonic() {
            Mnemonic::Clc => *rflags &= !CF,
            Mnemonic::Stc => *rflags |= CF,
            Mnemonic::Cmc => *rflags ^= CF,
            Mnemonic::Cld => *rflags &= !Rflags::DF.bits(),
            Mnemonic::Std => *rflags |= Rflags::DF.bits(),
            Mnemonic::Lahf => {
                let value = *rflags & IN_AH | Rflags::FIXED.bits();
                self.set_gpr(place::HIGH_BYTE, 1, value);
            }
            Mnemonic::Sahf => {
                self.state.rflags = self.state.rflags & !IN_AH | self.gpr(place::HIGH_BYTE, 1) & IN_AH;
            }
            Mnemonic::Salc => {
                let value = if self.state.rflags & CF != 0 { 0xff } else { 0 };
                self.set_gpr(A, 1, value);
            }
            mnemonic => self.set_interrupt_flag(mnemonic == Mnemonic::Sti)?,
        }
        Ok(())
    }

    /// CLI and STI, on IF or, with VME or PVI, on VIF (SDM Vol. 2A, CLI; Vol. 2B, STI).
    fn set_interrupt_flag(&mut self, enable: bool) -> Result<(), Exception> {
        let state = &mut self.state;
        let io_privilege_level = (state.rflags >> 12 & 3) as u8;
        let virtual_flag = if state.has_flags(Rflags::VM) {
            state.cr4_has(Cr4::VME)
        } else {
            state.cpl == 3 && state.cr4_has(Cr4::PVI)
        };
        let flag = if state.cpl <= io_privilege_level {
            Rflags::IF
        } else if virtual_flag && !(enable && state.has_flags(Rflags::VIP)) {
            Rflags::VIF
        } else {
            return Err(Exception::GP0);
        };
        if !enable {
            state.rflags &= !flag.bits();
        } else if !state.has_flags(flag) {
            state.rflags |= flag.bits();
            // Interrupts wait until the following instruction is done.
            state.interrupt_shadow = flag == Rflags::IF;
        }
        Ok(())
    }
}
