//! IRETQ from 64-bit code at CPL 0 to 64-bit code at CPL 0 or 3 (SDM Vol. 2A, IRET): what it loads into CS and SS is
//! remembered with the descriptors that it comes from, which are compared each time.

use std::mem::offset_of;

use bivisor_x86::cpu::Access;
use bivisor_x86::env::Env;
use bivisor_x86::paging::Place;
use bivisor_x86::registers::Rflags;
use bivisor_x86::state::{CpuState, SegReg, Segment, TableRegister};

use super::analysis::Decoded;
use super::block::Builder;
use super::context::{
    self, ADDEND, ADDRESS, GUEST_RSP, InterruptReturn, RETURNS, TEMPORARY, VECTORS_IN_STATE, frame,
    interrupt_return,
};
use super::emit::{Width, at, condition, indexed};
use super::key::{SUPERVISOR, USER};
use super::sensitive::{RFLAGS, state};
use super::site::{Site, SiteKind, Undo};
use super::vcpu::{DbtVcpu, PAGE_MASK};

/// Words of a frame: RIP, CS, RFLAGS, RSP, SS.
const WORDS: usize = 5;
/// Bytes of a frame.
pub const FRAME: i32 = WORDS as i32 * 8;
/// The words of a frame.
const RIP: usize = 0;
const CS: usize = 1;
const FLAGS: usize = 2;
const RSP: usize = 3;
const SS: usize = 4;
/// Flags that change how code is translated, or that IRET refuses.
const SPECIAL: Rflags = Rflags::TF.union(Rflags::NT).union(Rflags::AC);
/// The other flags that are loaded at CPL 0. RF is dropped, as the next instruction drops it: no breakpoint is enabled
/// where translated code runs.
const LOADED: Rflags = Rflags::ARITHMETIC
    .union(Rflags::IF)
    .union(Rflags::DF)
    .union(Rflags::IOPL)
    .union(Rflags::VIF)
    .union(Rflags::VIP)
    .union(Rflags::ID);
/// Accessed flag in a descriptor.
const ACCESSED: u64 = 1 << 40;
/// Bits of SS by which a remembered return is found.
const INDEX_MASK: i32 = (RETURNS as i32 - 1) << 3;
const INDEX_SHIFT: u8 = size_of::<InterruptReturn>().trailing_zeros() as u8 - 3;

impl Builder<'_> {
    /// IRETQ in supervisor mode.
    pub fn interrupt_return(&mut self, decoded: &Decoded) {
        let elsewhere = decoded.stack_delta.is_none() || self.in_shadow || self.class() != SUPERVISOR;
        self.put_flags_aside();
        if elsewhere {
            let site = self.new_site(SiteKind::InterruptReturn);
            self.leave_code(site);
            return;
        }
        self.copy_frame(decoded);
        self.check_mode();
        self.check_descriptors();
        self.e.load(Width::W64, TEMPORARY, frame(CS));
        self.e.test_imm(TEMPORARY, 3);
        let inside = self.e.jump_if(condition::E);
        self.load_return(USER);
        self.e.bind(inside);
        self.load_return(SUPERVISOR);
    }

    /// Leaves to the interpreter where a condition holds.
    fn refuse_if(&mut self, condition: u8) {
        let fixup = self.e.jump_if(condition);
        self.leave_from(fixup, SiteKind::InterruptReturn);
    }

    fn copy_frame(&mut self, decoded: &Decoded) {
        for word in 0..WORDS {
            let place = self.stack_operand(decoded, word as i32 * 8, false);
            self.e.load(Width::W64, TEMPORARY, place);
            self.e.store(Width::W64, frame(word), TEMPORARY);
        }
    }

    /// What must hold of the processor, the flags and the address returned to. Changes ADDRESS and TEMPORARY.
    fn check_mode(&mut self) {
        for byte in [context::event(), context::pending()] {
            self.e.compare_zero8(byte);
            self.refuse_if(condition::NE);
        }
        self.load_state();
        self.e.compare_zero8(state(offset_of!(CpuState, cpl)));
        self.refuse_if(condition::NE);
        self.e.load(Width::W64, ADDRESS, state(RFLAGS));
        self.e.test_imm(ADDRESS, Rflags::NT.bits() as u32);
        self.refuse_if(condition::NE);
        self.e.load(Width::W64, ADDRESS, frame(FLAGS));
        self.e.test_imm(ADDRESS, SPECIAL.bits() as u32);
        self.refuse_if(condition::NE);
        self.e.load(Width::W64, ADDRESS, frame(RIP));
        self.e.copy(Width::W64, TEMPORARY, ADDRESS);
        self.e.shl(Width::W64, TEMPORARY, 16);
        self.e.sar(Width::W64, TEMPORARY, 16);
        self.e.compare_reg(Width::W64, TEMPORARY, ADDRESS);
        self.refuse_if(condition::NE);
    }

    /// The selectors must be remembered ones, and their descriptors in memory must not have changed. Leaves the remembered
    /// return's offset in ADDEND.
    fn check_descriptors(&mut self) {
        self.load_state();
        let base = offset_of!(CpuState, gdtr) + offset_of!(TableRegister, base);
        self.e.load(Width::W64, ADDRESS, state(base));
        // Nothing is live: the flags are aside.
        self.check_page(SiteKind::InterruptReturn, at(ADDRESS, 0), 1, false, 0);
        self.e.lea(Width::W64, ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
        self.e.load(Width::W64, ADDEND, frame(SS));
        self.e.and_imm(Width::W32, ADDEND, INDEX_MASK);
        self.e.shl(Width::W32, ADDEND, INDEX_SHIFT);
        for (word, selector, descriptor) in [
            (CS, offset_of!(InterruptReturn, cs), offset_of!(InterruptReturn, cs_descriptor)),
            (SS, offset_of!(InterruptReturn, ss), offset_of!(InterruptReturn, ss_descriptor)),
        ] {
            self.e.load(Width::W64, TEMPORARY, frame(word));
            self.e.compare(Width::W64, TEMPORARY, interrupt_return(ADDEND, selector));
            self.refuse_if(condition::NE);
            self.e.and_imm(Width::W32, TEMPORARY, !7);
            self.e.load(Width::W64, TEMPORARY, indexed(ADDRESS, TEMPORARY, 0, 0));
            self.e.compare(Width::W64, TEMPORARY, interrupt_return(ADDEND, descriptor));
            self.refuse_if(condition::NE);
        }
    }

    /// Loads everything, and goes on at the privilege class returned to.
    fn load_return(&mut self, class: u8) {
        if class == USER {
            self.e.compare_zero8(context::inner_segments());
            self.refuse_if(condition::NE);
            // Only what the context holds is loaded below.
            self.e.compare_imm8(context::vectors(), VECTORS_IN_STATE);
            self.refuse_if(condition::E);
        }
        self.load_state();
        let cpl = if class == USER { 3 } else { 0 };
        self.load_selectors(interrupt_return(ADDEND, offset_of!(InterruptReturn, selectors)), cpl);
        self.e.store_imm8(state(offset_of!(CpuState, nmi_blocked)), 0);
        self.e.load(Width::W64, ADDRESS, frame(FLAGS));
        self.e.and_imm(Width::W32, ADDRESS, LOADED.bits() as i32);
        self.e.or_imm(Width::W32, ADDRESS, Rflags::FIXED.bits() as i32);
        self.e.store(Width::W64, state(RFLAGS), ADDRESS);
        self.flags_word(ADDRESS);
        self.e.load(Width::W64, GUEST_RSP, frame(RSP));
        if class == USER {
            self.load_missing_vectors();
        }
        self.flags_aside = true;
        self.e.load(Width::W64, ADDRESS, frame(RIP));
        if class == USER {
            self.go_to_class(USER);
        } else {
            self.look_up(Undo::Never);
        }
    }
}

