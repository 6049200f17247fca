//! Far transfers of control: JMP, CALL and RET through segments, gates and tasks, IRET, software interrupts
//! (SDM Vol. 3A, sections 5.8 and 6.12; Vol. 2A and 2B, the instructions' own pages).
//!
//! All of them set [`Cpu::next_rip`]; on a fault nothing has changed (but see [`crate::task`]).

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::{Exception, vector};
use crate::interp::operand::truncate;
use crate::interrupt::{Source, on_new_stack};
use crate::memory::is_canonical;
use crate::registers::{Rflags, gpr};
use crate::segment::{Descriptor, is_null, null_stack_segment, rpl, system_type, virtual_8086_segment};
use crate::state::{Mode, SegReg, Segment};
use crate::task::{Origin, TaskSwitch};

/// The far transfers that may go through a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    Jump,
    Call,
}

impl Transfer {
    fn task_switch(self) -> TaskSwitch {
        match self {
            Self::Jump => TaskSwitch::Jump,
            Self::Call => TaskSwitch::Call,
        }
    }
}

impl Cpu {
    /// Where a task that an instruction leaves goes on.
    fn origin(&self) -> Origin {
        Origin { ip: self.next_rip, flags: self.state.rflags & !Rflags::RF.bits() }
    }

    /// #GP(0) unless `ip` lies in a code segment.
    fn check_target(&self, ip: u64, segment: &Segment) -> Result<(), Exception> {
        let long = self.in_long_mode() && segment.attributes & Segment::L != 0;
        let inside = if long { is_canonical(ip) } else { ip <= u64::from(segment.limit) };
        if inside { Ok(()) } else { Err(Exception::GP0) }
    }

    /// CS as real and virtual-8086 mode load it.
    fn real_code_segment(&self, selector: u16) -> Segment {
        if self.state.mode() == Mode::Virtual8086 {
            virtual_8086_segment(selector)
        } else {
            self.real_segment(SegReg::Cs, selector)
        }
    }

    /// Far JMP or CALL to selector:offset, with an operand size of `size` (2, 4, 8) bytes.
    pub(crate) fn far_transfer<E: Env>(
        &mut self,
        env: &mut E,
        kind: Transfer,
        selector: u16,
        offset: u64,
        size: usize,
    ) -> Result<(), Exception> {
        if !self.is_protected() {
            return self.attempt(|cpu| cpu.real_transfer(env, kind, selector, offset, size));
        }
        if is_null(selector) {
            return Err(Exception::GP0);
        }
        let failed = Exception::selector(vector::GP, selector);
        let descriptor = self.read_descriptor(env, selector, failed)?;
        if !descriptor.is_system() {
            return self.attempt(|cpu| cpu.segment_transfer(env, kind, selector, descriptor, offset, size));
        }
        use system_type::{CALL_GATE16, CALL_GATE32, TASK_GATE, TSS16, TSS32};
        let long = self.in_long_mode();
        match descriptor.kind() {
            CALL_GATE16 if !long => {}
            CALL_GATE32 => {}
            TASK_GATE | TSS16 | TSS32 if !long => {}
            _ => return Err(failed),
        }
        if descriptor.dpl() < self.state.cpl || descriptor.dpl() < rpl(selector) {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        let origin = self.origin();
        match descriptor.kind() {
            TASK_GATE => self.task_gate(env, &descriptor, kind.task_switch(), origin),
            TSS16 | TSS32 => self.switch_to_available(env, selector, &descriptor, kind.task_switch(), origin),
            _ => self.attempt(|cpu| cpu.gate_transfer(env, kind, selector)),
        }
    }

    fn real_transfer<E: Env>(
        &mut self,
        env: &mut E,
        kind: Transfer,
        selector: u16,
        offset: u64,
        size: usize,
    ) -> Result<(), Exception> {
        let segment = self.real_code_segment(selector);
        if kind == Transfer::Call {
            self.push_return_address(env, size)?;
        }
        self.check_target(offset, &segment)?;
        self.set_segment(SegReg::Cs, segment);
        self.next_rip = offset;
        Ok(())
    }

    fn push_return_address<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        self.push(env, size, self.segment(SegReg::Cs).selector.into())?;
        self.push(env, size, self.next_rip)
    }

