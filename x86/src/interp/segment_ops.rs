//! The instructions that deal in segments, gates, tasks and descriptor tables: operands here, the work in
//! [`crate::segment`], [`crate::transfer`], [`crate::task`] and [`crate::syscall`].

use iced_x86::{Code, Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::{Exception, vector};
use crate::interp::op::Op;
use crate::interp::operand::{segment_register, truncate};
use crate::interrupt::Source;
use crate::memory::is_canonical;
use crate::registers::{Cr4, Rflags};
use crate::state::{Mode, SegReg, TableRegister};
use crate::transfer::Transfer;

impl Cpu {
    /// Executes an instruction that deals in segments, gates and tasks, if `op` is one: far JMP, CALL and RET,
    /// IRET, INT n, INT3, INT1, INTO, SYSCALL, SYSRET, SYSENTER, SYSEXIT, MOV, POP and PUSH of segment
    /// registers, LDS and its kin, LLDT, LTR, SLDT, STR, VERR, VERW, LAR, LSL, ARPL, LGDT, LIDT, SGDT, SIDT.
    /// Transfers set [`Cpu::next_rip`]. False: not one of these.
    pub fn exec_segment_op<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Mov => return self.exec_move_segment(env, op),
            Mnemonic::Push => return self.exec_push_segment(env, op),
            Mnemonic::Pop => return self.exec_pop_segment(env, op),
            Mnemonic::Jmp => return self.exec_far_transfer(env, op, Transfer::Jump),
            Mnemonic::Call => return self.exec_far_transfer(env, op, Transfer::Call),
            Mnemonic::Retf => {
                let release = if op.instruction.op_count() > 0 { op.instruction.immediate16() } else { 0 };
                let size = match op.instruction.code() {
                    Code::Retfw | Code::Retfw_imm16 => 2,
                    Code::Retfd | Code::Retfd_imm16 => 4,
                    _ => 8,
                };
                self.far_return(env, size, release)?;
            }
            Mnemonic::Iret => self.interrupt_return(env, 2)?,
            Mnemonic::Iretd => self.interrupt_return(env, 4)?,
            Mnemonic::Iretq => self.interrupt_return(env, 8)?,
            Mnemonic::Int => {
                // Without virtual-8086 mode extensions, INT n is IOPL-sensitive there.
                if self.state.mode() == Mode::Virtual8086 && self.iopl() < 3 {
                    return Err(Exception::GP0);
                }
                self.software_interrupt(env, op.instruction.immediate8(), Source::Software)?;
            }
            Mnemonic::Int3 => self.software_interrupt(env, vector::BP, Source::Software)?,
            Mnemonic::Int1 => {
                self.report_hits_with_int1();
                self.software_interrupt(env, vector::DB, Source::PrivilegedSoftware)?
            }
            Mnemonic::Into => {
                if self.state.has_flags(Rflags::OF) {
                    self.software_interrupt(env, vector::OF, Source::Software)?;
                }
            }
            Mnemonic::Syscall => self.syscall()?,
            Mnemonic::Sysret => self.sysret(false)?,
            Mnemonic::Sysretq => self.sysret(true)?,
            Mnemonic::Sysenter => self.sysenter()?,
            Mnemonic::Sysexit => self.sysexit(false)?,
            Mnemonic::Sysexitq => self.sysexit(true)?,
            Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
                self.exec_load_far_pointer(env, op)?;
            }
            Mnemonic::Lldt | Mnemonic::Ltr | Mnemonic::Sldt | Mnemonic::Str => {
                self.exec_system_segment(env, op)?;
            }
            Mnemonic::Verr | Mnemonic::Verw | Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Arpl => {
                self.exec_selector_query(env, op)?;
            }
            Mnemonic::Lgdt | Mnemonic::Lidt => self.exec_load_table(env, op)?,
            Mnemonic::Sgdt | Mnemonic::Sidt => self.exec_store_table(env, op)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// MOV to and from segment registers.
    fn exec_move_segment<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let instruction = &op.instruction;
        match instruction.code() {
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
                let selector = self.segment(segment_register(instruction.op1_register())).selector;
                self.write_operand(env, op, 0, selector.into())?;
            }
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
                let seg = segment_register(instruction.op0_register());
                if seg == SegReg::Cs {
                    return Err(Exception::UD);
                }
                let selector = self.read_operand(env, op, 1)? as u16;
                self.load_segment(env, seg, selector)?;
                self.shadow_stack_load(seg);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// MOV SS and POP SS hold interrupts and debug traps back for one instruction, so that RSP can follow
    /// undisturbed (SDM Vol. 3A, section 6.8.3).
    fn shadow_stack_load(&mut self, seg: SegReg) {
        if seg == SegReg::Ss {
            self.state.interrupt_shadow = true;
            self.state.ss_shadow = true;
        }
    }

    fn exec_push_segment<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let register = op.instruction.op0_register();
        if op.instruction.op0_kind() != OpKind::Register || !register.is_segment_register() {
            return Ok(false);
        }
        let size = op.instruction.stack_pointer_increment().unsigned_abs() as usize;
        let selector = self.segment(segment_register(register)).selector;
        self.push(env, size, selector.into())?;
        Ok(true)
    }

    fn exec_pop_segment<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let register = op.instruction.op0_register();
        if op.instruction.op0_kind() != OpKind::Register || !register.is_segment_register() {
            return Ok(false);
        }
        let size = op.instruction.stack_pointer_increment().unsigned_abs() as usize;
        let seg = segment_register(register);
        self.attempt(|cpu| {
            let selector = cpu.pop(env, size)? as u16;
            cpu.load_segment(env, seg, selector)
        })?;
        self.shadow_stack_load(seg);
        Ok(true)
    }

    fn exec_far_transfer<E: Env>(&mut self, env: &mut E, op: &Op, kind: Transfer) -> Result<bool, Exception> {
        let instruction = &op.instruction;
        let (selector, offset, size) = match instruction.code() {
            Code::Jmp_ptr1616 | Code::Call_ptr1616 => {
                (instruction.far_branch_selector(), instruction.far_branch16().into(), 2)
            }
            Code::Jmp_ptr1632 | Code::Call_ptr1632 => {
                (instruction.far_branch_selector(), instruction.far_branch32().into(), 4)
            }
            Code::Jmp_m1616 | Code::Call_m1616 | Code::Jmp_m1632 | Code::Call_m1632
                if self.in_64bit_mode() && has_rex_w(op) =>
            {
                self.read_far_pointer(env, op, 8)?
            }
            Code::Jmp_m1616 | Code::Call_m1616 => self.read_far_pointer(env, op, 2)?,
            Code::Jmp_m1632 | Code::Call_m1632 => self.read_far_pointer(env, op, 4)?,
            Code::Jmp_m1664 | Code::Call_m1664 => self.read_far_pointer(env, op, 8)?,
            _ => return Ok(false),
        };
        self.far_transfer(env, kind, selector, offset, size)?;
        Ok(true)
    }

    /// Reads the memory operand selector:offset, whose offset has `size` bytes and stands first.
    fn read_far_pointer<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        size: usize,
    ) -> Result<(u16, u64, usize), Exception> {
        let (seg, address) = self.effective_address(op);
        let mut bytes = [0; 10];
        let Some((used, _)) = bytes.split_at_mut_checked(size + 2) else { return Err(Exception::UD) };
        self.read_bytes(env, seg, address, used)?;
        let (offset, selector) = used.split_at(size);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        Ok((number(selector) as u16, number(offset), size))
    }

    fn exec_load_far_pointer<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let seg = match op.instruction.mnemonic() {
            Mnemonic::Lds => SegReg::Ds,
            Mnemonic::Les => SegReg::Es,
            Mnemonic::Lfs => SegReg::Fs,
            Mnemonic::Lgs => SegReg::Gs,
            _ => SegReg::Ss,
        };
        let register = op.instruction.op0_register();
        let (selector, offset, _) = self.read_far_pointer(env, op, register.size())?;
        self.load_segment(env, seg, selector)?;
        self.set_register(register, offset);
        Ok(())
    }

    /// #UD outside protected mode.
    fn require_protected(&self) -> Result<(), Exception> {
        if self.is_protected() { Ok(()) } else { Err(Exception::UD) }
    }

    /// #GP(0) in an outer ring, if the operating system hides system registers from it.
    fn check_umip(&self) -> Result<(), Exception> {
        if self.state.cpl > 0 && self.state.cr4_has(Cr4::UMIP) { Err(Exception::GP0) } else { Ok(()) }
    }

    fn exec_system_segment<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        self.require_protected()?;
        let mnemonic = op.instruction.mnemonic();
        if matches!(mnemonic, Mnemonic::Sldt | Mnemonic::Str) {
            self.check_umip()?;
            let segment = if mnemonic == Mnemonic::Sldt { &self.state.ldtr } else { &self.state.tr };
            return self.write_operand(env, op, 0, segment.selector.into());
        }
        if self.state.cpl != 0 {
            return Err(Exception::GP0);
        }
        let selector = self.read_operand(env, op, 0)? as u16;
        if mnemonic == Mnemonic::Lldt {
            self.load_ldtr(env, selector, vector::GP)
        } else {
            self.load_tr(env, selector)
        }
    }

    /// Instructions that tell about a selector in ZF, and fault on nothing but their operand.
    fn exec_selector_query<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        self.require_protected()?;
        let instruction = &op.instruction;
        let mnemonic = instruction.mnemonic();
        let zero_flag = match mnemonic {
            Mnemonic::Verr | Mnemonic::Verw => {
                let selector = self.read_operand(env, op, 0)? as u16;
                self.verify_segment(env, selector, mnemonic == Mnemonic::Verw)?
            }
            Mnemonic::Arpl => self.adjust_rpl(env, op)?,
            _ => {
                let selector = self.read_operand(env, op, 1)? as u16;
                let value = match mnemonic {
                    Mnemonic::Lar => self.access_rights(env, selector)?,
                    _ => self.segment_limit(env, selector)?,
                };
                if let Some(value) = value {
                    let register = instruction.op0_register();
                    self.set_register(register, truncate(value.into(), register.size()));
                }
                value.is_some()
            }
        };
        self.state.rflags &= !Rflags::ZF.bits();
        if zero_flag {
            self.state.rflags |= Rflags::ZF.bits();
        }
        Ok(())
    }

    /// ARPL: raises the RPL of the destination to that of the source; whether it had to. Only then it writes.
    fn adjust_rpl<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let level = self.register(op.instruction.op1_register()) & 3;
        let selector = self.read_operand(env, op, 0)?;
        let is_lower = selector & 3 < level;
        if is_lower {
            self.write_operand(env, op, 0, selector & !3 | level)?;
        }
        Ok(is_lower)
    }

    fn exec_load_table<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        if self.state.cpl != 0 {
            return Err(Exception::GP0);
        }
        let long = self.in_64bit_mode();
        let (seg, offset) = self.effective_address(op);
        let mut bytes = [0; 10];
        let used = if long { &mut bytes[..] } else { &mut bytes[..6] };
        self.read_bytes(env, seg, offset, used)?;
        let [limit0, limit1, base @ ..] = bytes;
        let mut base = u64::from_le_bytes(base);
        if matches!(op.instruction.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
            base &= 0xff_ffff;
        }
        if !is_canonical(base) {
            return Err(Exception::GP0);
        }
        let table = TableRegister { base, limit: u16::from_le_bytes([limit0, limit1]) };
        if op.instruction.mnemonic() == Mnemonic::Lgdt {
            self.state.gdtr = table;
        } else {
            self.state.idtr = table;
        }
        Ok(())
    }

    fn exec_store_table<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        self.check_umip()?;
        let table =
            if op.instruction.mnemonic() == Mnemonic::Sgdt { self.state.gdtr } else { self.state.idtr };
        let mut bytes = [0; 10];
        let (limit, base) = bytes.split_at_mut(2);
        limit.copy_from_slice(&table.limit.to_le_bytes());
        base.copy_from_slice(&table.base.to_le_bytes());
        let (seg, offset) = self.effective_address(op);
        // Outside 64-bit mode all four bytes of the base are stored, whatever the operand size.
        let used = if self.in_64bit_mode() { &bytes[..] } else { &bytes[..6] };
        self.write_bytes(env, seg, offset, used)
    }
}

