//! System instructions: control and debug registers, MSRs, CPUID, time-stamp counter, TLB and cache control
//! (SDM Vol. 2; APM Vol. 3). Segment and descriptor-table instructions are in [`crate::segment`].

use iced_x86::{Code, Mnemonic, Register};

use crate::cpu::Cpu;
use crate::cpuid::{Vendor, Word};
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::Op;
use crate::interp::operand::memory_segment;
use crate::memory::is_canonical;
use crate::registers::gpr::{RAX, RBX, RCX, RDX};
use crate::registers::{Cr0, Cr4, Rflags};
use crate::state::SegReg;

/// Bits of CR0 that LMSW writes; it can set PE, but not clear it.
const LMSW_BITS: u64 = 0b1111;
/// Bytes that CLZERO clears: a cache line.
const CACHE_LINE: u64 = 64;

impl Cpu {
    /// Executes `op` if it is one of the instructions of this module; false if it is not.
    pub fn exec_system_op<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Mov => return self.exec_mov_special(env, op),
            Mnemonic::Rdtsc => self.exec_rdtsc(env)?,
            Mnemonic::Rdtscp => {
                self.exec_rdtsc(env)?;
                self.state.gpr[RCX] = self.state.msr.tsc_aux;
            }
            Mnemonic::Rdpid => {
                let aux = self.state.msr.tsc_aux;
                self.set_register(op.instruction.op0_register(), aux);
            }
            Mnemonic::Rdpmc => self.exec_rdpmc()?,
            Mnemonic::Cpuid => self.exec_cpuid(env),
            Mnemonic::Rdmsr => {
                self.require_cpl0()?;
                let value = self.read_msr(env, self.state.gpr[RCX] as u32)?;
                self.set_edx_eax(value);
            }
            Mnemonic::Wrmsr => {
                self.require_cpl0()?;
                self.write_msr(env, self.state.gpr[RCX] as u32, self.edx_eax())?;
            }
            Mnemonic::Swapgs => {
                self.require_cpl0()?;
                let base = &mut self.state.seg[SegReg::Gs as usize].base;
                core::mem::swap(base, &mut self.state.msr.kernel_gs_base);
            }
            Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
                self.exec_fs_gs_base(op)?
            }
            Mnemonic::Clts => {
                self.require_cpl0()?;
                self.state.cr0 &= !Cr0::TS.bits();
            }
            Mnemonic::Lmsw => {
                self.require_cpl0()?;
                let value = self.read_operand(env, op, 0)?;
                let kept = self.state.cr0 & !(LMSW_BITS & !Cr0::PE.bits());
                self.write_cr0(env, kept | value & LMSW_BITS)?;
            }
            Mnemonic::Smsw => {
                if self.state.cpl != 0 && self.state.cr4_has(Cr4::UMIP) {
                    return Err(Exception::GP0);
                }
                self.write_operand(env, op, 0, self.state.cr0)?;
            }
            Mnemonic::Stac => self.set_ac(true)?,
            Mnemonic::Clac => self.set_ac(false)?,
            Mnemonic::Xgetbv => self.exec_xgetbv()?,
            Mnemonic::Xsetbv => self.exec_xsetbv()?,
            Mnemonic::Invlpg => {
                self.require_cpl0()?;
                let linear = self.linear_unchecked(op);
                self.flush_tlb_page(linear);
            }
            Mnemonic::Invpcid => self.exec_invpcid(env, op)?,
            // Guest memory is coherent: there is nothing to write back or to drop.
            Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => self.require_cpl0()?,
            Mnemonic::Clzero => self.exec_clzero(env, op)?,
            Mnemonic::Vmcall | Mnemonic::Vmmcall => {
                self.state.gpr[RAX] = env.hypercall(&self.state).ok_or(Exception::UD)?;
            }
            // Outside of system management mode.
            Mnemonic::Rsm => return Err(Exception::UD),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn require_cpl0(&self) -> Result<(), Exception> {
        if self.state.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
    }

    fn edx_eax(&self) -> u64 {
        self.state.gpr[RDX] << 32 | self.state.gpr[RAX] & 0xffff_ffff
    }

    fn set_edx_eax(&mut self, value: u64) {
        self.state.gpr[RAX] = value & 0xffff_ffff;
        self.state.gpr[RDX] = value >> 32;
    }

    fn exec_rdtsc<E: Env>(&mut self, env: &mut E) -> Result<(), Exception> {
        if self.state.cr4_has(Cr4::TSD) {
            self.require_cpl0()?;
        }
        self.set_edx_eax(env.tsc());
        Ok(())
    }

    /// RDPMC: on AMD's processors four counters that never count, on Intel's none.
    fn exec_rdpmc(&mut self) -> Result<(), Exception> {
        if !self.state.cr4_has(Cr4::PCE) {
            self.require_cpl0()?;
        }
        if self.model.vendor == Vendor::Intel || self.state.gpr[RCX] as u32 > 3 {
            return Err(Exception::GP0);
        }
        self.set_edx_eax(0);
        Ok(())
    }

    fn exec_cpuid<E: Env>(&mut self, env: &mut E) {
        let [eax, ebx, ecx, edx] = self.cpuid(env, self.state.gpr[RAX] as u32, self.state.gpr[RCX] as u32);
        for (register, value) in [(RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)] {
            self.state.gpr[register] = value.into();
        }
    }

    /// MOV to and from control and debug registers; false for every other MOV.
    fn exec_mov_special<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let instruction = &op.instruction;
        let (to, from) = (instruction.op0_register(), instruction.op1_register());
        match instruction.code() {
            Code::Mov_cr_r32 | Code::Mov_cr_r64 => self.write_control(env, to, self.register(from))?,
            Code::Mov_r32_cr | Code::Mov_r64_cr => {
                let value = self.read_control(env, from)?;
                self.set_register(to, value);
            }
            Code::Mov_dr_r32 | Code::Mov_dr_r64 => {
                let number = self.debug_register_number(to)?;
                self.write_debug_register(number, self.register(from))?;
            }
            Code::Mov_r32_dr | Code::Mov_r64_dr => {
                let number = self.debug_register_number(from)?;
                let value = self.state.dr[number & 7];
                self.set_register(to, value);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write_control<E: Env>(&mut self, env: &mut E, to: Register, value: u64) -> Result<(), Exception> {
        self.require_control_register(to)?;
        match to {
            Register::CR0 => self.write_cr0(env, value),
            Register::CR2 => {
                self.state.cr2 = value;
                Ok(())
            }
            Register::CR3 => self.load_cr3(env, value),
            Register::CR4 => self.write_cr4(env, value),
            _ if value > 15 => Err(Exception::GP0),
            _ => {
                env.set_cr8(value as u8);
                Ok(())
            }
        }
    }

    fn read_control<E: Env>(&mut self, env: &mut E, from: Register) -> Result<u64, Exception> {
        self.require_control_register(from)?;
        Ok(match from {
            Register::CR0 => self.state.cr0,
            Register::CR2 => self.state.cr2,
            Register::CR3 => self.state.cr3,
            Register::CR4 => self.state.cr4,
            _ => env.cr8().into(),
        })
    }

    /// #UD for a control register that does not exist, before #GP(0) for the privilege level.
    fn require_control_register(&self, register: Register) -> Result<(), Exception> {
        match register {
            Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8 => {
                self.require_cpl0()
            }
            _ => Err(Exception::UD),
        }
    }

    /// RDFSBASE and its kin; only 64-bit mode decodes them.
    fn exec_fs_gs_base(&mut self, op: &Op) -> Result<(), Exception> {
        if !self.in_64bit_mode() || !self.state.cr4_has(Cr4::FSGSBASE) {
            return Err(Exception::UD);
        }
        let mnemonic = op.instruction.mnemonic();
        let segment =
            if matches!(mnemonic, Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) { SegReg::Fs } else { SegReg::Gs };
        let register = op.instruction.op0_register();
        if matches!(mnemonic, Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
            let base = self.state.seg[segment as usize].base;
            self.set_register(register, base);
            return Ok(());
        }
        let base = self.register(register);
        if !is_canonical(base) {
            return Err(Exception::GP0);
        }
        self.state.seg[segment as usize].base = base;
        Ok(())
    }

    /// STAC and CLAC.
    fn set_ac(&mut self, value: bool) -> Result<(), Exception> {
        if self.state.cpl != 0 {
            return Err(Exception::UD);
        }
        let ac = Rflags::AC.bits();
        self.state.rflags = if value { self.state.rflags | ac } else { self.state.rflags & !ac };
        Ok(())
    }

    fn exec_xgetbv(&mut self) -> Result<(), Exception> {
        if !self.state.cr4_has(Cr4::OSXSAVE) {
            return Err(Exception::UD);
        }
        match self.state.gpr[RCX] as u32 {
            0 => {}
            // XCR0 and XINUSE: every component counts as in use.
            1 if self.model.has(Word::LDs1Eax, 2) => {}
            _ => return Err(Exception::GP0),
        }
        self.set_edx_eax(self.state.xcr0);
        Ok(())
    }

    fn exec_xsetbv(&mut self) -> Result<(), Exception> {
        if !self.state.cr4_has(Cr4::OSXSAVE) {
            return Err(Exception::UD);
        }
        self.require_cpl0()?;
        if self.state.gpr[RCX] as u32 != 0 {
            return Err(Exception::GP0);
        }
        self.write_xcr0(self.edx_eax())
    }

    /// Linear address of the memory operand without any check, as INVLPG takes it.
    fn linear_unchecked(&self, op: &Op) -> u64 {
        let (segment, offset) = self.effective_address(op);
        let long = self.in_64bit_mode();
        let base = match segment {
            SegReg::Fs | SegReg::Gs => self.state.seg[segment as usize].base,
            _ if long => 0,
            _ => self.state.seg[segment as usize].base,
        };
        let linear = base.wrapping_add(offset);
        if long { linear } else { linear & 0xffff_ffff }
    }

    fn exec_invpcid<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        self.require_cpl0()?;
        let kind = self.register(op.instruction.op0_register());
        let (segment, offset) = self.effective_address(op);
        let mut descriptor = [0; 16];
        self.read_bytes(env, segment, offset, &mut descriptor)?;
        let descriptor = u128::from_le_bytes(descriptor);
        let (pcid, linear) = (descriptor as u64, (descriptor >> 64) as u64);
        let bad_pcid = pcid & !0xfff != 0 || kind < 2 && pcid != 0 && !self.state.cr4_has(Cr4::PCIDE);
        if kind > 3 || bad_pcid || kind == 0 && !is_canonical(linear) {
            return Err(Exception::GP0);
        }
        self.invalidate_pcid(kind, (pcid & 0xfff) as u16, linear);
        Ok(())
    }

    /// CLZERO (APM Vol. 3): clears the cache line that rAX points into.
    fn exec_clzero<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let register = match op.instruction.code() {
            Code::Clzerow => Register::AX,
            Code::Clzerod => Register::EAX,
            _ => Register::RAX,
        };
        let line = self.register(register) & !(CACHE_LINE - 1);
        self.write_bytes(env, memory_segment(&op.instruction), line, &[0; CACHE_LINE as usize])
    }
}

#[cfg(test)]
#[path = "system_tests.rs"]
mod tests;
