//! String instructions and their repetition (SDM Vol. 1, section 7.3.9).

use iced_x86::Mnemonic;

use crate::cpu::{Access, Cpu};
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::{self, ARITHMETIC, ZF};
use crate::interp::op::Op;
use crate::interp::operand::truncate;
use crate::paging::Place;
use crate::registers::Rflags;
use crate::registers::gpr::{RAX, RCX, RDI, RSI};
use crate::state::SegReg;

const A: u8 = RAX as u8;
/// Iterations between two looks at events.
const ITERATIONS: usize = 64;
/// Bytes moved at once.
const CHUNK: usize = 256;
const PAGE: u64 = 0x1000;

impl Cpu {
    /// MOVS, STOS, LODS, SCAS, CMPS.
    pub(super) fn exec_string<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
                if self.run_of_pages(env, op, true)? {
                    return Ok(());
                }
                self.repeat(env, op, Self::move_element)
            }
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
                if self.run_of_pages(env, op, false)? {
                    return Ok(());
                }
                self.repeat(env, op, Self::store_element)
            }
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
                self.repeat(env, op, Self::load_element)
            }
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
                self.repeat(env, op, Self::scan_element)
            }
            _ => self.repeat(env, op, Self::compare_element),
        }
    }

    /// Executes a string instruction by its `element`, once or as its REP prefix says. `element` tells whether
    /// to go on, prefix and count permitting. After some iterations, or one when single-stepping, it returns with
    /// the instruction to be executed again, so that events are taken between iterations.
    pub(super) fn repeat<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        element: fn(&mut Self, &mut E, &Op) -> Result<bool, Exception>,
    ) -> Result<(), Exception> {
        if !is_repeated(op) {
            element(self, env, op)?;
            return Ok(());
        }
        let size = op.address_size.into();
        let mut count = self.gpr(RCX as u8, size);
        if count == 0 {
            return Ok(());
        }
        for _ in 0..self.iterations_at_once() {
            let go_on = element(self, env, op)?;
            count = count.wrapping_sub(1);
            self.set_gpr(RCX as u8, size, count);
            if count == 0 || !go_on {
                return Ok(());
            }
        }
        self.next_rip = self.state.rip;
        Ok(())
    }

    fn iterations_at_once(&self) -> usize {
        if self.state.has_flags(Rflags::TF) || self.debug_active() { 1 } else { ITERATIONS }
    }

    /// Moves an index register on by one element.
    pub(super) fn advance(&mut self, op: &Op, register: usize) {
        let size = u64::from(op.size);
        let step = if self.state.has_flags(Rflags::DF) { size.wrapping_neg() } else { size };
        let value = self.state.gpr[register & 15].wrapping_add(step);
        self.set_gpr(register as u8, op.address_size.into(), value);
    }

    fn source_offset(&self, op: &Op) -> u64 {
        self.gpr(RSI as u8, op.address_size.into())
    }

    fn destination_offset(&self, op: &Op) -> u64 {
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
        // Zen reads the second operand first.
        let right = self.read(env, SegReg::Es, self.destination_offset(op), size)?;
        let left = self.read(env, op.segment, self.source_offset(op), size)?;
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

    /// REP MOVS and REP STOS upwards in RAM: as many elements at once as lie within one page of the source and one
    /// of the destination. False: nothing done, the instruction is to be executed element by element.
    fn run_of_pages<E: Env>(&mut self, env: &mut E, op: &Op, moves: bool) -> Result<bool, Exception> {
        let slow = Rflags::DF.bits() | Rflags::TF.bits() | Rflags::AC.bits();
        if !is_repeated(op) || self.state.rflags & slow != 0 || self.debug_active() {
            return Ok(false);
        }
        let size = u64::from(op.size);
        let address_size = usize::from(op.address_size);
        let count = self.gpr(RCX as u8, address_size);
        let (source, destination) = (self.source_offset(op), self.destination_offset(op));
        let mut bytes = to_page_end(self.address_of(SegReg::Es, destination));
        if moves {
            bytes = bytes.min(to_page_end(self.address_of(op.segment, source)));
        }
        // Without wrapping round within the address size; the last byte of it is left to the slow path.
        let highest = truncate(u64::MAX, address_size);
        bytes = bytes.min(highest - destination).min(highest - source);
        let mut elements = (bytes / size).min(count);
        if elements < 2 {
            return Ok(false);
        }
        let whole = (elements * size) as usize;
        let privilege = self.privilege();
        let mut from = None;
        if moves {
            let Ok(linear) = self.checked_address(op.segment, source, whole, Access::Read) else {
                return Ok(false);
            };
            let Place::Ram(offset) = self.place(env, linear, Access::Read, privilege)? else {
                return Ok(false);
            };
            from = Some(offset);
        }
        let Ok(linear) = self.checked_address(SegReg::Es, destination, whole, Access::Write) else {
            return Ok(false);
        };
        let Place::Ram(to) = self.place(env, linear, Access::Write, privilege)? else {
            return Ok(false);
        };
        match from {
            Some(from) => {
                // Where the destination overlaps the source's rest, what is copied is copied again.
                if from < to && to < from + elements * size {
                    elements = (to - from) / size;
                }
                if elements == 0 {
                    return Ok(false);
                }
                copy(env, from, to, (elements * size) as usize);
                self.set_gpr(RSI as u8, address_size, source.wrapping_add(elements * size));
            }
            None => fill(env, to, self.state.gpr[RAX], size as usize, (elements * size) as usize),
        }
        self.set_gpr(RDI as u8, address_size, destination.wrapping_add(elements * size));
        self.set_gpr(RCX as u8, address_size, count - elements);
        if elements < count {
            self.next_rip = self.state.rip;
        }
        Ok(true)
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

fn to_page_end(linear: u64) -> u64 {
    PAGE - (linear & (PAGE - 1))
}

/// Copies within RAM, not crossing a page on either side, in ascending order.
fn copy<E: Env>(env: &E, mut from: u64, mut to: u64, mut bytes: usize) {
    let mut buffer = [0; CHUNK];
    while bytes > 0 {
        let now = bytes.min(CHUNK);
        let part = &mut buffer[..now];
        env.load_bytes(from, part);
        env.store_bytes(to, part);
        from += now as u64;
        to += now as u64;
        bytes -= now;
    }
}

/// Fills RAM, not crossing a page, with the low `size` bytes of `value`.
fn fill<E: Env>(env: &E, mut to: u64, value: u64, size: usize, mut bytes: usize) {
    let mut buffer = [0; CHUNK];
    for element in buffer.chunks_exact_mut(size) {
        element.copy_from_slice(&value.to_le_bytes()[..size]);
    }
    while bytes > 0 {
        let now = bytes.min(CHUNK);
        env.store_bytes(to, &buffer[..now]);
        to += now as u64;
        bytes -= now;
    }
}
