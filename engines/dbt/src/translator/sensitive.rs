//! Instructions that would trap, or tell of the host: their effect on the guest's state is emitted.

use std::mem::offset_of;

use bivisor_x86::cpuid::Vendor;
use bivisor_x86::registers::Rflags;
use bivisor_x86::state::{CpuState, Msrs, SegReg, Segment};
use iced_x86::{Mnemonic, OpKind, Register};

use super::analysis::{self, Decoded};
use super::block::{Addend, Builder, NotRenamed};
use super::context::{
    self, ADDEND, ADDRESS, ARITHMETIC, CPUID_ENTRIES, CpuidEntry, NO_STACK_PAGE, Selectors, TEMPORARY,
    VECTORS_IN_STATE, cpuid_key, cpuid_result,
};
use super::emit::{Mem, Reg, Width, at, condition, indexed, reg};
use super::key::{SUPERVISOR, SUPERVISOR_AC, USER};
use super::operand::{host_register, lives_in_memory, number};
use super::site::{SiteKind, Undo};

const R11: u8 = 11;

/// A field of the state, whose address TEMPORARY holds.
pub(super) fn state(offset: usize) -> Mem {
    at(TEMPORARY, offset as i32)
}
fn segment(register: SegReg) -> usize {
    offset_of!(CpuState, seg) + register as usize * size_of::<Segment>()
}
pub(super) const RFLAGS: usize = offset_of!(CpuState, rflags);
const MSR: usize = offset_of!(CpuState, msr);

