//! SYSCALL, SYSRET, SYSENTER and SYSEXIT (SDM Vol. 2B; APM Vol. 3). Intel's processors have SYSCALL in 64-bit
//! mode only, AMD's have SYSENTER outside long mode only.

use crate::cpu::Cpu;
use crate::cpuid::Vendor;
use crate::exception::Exception;
use crate::memory::is_canonical;
use crate::registers::{Cr0, Efer, Rflags, gpr};
use crate::state::{SegReg, Segment};

/// Flags that SYSRET loads from R11: all but RF, VM and the reserved ones.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

/// Size of the code that a fast system call leads to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    Bits32,
    Bits64,
}

/// A flat code segment at privilege level `cpl`.
fn flat_code(selector: u16, cpl: u8, size: Size) -> Segment {
    let bits = match size {
        Size::Bits32 => Segment::DB,
        Size::Bits64 => Segment::L,
    };
    flat(selector, cpl, bits | 0xb)
}

/// A flat stack segment at privilege level `cpl`.
fn flat_stack(selector: u16, cpl: u8) -> Segment {
    flat(selector, cpl, Segment::DB | 3)
}

fn flat(selector: u16, cpl: u8, attributes: u16) -> Segment {
    let level = u16::from(cpl);
    Segment {
        base: 0,
        limit: u32::MAX,
        selector: selector & !3 | level,
        attributes: attributes | Segment::G | Segment::P | Segment::S | level << 5,
    }
}

impl Cpu {
    /// #UD where this vendor has no SYSCALL and SYSRET.
    fn check_syscall(&self) -> Result<(), Exception> {
        let enabled = self.state.msr.efer & Efer::SCE.bits() != 0;
        let here = self.model.vendor == Vendor::Amd || self.in_64bit_mode();
        if enabled && here && self.state.cr0_has(Cr0::PE) { Ok(()) } else { Err(Exception::UD) }
    }

    /// SYSCALL.
    pub(crate) fn syscall(&mut self) -> Result<(), Exception> {
        self.check_syscall()?;
        let star = self.state.msr.star;
        let selector = (star >> 32) as u16 & !3;
        let flags = self.state.rflags & !Rflags::RF.bits();
        let mut size = Size::Bits32;
        let return_ip = self.next_rip;
        if self.in_long_mode() {
            size = Size::Bits64;
            let msr = &self.state.msr;
            self.next_rip = if self.in_64bit_mode() { msr.lstar } else { msr.cstar };
            self.state.gpr[gpr::RCX] = return_ip;
            self.state.gpr[11] = flags;
            self.state.rflags = flags & !self.state.msr.sfmask | Rflags::FIXED.bits();
        } else {
            self.next_rip = star & 0xffff_ffff;
            self.state.gpr[gpr::RCX] = return_ip;
            self.state.rflags = flags & !(Rflags::VM | Rflags::IF).bits();
        }
        self.set_code_segment(flat_code(selector, 0, size), 0);
        self.set_segment(SegReg::Ss, flat_stack(selector.wrapping_add(8), 0));
        Ok(())
    }

    /// SYSRET; `wide`: with a 64-bit operand size.
    pub(crate) fn sysret(&mut self, wide: bool) -> Result<(), Exception> {
        self.check_syscall()?;
        if self.state.cpl != 0 {
            return Err(Exception::GP0);
        }
        let target = self.state.gpr[gpr::RCX];
        // AMD's processors leave the address to fault in user mode.
        if wide && !is_canonical(target) && self.model.vendor == Vendor::Intel {
            return Err(Exception::GP0);
        }
        let selector = (self.state.msr.star >> 48) as u16;
        let long = self.in_long_mode();
        if long {
            self.state.rflags = self.state.gpr[11] & SYSRET_FLAGS | Rflags::FIXED.bits();
        } else {
            self.state.rflags |= Rflags::IF.bits();
        }
        if wide && long {
            self.set_code_segment(flat_code(selector.wrapping_add(16), 3, Size::Bits64), 3);
            self.next_rip = target;
        } else {
            self.set_code_segment(flat_code(selector, 3, Size::Bits32), 3);
            self.next_rip = target & 0xffff_ffff;
        }
        self.set_segment(SegReg::Ss, flat_stack(selector.wrapping_add(8), 3));
        Ok(())
    }

