//! Task-state segments: I/O permission, stacks of inner privilege levels, and hardware task switches (SDM Vol.
//! 3A, chapter 7; Vol. 1, section 18.5).

use crate::cpu::{Access, Cpu};
use crate::env::Env;
use crate::exception::{Exception, vector};
use crate::memory::is_canonical;
use crate::registers::{Cr0, Rflags, gpr};
use crate::segment::{Descriptor, is_null, null_segment, rpl, system_type, virtual_8086_segment};
use crate::state::{SegReg, Segment};
use crate::tlb::Privilege;

/// Offset in a 32-bit or 64-bit TSS of the offset of the I/O permission bitmap.
const IO_MAP_BASE: u64 = 0x66;
/// Offset in a 64-bit TSS of the first interrupt stack pointer.
const IST1: u64 = 0x24;

/// DR7 bits L0 to L3 and LE.
const DR7_LOCAL: u64 = 0x155;

/// What makes a task switch; decides on busy bits, back link and NT (SDM Vol. 3A, table 7-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskSwitch {
    /// JMP.
    Jump,
    /// CALL, an interrupt or an exception: the new task is nested.
    Call,
    /// IRET of a nested task.
    Return,
}

/// Where the task that is left goes on one day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub ip: u64,
    pub flags: u64,
}

/// Order of the segment registers in a TSS.
const TSS_SEGMENTS: [SegReg; 6] = [SegReg::Es, SegReg::Cs, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs];

/// Where the fields of a 16- or 32-bit TSS stand: general registers and segments follow the flags.
struct Layout {
    /// Last byte that the limit must include.
    limit: u32,
    /// Bytes per register.
    size: usize,
    ip: u64,
    /// Number of segment registers: a 16-bit TSS has neither FS nor GS.
    segments: usize,
    ldt: u64,
    /// End of what is written to the old TSS.
    end: u64,
}

const LAYOUT16: Layout = Layout { limit: 0x2b, size: 2, ip: 0x0e, segments: 4, ldt: 0x2a, end: 0x2a };
const LAYOUT32: Layout = Layout { limit: 0x67, size: 4, ip: 0x20, segments: 6, ldt: 0x60, end: 0x60 };

impl Layout {
    fn of(kind: u8) -> &'static Self {
        if kind & 8 != 0 { &LAYOUT32 } else { &LAYOUT16 }
    }
    fn flags(&self) -> u64 {
        self.ip + self.size as u64
    }
    fn register(&self, number: usize) -> u64 {
        self.ip + (self.size * (2 + number)) as u64
    }
    fn segment(&self, number: usize) -> u64 {
        self.ip + (self.size * (10 + number)) as u64
    }
}

/// What a new TSS holds.
struct TaskState {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// Whether the current privilege level may access `size` ports from `port` on: IOPL, then the I/O
    /// permission bitmap; #GP(0) if not (SDM Vol. 1, section 18.5). If so, port breakpoints see the access.
    pub fn check_io<E: Env>(&mut self, env: &mut E, port: u16, size: usize) -> Result<(), Exception> {
        self.note_port_access(port, size);
        let virtual_8086 = self.state.has_flags(Rflags::VM);
        if !self.state.cr0_has(Cr0::PE) || (!virtual_8086 && self.state.cpl <= self.iopl()) {
            return Ok(());
        }
        let tr = self.state.tr;
        let kind = (tr.attributes & 0xf) as u8;
        if !tr.usable() || !matches!(kind, system_type::TSS32 | system_type::TSS32_BUSY) || tr.limit < 0x67 {
            return Err(Exception::GP0);
        }
        let map = self.read_system(env, tr.base.wrapping_add(IO_MAP_BASE), 2)?;
        let offset = map + u64::from(port / 8);
        // Two bytes are always read: a wide port may reach into the second.
        if offset + 1 > u64::from(tr.limit) {
            return Err(Exception::GP0);
        }
        let bits = self.read_system(env, tr.base.wrapping_add(offset), 2)? >> (port % 8);
        if bits & ((1 << size) - 1) != 0 { Err(Exception::GP0) } else { Ok(()) }
    }

