//! Debug registers, breakpoints and single-stepping (SDM Vol. 3B, chapter 18; APM Vol. 2, section 13.1).

use iced_x86::Register;

use crate::cpu::{Access, Cpu};
use crate::exception::Exception;
use crate::registers::{Cr4, Rflags};

/// Bits of DR6.
mod dr6 {
    /// Breakpoints 0 to 3 were hit.
    pub const HITS: u64 = 0b1111;
    /// A debug register was accessed while DR7.GD was set.
    pub const BD: u64 = 1 << 13;
    /// Single step.
    pub const BS: u64 = 1 << 14;
    /// Switched to a task whose T flag is set.
    pub const BT: u64 = 1 << 15;
    pub const WRITABLE: u64 = HITS | BD | BS | BT;
    pub const ONES: u64 = 0xffff_0ff0;
}

/// Bits of DR7.
mod dr7 {
    /// L0, G0, … L3, G3.
    pub const ENABLES: u64 = 0xff;
    /// General detect.
    pub const GD: u64 = 1 << 13;
    /// Enables, LE, GE, GD, and four bits for each breakpoint.
    pub const WRITABLE: u64 = 0xffff_23ff;
    pub const ONES: u64 = 0x400;
}

/// IA32_DEBUGCTL: RFLAGS.TF steps from branch to branch.
const DEBUGCTL_BTF: u64 = 1 << 1;

/// What a breakpoint waits for: the R/W field of DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Execution,
    Write,
    /// Port access, with CR4.DE.
    Io,
    ReadWrite,
}

/// What of the debug registers is at work; kept beside them so that nothing is looked up for every instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DebugWatch {
    /// Breakpoints 0 to 3 that are enabled for instruction fetches, a bit each.
    execution: u8,
    /// … for data.
    data: u8,
    /// … for ports.
    io: u8,
    /// Data and port breakpoints that were hit and not reported yet.
    hits: u8,
}

impl Cpu {
    /// Number of the debug register that an instruction names: 4 and 5 stand for 6 and 7, or are undefined with
    /// CR4.DE. Does the checks that come before the access: #UD, #GP(0), and #DB if DR7.GD is set.
    pub(crate) fn debug_register_number(&mut self, register: Register) -> Result<usize, Exception> {
        let number = (register as usize).wrapping_sub(Register::DR0 as usize);
        if number > 7 || matches!(number, 4 | 5) && self.state.cr4_has(Cr4::DE) {
            return Err(Exception::UD);
        }
        if self.state.cpl != 0 {
            return Err(Exception::GP0);
        }
        if self.state.dr[7] & dr7::GD != 0 {
            return Err(self.debug_exception(dr6::BD));
        }
        Ok(if number < 4 { number } else { number | 2 })
    }

    /// Writes a debug register: 0 to 3, 6 or 7.
    pub(crate) fn write_debug_register(&mut self, number: usize, value: u64) -> Result<(), Exception> {
        if number >= 6 && value >> 32 != 0 {
            return Err(Exception::GP0);
        }
        match number {
            0..=3 => self.state.dr[number] = value,
            6 => self.state.dr[6] = value & dr6::WRITABLE | dr6::ONES,
            _ => self.state.dr[7] = value & dr7::WRITABLE | dr7::ONES,
        }
        self.debug_changed();
        Ok(())
    }

    /// To be called when DR0 to DR3, DR7 or CR4.DE have changed.
    pub(crate) fn debug_changed(&mut self) {
        let before = self.watch;
        let mut watch = DebugWatch { hits: before.hits, ..DebugWatch::default() };
        for number in 0..4 {
            let bit = 1 << number;
            if self.state.dr[7] & dr7::ENABLES & 0b11 << (2 * number) == 0 {
                continue;
            }
            match self.breakpoint_kind(number) {
                Kind::Execution => watch.execution |= bit,
                Kind::Write | Kind::ReadWrite => watch.data |= bit,
                Kind::Io if self.state.cr4_has(Cr4::DE) => watch.io |= bit,
                Kind::Io => {}
            }
        }
        self.watch = watch;
        // Watched pages stay out of the TLB, so that accesses to them come to `note_data_access`.
        if before.data | watch.data != 0 {
            self.flush_tlb();
        }
    }

    /// Whether breakpoints are enabled or a debug trap is pending: the run loop then asks
    /// [`Cpu::instruction_breakpoint`] before each instruction and [`Cpu::debug_trap`] after it.
    #[inline(always)]
    pub(crate) fn debug_active(&self) -> bool {
        self.watch != DebugWatch::default()
    }