    /// Straight to a code segment: same privilege level.
    fn segment_transfer<E: Env>(
        &mut self,
        env: &mut E,
        kind: Transfer,
        selector: u16,
        mut descriptor: Descriptor,
        offset: u64,
        size: usize,
    ) -> Result<(), Exception> {
        let cpl = self.state.cpl;
        let privileged = if descriptor.is_conforming_code() {
            descriptor.dpl() <= cpl
        } else {
            descriptor.dpl() == cpl && rpl(selector) <= cpl
        };
        if !descriptor.is_code() || !privileged || self.is_contradictory(&descriptor) {
            return Err(Exception::selector(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        if kind == Transfer::Call {
            self.push_return_address(env, size)?;
        }
        // A 64-bit offset into a segment of compatibility mode is cut.
        let offset = if descriptor.is_long() { offset } else { truncate(offset, 4) };
        self.check_target(offset, &descriptor.segment(selector))?;
        self.set_accessed(env, selector, &mut descriptor)?;
        self.set_code_segment(descriptor.segment(selector), cpl);
        self.next_rip = offset;
        Ok(())
    }

    /// In long mode a code segment can't be both 64-bit and 32-bit.
    fn is_contradictory(&self, descriptor: &Descriptor) -> bool {
        self.in_long_mode() && descriptor.is_long() && descriptor.is_big()
    }

    /// Through a call gate whose own privilege and presence are checked.
    fn gate_transfer<E: Env>(
        &mut self,
        env: &mut E,
        kind: Transfer,
        gate_selector: u16,
    ) -> Result<(), Exception> {
        let failed = Exception::selector(vector::GP, gate_selector);
        let gate = self.read_system_descriptor(env, gate_selector, failed)?;
        let long = self.in_long_mode();
        if long && !gate.upper_type_is_zero() {
            return Err(failed);
        }
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(Exception::GP0);
        }
        let failed = Exception::selector(vector::GP, selector);
        let mut target = self.read_descriptor(env, selector, failed)?;
        let cpl = self.state.cpl;
        let conforming = target.is_conforming_code();
        let privileged = match kind {
            Transfer::Jump if !conforming => target.dpl() == cpl,
            _ => target.dpl() <= cpl,
        };
        if !target.is_code() || !privileged || (long && (!target.is_long() || target.is_big())) {
            return Err(failed);
        }
        if !target.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        let wide = gate.kind() & 8 != 0;
        let offset = gate.gate_offset(wide);
        let segment = target.segment(selector);
        let size = if long {
            8
        } else if wide {
            4
        } else {
            2
        };
        let inward = !conforming && target.dpl() < cpl;
        if kind == Transfer::Jump {
            self.check_target(offset, &segment)?;
        } else if inward && long {
            self.inner_call64(env, &target, selector)?;
            self.check_target(offset, &segment)?;
        } else if inward {
            self.inner_call(env, &gate, target.dpl(), size)?;
            self.check_target(offset, &segment)?;
        } else {
            // The pushes of a 64-bit gate are made by 64-bit code's rules, even from compatibility mode.
            let (old_cs, return_ip) = (self.segment(SegReg::Cs).selector, self.next_rip);
            self.check_target(offset, &segment)?;
            if long {
                self.set_code_segment(segment, cpl);
            }
            self.push(env, size, old_cs.into())?;
            self.push(env, size, return_ip)?;
        }
        self.set_accessed(env, selector, &mut target)?;
        let cpl = if inward { target.dpl() } else { cpl };
        self.set_code_segment(target.segment(selector), cpl);
        self.next_rip = offset;
        Ok(())
    }

    /// CALL to an inner level through a 16- or 32-bit gate: new stack, parameters copied.
    fn inner_call<E: Env>(
        &mut self,
        env: &mut E,
        gate: &Descriptor,
        cpl: u8,
        size: usize,
    ) -> Result<(), Exception> {
        let old_cs = self.segment(SegReg::Cs).selector;
        let old_ss = self.segment(SegReg::Ss).selector;
        let old_rsp = self.state.gpr[gpr::RSP];
        let mask = self.stack_mask();
        let mut parameters = [0; 31];
        let count = gate.gate_count();
        for (number, parameter) in parameters.iter_mut().enumerate().take(count) {
            let offset = old_rsp.wrapping_add((number * size) as u64) & mask;
            *parameter = self.read(env, SegReg::Ss, offset, size)?;
        }
        let selector = self.switch_to_inner_stack(env, cpl)?;
        let parameters = parameters.into_iter().take(count).rev();
        let frame = [u64::from(old_ss), old_rsp].into_iter().chain(parameters);
        for value in frame.chain([u64::from(old_cs), self.next_rip]) {
            self.push(env, size, value).map_err(|e| on_new_stack(e, selector))?;
        }
        Ok(())
    }

    /// CALL to an inner level through a 64-bit gate.
    fn inner_call64<E: Env>(
        &mut self,
        env: &mut E,
        target: &Descriptor,
        selector: u16,
    ) -> Result<(), Exception> {
        let cpl = target.dpl();
        let old_cs = self.segment(SegReg::Cs).selector;
        let old_ss = self.segment(SegReg::Ss).selector;
        let old_rsp = self.state.gpr[gpr::RSP];
        let rsp = self.inner_stack64(env, cpl)?;
        self.set_code_segment(target.segment(selector), cpl);
        self.set_segment(SegReg::Ss, null_stack_segment(cpl.into(), cpl));
        self.state.gpr[gpr::RSP] = rsp;
        for value in [old_ss.into(), old_rsp, old_cs.into(), self.next_rip] {
            self.push(env, 8, value)?;
        }
        Ok(())
    }

    // ---- returns ----

    /// The value `bytes` above the top of the stack, without popping it.
    fn peek<E: Env>(&mut self, env: &mut E, size: usize, bytes: u64) -> Result<u64, Exception> {
        let offset = self.state.gpr[gpr::RSP].wrapping_add(bytes) & self.stack_mask();
        self.read(env, SegReg::Ss, offset, size)
    }

    /// Removes bytes from the stack.
    fn release_stack(&mut self, bytes: u64) {
        self.set_stack_pointer(self.state.gpr[gpr::RSP].wrapping_add(bytes));
    }

    /// Far RET with an operand size of `size` bytes, releasing `release` bytes of parameters.
    pub(crate) fn far_return<E: Env>(
        &mut self,
        env: &mut E,
        size: usize,
        release: u16,
    ) -> Result<(), Exception> {
        self.attempt(|cpu| {
            let width = size as u64;
            let ip = cpu.peek(env, size, 0)?;
            let selector = cpu.peek(env, size, width)? as u16;
            let taken = 2 * width + u64::from(release);
            if !cpu.is_protected() {
                let segment = cpu.real_code_segment(selector);
                cpu.check_target(ip, &segment)?;
                cpu.release_stack(taken);
                cpu.set_segment(SegReg::Cs, segment);
                cpu.next_rip = ip;
                return Ok(());
            }
            let segment = cpu.return_segment(env, selector)?;
            let outward = rpl(selector) > cpu.state.cpl;
            let stack = match outward {
                true => {
                    let rsp = cpu.peek(env, size, taken)?;
                    Some((cpu.peek(env, size, taken + width)? as u16, rsp.wrapping_add(release.into())))
                }
                false => None,
            };
            cpu.release_stack(taken);
            cpu.return_to(env, ip, selector, segment, stack)
        })
    }

    /// The code segment that a return leads to, checked for it.
    fn return_segment<E: Env>(&mut self, env: &mut E, selector: u16) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Err(Exception::GP0);
        }
        let failed = Exception::selector(vector::GP, selector);
        let mut descriptor = self.read_descriptor(env, selector, failed)?;
        let level = rpl(selector);
        let privileged = if descriptor.is_conforming_code() {
            descriptor.dpl() <= level
        } else {
            descriptor.dpl() == level
        };
        let contradictory = self.is_contradictory(&descriptor);
        if !descriptor.is_code() || level < self.state.cpl || !privileged || contradictory {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        self.set_accessed(env, selector, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Completes a return: `stack` is the popped SS and RSP, if those are returned to as well.
    fn return_to<E: Env>(
        &mut self,
        env: &mut E,
        ip: u64,
        selector: u16,
        segment: Segment,
        stack: Option<(u16, u64)>,
    ) -> Result<(), Exception> {
        let level = rpl(selector);
        let outward = level > self.state.cpl;
        let ip =
            if segment.attributes & Segment::L != 0 && self.in_long_mode() { ip } else { truncate(ip, 4) };
        let new_stack = match stack {
            Some((selector, rsp)) => Some((self.return_stack(env, selector, level, &segment)?, rsp)),
            None => None,
        };
        self.check_target(ip, &segment)?;
        self.set_code_segment(segment, level);
        if let Some((segment, rsp)) = new_stack {
            self.set_segment(SegReg::Ss, segment);
            self.set_stack_pointer(rsp);
        }
        if outward {
            self.drop_inner_segments();
        }
        self.next_rip = ip;
        Ok(())
    }

    /// The stack segment that a return to privilege level `level` leads to. `code`: the new CS.
    fn return_stack<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        level: u8,
        code: &Segment,
    ) -> Result<Segment, Exception> {
        if !is_null(selector) {
            return self.checked_stack_segment(env, selector, level, vector::GP);
        }
        let long = self.in_long_mode() && code.attributes & Segment::L != 0;
        if long && level < 3 && rpl(selector) == level {
            Ok(null_stack_segment(selector, level))
        } else {
            Err(Exception::GP0)
        }
    }

    /// IRET with an operand size of `size` bytes.
    pub(crate) fn interrupt_return<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        match self.state.mode() {
            Mode::Real => self.attempt(|cpu| cpu.real_interrupt_return(env, size))?,
            // Without virtual-8086 mode extensions, IRET is IOPL-sensitive.
            Mode::Virtual8086 if self.iopl() < 3 => return Err(Exception::GP0),
            Mode::Virtual8086 => self.attempt(|cpu| cpu.real_interrupt_return(env, size))?,
            _ if self.state.has_flags(Rflags::NT) => {
                if self.in_long_mode() {
                    return Err(Exception::GP0);
                }
                self.return_from_task(env, self.origin())?;
            }
            _ => self.attempt(|cpu| cpu.protected_interrupt_return(env, size))?,
        }
        self.state.nmi_blocked = false;
        Ok(())
    }

    fn real_interrupt_return<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        let width = size as u64;
        let ip = self.peek(env, size, 0)?;
        let selector = self.peek(env, size, width)? as u16;
        let flags = self.peek(env, size, 2 * width)?;
        let segment = self.real_code_segment(selector);
        self.check_target(ip, &segment)?;
        self.release_stack(3 * width);
        self.set_segment(SegReg::Cs, segment);
        self.next_rip = ip;
        let mut loaded = self.loadable_flags(size, 0) & !(Rflags::VIF | Rflags::VIP).bits();
        if self.state.mode() == Mode::Virtual8086 {
            loaded &= !Rflags::IOPL.bits();
        }
        self.state.rflags = self.state.rflags & !loaded | flags & loaded;
        Ok(())
    }