impl DbtVcpu {
    /// IRETQ that translated code has left to the interpreter.
    pub(super) fn return_from_interrupt(&mut self, rip: u64, site: &Site) -> super::exits::Next {
        if self.cpu.state.cpl == 0 {
            self.remember_return();
        }
        self.step(rip, None, site)
    }

    /// Notes what the IRETQ that comes next will load, if it leads to 64-bit code without a fault.
    fn remember_return(&mut self) {
        let rsp = self.cpu.state.gpr[4];
        let [Some(cs), Some(ss)] =
            [CS, SS].map(|word| self.read_supervisor(rsp.wrapping_add(word as u64 * 8)))
        else {
            return;
        };
        let base = self.cpu.state.gdtr.base;
        let room = base | PAGE_MASK;
        // Both must lie in the table's first page, which the code enters into the inline TLB.
        let inside = |selector: u64| selector & !0xfffb == 0 && (selector | 7) <= !room;
        if !inside(cs) || !inside(ss) {
            return;
        }
        let [Some(cs_descriptor), Some(ss_descriptor)] =
            [cs, ss].map(|selector| self.read_supervisor(base.wrapping_add(selector & !7)))
        else {
            return;
        };
        // Else IRET sets it.
        let accessed = cs_descriptor & ACCESSED != 0 && (ss < 4 || ss_descriptor & ACCESSED != 0);
        if !accessed || !self.fill(base, 1, false) {
            return;
        }
        if let Some([code, stack]) = self.cpu.plain_return(&mut self.env, cs as u16, ss as u16) {
            let place = &mut self.context().returns[(ss >> 3) as usize % RETURNS];
            let selectors = context::Selectors { cs: code, ss: stack };
            *place = InterruptReturn { cs, ss, cs_descriptor, ss_descriptor, selectors };
        }
    }

    /// Eight bytes as the processor itself reads them in supervisor mode, if they lie in one page of RAM.
    fn read_supervisor(&mut self, linear: u64) -> Option<u64> {
        if linear & !PAGE_MASK > 0xff8 {
            return None;
        }
        match self.cpu.probe(&mut self.env, linear, Access::Read) {
            Ok(Place::Ram(offset)) => Some(self.env.load64(offset)),
            _ => None,
        }
    }

    /// Sets what translated code needs for IRETQ, unless the context has it.
    pub(super) fn update_returns(&mut self) {
        let state = &self.cpu.state;
        // A return to an outer level changes segments that are the inner level's, or null with another privilege in them.
        let changes = |register: SegReg| {
            let segment = &state.seg[register as usize];
            let (outer, null) = (segment.dpl() == 3, segment.attributes & Segment::UNUSABLE != 0);
            if segment.selector < 4 { segment.selector != 0 || !null } else { !outer }
        };
        let inner = [SegReg::Es, SegReg::Ds, SegReg::Fs, SegReg::Gs].into_iter().any(changes);
        let gdtr = state.gdtr;
        let context = self.windows.context();
        context.inner_segments = inner.into();
        if self.returns_for != gdtr {
            self.returns_for = gdtr;
            self.windows.context().forget_returns();
        }
    }
}