    /// #UD where this vendor has no SYSENTER and SYSEXIT, #GP(0) where they can't work.
    fn check_sysenter(&self) -> Result<(), Exception> {
        if self.model.vendor == Vendor::Amd && self.in_long_mode() {
            return Err(Exception::UD);
        }
        let usable = self.state.cr0_has(Cr0::PE) && self.state.msr.sysenter_cs & 0xfffc != 0;
        if usable { Ok(()) } else { Err(Exception::GP0) }
    }

    /// What SYSCALL and SYSRET load into CS and SS, between 64-bit code of user and supervisor mode, if they work
    /// there: `[[CS, SS] of SYSCALL, [CS, SS] of SYSRET]`.
    pub fn fast_system_calls(&self) -> Option<[[Segment; 2]; 2]> {
        self.check_syscall().ok()?;
        let star = self.state.msr.star;
        let (to, from) = ((star >> 32) as u16 & !3, (star >> 48) as u16);
        Some([
            [flat_code(to, 0, Size::Bits64), flat_stack(to.wrapping_add(8), 0)],
            [flat_code(from.wrapping_add(16), 3, Size::Bits64), flat_stack(from.wrapping_add(8), 3)],
        ])
    }

    /// SYSENTER.
    pub(crate) fn sysenter(&mut self) -> Result<(), Exception> {
        self.check_sysenter()?;
        let selector = self.state.msr.sysenter_cs as u16 & !3;
        let (mut ip, mut rsp) = (self.state.msr.sysenter_eip, self.state.msr.sysenter_esp);
        let mut size = Size::Bits64;
        if !self.in_long_mode() {
            size = Size::Bits32;
            ip &= 0xffff_ffff;
            rsp &= 0xffff_ffff;
        }
        self.state.rflags &= !(Rflags::VM | Rflags::IF | Rflags::RF).bits();
        self.set_code_segment(flat_code(selector, 0, size), 0);
        self.set_segment(SegReg::Ss, flat_stack(selector.wrapping_add(8), 0));
        self.state.gpr[gpr::RSP] = rsp;
        self.next_rip = ip;
        Ok(())
    }

    /// SYSEXIT; `wide`: with a 64-bit operand size.
    pub(crate) fn sysexit(&mut self, wide: bool) -> Result<(), Exception> {
        self.check_sysenter()?;
        if self.state.cpl != 0 {
            return Err(Exception::GP0);
        }
        let selector = self.state.msr.sysenter_cs as u16;
        let (mut ip, mut rsp) = (self.state.gpr[gpr::RDX], self.state.gpr[gpr::RCX]);
        if wide && !(is_canonical(ip) && is_canonical(rsp)) {
            return Err(Exception::GP0);
        }
        let (first, size) = if wide { (32, Size::Bits64) } else { (16, Size::Bits32) };
        if !wide {
            ip &= 0xffff_ffff;
            rsp &= 0xffff_ffff;
        }
        self.set_code_segment(flat_code(selector.wrapping_add(first), 3, size), 3);
        self.set_segment(SegReg::Ss, flat_stack(selector.wrapping_add(first + 8), 3));
        self.state.gpr[gpr::RSP] = rsp;
        self.next_rip = ip;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Machine, sel};