    /// What IRETQ in 64-bit code at CPL 0 loads into CS and SS if it pops these selectors of the GDT and leads to 64-bit
    /// code at CPL 0 or 3 without a fault. Both descriptors must have been accessed, else they are marked so.
    pub fn plain_return<E: Env>(&mut self, env: &mut E, cs: u16, ss: u16) -> Option<[Segment; 2]> {
        let level = rpl(cs);
        let code = self.return_segment(env, cs).ok()?;
        if !matches!(level, 0 | 3) || code.attributes & Segment::L == 0 {
            return None;
        }
        let stack = self.return_stack(env, ss, level, &code).ok()?;
        Some([Segment { selector: code.selector & !3 | u16::from(level), ..code }, stack])
    }

    /// The flags that IRET at privilege level `cpl` loads, besides VM.
    fn loadable_flags(&self, size: usize, cpl: u8) -> u64 {
        let mut loaded = Rflags::ARITHMETIC | Rflags::TF | Rflags::DF | Rflags::NT;
        if size > 2 {
            loaded |= Rflags::RF | Rflags::AC | Rflags::ID;
        }
        if cpl <= self.iopl() {
            loaded |= Rflags::IF;
        }
        if cpl == 0 {
            loaded |= Rflags::IF | Rflags::IOPL;
            if size > 2 {
                loaded |= Rflags::VIF | Rflags::VIP;
            }
        }
        loaded.bits()
    }

