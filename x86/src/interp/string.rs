//! String instructions and their repetition (SDM Vol. 1, section 7.3.9).

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::{self, ARITHMETIC, ZF};
use crate::interp::op::Op;
use crate::registers::Rflags;
use crate::registers::gpr::{RAX, RCX, RDI, RSI};
use crate::state::SegReg;

const A: u8 = RAX as u8;
/// Elements that are executed one by one between two looks at events.
pub(super) const ITERATIONS: u64 = 64;

/// What a string instruction does with its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StringKind {
    /// MOVS.
    Move,
    /// STOS.
    Store,
    /// LODS.
    Load,
    /// SCAS.
    Scan,
    /// CMPS.
    Compare,
}

/// Executes one element; whether to go on, prefix and count permitting.
pub(super) type Element<E> = fn(&mut Cpu, &mut E, &Op) -> Result<bool, Exception>;

impl Cpu {
    /// MOVS, STOS, LODS, SCAS, CMPS.
    pub(super) fn exec_string<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let kind = match op.instruction.mnemonic() {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => StringKind::Move,
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => StringKind::Store,
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => StringKind::Load,
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => StringKind::Scan,
            _ => StringKind::Compare,
        };
        if is_repeated(op) && !self.one_at_a_time() && !self.alignment_checked() {
            return self.repeat_by_runs(env, op, kind);
        }
        self.repeat(env, op, Self::element_of(kind))
    }

    /// What executes one element of this kind.
    pub(super) fn element_of<E: Env>(kind: StringKind) -> Element<E> {
        match kind {
            StringKind::Move => Self::move_element,
            StringKind::Store => Self::store_element,
            StringKind::Load => Self::load_element,
            StringKind::Scan => Self::scan_element,
            StringKind::Compare => Self::compare_element,
        }
    }

    /// Executes a string instruction by its `element`, once or as its REP prefix says. After some
    /// iterations, or one when single-stepping, it returns with the instruction to be executed again, so that
    /// events are taken between iterations.
    pub(super) fn repeat<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        element: Element<E>,
    ) -> Result<(), Exception> {
        if !is_repeated(op) {
            element(self, env, op)?;
            return Ok(());
        }
        let iterations = if self.one_at_a_time() { 1 } else { ITERATIONS };
        if self.repeat_elements(env, op, element, iterations)? {
            self.next_rip = self.state.rip;
        }
        Ok(())
    }

    /// Executes up to `iterations` elements; whether the instruction is to go on.
    pub(super) fn repeat_elements<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        element: Element<E>,
        iterations: u64,
    ) -> Result<bool, Exception> {
        let size = op.address_size.into();
        let mut count = self.gpr(RCX as u8, size);
        for _ in 0..iterations.min(count) {
            let go_on = element(self, env, op)?;
            count -= 1;
            self.set_gpr(RCX as u8, size, count);
            if !go_on {
                return Ok(false);
            }
        }
        Ok(count != 0)
    }

    /// Whether something is to be done between elements: single steps, watchpoints.
    fn one_at_a_time(&self) -> bool {
        self.state.has_flags(Rflags::TF) || self.debug_active()
    }

    /// Moves an index register on by one element.
    pub(super) fn advance(&mut self, op: &Op, register: usize) {
        self.advance_by(op, register, 1);
    }

    /// Moves an index register on by some elements.
    pub(super) fn advance_by(&mut self, op: &Op, register: usize, elements: u64) {
        let bytes = elements.wrapping_mul(op.size.into());
        let step = if self.state.has_flags(Rflags::DF) { bytes.wrapping_neg() } else { bytes };
        let value = self.state.gpr[register & 15].wrapping_add(step);
        self.set_gpr(register as u8, op.address_size.into(), value);
    }

    pub(super) fn source_offset(&self, op: &Op) -> u64 {
        self.gpr(RSI as u8, op.address_size.into())
    }

    pub(super) fn destination_offset(&self, op: &Op) -> u64 {
        self.gpr(RDI as u8, op.address_size.into())
    }

    fn move_element<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let size = op.size.into();
        let value = self.read(env, op.segment, self.source_offset(op), size)?;
        self.write(env, SegReg::Es, self.destination_offset(op), size, value)?;
        self.advance(op, RSI);
        self.advance(op, RDI);
        Ok(true)
    }

    fn store_element<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let size = op.size.into();
        self.write(env, SegReg::Es, self.destination_offset(op), size, self.gpr(A, size))?;
        self.advance(op, RDI);
        Ok(true)
    }

    fn load_element<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let size = op.size.into();
        let value = self.read(env, op.segment, self.source_offset(op), size)?;
        self.set_gpr(A, size, value);
        self.advance(op, RSI);
        Ok(true)
    }

    fn scan_element<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let size = op.size.into();
        let right = self.read(env, SegReg::Es, self.destination_offset(op), size)?;
        self.advance(op, RDI);
        Ok(self.compare(op, self.gpr(A, size), right))
    }

    fn compare_element<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let size = op.size.into();
        let (left, right);
        if compares_left_first(op) {
            left = self.read(env, op.segment, self.source_offset(op), size)?;
            right = self.read(env, SegReg::Es, self.destination_offset(op), size)?;
        } else {
            right = self.read(env, SegReg::Es, self.destination_offset(op), size)?;
            left = self.read(env, op.segment, self.source_offset(op), size)?;
        }
        self.advance(op, RSI);
        self.advance(op, RDI);
        Ok(self.compare(op, left, right))
    }

    /// Sets the flags; tells whether REPE or REPNE goes on.
    fn compare(&mut self, op: &Op, left: u64, right: u64) -> bool {
        let (_, flags) = flags::subtract(left, right, 0, op.size.into());
        self.state.rflags = self.state.rflags & !ARITHMETIC | flags;
        (flags & ZF != 0) != op.instruction.has_repne_prefix()
    }

    /// Linear address without checks.
    pub(super) fn address_of(&self, segment: SegReg, offset: u64) -> u64 {
        if self.in_64bit_mode() && !matches!(segment, SegReg::Fs | SegReg::Gs) {
            offset
        } else {
            self.state.seg[segment as usize].base.wrapping_add(offset)
        }
    }
}

fn is_repeated(op: &Op) -> bool {
    op.instruction.has_rep_prefix() || op.instruction.has_repne_prefix()
}

/// Zen reads the second operand of CMPS first, unless it is REPE CMPSB, the one that its microcode makes fast.
pub(super) fn compares_left_first(op: &Op) -> bool {
    op.size == 1 && op.instruction.has_rep_prefix()
}