    const SYSCALL: &[u8] = &[0x0f, 0x05];
    const SYSRET: &[u8] = &[0x0f, 0x07];
    const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
    const SYSENTER: &[u8] = &[0x0f, 0x34];
    const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];

    fn machine(vendor: Vendor) -> Machine {
        let mut machine = Machine::long();
        alloc::sync::Arc::make_mut(&mut machine.cpu.model).vendor = vendor;
        let msr = &mut machine.cpu.state.msr;
        msr.star = 0x0033_0010 << 32;
        msr.lstar = 0xffff_8000_0000_1000;
        msr.cstar = 0xffff_8000_0000_2000;
        msr.sfmask = 0x300;
        msr.sysenter_cs = 0x10;
        msr.sysenter_esp = 0x9000;
        msr.sysenter_eip = 0xa000;
        machine.ring(sel::USER_CODE64, sel::USER_DATA);
        machine.cpu.state.rflags = 0x1_0302;
        machine
    }

    fn code(machine: &Machine) -> (u16, u16, u8) {
        let state = &machine.cpu.state;
        (state.seg[SegReg::Cs as usize].selector, state.seg[SegReg::Ss as usize].selector, state.cpl)
    }

    #[test]
    fn there_and_back() {
        let mut machine = machine(Vendor::Intel);
        machine.exec(SYSCALL).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.rflags), (0xffff_8000_0000_1000, 2));
        assert_eq!((state.gpr[gpr::RCX], state.gpr[11]), (0x5002, 0x302));
        assert_eq!(code(&machine), (0x10, 0x18, 0));
        assert!(machine.cpu.in_64bit_mode());
        machine.exec(SYSRETQ).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.rflags), (0x5002, 0x302));
        assert_eq!(code(&machine), (0x43, 0x3b, 3));
        assert!(machine.cpu.in_64bit_mode());
    }

    #[test]
    fn sysret_to_compatibility_mode_and_syscall_from_it() {
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let mut machine = machine(vendor);
            machine.exec(SYSCALL).unwrap();
            machine.exec(SYSRET).unwrap();
            assert_eq!(code(&machine), (0x33, 0x3b, 3));
            assert_eq!(machine.cpu.state.code_bits(), 32);
            let again = machine.exec(SYSCALL);
            if vendor == Vendor::Intel {
                assert_eq!(again, Err(Exception::UD));
            } else {
                assert_eq!(again, Ok(()));
                assert_eq!(machine.cpu.state.rip, 0xffff_8000_0000_2000);
            }
        }
    }

    #[test]
    fn a_non_canonical_return_faults_where_the_vendor_wants_it() {
        for (vendor, expected) in [(Vendor::Intel, Err(Exception::GP0)), (Vendor::Amd, Ok(()))] {
            let mut machine = machine(vendor);
            machine.exec(SYSCALL).unwrap();
            machine.cpu.state.gpr[gpr::RCX] = 1 << 47;
            assert_eq!(machine.exec(SYSRETQ), expected);
        }
    }

    #[test]
    fn privilege_and_enabling() {
        let mut machine = machine(Vendor::Intel);
        assert_eq!(machine.exec(SYSRETQ), Err(Exception::GP0));
        machine.cpu.state.msr.efer &= !Efer::SCE.bits();
        assert_eq!(machine.exec(SYSCALL), Err(Exception::UD));
        assert_eq!(machine.exec(SYSRETQ), Err(Exception::UD));
    }

    #[test]
    fn sysenter_and_sysexit() {
        let mut machine = machine(Vendor::Intel);
        machine.exec(SYSENTER).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.gpr[gpr::RSP]), (0xa000, 0x9000));
        assert_eq!((code(&machine), machine.cpu.state.rflags), ((0x10, 0x18, 0), 0x102));
        machine.cpu.state.gpr[gpr::RDX] = 0x5555;
        machine.cpu.state.gpr[gpr::RCX] = 0x6666;
        machine.exec(SYSEXITQ).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.gpr[gpr::RSP]), (0x5555, 0x6666));
        assert_eq!(code(&machine), (0x33, 0x3b, 3));
        machine.cpu.state.msr.sysenter_cs = 3;
        assert_eq!(machine.exec(SYSENTER), Err(Exception::GP0));
        let mut machine = super::tests::machine(Vendor::Amd);
        assert_eq!(machine.exec(SYSENTER), Err(Exception::UD));
    }
}