    fn protected_interrupt_return<E: Env>(&mut self, env: &mut E, size: usize) -> Result<(), Exception> {
        let width = size as u64;
        let ip = self.peek(env, size, 0)?;
        let selector = self.peek(env, size, width)? as u16;
        let flags = self.peek(env, size, 2 * width)?;
        let cpl = self.state.cpl;
        let to_virtual_8086 = size == 4 && flags & Rflags::VM.bits() != 0 && cpl == 0;
        if to_virtual_8086 && !self.in_long_mode() {
            return self.return_to_virtual_8086(env, ip, selector, flags);
        }
        let segment = self.return_segment(env, selector)?;
        let stack = match rpl(selector) > cpl || self.in_64bit_mode() {
            true => {
                let rsp = self.peek(env, size, 3 * width)?;
                Some((self.peek(env, size, 4 * width)? as u16, rsp))
            }
            false => None,
        };
        let loaded = self.loadable_flags(size, cpl);
        self.release_stack(3 * width);
        self.return_to(env, ip, selector, segment, stack)?;
        self.state.rflags = self.state.rflags & !loaded | flags & loaded;
        Ok(())
    }

    fn return_to_virtual_8086<E: Env>(
        &mut self,
        env: &mut E,
        ip: u64,
        selector: u16,
        flags: u64,
    ) -> Result<(), Exception> {
        let rsp = self.peek(env, 4, 12)?;
        let ss = self.peek(env, 4, 16)? as u16;
        self.load_virtual_8086_segments(env, ss, selector)?;
        if ip > 0xffff {
            return Err(Exception::GP0);
        }
        let loaded = self.loadable_flags(4, 0) | Rflags::VM.bits();
        self.state.rflags = self.state.rflags & !loaded | flags & loaded;
        self.state.cpl = 3;
        self.state.gpr[gpr::RSP] = rsp;
        self.next_rip = ip;
        Ok(())
    }