/// Whether a far JMP or CALL through memory has REX.W. AMD's own processors ignore it there, and so does
/// iced-x86 when it decodes for them; but system software uses m16:64 without asking for the vendor, and no
/// program counts on its being ignored.
fn has_rex_w(op: &Op) -> bool {
    let prefixes = op.bytes.iter().take_while(|&&byte| byte != 0xff);
    prefixes.last().is_some_and(|byte| byte & 0xf8 == 0x48)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::gpr;
    use crate::testing::{Machine, at, sel};

    /// MOV sreg, AX.
    fn load(machine: &mut Machine, seg: SegReg, selector: u16) -> Result<(), Exception> {
        machine.cpu.state.gpr[gpr::RAX] = selector.into();
        machine.exec(&[0x8e, 0xc0 | (seg as u8) << 3])
    }

    fn fault(vector: u8, selector: u16) -> Result<(), Exception> {
        Err(Exception::selector(vector, selector))
    }

    #[test]
    fn loading_data_segments() {
        let mut machine = Machine::protected();
        machine.descriptor(sel::FREE, 0x00cf_1200_0000_ffff);
        machine.descriptor(sel::FREE + 8, 0x00cf_9812_0000_ffff);
        machine.descriptor(sel::FREE + 16, 0x1240_9234_5678_0fff);
        let machine = &mut machine;
        assert_eq!(load(machine, SegReg::Ds, sel::FREE), fault(vector::NP, sel::FREE));
        assert_eq!(
            load(machine, SegReg::Ds, sel::FREE + 8),
            fault(vector::GP, sel::FREE + 8),
            "execute-only"
        );
        assert_eq!(load(machine, SegReg::Ds, sel::TSS), fault(vector::GP, sel::TSS));
        assert_eq!(load(machine, SegReg::Ds, sel::DATA | 3), fault(vector::GP, sel::DATA));
        assert_eq!(load(machine, SegReg::Ds, 0x100), fault(vector::GP, 0x100));
        assert_eq!(machine.cpu.state.seg[SegReg::Ds as usize].selector, sel::DATA, "unchanged so far");
        assert_eq!(load(machine, SegReg::Es, sel::CODE), Ok(()), "readable code");
        assert_eq!(load(machine, SegReg::Ds, sel::FREE + 16), Ok(()));
        let ds = machine.cpu.state.seg[SegReg::Ds as usize];
        assert_eq!((ds.base, ds.limit, ds.attributes), (0x1234_5678, 0xfff, 0x4093));
        assert_eq!(machine.env.load8(at::GDT + u64::from(sel::FREE) + 21), 0x93, "marked as accessed");
        assert_eq!(load(machine, SegReg::Ds, 3), Ok(()));
        assert!(!machine.cpu.state.seg[SegReg::Ds as usize].usable());
        machine.ring(sel::USER_CODE, sel::USER_DATA);
        assert_eq!(load(machine, SegReg::Gs, sel::DATA), fault(vector::GP, sel::DATA));
        assert_eq!(load(machine, SegReg::Gs, sel::CONFORMING), Ok(()));
    }

    #[test]
    fn loading_the_stack_segment() {
        let mut machine = Machine::protected();
        machine.descriptor(sel::FREE, 0x00cf_1200_0000_ffff);
        let machine = &mut machine;
        assert_eq!(load(machine, SegReg::Ss, 0), fault(vector::GP, 0));
        assert_eq!(load(machine, SegReg::Ss, sel::CODE), fault(vector::GP, sel::CODE));
        assert_eq!(load(machine, SegReg::Ss, sel::DATA | 1), fault(vector::GP, sel::DATA));
        assert_eq!(load(machine, SegReg::Ss, sel::USER_DATA), fault(vector::GP, sel::USER_DATA));
        assert_eq!(load(machine, SegReg::Ss, sel::FREE), fault(vector::SS, sel::FREE));
        assert!(!machine.cpu.state.interrupt_shadow);
        assert_eq!(load(machine, SegReg::Ss, sel::DATA), Ok(()));
        assert!(machine.cpu.state.interrupt_shadow && machine.cpu.state.ss_shadow);
        let mut machine = Machine::long();
        assert_eq!(load(&mut machine, SegReg::Ss, 0), Ok(()), "64-bit mode below ring 3");
        machine.ring(sel::USER_CODE64, sel::USER_DATA);
        assert_eq!(load(&mut machine, SegReg::Ss, 3), fault(vector::GP, 0));
    }

    #[test]
    fn push_and_pop_move_by_the_operand_size() {
        let mut machine = Machine::long();
        machine.exec(&[0x0f, 0xa0]).unwrap();
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], 0x6ff8);
        assert_eq!(machine.stack::<1>(8), [sel::DATA.into()]);
        machine.exec(&[0x0f, 0xa9]).unwrap();
        machine.exec(&[0x66, 0x0f, 0xa0]).unwrap();
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], 0x6ffe);
        machine.env.store16(0x6ffe, 0x100);
        assert_eq!(machine.exec(&[0x66, 0x0f, 0xa1]), fault(vector::GP, 0x100));
        assert_eq!(machine.cpu.state.gpr[gpr::RSP], 0x6ffe);
    }

    #[test]
    fn far_pointers() {
        let mut machine = Machine::protected();
        machine.env.put(0x9000, &[0x78, 0x56, 0x34, 0x12, sel::USER_DATA as u8, 0]);
        machine.exec(&[0x0f, 0xb4, 0x1d, 0, 0x90, 0, 0]).unwrap();
        assert_eq!(machine.cpu.state.gpr[gpr::RBX], 0x1234_5678);
        assert_eq!(machine.cpu.state.seg[SegReg::Fs as usize].selector, sel::USER_DATA);
    }

    #[test]
    fn far_pointers_of_10_bytes_on_both_vendors() {
        for options in [iced_x86::DecoderOptions::NONE, iced_x86::DecoderOptions::AMD] {
            let mut machine = Machine::long();
            machine.env.put(0x9000, &[0, 0x10, 0, 0, 0, 0x80, 0xff, 0xff, sel::CODE64 as u8, 0]);
            let mut bytes = [0; 15];
            bytes[..8].copy_from_slice(&[0x48, 0xff, 0x2c, 0x25, 0, 0x90, 0, 0]);
            let op = Op::new(iced_x86::Decoder::new(64, &bytes[..8], options).decode(), bytes);
            assert_eq!(machine.cpu.exec_segment_op(&mut machine.env, &op), Ok(true));
            assert_eq!(machine.cpu.next_rip, 0xffff_8000_0000_1000);
        }
    }

    #[test]
    fn ldtr_and_tr() {
        let mut machine = Machine::protected();
        machine.descriptor(sel::FREE, 0x0000_8200_9000_000f);
        machine.descriptor(sel::FREE + 8, 0x0000_8900_4000_0067);
        let machine = &mut machine;
        let mut with = |selector: u16, code: &[u8]| {
            machine.cpu.state.gpr[gpr::RAX] = selector.into();
            machine.exec(code)
        };
        let (lldt, ltr) = (&[0x0f, 0x00, 0xd0][..], &[0x0f, 0x00, 0xd8][..]);
        assert_eq!(with(sel::DATA, lldt), fault(vector::GP, sel::DATA));
        assert_eq!(with(sel::FREE | 4, lldt), fault(vector::GP, sel::FREE | 4));
        assert_eq!(with(sel::FREE, lldt), Ok(()));
        assert_eq!(with(sel::TSS, ltr), fault(vector::GP, sel::TSS), "busy");
        assert_eq!(with(0, ltr), fault(vector::GP, 0));
        assert_eq!(with(sel::FREE + 8, ltr), Ok(()));
        assert_eq!(machine.env.load8(at::GDT + u64::from(sel::FREE) + 13), 0x8b);
        machine.exec(&[0x0f, 0x00, 0xc8]).unwrap();
        assert_eq!(machine.cpu.state.gpr[gpr::RAX], u64::from(sel::FREE) + 8);
        // A segment of the LDT.
        machine.env.store64(0x9008, 0x00cf_9300_0000_ffff);
        assert_eq!(load(machine, SegReg::Ds, 0xc), Ok(()));
        assert_eq!(load(machine, SegReg::Ds, 0x14), fault(vector::GP, 0x14));
        machine.cpu.state.cpl = 3;
        assert_eq!(machine.exec(lldt), fault(vector::GP, 0));
        assert_eq!(machine.exec(&[0x0f, 0x00, 0xc0]), Ok(()));
        machine.cpu.state.cr4 |= Cr4::UMIP.bits();
        assert_eq!(machine.exec(&[0x0f, 0x00, 0xc0]), fault(vector::GP, 0));
        assert_eq!(machine.exec(&[0x0f, 0x01, 0x00]), fault(vector::GP, 0));
    }

    #[test]
    fn queries() {
        let mut machine = Machine::protected();
        let machine = &mut machine;
        machine.descriptor(sel::FREE, 0x0000_8e00_0008_0000);
        let mut query = |selector: u16, code: &[u8]| {
            machine.cpu.state.gpr[gpr::RAX] = selector.into();
            machine.cpu.state.gpr[gpr::RBX] = 0x5555;
            machine.exec(code).unwrap();
            (machine.cpu.state.has_flags(Rflags::ZF), machine.cpu.state.gpr[gpr::RBX])
        };
        let (lar, lsl) = (&[0x0f, 0x02, 0xd8][..], &[0x0f, 0x03, 0xd8][..]);
        let (verr, verw) = (&[0x0f, 0x00, 0xe0][..], &[0x0f, 0x00, 0xe8][..]);
        assert_eq!(query(sel::DATA, lar), (true, 0x00c0_9300 | 0x000f_0000));
        assert_eq!(query(sel::DATA, lsl), (true, 0xffff_ffff));
        assert_eq!(query(sel::TSS, lar), (true, 0x8b00));
        assert_eq!(query(sel::TSS, lsl), (true, 0x67));
        assert_eq!(query(sel::FREE, lar), (false, 0x5555), "interrupt gate");
        assert_eq!(query(0, lar), (false, 0x5555));
        assert_eq!(query(0x100, lsl), (false, 0x5555));
        assert!(query(sel::CODE, verr).0);
        assert!(!query(sel::CODE, verw).0);
        assert!(query(sel::DATA, verw).0);
        assert!(!query(sel::DATA | 3, verw).0);
        assert!(query(sel::CONFORMING | 3, verr).0);
    }

    #[test]
    fn arpl() {
        let mut machine = Machine::protected();
        machine.cpu.state.gpr[gpr::RAX] = 0x1230;
        machine.cpu.state.gpr[gpr::RBX] = 2;
        machine.exec(&[0x63, 0xd8]).unwrap();
        assert_eq!(machine.cpu.state.gpr[gpr::RAX], 0x1232);
        assert!(machine.cpu.state.has_flags(Rflags::ZF));
        machine.exec(&[0x63, 0xd8]).unwrap();
        assert!(!machine.cpu.state.has_flags(Rflags::ZF));
        // By CS, which can't be written: it is only where the level is too low.
        machine.env.store8(0x9000, 3);
        machine.exec(&[0x2e, 0x63, 0x1d, 0, 0x90, 0, 0]).unwrap();
        machine.env.store8(0x9000, 0);
        assert_eq!(machine.exec(&[0x2e, 0x63, 0x1d, 0, 0x90, 0, 0]), fault(vector::GP, 0));
    }

    #[test]
    fn descriptor_tables() {
        let mut machine = Machine::long();
        machine.env.put(0x9000, &[0xff, 0x0f, 0, 0x10, 0, 0, 0, 0x80, 0xff, 0xff]);
        machine.exec(&[0x0f, 0x01, 0x1c, 0x25, 0, 0x90, 0, 0]).unwrap();
        assert_eq!(machine.cpu.state.idtr, TableRegister { base: 0xffff_8000_0000_1000, limit: 0xfff });
        machine.exec(&[0x0f, 0x01, 0x0c, 0x25, 0, 0xa0, 0, 0]).unwrap();
        assert_eq!(machine.env.get::<10>(0xa000), machine.env.get::<10>(0x9000));
        machine.env.store8(0x9009, 0);
        assert_eq!(machine.exec(&[0x0f, 0x01, 0x1c, 0x25, 0, 0x90, 0, 0]), fault(vector::GP, 0));
        let mut machine = Machine::protected();
        machine.env.put(0x9000, &[0xff, 0x0f, 1, 2, 3, 4]);
        machine.exec(&[0x66, 0x0f, 0x01, 0x15, 0, 0x90, 0, 0]).unwrap();
        assert_eq!(machine.cpu.state.gdtr.base, 0x03_0201);
        machine.cpu.state.cpl = 3;
        assert_eq!(machine.exec(&[0x0f, 0x01, 0x15, 0, 0x90, 0, 0]), fault(vector::GP, 0));
    }

    #[test]
    fn protected_mode_only() {
        let mut machine = Machine::protected();
        machine.cpu.state = crate::state::CpuState::default();
        for code in [[0x0f, 0x00, 0xd8], [0x0f, 0x00, 0xc0], [0x0f, 0x02, 0xc0], [0x0f, 0x00, 0xe0]] {
            assert_eq!(machine.exec(&code), Err(Exception::UD));
        }
        machine.cpu.state.gpr[gpr::RAX] = 0x1234;
        machine.exec(&[0x8e, 0xd8]).unwrap();
        let ds = machine.cpu.state.seg[SegReg::Ds as usize];
        assert_eq!((ds.base, ds.limit, ds.attributes), (0x1_2340, 0xffff, 0x93));
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Tables full of random bits, random segments, random privilege: nothing may panic, and a fault, unless it
    /// comes out of a task switch, leaves registers as they were.
    #[test]
    fn wild_tables_do_no_harm() {
        let codes: [&[u8]; 18] = [
            &[0x8e, 0xd8],
            &[0x8e, 0xd0],
            &[0x0f, 0xa1],
            &[0xcb],
            &[0xca, 8, 0],
            &[0x48, 0xcb],
            &[0xcf],
            &[0x48, 0xcf],
            &[0xcd, 0x80],
            &[0xcc],
            &[0xff, 0x28],
            &[0xff, 0x18],
            &[0x48, 0xff, 0x18],
            &[0x0f, 0x00, 0xd0],
            &[0x0f, 0x00, 0xd8],
            &[0x0f, 0x02, 0xd8],
            &[0x0f, 0x03, 0xd8],
            &[0x0f, 0x05],
        ];
        let seed = &mut 1;
        for round in 0..4000 {
            let mut machine = if round & 1 == 0 { Machine::long() } else { Machine::protected() };
            for address in (at::GDT..at::IDT + 0x1000).chain(at::TSS..at::TSS + 0x80).step_by(8) {
                // Half of the descriptors keep base, limit and presence plausible, or none would get far.
                let plausible = random(seed) & 1 == 0;
                let value = random(seed);
                let sane = value & 0x0060_7f00_0038_ffff | 0x0080_8000_0000_5000;
                machine.env.store64(address, if plausible { sane } else { value });
            }
            for address in (0x6f00..0x7100).step_by(8) {
                machine.env.store64(address, random(seed) & 0x7_ffff_00ff);
            }
            let state = &mut machine.cpu.state;
            state.cpl = random(seed) as u8 & 3;
            state.gpr[gpr::RAX] = random(seed) & 0xff;
            state.rflags |= random(seed) & (Rflags::NT | Rflags::IOPL).bits();
            if round & 3 == 3 {
                state.seg[SegReg::Ss as usize].attributes = random(seed) as u16;
                state.seg[SegReg::Ss as usize].limit = random(seed) as u32;
            }
            let code = codes[random(seed) as usize % codes.len()];
            if round & 1 == 1 && code[0] == 0x48 {
                continue;
            }
            let before = machine.cpu.state.clone();
            let result = machine.exec(code);
            let after = &mut machine.cpu.state;
            if result.is_err() && after.tr == before.tr {
                after.cr2 = before.cr2;
                assert_eq!(*after, before, "{code:02x?}");
            }
            let vector = random(seed) as u8 & 31;
            machine.cpu.deliver_exception(&mut machine.env, Exception::with_code(vector, 0));
        }
    }
}