    /// #TS with the selector of the current task.
    fn invalid_task(&self) -> Exception {
        Exception::selector(vector::TS, self.state.tr.selector)
    }

    /// Stack selector and pointer of an inner privilege level from the 16- or 32-bit TSS.
    pub(crate) fn inner_stack<E: Env>(&mut self, env: &mut E, cpl: u8) -> Result<(u16, u64), Exception> {
        let tr = self.state.tr;
        let wide = tr.attributes & 8 != 0;
        let size = if wide { 4 } else { 2 };
        let offset = size as u64 * (u64::from(cpl) * 2 + 1);
        if !tr.usable() || offset + size as u64 + 1 > u64::from(tr.limit) {
            return Err(self.invalid_task());
        }
        let pointer = self.read_system(env, tr.base.wrapping_add(offset), size)?;
        let selector = self.read_system(env, tr.base.wrapping_add(offset + size as u64), 2)?;
        Ok((selector as u16, pointer))
    }

    /// Stack pointer of an inner privilege level from the 64-bit TSS.
    pub(crate) fn inner_stack64<E: Env>(&mut self, env: &mut E, cpl: u8) -> Result<u64, Exception> {
        self.stack_pointer64(env, 4 + u64::from(cpl) * 8)
    }

    /// Stack pointer number `ist` (1 to 7) of the 64-bit TSS's interrupt stack table.
    pub(crate) fn interrupt_stack<E: Env>(&mut self, env: &mut E, ist: u64) -> Result<u64, Exception> {
        self.stack_pointer64(env, IST1 + ist.saturating_sub(1) * 8)
    }

    fn stack_pointer64<E: Env>(&mut self, env: &mut E, offset: u64) -> Result<u64, Exception> {
        let tr = self.state.tr;
        if !tr.usable() || offset + 7 > u64::from(tr.limit) {
            return Err(self.invalid_task());
        }
        let pointer = self.read_system(env, tr.base.wrapping_add(offset), 8)?;
        if is_canonical(pointer) { Ok(pointer) } else { Err(Exception::SS0) }
    }

    /// Switches to the task of a task gate: checks the TSS selector in it first.
    pub(crate) fn task_gate<E: Env>(
        &mut self,
        env: &mut E,
        gate: &Descriptor,
        how: TaskSwitch,
        origin: Origin,
    ) -> Result<(), Exception> {
        let selector = gate.gate_selector();
        let failed = Exception::selector(vector::GP, selector);
        if is_null(selector) || selector & 4 != 0 {
            return Err(failed);
        }
        let descriptor = self.read_descriptor(env, selector, failed)?;
        self.switch_to_available(env, selector, &descriptor, how, origin)
    }

