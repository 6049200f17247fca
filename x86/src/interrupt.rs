//! Delivery of exceptions, interrupts and events (SDM Vol. 3A, chapter 6; APM Vol. 2, chapter 8).

use crate::cpu::Cpu;
use crate::env::{Env, Event};
use crate::exception::{Exception, vector};
use crate::memory::is_canonical;
use crate::registers::{Rflags, gpr};
use crate::segment::{Descriptor, is_null, null_segment, null_stack_segment, rpl, system_type};
use crate::state::{Activity, Mode, SegReg, Segment, TableRegister};
use crate::task::{Origin, TaskSwitch};

/// Error code bit: the event was not caused by an instruction of the program.
const EXT: u32 = 1;
/// Error code bit: the index is one of the IDT.
const IDT: u32 = 2;
/// DR7 bit GD: accesses to debug registers trap.
const DR7_GENERAL_DETECT: u64 = 1 << 13;
/// IA32_DEBUGCTL bits LBR and BTF.
const DEBUGCTL_LBR_BTF: u64 = 3;
/// IA32_APIC_BASE and its flag of the bootstrap processor.
const MSR_APIC_BASE: u32 = 0x1b;
const APIC_BASE_BSP: u64 = 1 << 8;
/// The longest chain of exceptions delivered for one another. A benign one (#AC) may raise itself in being
/// delivered for ever; then the instruction is taken anew, so that the run loop gets to look around.
const LONGEST_CHAIN: usize = 8;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// An exception.
    Exception,
    /// An external interrupt or NMI.
    External,
    /// INT1: no check of the gate's privilege, but otherwise like the next.
    PrivilegedSoftware,
    /// INT n, INT3 or INTO.
    Software,
}