    /// Loads all six segment registers on the return to virtual-8086 mode; four of them from the stack.
    fn load_virtual_8086_segments<E: Env>(&mut self, env: &mut E, ss: u16, cs: u16) -> Result<(), Exception> {
        let mut data = [0; 4];
        for (number, selector) in data.iter_mut().enumerate() {
            *selector = self.peek(env, 4, 20 + 4 * number as u64)? as u16;
        }
        let [es, ds, fs, gs] = data;
        self.state.seg = [es, cs, ss, ds, fs, gs].map(virtual_8086_segment);
        Ok(())
    }

    // ---- software interrupts ----

    /// INT n, INT3, INTO and INT1 ([`Source::PrivilegedSoftware`]).
    pub(crate) fn software_interrupt<E: Env>(
        &mut self,
        env: &mut E,
        number: u8,
        source: Source,
    ) -> Result<(), Exception> {
        self.deliver(env, number, None, source, self.next_rip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::Rflags;
    use crate::testing::{Machine, at, sel};

    /// JMP or CALL ptr16:32.
    fn direct(opcode: u8, selector: u16, offset: u32) -> [u8; 7] {
        let mut code = [opcode; 7];
        code[1..5].copy_from_slice(&offset.to_le_bytes());
        code[5..].copy_from_slice(&selector.to_le_bytes());
        code
    }
    const JMP: u8 = 0xea;
    const CALL: u8 = 0x9a;
    const RETF: &[u8] = &[0xcb];
    const IRETD: &[u8] = &[0xcf];
    const IRETQ: &[u8] = &[0x48, 0xcf];

    fn gp(selector: u16) -> Result<(), Exception> {
        Err(Exception::selector(vector::GP, selector))
    }

    fn push(machine: &mut Machine, size: usize, values: &[u64]) {
        for &value in values.iter().rev() {
            machine.cpu.push(&mut machine.env, size, value).unwrap();
        }
    }

    #[test]
    fn call_and_return_in_the_same_ring() {
        let mut machine = Machine::protected();
        machine.exec(&direct(CALL, sel::CODE, 0x6000)).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.stack::<2>(4)), (0x6000, [0x5007, sel::CODE.into()]));
        machine.exec(RETF).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.gpr[gpr::RSP]), (0x5007, 0x7000));
    }

    #[test]
    fn what_may_not_be_jumped_to() {
        let mut machine = Machine::protected();
        machine.descriptor(sel::FREE, 0x00cf_1b00_0000_ffff);
        machine.descriptor(sel::FREE + 8, 0x0040_9b00_0000_0fff);
        let mut jump = |selector, offset| machine.exec(&direct(JMP, selector, offset));
        assert_eq!(jump(3, 0), gp(0));
        assert_eq!(jump(sel::DATA, 0), gp(sel::DATA));
        assert_eq!(jump(sel::USER_CODE, 0), gp(sel::USER_CODE));
        assert_eq!(jump(sel::CODE | 1, 0), gp(sel::CODE));
        assert_eq!(jump(0x100, 0), gp(0x100));
        assert_eq!(jump(sel::CODE | 4, 0), gp(sel::CODE | 4), "no LDT");
        assert_eq!(jump(sel::FREE, 0), Err(Exception::selector(vector::NP, sel::FREE)));
        assert_eq!(jump(sel::FREE + 8, 0x1000), gp(0), "beyond the limit");
        assert_eq!(jump(sel::FREE + 8, 0xfff), Ok(()));
    }

    #[test]
    fn conforming_code_runs_in_the_callers_ring() {
        let mut machine = Machine::protected();
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        machine.exec(&direct(JMP, sel::CONFORMING, 0x6000)).unwrap();
        assert_eq!(machine.cpu.state.cpl, 3);
        assert_eq!(machine.cpu.state.seg[SegReg::Cs as usize].selector, sel::CONFORMING | 3);
    }

    #[test]
    fn call_gate_to_an_inner_ring_and_back() {
        let mut machine = Machine::protected();
        machine.descriptor(sel::FREE, 0x0000_ec02_0008_6000);
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        push(&mut machine, 4, &[0x11, 0x22]);
        machine.exec(&direct(CALL, sel::FREE | 3, 0xdead)).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.cpl), (0x6000, 0));
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], at::STACK0 - 24);
        let frame = [0x5007, sel::USER_CODE.into(), 0x11, 0x22, 0x6ff8, sel::USER_DATA.into()];
        assert_eq!(machine.stack::<6>(4), frame);
        machine.ring_data(SegReg::Fs, sel::DATA);
        machine.exec(&[0xca, 8, 0]).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.cpl, state.gpr[gpr::RSP]), (0x5007, 3, 0x7000));
        assert_eq!(state.seg[SegReg::Ss as usize].selector, sel::USER_DATA);
        assert!(!state.seg[SegReg::Fs as usize].usable(), "a segment of ring 0 is dropped");
        assert_eq!(state.seg[SegReg::Ds as usize].selector, sel::USER_DATA);
    }

    #[test]
    fn gates_have_a_privilege_of_their_own() {
        let mut machine = Machine::protected();
        machine.descriptor(sel::FREE, 0x0000_8c00_0008_6000);
        machine.descriptor(sel::FREE + 8, 0x0000_6c00_0008_6000);
        machine.descriptor(sel::FREE + 16, 0x0000_ec00_0010_6000);
        machine.descriptor(sel::FREE + 24, 0x0000_ec00_0008_6000);
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        let mut call = |opcode, selector| machine.exec(&direct(opcode, selector, 0));
        assert_eq!(call(CALL, sel::FREE), gp(sel::FREE));
        assert_eq!(call(CALL, sel::FREE + 8), Err(Exception::selector(vector::NP, sel::FREE + 8)));
        assert_eq!(call(CALL, sel::FREE + 16), gp(sel::DATA));
        assert_eq!(call(JMP, sel::FREE + 24), gp(sel::CODE), "JMP does not change rings");
        machine.env.store32(at::TSS + 8, sel::USER_DATA.into());
        let fault = machine.exec(&direct(CALL, sel::FREE + 24, 0));
        assert_eq!(fault, Err(Exception::selector(vector::TS, sel::USER_DATA)));
        machine.cpu.state.tr.limit = 8;
        let fault = machine.exec(&direct(CALL, sel::FREE + 24, 0));
        assert_eq!(fault, Err(Exception::selector(vector::TS, sel::TSS)));
        assert_eq!((machine.cpu.state.cpl, machine.cpu.state.gpr[gpr::RSP]), (3, 0x7000));
    }

    #[test]
    fn call_gate_of_long_mode() {
        let mut machine = Machine::long();
        machine.descriptor(sel::FREE, 0x0000_ec00_0038_6000);
        machine.descriptor(sel::FREE + 8, 0xffff_8000);
        machine.ring(sel::USER_CODE64, sel::USER_DATA);
        machine.env.put(0x9000, &[0, 0, 0, 0, sel::FREE as u8, 0]);
        // CALL FAR [0x9000].
        machine.exec(&[0xff, 0x1c, 0x25, 0, 0x90, 0, 0]).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.cpl), (0xffff_8000_0000_6000, 0));
        let frame = [0x5007, sel::USER_CODE64.into(), 0x7000, sel::USER_DATA.into()];
        assert_eq!(machine.stack::<4>(8), frame);
        machine.exec(&[0x48, 0xcb]).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.cpl), (0x5007, 3));
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], 0x7000);
        machine.descriptor(sel::FREE + 8, 0x0100_ffff_8000);
        assert_eq!(machine.exec(&[0xff, 0x1c, 0x25, 0, 0x90, 0, 0]), gp(sel::FREE));
    }

    #[test]
    fn between_64_bit_and_compatibility_mode() {
        let mut machine = Machine::long();
        push(&mut machine, 4, &[0x6000, sel::CODE.into()]);
        machine.exec(RETF).unwrap();
        assert_eq!((machine.cpu.state.mode(), machine.cpu.state.code_bits()), (Mode::Compatibility, 32));
        machine.exec(&direct(JMP, sel::CODE64, 0x8000_0000)).unwrap();
        assert_eq!((machine.cpu.state.mode(), machine.cpu.state.rip), (Mode::Long64, 0x8000_0000));
        machine.descriptor(sel::FREE, 0x00ef_9b00_0000_ffff);
        push(&mut machine, 8, &[0x6000, sel::FREE.into()]);
        assert_eq!(machine.exec(&[0x48, 0xcb]), gp(sel::FREE), "L and D");
    }

    #[test]
    fn iret_in_64_bit_mode_takes_the_stack_always() {
        let mut machine = Machine::long();
        machine.cpu.state.rflags |= Rflags::IOPL.bits();
        push(&mut machine, 8, &[0x6000, sel::CODE64.into(), 0x24_0ed7 | 0x1_0000, 0x9000, 0]);
        machine.exec(IRETQ).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.rip, state.gpr[gpr::RSP], state.rflags), (0x6000, 0x9000, 0x25_0ed7));
        assert!(!state.seg[SegReg::Ss as usize].usable());
        push(&mut machine, 8, &[0x6000, sel::USER_CODE64.into(), 2, 0x9000, 0]);
        assert_eq!(machine.exec(IRETQ), gp(0), "no null SS in ring 3");
        push(&mut machine, 8, &[1 << 47, sel::USER_CODE64.into(), 2, 0x9000, sel::USER_DATA.into()]);
        assert_eq!(machine.exec(IRETQ), gp(0), "not canonical");
        push(&mut machine, 8, &[0x6000, sel::USER_CODE64.into(), 2, 0x9000, sel::DATA.into()]);
        assert_eq!(machine.exec(IRETQ), gp(sel::DATA));
        machine.cpu.state.rflags |= Rflags::NT.bits();
        assert_eq!(machine.exec(IRETQ), gp(0), "no nested tasks in long mode");
    }

    #[test]
    fn iret_keeps_the_base_of_a_null_fs() {
        let mut machine = Machine::long();
        machine.cpu.state.seg[SegReg::Fs as usize] = crate::segment::null_segment(0);
        machine.cpu.state.seg[SegReg::Fs as usize].base = 0x1234;
        push(&mut machine, 8, &[0x6000, sel::USER_CODE64.into(), 2, 0x9000, sel::USER_DATA.into()]);
        machine.exec(IRETQ).unwrap();
        assert_eq!(machine.cpu.state.seg[SegReg::Fs as usize].base, 0x1234);
        assert!(!machine.cpu.state.seg[SegReg::Ds as usize].usable());
    }

    #[test]
    fn flags_that_iret_may_not_change() {
        let mut machine = Machine::protected();
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        push(&mut machine, 4, &[0x6000, sel::USER_CODE.into(), 0x1a_3202]);
        machine.exec(IRETD).unwrap();
        assert_eq!(machine.cpu.state.rflags, 2, "neither IF nor IOPL, VM, VIF, VIP");
        machine.cpu.state.rflags |= Rflags::IOPL.bits();
        push(&mut machine, 4, &[0x6000, sel::USER_CODE.into(), 0x202]);
        machine.exec(IRETD).unwrap();
        assert_eq!(machine.cpu.state.rflags, 0x3202, "IF with IOPL 3");
        push(&mut machine, 4, &[0x6000, sel::CODE.into(), 0x202]);
        assert_eq!(machine.exec(IRETD), gp(sel::CODE), "not inwards");
    }

    #[test]
    fn virtual_8086_mode_and_out_of_it() {
        let mut machine = Machine::protected();
        machine.gate(0x20, sel::CODE, 0x6000, 0xee, 0);
        let flags = Rflags::VM.bits() | 0x3002;
        push(&mut machine, 4, &[0x100, 0x2000, flags, 0xfff0, 0x1000, 0x11, 0x22, 0x33, 0x44]);
        machine.exec(IRETD).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.mode(), state.cpl, state.rip), (Mode::Virtual8086, 3, 0x100));
        assert_eq!(state.seg.map(|s| s.selector), [0x11, 0x2000, 0x1000, 0x22, 0x33, 0x44]);
        assert_eq!(state.seg[1].base, 0x2_0000);
        machine.exec(&[0xcd, 0x20]).unwrap();
        let state = &machine.cpu.state;
        assert_eq!((state.mode(), state.cpl, state.rip), (Mode::Protected, 0, 0x6000));
        assert_eq!(state.gpr[gpr::RSP], at::STACK0 - 36);
        assert!([0, 3, 4, 5].iter().all(|&seg| !state.seg[seg].usable()));
        let frame = [0x102, 0x2000, flags, 0xfff0, 0x1000, 0x11, 0x22, 0x33, 0x44];
        assert_eq!(machine.stack::<9>(4), frame);
        machine.env.store32(at::STACK0 - 36 + 8, Rflags::VM.bits() as u32 | 2);
        machine.exec(IRETD).unwrap();
        assert_eq!(machine.exec(&[0xcd, 0x20]), gp(0), "INT n needs IOPL 3 there");
        assert_eq!(machine.exec(&[0xcf]), gp(0));
    }

    #[test]
    fn real_mode_transfers() {
        let mut machine = Machine::protected();
        machine.cpu.state = crate::state::CpuState::default();
        machine.cpu.state.gpr[gpr::RSP] = 0x1000;
        machine.exec(&[0x9a, 0x34, 0x12, 0x00, 0x20]).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.seg[1].base), (0x1234, 0x2_0000));
        assert_eq!(machine.stack::<2>(2), [0xfff5, 0xf000]);
        machine.exec(RETF).unwrap();
        assert_eq!((machine.cpu.state.rip, machine.cpu.state.seg[1].base), (0xfff5, 0xf_0000));
        let wide = [0x66, 0xea, 0, 0, 1, 0, 0, 0x20];
        assert_eq!(machine.exec(&wide), gp(0), "beyond 64 KiB");
    }
}