impl Builder<'_> {
    /// Leaves to the interpreter for the current, last instruction if a byte of the context is zero, or not.
    /// The host's flags must be free.
    fn interpret_if_zero(&mut self, byte: Mem, zero: bool) {
        self.e.compare_zero8(byte);
        let fixup = self.e.jump_if(if zero { condition::E } else { condition::NE });
        self.leave_from(fixup, SiteKind::InterpretLast);
    }

    pub(super) fn load_state(&mut self) {
        self.e.load(Width::W64, TEMPORARY, context::state());
    }

    /// Sets or clears a flag of RFLAGS in the state, leaving the host's flags alone.
    pub fn change_flag(&mut self, bit: u8, set: bool) {
        self.load_state();
        self.e.load(Width::W64, ADDRESS, state(RFLAGS));
        // Rotated to the top and pushed out, and a new bit in at the other end.
        self.e.rorx(ADDRESS, ADDRESS, bit + 1);
        self.e.lea(Width::W64, ADDRESS, indexed(ADDRESS, ADDRESS, 0, i32::from(set)));
        self.e.rorx(ADDRESS, ADDRESS, 64 - bit);
        self.e.store(Width::W64, state(RFLAGS), ADDRESS);
    }

    /// STI: interrupts are looked at behind the next instruction at the earliest.
    pub fn sti(&mut self) {
        let fixup = self.unless_zero(context::pending());
        self.leave_from(fixup, SiteKind::InterpretLast);
        let fixup = self.unless_zero(context::event());
        self.leave_from(fixup, SiteKind::InterpretLast);
        self.change_flag(9, true);
        self.e.store_imm8(state(offset_of!(CpuState, interrupt_shadow)), 1);
        self.in_shadow = true;
    }

    /// The instruction behind STI is done, or is about to jump away.
    pub fn leave_shadow(&mut self) {
        self.in_shadow = false;
        self.load_state();
        self.e.store_imm8(state(offset_of!(CpuState, interrupt_shadow)), 0);
    }

    /// STAC and CLAC: the code behind it is another privilege class's.
    pub fn switch_ac(&mut self) {
        self.bring_flags_back();
        let set = self.class() == SUPERVISOR;
        self.change_flag(18, set);
        self.switch_class(if set { SUPERVISOR_AC } else { SUPERVISOR });
        let fixup = self.unless_zero(context::event());
        self.leave_from(fixup, SiteKind::Event { target: self.next_guest as i32 });
        self.jump_to(self.next_guest as i64, analysis::ALL_FLAGS);
    }

    /// From here on jumps lead to another privilege class's code. An event that another thread announces in between is
    /// lost from the bias, but not from [`context::Context::event`], which the caller looks at behind this: the
    /// exchange is a barrier. Changes TEMPORARY.
    fn switch_class(&mut self, class: u8) {
        self.e.load(Width::W64, TEMPORARY, context::class_bias(class));
        self.e.exchange(context::jump_bias(), TEMPORARY);
        self.forget_stack_window();
    }

    /// The stack window was another privilege class's.
    fn forget_stack_window(&mut self) {
        self.e.load_immediate(TEMPORARY, NO_STACK_PAGE);
        self.e.store(Width::W64, context::stack_page(), TEMPORARY);
    }

    /// PUSHFQ, or PUSHFD in 32-bit code.
    pub fn pushf(&mut self, decoded: &Decoded) {
        self.bring_flags_back();
        self.e.pushfq();
        self.e.pop(ADDRESS);
        self.e.pext(ADDRESS, ADDRESS, context::arithmetic_mask());
        self.e.pdep(ADDRESS, ADDRESS, context::arithmetic_mask());
        self.load_state();
        self.e.load(Width::W64, TEMPORARY, state(RFLAGS));
        self.e.pext(TEMPORARY, TEMPORARY, context::pushed_mask());
        self.e.pdep(TEMPORARY, TEMPORARY, context::pushed_mask());
        self.e.lea(Width::W64, ADDRESS, indexed(ADDRESS, TEMPORARY, 0, 0));
        self.e.store(Width::W64, context::target(), ADDRESS);
        let (width, step) = (self.width(), self.stack_step());
        let place = self.stack_operand(decoded, -step, true);
        self.e.load(Width::W64, TEMPORARY, context::target());
        self.e.store(width, place, TEMPORARY);
        self.e.lea(width, context::GUEST_RSP, at(context::GUEST_RSP, -step));
    }

    /// INVLPG: leaves with the address, and comes back.
    pub fn invlpg(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        self.address(&decoded.instruction)?;
        let site = self.new_site(SiteKind::Invlpg { next: self.next_guest as u16, next_host: None });
        self.leave_code(site);
        Ok(())
    }

    /// SWAPGS.
    pub fn swapgs(&mut self) {
        const KERNEL: usize = MSR + offset_of!(Msrs, kernel_gs_base);
        self.addend = Addend::Anything;
        self.load_state();
        self.e.load(Width::W64, ADDRESS, context::gs_base());
        self.e.load(Width::W64, ADDEND, state(KERNEL));
        self.e.store(Width::W64, state(KERNEL), ADDRESS);
        self.e.store(Width::W64, context::gs_base(), ADDEND);
        self.e.store(Width::W64, state(segment(SegReg::Gs) + offset_of!(Segment, base)), ADDEND);
    }

    /// Stores a general register of the guest's from TEMPORARY.
    fn write_register(&mut self, guest: u8) {
        if lives_in_memory(guest) {
            self.e.store(Width::W64, context::spilled(guest), TEMPORARY);
        } else {
            self.e.copy(Width::W64, host_register(guest), TEMPORARY);
        }
    }

    /// MOV of a selector to a general register or to memory.
    pub fn read_selector(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let register = match decoded.instruction.op1_register() {
            Register::ES => SegReg::Es,
            Register::CS => SegReg::Cs,
            Register::SS => SegReg::Ss,
            Register::DS => SegReg::Ds,
            Register::FS => SegReg::Fs,
            _ => SegReg::Gs,
        };
        if decoded.instruction.op0_kind() == OpKind::Memory {
            self.address(&decoded.instruction)?;
            self.check(2, true, decoded.live_before);
            self.load_state();
            self.e.load_zx16(TEMPORARY, state(segment(register) + offset_of!(Segment, selector)));
            self.e.store16(indexed(ADDRESS, ADDEND, 0, 0), TEMPORARY);
            return Ok(());
        }
        let guest = number(decoded.instruction.op0_register()).ok_or(NotRenamed)?;
        self.load_state();
        self.e.load_zx16(TEMPORARY, state(segment(register) + offset_of!(Segment, selector)));
        match decoded.instruction.op0_register().size() {
            2 if lives_in_memory(guest) => self.e.store16(context::spilled(guest), TEMPORARY),
            2 => self.e.copy16(host_register(guest), TEMPORARY),
            _ => self.write_register(guest),
        }
        Ok(())
    }

    /// MOV of a control register to a general register.
    pub fn read_control(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let offset = match decoded.instruction.op1_register() {
            Register::CR0 => offset_of!(CpuState, cr0),
            Register::CR2 => offset_of!(CpuState, cr2),
            Register::CR3 => offset_of!(CpuState, cr3),
            _ => offset_of!(CpuState, cr4),
        };
        let guest = number(decoded.instruction.op0_register()).ok_or(NotRenamed)?;
        self.load_state();
        self.e.load(self.width(), TEMPORARY, state(offset));
        self.write_register(guest);
        Ok(())
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
    pub fn segment_base(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        let guest = number(instruction.op0_register()).ok_or(NotRenamed)?;
        self.put_flags_aside();
        self.e.compare_zero8(context::base_instructions());
        let disabled = self.e.jump_if(condition::E);
        let interpret = SiteKind::Interpret { next: self.next_guest as u16, next_host: None };
        self.leave_from(disabled, interpret);
        let (place, register) = match instruction.mnemonic() {
            Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => (context::fs_base(), SegReg::Fs),
            _ => (context::gs_base(), SegReg::Gs),
        };
        if matches!(instruction.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
            self.e.load(Width::W64, TEMPORARY, place);
            self.write_register(guest);
            return Ok(());
        }
        let from = self.in_register(guest, ADDRESS);
        // #GP(0) for an address that isn't canonical.
        self.e.copy(Width::W64, TEMPORARY, from);
        self.e.shl(Width::W64, TEMPORARY, 16);
        self.e.sar(Width::W64, TEMPORARY, 16);
        self.e.compare_reg(Width::W64, TEMPORARY, from);
        let outside = self.e.jump_if(condition::NE);
        self.leave_from(outside, interpret);
        self.e.store(Width::W64, place, from);
        self.load_state();
        self.e.store(Width::W64, state(segment(register) + offset_of!(Segment, base)), from);
        Ok(())
    }

    /// RDTSC and RDTSCP.
    pub fn rdtsc(&mut self, with_aux: bool) {
        if with_aux {
            self.e.lfence();
        }
        self.e.rdtsc();
        self.e.rorx(reg::RDX, reg::RDX, 32);
        self.e.lea(Width::W64, reg::RAX, indexed(reg::RAX, reg::RDX, 0, 0));
        self.e.load(Width::W64, TEMPORARY, context::tsc_offset());
        self.e.lea(Width::W64, reg::RAX, indexed(reg::RAX, TEMPORARY, 0, 0));
        self.e.rorx(reg::RDX, reg::RAX, 32);
        self.e.copy(Width::W32, reg::RDX, reg::RDX);
        self.e.copy(Width::W32, reg::RAX, reg::RAX);
        if with_aux {
            self.load_state();
            self.e.load(Width::W32, reg::RCX, state(MSR + offset_of!(Msrs, tsc_aux)));
        }
    }

    /// CPUID, if its result is remembered.
    pub fn cpuid(&mut self, decoded: &Decoded) {
        if decoded.live_before != 0 {
            self.put_flags_aside();
        }
        self.addend = Addend::Anything;
        self.e.lea(Width::W32, ADDEND, indexed(reg::RAX, reg::RCX, 0, 0));
        self.e.and_imm(Width::W32, ADDEND, CPUID_ENTRIES as i32 - 1);
        self.e.shl(Width::W32, ADDEND, size_of::<CpuidEntry>().trailing_zeros() as u8);
        self.e.copy(Width::W32, ADDRESS, reg::RAX);
        self.e.copy(Width::W32, TEMPORARY, reg::RCX);
        self.e.shl(Width::W64, TEMPORARY, 32);
        self.e.or(Width::W64, ADDRESS, TEMPORARY);
        self.e.compare(Width::W64, ADDRESS, cpuid_key(ADDEND));
        let fixup = self.e.jump_if(condition::NE);
        self.leave_from(fixup, SiteKind::Cpuid { next: self.next_guest as u16, next_host: None });
        for (word, register) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX].into_iter().enumerate() {
            self.e.load(Width::W32, register, cpuid_result(ADDEND, word));
        }
    }

    /// Copies CS and SS from the context to the state, whose address TEMPORARY holds. Changes ADDRESS.
    pub(super) fn load_selectors(&mut self, from: Mem, cpl: u8) {
        for (register, offset) in
            [(SegReg::Cs, offset_of!(Selectors, cs)), (SegReg::Ss, offset_of!(Selectors, ss))]
        {
            for half in [0, 8] {
                self.e.load(Width::W64, ADDRESS, from.plus((offset + half) as i32));
                self.e.store(Width::W64, state(segment(register) + half), ADDRESS);
            }
        }
        self.e.store_imm8(state(offset_of!(CpuState, cpl)), cpl);
    }

    /// SYSCALL from 64-bit user mode (APM Vol. 3, SYSCALL).
    pub fn syscall(&mut self) {
        // R11 gets the flags, so those of the host are free from here on.
        self.put_flags_aside();
        self.interpret_if_zero(context::fast_system_calls(), true);
        self.bring_flags_back();
        // RCX gets the instruction pointer in the end, and is free until then.
        self.e.pushfq();
        self.e.pop(reg::RCX);
        self.load_state();
        self.e.and_imm(Width::W32, reg::RCX, ARITHMETIC as i32);
        self.e.load(Width::W64, ADDRESS, state(RFLAGS));
        self.e.and_imm(Width::W32, ADDRESS, !ARITHMETIC as i32);
        self.e.or(Width::W64, reg::RCX, ADDRESS);
        self.e.load(Width::W64, ADDRESS, state(MSR + offset_of!(Msrs, sfmask)));
        self.e.not(Width::W64, ADDRESS);
        self.e.and(Width::W64, ADDRESS, reg::RCX);
        self.e.or_imm(Width::W64, ADDRESS, Rflags::FIXED.bits() as i32);
        self.e.store(Width::W64, state(RFLAGS), ADDRESS);
        self.e.store(Width::W64, context::spilled(R11), reg::RCX);
        // The arithmetic flags that remain, in the form in which flags are put aside.
        self.flags_word(ADDRESS);
        self.load_selectors(context::syscall(), 0);
        self.e.load(Width::W64, reg::RCX, context::page_base());
        self.e.lea(Width::W64, reg::RCX, at(reg::RCX, self.next_guest as i32));
        self.e.load(Width::W64, ADDRESS, state(MSR + offset_of!(Msrs, lstar)));
        self.flags_aside = true;
        self.go_to_class(SUPERVISOR);
    }

    /// SYSRET to 64-bit code (APM Vol. 3, SYSRET).
    pub fn sysret(&mut self) {
        const SPECIAL: Rflags = Rflags::TF.union(Rflags::AC).union(Rflags::RF).union(Rflags::VM);
        self.flags_aside = true;
        self.interpret_if_zero(context::fast_system_calls(), true);
        // It can be taken if interrupts are enabled now.
        self.interpret_if_zero(context::pending(), false);
        // Only what the context holds is loaded below.
        self.e.compare_imm8(context::vectors(), VECTORS_IN_STATE);
        let elsewhere = self.e.jump_if(condition::E);
        self.leave_from(elsewhere, SiteKind::InterpretLast);
        self.e.load(Width::W64, ADDRESS, context::spilled(R11));
        self.e.test_imm(ADDRESS, SPECIAL.bits() as u32);
        let special = self.e.jump_if(condition::NE);
        self.leave_from(special, SiteKind::InterpretLast);
        if self.request.model.vendor == Vendor::Intel {
            // #GP(0) where AMD's processors let the fetch fault.
            self.e.copy(Width::W64, ADDRESS, reg::RCX);
            self.e.shl(Width::W64, ADDRESS, 16);
            self.e.sar(Width::W64, ADDRESS, 16);
            self.e.compare_reg(Width::W64, ADDRESS, reg::RCX);
            let outside = self.e.jump_if(condition::NE);
            self.leave_from(outside, SiteKind::InterpretLast);
        }
        self.load_state();
        self.e.load(Width::W32, ADDRESS, context::spilled(R11));
        // All that SYSRET loads, and the flag that is always set.
        self.e.and_imm(Width::W32, ADDRESS, 0x003c_7fd7);
        self.e.or_imm(Width::W32, ADDRESS, Rflags::FIXED.bits() as i32);
        self.e.store(Width::W64, state(RFLAGS), ADDRESS);
        self.e.load(Width::W64, ADDRESS, context::spilled(R11));
        self.flags_word(ADDRESS);
        self.load_selectors(context::sysret(), 3);
        self.load_missing_vectors();
        self.e.copy(Width::W64, ADDRESS, reg::RCX);
        self.go_to_class(USER);
    }

    /// Loads the vector registers that user mode has, from the context, unless they are. Changes the host's flags.
    pub(super) fn load_missing_vectors(&mut self) {
        self.e.compare_zero8(context::vectors());
        let loaded = self.e.jump_if(condition::E);
        let call = self.e.call();
        self.bind_shared(call, self.request.shared.load_vectors);
        self.e.bind(loaded);
    }

    /// Puts the arithmetic flags of a register aside. Changes ADDEND.
    pub(super) fn flags_word(&mut self, flags: Reg) {
        self.addend = Addend::Anything;
        // Bit 11 to bit 0, the low byte to bits 8 to 15.
        self.e.copy(Width::W32, ADDEND, flags);
        self.e.shr(Width::W32, ADDEND, 11);
        self.e.and_imm(Width::W32, ADDEND, 1);
        self.e.store16(context::block_flags(), ADDEND);
        self.e.store8(context::block_flags().plus(1), flags);
    }

    /// Goes on at ADDRESS in another privilege class. The guest's flags must be aside.
    pub(super) fn go_to_class(&mut self, class: u8) {
        self.switch_class(class);
        self.e.compare_zero8(context::event());
        let event = self.e.jump_if(condition::NE);
        self.leave_from(event, SiteKind::Lookup(Undo::Never));
        self.look_up(Undo::Never);
    }

    /// REP MOVS and REP STOS: page by page in the shared code, and by the interpreter what that leaves.
    pub fn repeat_string(&mut self, decoded: &Decoded) {
        let (is_move, scale) = match decoded.instruction.mnemonic() {
            Mnemonic::Movsb => (true, 0),
            Mnemonic::Movsw => (true, 1),
            Mnemonic::Movsd => (true, 2),
            Mnemonic::Movsq => (true, 3),
            Mnemonic::Stosb => (false, 0),
            Mnemonic::Stosw => (false, 1),
            Mnemonic::Stosd => (false, 2),
            _ => (false, 3),
        };
        if decoded.live_before != 0 {
            self.put_flags_aside();
        }
        let (code32, class) = (usize::from(self.request.key.code32()), usize::from(self.class()));
        let shared = &self.request.shared;
        let routine = if is_move { shared.repeat_movs } else { shared.repeat_stos }[code32][class][scale];
        let call = self.e.call();
        self.bind_shared(call, routine);
        let rest = self.e.jump_if(condition::NE);
        let retry = (self.request.start + self.instruction_start) as u32;
        self.leave_from(
            rest,
            SiteKind::String { is_move, next: self.next_guest as u16, retry, next_host: None },
        );
        self.addend = Addend::Anything;
    }

    /// BT, BTS, BTR, BTC with the bit's number in a register, which may lead outside of the operand.
    pub fn bit_string(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        let size = instruction.memory_size().size() as i32;
        let guest = number(instruction.op1_register()).ok_or(NotRenamed)?;
        if instruction.op1_kind() != OpKind::Register || instruction.memory_base() == Register::EIP {
            return Err(NotRenamed);
        }
        self.address(instruction)?;
        // CF changes, the others stay.
        self.put_flags_aside();
        self.bit_number(guest, size);
        self.e.sar(Width::W64, TEMPORARY, if size == 8 { 6 } else { 5 });
        let scale = if size == 8 { 3 } else { 2 };
        self.e.lea(self.width(), ADDRESS, indexed(ADDRESS, TEMPORARY, scale, 0));
        self.check(size, instruction.mnemonic() != Mnemonic::Bt, analysis::ALL_FLAGS);
        self.bring_flags_back();
        self.bit_number(guest, size);
        // What reaches memory is a number within the operand; the mask leaves the flags alone.
        self.e.pext(TEMPORARY, TEMPORARY, context::bit_mask().plus(if size == 8 { 0 } else { 8 }));
        let mut renamed = *instruction;
        renamed.set_segment_prefix(Register::None);
        renamed.set_memory_base(Register::R14);
        renamed.set_memory_index(Register::R13);
        renamed.set_memory_index_scale(1);
        renamed.set_memory_displacement64(0);
        renamed.set_memory_displ_size(0);
        renamed.set_op1_register(if size == 8 { Register::R15 } else { Register::R15D });
        self.encode(&renamed)
    }

    /// The bit's number, sign-extended, to TEMPORARY.
    fn bit_number(&mut self, guest: u8, size: i32) {
        let from = self.in_register(guest, TEMPORARY);
        if size == 8 {
            self.e.copy(Width::W64, TEMPORARY, from);
        } else {
            self.e.sign_extend32(TEMPORARY, from);
        }
    }
}