/// What counts towards a double fault (SDM Vol. 3A, table 6-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(number: u8) -> Class {
    match number {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// The registers that a transfer of control changes, to be put back if it faults half-way.
struct Checkpoint {
    rsp: u64,
    rip: u64,
    next_rip: u64,
    rflags: u64,
    seg: [Segment; 6],
    cpl: u8,
}

impl Cpu {
    /// Makes all of a transfer of control, or none: on a fault the registers are as before.
    pub(crate) fn attempt<T>(
        &mut self,
        transfer: impl FnOnce(&mut Self) -> Result<T, Exception>,
    ) -> Result<T, Exception> {
        let saved = Checkpoint {
            rsp: self.state.gpr[gpr::RSP],
            rip: self.state.rip,
            next_rip: self.next_rip,
            rflags: self.state.rflags,
            seg: self.state.seg,
            cpl: self.state.cpl,
        };
        transfer(self).inspect_err(|_| {
            self.state.gpr[gpr::RSP] = saved.rsp;
            self.state.rip = saved.rip;
            self.next_rip = saved.next_rip;
            self.state.rflags = saved.rflags;
            self.state.seg = saved.seg;
            self.state.cpl = saved.cpl;
        })
    }

    /// Delivers an exception that the instruction at `state.rip` raised: a fault's return address is
    /// `state.rip`; a trap's caller has moved `state.rip` on. Faults on the way end in a double fault, and then
    /// in [`crate::state::Activity::Shutdown`].
    pub fn deliver_exception<E: Env>(&mut self, env: &mut E, exception: Exception) {
        let mut current = exception;
        for _ in 0..LONGEST_CHAIN {
            if current.vector == vector::PF {
                self.state.cr2 = current.cr2;
            }
            let return_ip = self.state.rip;
            let result = self.deliver(env, current.vector, current.error_code, Source::Exception, return_ip);
            let Err(next) = result else { return };
            current = match (class(current.vector), class(next.vector)) {
                (Class::DoubleFault, Class::Contributory | Class::PageFault) => {
                    self.state.activity = Activity::Shutdown;
                    return;
                }
                (Class::Contributory, Class::Contributory)
                | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                    if next.vector == vector::PF {
                        self.state.cr2 = next.cr2;
                    }
                    Exception::with_code(vector::DF, 0)
                }
                _ => next,
            };
        }
    }

    /// Takes an event between two instructions: an interrupt or NMI is delivered (and ends HLT), INIT resets,
    /// a SIPI starts a processor that waits for one. [`Event::Kick`] is not for the processor and does nothing. The
    /// others are those of a paravirtual interface.
    pub fn deliver_event<E: Env>(&mut self, env: &mut E, event: Event) {
        match event {
            Event::Interrupt(number) => self.deliver_external(env, number),
            Event::Nmi => {
                self.deliver_external(env, vector::NMI);
                self.state.nmi_blocked = true;
            }
            Event::Init => self.init(env),
            Event::Sipi(page) => self.start(page),
            Event::Kick => {}
            Event::Unhalt if self.state.activity == Activity::Halted => {
                self.state.activity = Activity::Running;
            }
            Event::Unhalt => self.unhalted = true,
            Event::FlushTlb => self.flush_tlb(),
        }
    }

    fn deliver_external<E: Env>(&mut self, env: &mut E, number: u8) {
        let return_ip = self.state.rip;
        if let Err(exception) = self.deliver(env, number, None, Source::External, return_ip) {
            self.deliver_exception(env, exception);
        }
    }

    /// Calls the handler of a vector, with `return_ip` on its stack. On a fault nothing has changed (but see
    /// [`crate::task`]); RIP and `next_rip` are the handler's afterwards.
    pub(crate) fn deliver<E: Env>(
        &mut self,
        env: &mut E,
        number: u8,
        error_code: Option<u32>,
        source: Source,
        return_ip: u64,
    ) -> Result<(), Exception> {
        // A debug trap after HLT ends it, too.
        if self.state.activity == Activity::Halted {
            self.state.activity = Activity::Running;
        }
        let result = match self.state.mode() {
            Mode::Real => self.attempt(|cpu| cpu.deliver_real(env, number, return_ip)),
            Mode::Protected | Mode::Virtual8086 => {
                self.deliver_protected(env, number, error_code, source, return_ip)
            }
            Mode::Compatibility | Mode::Long64 => {
                self.attempt(|cpu| cpu.deliver_long(env, number, error_code, source, return_ip))
            }
        };
        match result {
            Ok(()) => {
                if number == vector::DB && source == Source::Exception {
                    self.state.dr[7] &= !DR7_GENERAL_DETECT;
                    self.state.msr.debugctl &= !DEBUGCTL_LBR_BTF;
                }
                self.state.interrupt_shadow = false;
                self.state.ss_shadow = false;
                self.next_rip = self.state.rip;
                Ok(())
            }
            Err(mut exception) => {
                let by_selector =
                    matches!(exception.vector, vector::TS | vector::NP | vector::SS | vector::GP);
                if source != Source::Software && by_selector {
                    exception.error_code = exception.error_code.map(|code| code | EXT);
                }
                Err(exception)
            }
        }
    }

    /// RFLAGS as the handler's stack gets it. RF is set for faults, so that a breakpoint at the instruction does
    /// not hit again on return (SDM Vol. 3B, section 17.3.1.1).
    fn pushed_flags(&self, number: u8, source: Source) -> u64 {
        let flags = self.state.rflags;
        match source {
            Source::Exception if !matches!(number, vector::DB | vector::DF | vector::MC) => {
                flags | Rflags::RF.bits()
            }
            Source::Software | Source::PrivilegedSoftware => flags & !Rflags::RF.bits(),
            _ => flags,
        }
    }

    /// Real mode (SDM Vol. 3A, section 20.1.4): the vector table holds far pointers.
    fn deliver_real<E: Env>(&mut self, env: &mut E, number: u8, return_ip: u64) -> Result<(), Exception> {
        let entry = u64::from(number) * 4;
        if entry + 3 > u64::from(self.state.idtr.limit) {
            return Err(Exception::gp(u32::from(number) * 8 + IDT));
        }
        let pointer = self.read_system(env, self.state.idtr.base.wrapping_add(entry), 4)?;
        self.push(env, 2, self.state.rflags)?;
        self.push(env, 2, self.segment(SegReg::Cs).selector.into())?;
        self.push(env, 2, return_ip)?;
        let cleared = Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF;
        self.state.rflags &= !cleared.bits();
        let selector = (pointer >> 16) as u16;
        let segment = self.real_segment(SegReg::Cs, selector);
        self.set_segment(SegReg::Cs, segment);
        self.state.rip = pointer & 0xffff;
        Ok(())
    }

    /// Reads the gate of a vector and checks what does not depend on its type: type is one of `types`, DPL for
    /// software interrupts, presence.
    fn read_gate<E: Env>(
        &mut self,
        env: &mut E,
        number: u8,
        source: Source,
        types: &[u8],
    ) -> Result<Descriptor, Exception> {
        let size = if self.in_long_mode() { 16 } else { 8 };
        let entry = u64::from(number) * size;
        let code = u32::from(number) * 8 + IDT;
        let TableRegister { base, limit } = self.state.idtr;
        if entry + size - 1 > u64::from(limit) {
            return Err(Exception::gp(code));
        }
        let low = self.read_system(env, base.wrapping_add(entry), 8)?;
        let high = if size == 16 { self.read_system(env, base.wrapping_add(entry + 8), 8)? } else { 0 };
        let gate = Descriptor { low, high };
        if !gate.is_system() || !types.contains(&gate.kind()) {
            return Err(Exception::gp(code));
        }
        if source == Source::Software && gate.dpl() < self.state.cpl {
            return Err(Exception::gp(code));
        }
        if !gate.present() {
            return Err(Exception::with_code(vector::NP, code));
        }
        Ok(gate)
    }

    /// The code segment that a gate leads to, checked except for presence.
    fn gate_target<E: Env>(&mut self, env: &mut E, gate: &Descriptor) -> Result<Descriptor, Exception> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(Exception::GP0);
        }
        let failed = Exception::selector(vector::GP, selector);
        let descriptor = self.read_descriptor(env, selector, failed)?;
        if !descriptor.is_code() || descriptor.dpl() > self.state.cpl {
            return Err(failed);
        }
        Ok(descriptor)
    }

    /// Protected and virtual-8086 mode (SDM Vol. 3A, sections 6.12 and 20.3).
    fn deliver_protected<E: Env>(
        &mut self,
        env: &mut E,
        number: u8,
        error_code: Option<u32>,
        source: Source,
        return_ip: u64,
    ) -> Result<(), Exception> {
        use system_type::{INTERRUPT_GATE16, INTERRUPT_GATE32, TASK_GATE, TRAP_GATE16, TRAP_GATE32};
        let types = [TASK_GATE, INTERRUPT_GATE16, TRAP_GATE16, INTERRUPT_GATE32, TRAP_GATE32];
        let gate = self.read_gate(env, number, source, &types)?;
        if gate.kind() == TASK_GATE {
            let origin = Origin { ip: return_ip, flags: self.pushed_flags(number, source) };
            self.task_gate(env, &gate, TaskSwitch::Call, origin)?;
            return match error_code {
                Some(code) => {
                    let size = if self.state.tr.attributes & 8 != 0 { 4 } else { 2 };
                    self.push(env, size, code.into())
                }
                None => Ok(()),
            };
        }
        self.attempt(|cpu| {
            let flags = cpu.pushed_flags(number, source);
            cpu.enter_handler(env, &gate, flags, error_code, return_ip)
        })
    }

    /// Through an interrupt or trap gate outside long mode.
    fn enter_handler<E: Env>(
        &mut self,
        env: &mut E,
        gate: &Descriptor,
        flags: u64,
        error_code: Option<u32>,
        return_ip: u64,
    ) -> Result<(), Exception> {
        let selector = gate.gate_selector();
        let mut target = self.gate_target(env, gate)?;
        if !target.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        let from_virtual_8086 = self.state.has_flags(Rflags::VM);
        if from_virtual_8086 && (target.is_conforming_code() || target.dpl() != 0) {
            return Err(Exception::selector(vector::GP, selector));
        }
        let wide = gate.kind() & 8 != 0;
        let size = if wide { 4 } else { 2 };
        let old_cs = self.segment(SegReg::Cs).selector;
        let inward = !target.is_conforming_code() && target.dpl() < self.state.cpl;
        let cpl = if inward { target.dpl() } else { self.state.cpl };
        let mut stack_selector = 0;
        if inward {
            let old = self.state.seg;
            let old_rsp = self.state.gpr[gpr::RSP];
            self.state.rflags &= !Rflags::VM.bits();
            stack_selector = self.switch_to_inner_stack(env, cpl)?;
            if from_virtual_8086 {
                for seg in [SegReg::Gs, SegReg::Fs, SegReg::Ds, SegReg::Es] {
                    let selector = old[seg as usize].selector.into();
                    self.push(env, size, selector).map_err(|e| on_new_stack(e, stack_selector))?;
                    self.set_segment(seg, null_segment(0));
                }
            }
            let old_ss = old[SegReg::Ss as usize].selector.into();
            self.push(env, size, old_ss).map_err(|e| on_new_stack(e, stack_selector))?;
            self.push(env, size, old_rsp).map_err(|e| on_new_stack(e, stack_selector))?;
        }
        let frame = [Some(flags), Some(old_cs.into()), Some(return_ip), error_code.map(u64::from)];
        for value in frame.into_iter().flatten() {
            self.push(env, size, value).map_err(|e| on_new_stack(e, stack_selector))?;
        }
        let ip = gate.gate_offset(wide);
        if ip > u64::from(target.limit()) {
            return Err(Exception::GP0);
        }
        self.set_accessed(env, selector, &mut target)?;
        self.set_code_segment(target.segment(selector), cpl);
        self.clear_flags_for_handler(gate);
        self.state.rip = ip;
        Ok(())
    }

    /// Loads SS and RSP from the 16- or 32-bit TSS for an inner privilege level, and sets CPL. Returns the
    /// selector.
    pub(crate) fn switch_to_inner_stack<E: Env>(&mut self, env: &mut E, cpl: u8) -> Result<u16, Exception> {
        let (selector, pointer) = self.inner_stack(env, cpl)?;
        if rpl(selector) != cpl {
            return Err(Exception::selector(vector::TS, selector));
        }
        let segment = self.checked_stack_segment(env, selector, cpl, vector::TS)?;
        self.set_segment(SegReg::Ss, segment);
        self.state.cpl = cpl;
        self.set_stack_pointer(pointer);
        Ok(selector)
    }

    /// TF, NT, RF and VM are cleared, and IF by an interrupt gate (SDM Vol. 3A, section 6.12.1.3).
    fn clear_flags_for_handler(&mut self, gate: &Descriptor) {
        let mut cleared = Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM;
        if gate.kind() & 1 == 0 {
            cleared |= Rflags::IF;
        }
        self.state.rflags &= !cleared.bits();
    }

    /// Long mode (SDM Vol. 3A, section 6.14).
    fn deliver_long<E: Env>(
        &mut self,
        env: &mut E,
        number: u8,
        error_code: Option<u32>,
        source: Source,
        return_ip: u64,
    ) -> Result<(), Exception> {
        let types = [system_type::INTERRUPT_GATE32, system_type::TRAP_GATE32];
        let gate = self.read_gate(env, number, source, &types)?;
        let selector = gate.gate_selector();
        let mut target = self.gate_target(env, &gate)?;
        if !target.is_long() || target.is_big() {
            return Err(Exception::selector(vector::GP, selector));
        }
        if !target.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        let inward = !target.is_conforming_code() && target.dpl() < self.state.cpl;
        let cpl = if inward { target.dpl() } else { self.state.cpl };
        let old_rsp = self.state.gpr[gpr::RSP];
        let rsp = match gate.gate_ist() {
            0 if inward => self.inner_stack64(env, cpl)?,
            0 => old_rsp,
            ist => self.interrupt_stack(env, ist)?,
        };
        let ip = gate.gate_offset(true);
        if !is_canonical(ip) {
            return Err(Exception::GP0);
        }
        let flags = self.pushed_flags(number, source);
        let (old_ss, old_cs) = (self.segment(SegReg::Ss).selector, self.segment(SegReg::Cs).selector);
        self.set_accessed(env, selector, &mut target)?;
        self.set_code_segment(target.segment(selector), cpl);
        if inward {
            self.set_segment(SegReg::Ss, null_stack_segment(cpl.into(), cpl));
        }
        self.state.gpr[gpr::RSP] = rsp & !15;
        let frame = [
            Some(old_ss.into()),
            Some(old_rsp),
            Some(flags),
            Some(old_cs.into()),
            Some(return_ip),
            error_code.map(u64::from),
        ];
        for value in frame.into_iter().flatten() {
            self.push(env, 8, value)?;
        }
        self.clear_flags_for_handler(&gate);
        self.state.rip = ip;
        Ok(())
    }

    /// INIT.
    fn init<E: Env>(&mut self, env: &mut E) {
        let bootstrap = match env.read_msr(MSR_APIC_BASE) {
            Some(base) => base & APIC_BASE_BSP != 0,
            None => self.apic_id == 0,
        };
        let [signature, ..] = self.model.query(1, 0);
        self.state.init(signature, bootstrap);
        self.next_rip = self.state.rip;
        self.state_changed();
        env.on_init();
    }

    /// A SIPI.
    fn start(&mut self, page: u8) {
        if self.state.start(page) {
            let segment = *self.segment(SegReg::Cs);
            self.set_segment(SegReg::Cs, segment);
            self.next_rip = 0;
        }
    }
}