    /// Before an instruction: the fault if a breakpoint stands at it (SDM Vol. 3B, section 18.3.1.1).
    pub(crate) fn instruction_breakpoint(&mut self) -> Result<(), Exception> {
        if self.watch.execution == 0 || self.state.has_flags(Rflags::RF) {
            return Ok(());
        }
        let linear = self.code_address(self.state.rip);
        let hits = self.matching(self.watch.execution, |cpu, number| cpu.state.dr[number] == linear);
        if hits == 0 { Ok(()) } else { Err(self.debug_exception(hits.into())) }
    }

    /// After an instruction without a fault: the trap if it hit data or port breakpoints, or if RFLAGS.TF was
    /// set when it began (`stepping`). `branched`: it did not go on to the following instruction. The trap's return
    /// address is the next instruction.
    pub(crate) fn debug_trap(&mut self, stepping: bool, branched: bool) -> Result<(), Exception> {
        // MOV SS and POP SS hold debug traps back for one instruction (SDM Vol. 3A, section 6.8.3).
        if self.state.ss_shadow {
            return Ok(());
        }
        let by_branch = self.state.msr.debugctl & DEBUGCTL_BTF != 0;
        let mut bits = u64::from(self.watch.hits);
        if stepping && (branched || !by_branch) {
            bits |= dr6::BS;
        }
        if bits == 0 { Ok(()) } else { Err(self.debug_exception(bits)) }
    }

    /// When an instruction has faulted: its accesses count as not made.
    pub(crate) fn forget_debug_hits(&mut self) {
        self.watch.hits = 0;
    }

    /// After a task switch to a task whose T flag is set.
    pub(crate) fn task_switch_trap(&mut self) -> Exception {
        self.debug_exception(dr6::BT)
    }

    /// Before INT1 raises #DB: what MOV SS held back is reported with it, not once more.
    pub(crate) fn report_hits_with_int1(&mut self) {
        if self.watch.hits != 0 {
            self.debug_exception(self.watch.hits.into());
        }
    }

    /// Whether a data breakpoint lies in the page of this linear address.
    pub(crate) fn is_watched_page(&self, linear: u64) -> bool {
        // A breakpoint is aligned to its length: it is in one page.
        self.matching(self.watch.data, |cpu, number| (cpu.state.dr[number] ^ linear) >> 12 == 0) != 0
    }

    /// Notes an access to data, for the trap after the instruction.
    #[inline(always)]
    pub(crate) fn note_data_access(&mut self, linear: u64, size: usize, access: Access) {
        if access == Access::Execute {
            return;
        }
        self.watch.hits |= self.matching(self.watch.data, |cpu, number| {
            let right_kind = access == Access::Write || cpu.breakpoint_kind(number) == Kind::ReadWrite;
            right_kind && cpu.breakpoint_overlaps(number, linear, size)
        });
    }

    /// Notes an access to ports, for the trap after the instruction.
    pub(crate) fn note_port_access(&mut self, port: u16, size: usize) {
        self.watch.hits |=
            self.matching(self.watch.io, |cpu, number| cpu.breakpoint_overlaps(number, port.into(), size));
    }

    /// The breakpoints out of `among` for which `condition` holds.
    #[inline(always)]
    fn matching(&self, among: u8, condition: impl Fn(&Self, usize) -> bool) -> u8 {
        if among == 0 {
            return 0;
        }
        (0..4)
            .filter(|&number| among >> number & 1 != 0 && condition(self, number))
            .fold(0, |hits, number| hits | 1 << number)
    }

    fn breakpoint_kind(&self, number: usize) -> Kind {
        match self.state.dr[7] >> (16 + 4 * number) & 3 {
            0 => Kind::Execution,
            1 => Kind::Write,
            2 => Kind::Io,
            _ => Kind::ReadWrite,
        }
    }

    /// Whether any of `size` bytes at `address` is among those of the breakpoint.
    fn breakpoint_overlaps(&self, number: usize, address: u64, size: usize) -> bool {
        let length = match self.state.dr[7] >> (18 + 4 * number) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        let start = self.state.dr[number & 7] & !(length - 1);
        address.wrapping_sub(start) < length || start.wrapping_sub(address) < size as u64
    }