    /// Switches to a task whose TSS must be available and present.
    pub(crate) fn switch_to_available<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        descriptor: &Descriptor,
        how: TaskSwitch,
        origin: Origin,
    ) -> Result<(), Exception> {
        let available = matches!(descriptor.kind(), system_type::TSS16 | system_type::TSS32);
        if !descriptor.is_system() || !available {
            return Err(Exception::selector(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        self.switch_task(env, selector, descriptor, how, origin)
    }

    /// IRET with NT set: back to the task in the back link of the current TSS.
    pub(crate) fn return_from_task<E: Env>(&mut self, env: &mut E, origin: Origin) -> Result<(), Exception> {
        let selector = self.read_system(env, self.state.tr.base, 2)? as u16;
        let failed = Exception::selector(vector::TS, selector);
        if is_null(selector) || selector & 4 != 0 {
            return Err(failed);
        }
        let descriptor = self.read_descriptor(env, selector, failed)?;
        let busy = matches!(descriptor.kind(), system_type::TSS16_BUSY | system_type::TSS32_BUSY);
        if !descriptor.is_system() || !busy {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        self.switch_task(env, selector, &descriptor, TaskSwitch::Return, origin)
    }

    /// The task switch itself (SDM Vol. 3A, section 7.3). `origin` is saved in the old TSS. A fault up to the
    /// point where TR changes leaves the old task as it was; a later one, in loading LDTR and the segment
    /// registers, is raised in the new task, whose instruction pointer is in place by then.
    fn switch_task<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        descriptor: &Descriptor,
        how: TaskSwitch,
        origin: Origin,
    ) -> Result<(), Exception> {
        let layout = Layout::of(descriptor.kind());
        let mut tss = descriptor.segment(selector);
        if tss.limit < layout.limit {
            return Err(Exception::selector(vector::TS, selector));
        }
        let new = self.read_task(env, tss.base, layout)?;
        self.check_old_task(env)?;
        let mut flags = new.flags;
        if how == TaskSwitch::Call {
            self.write_system(env, tss.base, 2, self.state.tr.selector.into())?;
            flags |= Rflags::NT.bits();
        }
        let pdptes = match new.cr3 {
            Some(cr3) if self.uses_pdptes(self.state.cr4) => self.read_pdptes(env, cr3)?,
            _ => self.state.pdpte,
        };
        self.save_task(env, how, origin)?;
        if how != TaskSwitch::Call {
            self.set_tss_busy(env, self.state.tr.selector, false)?;
        }
        if how != TaskSwitch::Return {
            self.set_tss_busy(env, selector, true)?;
        }
        // From here on the new task runs.
        tss.attributes |= 2;
        self.state.tr = tss;
        self.state.cr0 |= Cr0::TS.bits();
        // Local breakpoint enables end with the task.
        self.state.dr[7] &= !DR7_LOCAL;
        self.debug_changed();
        if let Some(cr3) = new.cr3 {
            self.state.pdpte = pdptes;
            self.state.cr3 = cr3;
            self.flush_tlb_non_global();
        }
        let defined = Rflags::ARITHMETIC | Rflags::TF | Rflags::IF | Rflags::DF | Rflags::IOPL | Rflags::NT;
        let wide = Rflags::RF | Rflags::VM | Rflags::AC | Rflags::VIF | Rflags::VIP | Rflags::ID;
        let kept = if layout.size == 4 { (defined | wide).bits() } else { defined.bits() };
        self.state.rflags = flags & kept | Rflags::FIXED.bits();
        self.state.rip = new.ip;
        self.next_rip = new.ip;
        for (register, value) in self.state.gpr.iter_mut().zip(new.registers) {
            *register = if layout.size == 4 { value } else { *register & 0xffff_0000 | value };
        }
        self.load_task_segments(env, &new)?;
        if new.trap {
            return Err(self.task_switch_trap());
        }
        Ok(())
    }

    fn read_task<E: Env>(&mut self, env: &mut E, base: u64, layout: &Layout) -> Result<TaskState, Exception> {
        let wide = layout.size == 4;
        let mut field = |offset: u64, size: usize| self.read_system(env, base.wrapping_add(offset), size);
        let mut registers = [0; 8];
        for (number, register) in registers.iter_mut().enumerate() {
            *register = field(layout.register(number), layout.size)?;
        }
        let mut segments = [0; 6];
        for (number, segment) in segments.iter_mut().enumerate().take(layout.segments) {
            *segment = field(layout.segment(number), 2)? as u16;
        }
        let ldt = field(layout.ldt, 2)? as u16;
        let ip = field(layout.ip, layout.size)?;
        let flags = field(layout.flags(), layout.size)?;
        let trap = wide && field(0x64, 2)? & 1 != 0;
        let cr3 = if wide { Some(field(0x1c, 4)?) } else { None };
        let cr3 = cr3.filter(|_| self.state.cr0_has(Cr0::PG));
        Ok(TaskState { cr3, ip, flags, registers, segments, ldt, trap })
    }

    /// Page faults of saving the old task are raised before anything is written.
    fn check_old_task<E: Env>(&mut self, env: &mut E) -> Result<(), Exception> {
        let tr = self.state.tr;
        let layout = Layout::of(tr.attributes as u8);
        if !tr.usable() || tr.limit < layout.limit {
            return Err(self.invalid_task());
        }
        for offset in [layout.ip, layout.end - 1] {
            let linear = self.mask_linear(tr.base.wrapping_add(offset));
            self.place(env, linear, Access::Write, Privilege::Supervisor)?;
        }
        Ok(())
    }

    fn save_task<E: Env>(&mut self, env: &mut E, how: TaskSwitch, origin: Origin) -> Result<(), Exception> {
        let tr = self.state.tr;
        let layout = Layout::of(tr.attributes as u8);
        let mut flags = origin.flags;
        if how == TaskSwitch::Return {
            flags &= !Rflags::NT.bits();
        }
        let mut save = |offset: u64, size: usize, value: u64| {
            self.write_system(env, tr.base.wrapping_add(offset), size, value)
        };
        save(layout.ip, layout.size, origin.ip)?;
        save(layout.flags(), layout.size, flags)?;
        for number in gpr::RAX..=gpr::RDI {
            let value = self.state.gpr[number];
            self.write_system(env, tr.base.wrapping_add(layout.register(number)), layout.size, value)?;
        }
        for (number, seg) in TSS_SEGMENTS.into_iter().enumerate().take(layout.segments) {
            let selector = self.segment(seg).selector.into();
            self.write_system(env, tr.base.wrapping_add(layout.segment(number)), 2, selector)?;
        }
        Ok(())
    }

    /// Loads LDTR and the segment registers of the new task (SDM Vol. 3A, table 7-1).
    fn load_task_segments<E: Env>(&mut self, env: &mut E, new: &TaskState) -> Result<(), Exception> {
        let virtual_8086 = self.state.has_flags(Rflags::VM);
        // First the selectors alone, so that a fault finds all of them in place.
        for (seg, selector) in TSS_SEGMENTS.into_iter().zip(new.segments) {
            let segment = if virtual_8086 { virtual_8086_segment(selector) } else { null_segment(selector) };
            self.set_segment(seg, segment);
        }
        let [_, code, stack, ..] = new.segments;
        self.state.cpl = if virtual_8086 { 3 } else { rpl(code) };
        self.state.ldtr = null_segment(new.ldt);
        self.load_ldtr(env, new.ldt, vector::TS)?;
        if virtual_8086 {
            return Ok(());
        }
        let segment = self.checked_task_code(env, code)?;
        self.set_code_segment(segment, rpl(code));
        let segment = self.checked_stack_segment(env, stack, self.state.cpl, vector::TS)?;
        self.set_segment(SegReg::Ss, segment);
        for (seg, selector) in TSS_SEGMENTS.into_iter().zip(new.segments) {
            if !matches!(seg, SegReg::Cs | SegReg::Ss) {
                let segment = self.checked_data_segment(env, selector, vector::TS)?;
                self.set_segment(seg, segment);
            }
        }
        Ok(())
    }

    fn checked_task_code<E: Env>(&mut self, env: &mut E, selector: u16) -> Result<Segment, Exception> {
        let failed = Exception::selector(vector::TS, selector);
        if is_null(selector) {
            return Err(failed);
        }
        let mut descriptor = self.read_descriptor(env, selector, failed)?;
        let privileged = if descriptor.is_conforming_code() {
            descriptor.dpl() <= rpl(selector)
        } else {
            descriptor.dpl() == rpl(selector)
        };
        if !descriptor.is_code() || !privileged {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        self.set_accessed(env, selector, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Event;
    use crate::testing::{Machine, at, sel};

    /// A second task's TSS, its selector, and a task gate to it.
    const TSS2: u64 = 0x4000;
    const TASK2: u16 = sel::FREE;
    const GATE2: u16 = sel::FREE + 8;

    fn machine() -> Machine {
        let mut machine = Machine::protected();
        machine.descriptor(TASK2, 0x0000_8900_0000_0067 | TSS2 << 16);
        machine.descriptor(GATE2, 0x0000_e500_0000_0000 | u64::from(TASK2) << 16);
        let fields = [
            (0x20, 0x6000),
            (0x24, 0x0000_0046),
            (0x28, 0xaaaa),
            (0x38, 0x7800),
            (0x48, sel::USER_DATA.into()),
            (0x4c, sel::USER_CODE.into()),
            (0x50, sel::USER_DATA.into()),
            (0x54, 0),
        ];
        for (offset, value) in fields {
            machine.env.store32(TSS2 + offset, value);
        }
        machine.cpu.state.gpr[gpr::RAX] = 0x1111;
        machine
    }

    fn jump(opcode: u8, selector: u16) -> [u8; 7] {
        let [low, high] = selector.to_le_bytes();
        [opcode, 0, 0, 0, 0, low, high]
    }

    fn kind(machine: &Machine, selector: u16) -> u8 {
        machine.env.load8(at::GDT + u64::from(selector) + 5) & 0xf
    }

    #[test]
    fn call_and_return_between_tasks() {
        let mut machine = machine();
        machine.exec(&jump(0x9a, TASK2)).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.cpl, state.gpr[gpr::RAX]), (0x6000, 3, 0xaaaa));
        assert_eq!(state.rflags, 0x46 | Rflags::NT.bits());
        assert_eq!(state.seg[SegReg::Es as usize].selector, sel::USER_DATA);
        assert!(!state.seg[SegReg::Ds as usize].usable());
        assert_eq!(state.tr.selector, TASK2);
        assert!(state.cr0_has(Cr0::TS));
        assert_eq!((kind(&machine, TASK2), kind(&machine, sel::TSS)), (11, 11));
        assert_eq!(machine.env.load16(TSS2), sel::TSS);
        assert_eq!(machine.env.load32(at::TSS + 0x20), 0x5007);
        assert_eq!(machine.env.load32(at::TSS + 0x28), 0x1111);
        machine.exec(&[0xcf]).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.cpl, state.gpr[gpr::RAX]), (0x5007, 0, 0x1111));
        assert_eq!(state.rflags, 2);
        assert_eq!((kind(&machine, TASK2), kind(&machine, sel::TSS)), (9, 11));
        assert_eq!(machine.env.load32(TSS2 + 0x24), 0x46, "NT is not saved by IRET");
    }

    #[test]
    fn jump_does_not_nest() {
        let mut machine = machine();
        machine.exec(&jump(0xea, GATE2)).unwrap();
        assert_eq!((kind(&machine, TASK2), kind(&machine, sel::TSS)), (11, 9));
        assert_eq!(machine.cpu.state.rflags, 0x46);
        assert_eq!(machine.exec(&jump(0xea, TASK2)), Err(Exception::selector(vector::GP, TASK2)), "busy");
    }

    #[test]
    fn exceptions_through_a_task_gate() {
        let mut machine = machine();
        machine.env.store64(at::IDT + 13 * 8, 0x0000_8500_0000_0000 | u64::from(TASK2) << 16);
        machine.cpu.deliver_exception(&mut machine.env, Exception::gp(0x18));
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.gpr[gpr::RSP]), (0x6000, 0x77fc));
        assert_eq!(machine.stack::<1>(4), [0x18]);
        assert_eq!(machine.env.load32(at::TSS + 0x20), 0x5000);
        assert_eq!(machine.env.load32(at::TSS + 0x24), 0x1_0002, "a fault saves RF");
    }

    #[test]
    fn a_fault_before_the_switch_stays_in_the_old_task_and_one_after_is_the_new_ones() {
        let mut machine = machine();
        machine.descriptor(TASK2, 0x0000_8900_0000_0066 | TSS2 << 16);
        let fault = machine.exec(&jump(0x9a, TASK2));
        assert_eq!(fault, Err(Exception::selector(vector::TS, TASK2)));
        assert_eq!((machine.cpu.state.tr.selector, machine.cpu.state.rip), (sel::TSS, 0x5000));

        let mut machine = self::machine();
        machine.env.store32(TSS2 + 0x50, sel::DATA.into());
        let fault = machine.exec(&jump(0x9a, TASK2));
        assert_eq!(fault, Err(Exception::selector(vector::TS, sel::DATA)));
        assert_eq!((machine.cpu.state.tr.selector, machine.cpu.state.rip), (TASK2, 0x6000));
    }

    #[test]
    fn tasks_in_virtual_8086_mode_and_of_16_bits() {
        let mut machine = machine();
        machine.env.store32(TSS2 + 0x24, Rflags::VM.bits() as u32);
        machine.exec(&jump(0xea, TASK2)).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.cpl, state.seg[SegReg::Cs as usize].base), (3, u64::from(sel::USER_CODE) << 4));

        let mut machine = self::machine();
        machine.descriptor(TASK2, 0x0000_8100_0000_002b | TSS2 << 16);
        for offset in (0..0x2c).step_by(2) {
            machine.env.store16(TSS2 + offset, 0);
        }
        let fields = [
            (0x0e, 0x6000),
            (0x10, 2),
            (0x12, 0xbbbb),
            (0x24, sel::CODE),
            (0x26, sel::DATA),
            (0x28, sel::DATA),
        ];
        for (offset, value) in fields {
            machine.env.store16(TSS2 + offset, value);
        }
        machine.exec(&jump(0x9a, TASK2)).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.gpr[gpr::RAX], state.cpl), (0x6000, 0xbbbb, 0));
        assert_eq!(state.seg[SegReg::Ds as usize].selector, sel::DATA);
        machine.exec(&[0xcf]).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.env.load16(TSS2 + 0x0e)), (0x5007, 0x6001));
    }

    #[test]
    fn the_t_flag_traps_in_the_new_task() {
        let mut machine = machine();
        machine.env.store16(TSS2 + 0x64, 1);
        assert_eq!(machine.exec(&jump(0x9a, TASK2)), Err(Exception::DB));
        assert_eq!((machine.cpu.state.dr[6] >> 15 & 1, machine.cpu.state.rip), (1, 0x6000));
    }

    #[test]
    fn interrupts_nest_tasks() {
        let mut machine = machine();
        machine.env.store64(at::IDT + 0x40 * 8, 0x0000_8500_0000_0000 | u64::from(TASK2) << 16);
        machine.cpu.deliver_event(&mut machine.env, Event::Interrupt(0x40));
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.tr.selector), (0x6000, TASK2));
        assert_eq!(machine.env.load32(at::TSS + 0x20), 0x5000);
    }

    #[test]
    fn ports_by_iopl_and_bitmap() {
        let mut machine = Machine::protected();
        let Machine { cpu, env } = &mut machine;
        assert_eq!(cpu.check_io(env, 0x60, 1), Ok(()));
        cpu.state.cpl = 3;
        env.store16(at::TSS + IO_MAP_BASE, 0x68);
        assert_eq!(cpu.check_io(env, 0x60, 1), Err(Exception::GP0), "no bitmap within the limit");
        cpu.state.tr.limit = 0x68 + 0x20;
        env.store8(at::TSS + 0x68 + 0xc, 0b0001_0000);
        assert_eq!(cpu.check_io(env, 0x60, 4), Ok(()));
        assert_eq!(cpu.check_io(env, 0x61, 4), Err(Exception::GP0));
        assert_eq!(cpu.check_io(env, 0x64, 1), Err(Exception::GP0));
        assert_eq!(cpu.check_io(env, 0x65, 1), Ok(()));
        assert_eq!(cpu.check_io(env, 0xff, 1), Ok(()), "the byte after the last is within the limit");
        assert_eq!(cpu.check_io(env, 0x100, 1), Err(Exception::GP0));
        cpu.state.rflags |= Rflags::IOPL.bits();
        assert_eq!(cpu.check_io(env, 0x64, 1), Ok(()));
        cpu.state.rflags |= Rflags::VM.bits();
        assert_eq!(cpu.check_io(env, 0x64, 1), Err(Exception::GP0), "IOPL does not count there");
    }
}