/// A stack fault on a stack just switched to names its selector.
pub(crate) fn on_new_stack(exception: Exception, selector: u16) -> Exception {
    if exception == Exception::SS0 { Exception::selector(vector::SS, selector) } else { exception }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::Cr0;
    use crate::state::CpuState;
    use crate::testing::{Machine, at, sel};

    const INTERRUPT32: u8 = 0x8e;
    const TRAP32: u8 = 0x8f;
    const USER_TRAP32: u8 = 0xef;
    const GP: u8 = vector::GP;

    #[test]
    fn exception_in_the_same_ring() {
        let mut machine = Machine::protected();
        machine.gate(GP, sel::CODE, 0x1234_5678, TRAP32, 0);
        machine.cpu.state.rflags = 0x302;
        machine.cpu.deliver_exception(&mut machine.env, Exception::gp(0x40));
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.rflags), (0x1234_5678, 0x202), "a trap gate leaves IF, clears TF");
        assert_eq!(machine.stack::<4>(4), [0x40, 0x5000, sel::CODE.into(), 0x1_0302]);
        assert_eq!(state.gpr[gpr::RSP], 0x7000 - 16);
    }

    #[test]
    fn interrupt_from_an_outer_ring_changes_the_stack() {
        let mut machine = Machine::protected();
        machine.gate(0x30, sel::CODE, 0x6000, INTERRUPT32, 0);
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        machine.cpu.state.rflags = 0x202;
        machine.cpu.state.activity = Activity::Halted;
        machine.cpu.state.interrupt_shadow = true;
        machine.cpu.deliver_event(&mut machine.env, Event::Interrupt(0x30));
        let state = &machine.cpu.state;
        assert_eq!((state.cpl, state.rip, state.rflags), (0, 0x6000, 2));
        assert_eq!(state.seg[SegReg::Ss as usize].selector, sel::DATA);
        assert_eq!((state.activity, state.interrupt_shadow), (Activity::Running, false));
        assert_eq!(state.gpr[gpr::RSP], at::STACK0 - 20);
        let frame = [0x5000, sel::USER_CODE.into(), 0x202, 0x7000, sel::USER_DATA.into()];
        assert_eq!(machine.stack::<5>(4), frame);
    }

    #[test]
    fn gates_of_16_bits() {
        let mut machine = Machine::protected();
        machine.gate(GP, sel::CODE, 0x1234_5678, 0x86, 0);
        machine.cpu.deliver_exception(&mut machine.env, Exception::gp(0x40));
        assert_eq!(machine.cpu.state.rip, 0x5678);
        assert_eq!(machine.stack::<4>(2), [0x40, 0x5000, sel::CODE.into(), 2]);
    }

    fn faults_after(exception: Exception, broken: &[u8]) -> (Machine, u64) {
        let mut machine = Machine::protected();
        for number in 0..32 {
            machine.gate(number, sel::CODE, 0x6000 + u64::from(number), TRAP32, 0);
        }
        for &number in broken {
            machine.gate(number, 0, 0, 0, 0);
        }
        machine.cpu.deliver_exception(&mut machine.env, exception);
        let rip = machine.cpu.state.rip;
        (machine, rip)
    }

    #[test]
    fn faults_in_delivery() {
        let handler = |number: u8| 0x6000 + u64::from(number);
        // A benign one first: the second is delivered, and names the gate.
        let (machine, rip) = faults_after(Exception::UD, &[vector::UD]);
        assert_eq!(rip, handler(GP));
        assert_eq!(machine.stack::<2>(4), [u64::from(vector::UD) * 8 + 3, 0x5000]);
        // Two contributory ones.
        let (machine, rip) = faults_after(Exception::gp(8), &[GP]);
        assert_eq!(rip, handler(vector::DF));
        assert_eq!(machine.stack::<2>(4), [0, 0x5000]);
        // A page fault first.
        let fault = Exception::page_fault(0x1234, 2);
        let (machine, rip) = faults_after(fault, &[vector::PF]);
        assert_eq!((rip, machine.cpu.state.cr2), (handler(vector::DF), 0x1234));
        // No way to tell the double fault.
        let (machine, _) = faults_after(Exception::gp(8), &[GP, vector::DF]);
        assert_eq!(machine.cpu.state.activity, Activity::Shutdown);
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.gpr[gpr::RSP]), (0x5000, 0x7000));
    }

    #[test]
    fn a_page_fault_while_a_contributory_fault_is_delivered_goes_its_own_way() {
        let mut machine = Machine::long();
        // The handler of #GP stands on a stack that is not mapped.
        machine.gate(GP, sel::CODE64, 0x6000, INTERRUPT32, 1);
        machine.gate(vector::PF, sel::CODE64, 0x6100, INTERRUPT32, 0);
        machine.env.store64(at::TSS + IST1_OFFSET, 0x1_0000_0000);
        machine.cpu.deliver_exception(&mut machine.env, Exception::GP0);
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.cr2), (0x6100, 0xffff_fff8));
        assert_eq!(machine.stack::<1>(8), [2]);
    }

    const IST1_OFFSET: u64 = 0x24;

    #[test]
    fn software_interrupts_need_the_gates_privilege() {
        let mut machine = Machine::protected();
        machine.gate(3, sel::CODE, 0x6000, USER_TRAP32, 0);
        machine.gate(0x80, sel::CODE, 0x6100, TRAP32, 0);
        machine.gate(0x81, sel::CODE, 0x6100, USER_TRAP32 & 0x7f, 0);
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        assert_eq!(machine.exec(&[0xcd, 0x80]), Err(Exception::gp(0x402)));
        assert_eq!(machine.exec(&[0xcd, 0x81]), Err(Exception::with_code(vector::NP, 0x40a)));
        assert_eq!(machine.exec(&[0xcd, 0xff]), Err(Exception::gp(0x7fa)));
        assert_eq!(machine.exec(&[0xcc]), Ok(()));
        assert_eq!(machine.cpu.state.rip, 0x6000);
        assert_eq!(machine.stack::<3>(4), [0x5001, sel::USER_CODE.into(), 2]);
    }

    #[test]
    fn int1_ignores_the_gates_privilege() {
        let mut machine = Machine::protected();
        machine.gate(vector::DB, sel::CODE, 0x6000, TRAP32, 0);
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        assert_eq!(machine.exec(&[0xf1]), Ok(()));
        assert_eq!(machine.cpu.state.rip, 0x6000);
    }

    #[test]
    fn long_mode_frames_are_aligned_and_whole() {
        let mut machine = Machine::long();
        machine.gate(vector::PF, sel::CODE64, 0xffff_8000_0000_6000, INTERRUPT32, 0);
        machine.cpu.state.gpr[gpr::RSP] = 0x6ff9;
        machine.cpu.state.rflags = 0x4302;
        machine.cpu.deliver_exception(&mut machine.env, Exception::page_fault(0x1234, 7));
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.rflags, state.cr2), (0xffff_8000_0000_6000, 2, 0x1234));
        assert_eq!(state.gpr[gpr::RSP], 0x6ff0 - 48);
        assert_eq!(state.seg[SegReg::Ss as usize].selector, sel::DATA);
        let frame = [7, 0x5000, sel::CODE64.into(), 0x1_4302, 0x6ff9, sel::DATA.into()];
        assert_eq!(machine.stack::<6>(8), frame);
    }

    #[test]
    fn long_mode_from_user_mode_and_ist() {
        let mut machine = Machine::long();
        machine.gate(0x40, sel::CODE64, 0x6000, INTERRUPT32, 0);
        machine.gate(2, sel::CODE64, 0x6100, INTERRUPT32, 7);
        machine.env.store64(at::TSS + IST1_OFFSET + 48, 0x9008);
        machine.ring(sel::USER_CODE64, sel::USER_DATA);
        machine.cpu.deliver_event(&mut machine.env, Event::Interrupt(0x40));
        let ss = machine.cpu.state.seg[SegReg::Ss as usize];
        assert_eq!((machine.cpu.state.cpl, ss.selector, ss.usable()), (0, 0, false));
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], at::STACK0 - 40);
        let frame = [0x5000, sel::USER_CODE64.into(), 2, 0x7000, sel::USER_DATA.into()];
        assert_eq!(machine.stack::<5>(8), frame);
        machine.cpu.deliver_event(&mut machine.env, Event::Nmi);
        assert!(machine.cpu.state.nmi_blocked);
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], 0x9000 - 40);
        assert_eq!(machine.stack::<5>(8), [0x6000, sel::CODE64.into(), 2, at::STACK0 - 40, 0]);
        assert_eq!(machine.exec(&[0x48, 0xcf]), Ok(()));
        assert!(!machine.cpu.state.nmi_blocked);
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.cpl), (0x6000, 0));
        assert_eq!(machine.exec(&[0x48, 0xcf]), Ok(()));
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.cpl), (0x5000, 3));
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], 0x7000);
        assert_eq!(machine.cpu.state.seg[SegReg::Ss as usize].selector, sel::USER_DATA);
    }

    #[test]
    fn gates_of_long_mode_lead_to_64_bit_code_only() {
        let mut machine = Machine::long();
        let number = 0x40;
        let mut deliver = |selector, offset, rights| {
            machine.gate(number, selector, offset, rights, 0);
            let Machine { cpu, env } = &mut machine;
            cpu.deliver(env, number, None, Source::External, 0x5000)
        };
        let index = u32::from(number) * 8;
        assert_eq!(deliver(sel::CODE, 0x6000, INTERRUPT32), Err(Exception::gp(u32::from(sel::CODE) + EXT)));
        assert_eq!(deliver(sel::CODE64, 1 << 60, INTERRUPT32), Err(Exception::gp(EXT)));
        assert_eq!(deliver(0, 0x6000, INTERRUPT32), Err(Exception::gp(EXT)));
        assert_eq!(deliver(sel::CODE64, 0x6000, 0x86), Err(Exception::gp(index + IDT + EXT)));
        assert_eq!(deliver(sel::CODE64, 0x6000, 0x85), Err(Exception::gp(index + IDT + EXT)));
        assert_eq!(deliver(sel::CODE64, 0x6000, INTERRUPT32), Ok(()));
    }

    #[test]
    fn real_mode() {
        let mut machine = Machine::protected();
        machine.cpu.state = CpuState { rip: 0x100, rflags: 0x302, ..CpuState::default() };
        machine.cpu.state.seg[SegReg::Cs as usize].base = 0xf_0000;
        machine.cpu.state.gpr[gpr::RSP] = 0x1000;
        machine.env.put(0x21 * 4, &[0x34, 0x12, 0x00, 0x20]);
        assert_eq!(machine.exec(&[0xcd, 0x21]), Ok(()));
        let cs = machine.cpu.state.seg[SegReg::Cs as usize];
        assert_eq!((cs.selector, cs.base, machine.cpu.state.rip), (0x2000, 0x2_0000, 0x1234));
        assert_eq!(machine.cpu.state.rflags, 2);
        assert_eq!(machine.stack::<3>(2), [0x102, 0xf000, 0x302]);
        assert_eq!(machine.exec(&[0xcf]), Ok(()));
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.rflags), (0x102, 0x302));
        machine.cpu.state.idtr.limit = 0x20;
        machine.cpu.deliver_exception(&mut machine.env, Exception::GP0);
        assert_eq!(machine.cpu.state.activity, Activity::Shutdown);
    }

    #[test]
    fn an_endless_chain_of_alignment_checks_comes_back() {
        let mut machine = Machine::protected();
        machine.descriptor(sel::FREE, 0x00cf_fb00_0000_ffff);
        machine.gate(vector::AC, sel::FREE | 3, 0x6000, TRAP32, 0);
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        machine.cpu.state.cr0 |= Cr0::AM.bits();
        machine.cpu.state.rflags |= Rflags::AC.bits();
        machine.cpu.state.gpr[gpr::RSP] = 0x7001;
        machine.cpu.deliver_exception(&mut machine.env, Exception::AC0);
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.gpr[gpr::RSP]), (0x5000, 0x7001));
    }

    #[test]
    fn init_and_sipi() {
        let mut machine = Machine::long();
        machine.cpu.state.gpr[gpr::RBX] = 7;
        machine.cpu.state.msr.lstar = 9;
        machine.cpu.apic_id = 1;
        machine.cpu.deliver_event(&mut machine.env, Event::Init);
        assert_eq!(machine.env.inits, 1);
        let state = &machine.cpu.state;
        assert_eq!((state.activity, state.mode()), (Activity::WaitForSipi, Mode::Real));
        assert_eq!((state.gpr[gpr::RBX], state.msr.lstar, state.msr.efer), (0, 9, 0));
        machine.cpu.deliver_event(&mut machine.env, Event::Sipi(0x9a));
        let cs = machine.cpu.state.seg[SegReg::Cs as usize];
        assert_eq!((cs.selector, cs.base, machine.cpu.state.rip), (0x9a00, 0x9_a000, 0));
        assert_eq!(machine.cpu.state.activity, Activity::Running);
        machine.cpu.state.rip = 5;
        machine.cpu.deliver_event(&mut machine.env, Event::Sipi(0x10));
        assert_eq!(machine.cpu.state.rip, 5, "only one that waits takes a SIPI");
    }
}