    /// Sets DR6 for a debug exception. Its delivery clears DR7.GD, LBR and BTF.
    fn debug_exception(&mut self, bits: u64) -> Exception {
        self.watch.hits = 0;
        self.state.dr[6] = self.state.dr[6] & !dr6::HITS | bits;
        Exception::DB
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::Vendor;
    use crate::state::SegReg;
    use crate::testing::{TestEnv, test_cpu};

    const ENABLE_0: u64 = 1;

    fn watch(cpu: &mut Cpu, kind: u64, length: u64, address: u64) {
        cpu.write_debug_register(0, address).unwrap();
        cpu.write_debug_register(7, ENABLE_0 | (kind | length << 2) << 16).unwrap();
    }

    #[test]
    fn reserved_bits() {
        let mut cpu = test_cpu(Vendor::Amd);
        cpu.write_debug_register(6, 0).unwrap();
        cpu.write_debug_register(7, 0xffff_ffff).unwrap();
        assert_eq!((cpu.state.dr[6], cpu.state.dr[7]), (0xffff_0ff0, 0xffff_27ff));
        assert_eq!(cpu.write_debug_register(7, 1 << 32), Err(Exception::GP0));
        assert_eq!(cpu.write_debug_register(0, 1 << 63), Ok(()));
    }

    #[test]
    fn general_detect_is_a_fault() {
        let mut cpu = test_cpu(Vendor::Amd);
        cpu.write_debug_register(7, dr7::GD).unwrap();
        assert_eq!(cpu.debug_register_number(Register::DR0), Err(Exception::DB));
        assert_eq!(cpu.state.dr[6] & dr6::WRITABLE, dr6::BD);
        cpu.write_debug_register(7, 0).unwrap();
        assert_eq!(cpu.debug_register_number(Register::DR4), Ok(6));
        cpu.state.cr4 = Cr4::DE.bits();
        assert_eq!(cpu.debug_register_number(Register::DR5), Err(Exception::UD));
    }

    #[test]
    fn instruction_breakpoints_respect_rf() {
        let mut cpu = test_cpu(Vendor::Amd);
        cpu.state.seg[SegReg::Cs as usize].base = 0x1_0000;
        cpu.state.rip = 0x234;
        assert!(!cpu.debug_active());
        watch(&mut cpu, 0, 0, 0x1_0234);
        assert!(cpu.debug_active());
        cpu.state.rflags |= Rflags::RF.bits();
        assert_eq!(cpu.instruction_breakpoint(), Ok(()));
        cpu.state.rflags &= !Rflags::RF.bits();
        assert_eq!(cpu.instruction_breakpoint(), Err(Exception::DB));
        assert_eq!(cpu.state.dr[6] & dr6::WRITABLE, 1);
    }

    #[test]
    fn data_breakpoints_trap_also_on_cached_pages() {
        let mut cpu = test_cpu(Vendor::Amd);
        let mut env = TestEnv::new(0x2000);
        cpu.write(&mut env, SegReg::Ds, 0x1004, 4, 1).unwrap();
        watch(&mut cpu, 1, 3, 0x1004);
        cpu.read(&mut env, SegReg::Ds, 0x1004, 4).unwrap();
        cpu.write(&mut env, SegReg::Ds, 0x1000, 4, 1).unwrap();
        cpu.write(&mut env, SegReg::Ds, 0x1008, 4, 1).unwrap();
        assert_eq!(cpu.debug_trap(false, false), Ok(()));
        cpu.write(&mut env, SegReg::Ds, 0x1007, 1, 1).unwrap();
        cpu.state.ss_shadow = true;
        assert_eq!(cpu.debug_trap(false, false), Ok(()), "held back by MOV SS");
        cpu.state.ss_shadow = false;
        assert_eq!(cpu.debug_trap(false, false), Err(Exception::DB));
        assert_eq!(cpu.state.dr[6] & dr6::WRITABLE, 1);
        assert_eq!(cpu.debug_trap(false, false), Ok(()), "reported once");
        watch(&mut cpu, 3, 3, 0x1004);
        cpu.read(&mut env, SegReg::Ds, 0x1002, 4).unwrap();
        assert_eq!(cpu.debug_trap(false, false), Err(Exception::DB));
        cpu.write_debug_register(7, 0).unwrap();
        cpu.write(&mut env, SegReg::Ds, 0x1004, 4, 1).unwrap();
        assert!(!cpu.debug_active());
    }

    #[test]
    fn port_breakpoints_need_debugging_extensions() {
        let mut cpu = test_cpu(Vendor::Amd);
        watch(&mut cpu, 2, 0, 0x3f8);
        assert!(!cpu.debug_active());
        cpu.write_cr4(&mut TestEnv::new(0), Cr4::DE.bits()).unwrap();
        cpu.note_port_access(0x3f9, 1);
        assert_eq!(cpu.debug_trap(false, false), Ok(()));
        cpu.note_port_access(0x3f7, 2);
        assert_eq!(cpu.debug_trap(true, false), Err(Exception::DB));
        assert_eq!(cpu.state.dr[6] & dr6::WRITABLE, 1 | dr6::BS);
    }

    #[test]
    fn stepping_from_branch_to_branch() {
        let mut cpu = test_cpu(Vendor::Amd);
        cpu.state.msr.debugctl = DEBUGCTL_BTF;
        assert_eq!(cpu.debug_trap(true, false), Ok(()));
        assert_eq!(cpu.debug_trap(true, true), Err(Exception::DB));
    }
}
