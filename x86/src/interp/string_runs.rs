//! Repeated string instructions in RAM: as many elements at once as lie in one page of each operand.
//!
//! Nothing faults here. Where elements don't lie in RAM, in a page that is accessible, within the segment's limit
//! and within the address size, they are executed one by one, which finds out in the right order what is wrong.

use crate::cpu::{Access, Cpu};
use crate::env::{Compared, Env};
use crate::exception::Exception;
use crate::interp::flags::{ARITHMETIC, ZF};
use crate::interp::op::Op;
use crate::interp::operand::truncate;
use crate::interp::string::{ITERATIONS, StringKind, compares_left_first};
use crate::memory::load;
use crate::paging::Place;
use crate::registers::Rflags;
use crate::registers::gpr::{RAX, RCX, RDI, RSI};
use crate::state::SegReg;

const A: u8 = RAX as u8;
const PAGE: u64 = 0x1000;
/// Bytes between two looks at events.
const BYTES_AT_ONCE: u64 = 0x1_0000;
/// What an element that is executed by itself counts for, in bytes.
const SINGLE: u64 = BYTES_AT_ONCE / ITERATIONS;

/// What came of trying a run.
enum Run {
    /// So many elements are done.
    Done(u64),
    /// A comparison has ended the instruction.
    Ended,
    /// Nothing is done: so many elements are to be executed one by one.
    OneByOne(u64),
}

impl Cpu {
    /// Executes a repeated string instruction until it ends or it is time to look at events.
    pub(super) fn repeat_by_runs<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        kind: StringKind,
    ) -> Result<(), Exception> {
        let size = u64::from(op.size);
        let shift = size.trailing_zeros();
        let mut left = BYTES_AT_ONCE;
        while left > 0 {
            let count = self.gpr(RCX as u8, op.address_size.into());
            if count == 0 {
                return Ok(());
            }
            match self.try_run(env, op, kind, count.min((left + size - 1) >> shift)) {
                Run::Done(elements) => {
                    self.set_gpr(RCX as u8, op.address_size.into(), count - elements);
                    left = left.saturating_sub(elements * size);
                }
                Run::Ended => return Ok(()),
                Run::OneByOne(elements) => {
                    let elements = elements.min(left.div_ceil(SINGLE));
                    if !self.repeat_elements(env, op, Self::element_of(kind), elements)? {
                        return Ok(());
                    }
                    left = left.saturating_sub(elements * SINGLE);
                }
            }
        }
        if self.gpr(RCX as u8, op.address_size.into()) != 0 {
            self.next_rip = self.state.rip;
        }
        Ok(())
    }

    /// Executes up to `most` elements at once, if that can be done. The count is changed only where a comparison
    /// ends the instruction.
    fn try_run<E: Env>(&mut self, env: &mut E, op: &Op, kind: StringKind, most: u64) -> Run {
        let from = (op.segment, self.source_offset(op));
        let to = (SegReg::Es, self.destination_offset(op));
        let mut elements = most;
        if !matches!(kind, StringKind::Store | StringKind::Scan) {
            elements = elements.min(self.elements_in_page(op, from));
        }
        if kind != StringKind::Load {
            elements = elements.min(self.elements_in_page(op, to));
        }
        if elements < 2 {
            return Run::OneByOne(1);
        }
        let run = match kind {
            StringKind::Move => self.move_run(env, op, (from, to), elements),
            StringKind::Store => self.store_run(env, op, to, elements),
            StringKind::Load => self.load_run(env, op, from, elements),
            StringKind::Scan => self.scan_run(env, op, to, elements),
            StringKind::Compare => self.compare_run(env, op, (from, to), elements),
        };
        run.unwrap_or(Run::OneByOne(elements))
    }

    /// How many elements, from the one at this place on, lie in its page and don't wrap within the address size;
    /// 0 if not even that one does.
    fn elements_in_page(&self, op: &Op, (segment, offset): (SegReg, u64)) -> u64 {
        let size = u64::from(op.size);
        let shift = size.trailing_zeros();
        let in_page = self.address_of(segment, offset) & (PAGE - 1);
        let above = truncate(u64::MAX, op.address_size.into()) - offset;
        if in_page + size > PAGE || above < size - 1 {
            0
        } else if self.state.has_flags(Rflags::DF) {
            (in_page.min(offset) >> shift) + 1
        } else {
            (PAGE - in_page).min(above.saturating_add(1)) >> shift
        }
    }

    /// Offset in RAM of the lowest byte of a run that begins at this place and lies within its page; `None` if the
    /// run must be executed one by one.
    fn run_in_ram<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        (segment, offset): (SegReg, u64),
        elements: u64,
        access: Access,
    ) -> Option<u64> {
        let bytes = elements * u64::from(op.size);
        let down = self.state.has_flags(Rflags::DF);
        // Behind the last element may lie the end of the address space.
        let lowest = if down { offset.wrapping_add(op.size.into()).wrapping_sub(bytes) } else { offset };
        let linear = self.checked_address(segment, lowest, bytes as usize, access).ok()?;
        match self.place(env, linear, access, self.privilege()) {
            Ok(Place::Ram(offset)) => Some(offset),
            _ => None,
        }
    }

    fn move_run<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        (from, to): ((SegReg, u64), (SegReg, u64)),
        elements: u64,
    ) -> Option<Run> {
        let source = self.run_in_ram(env, op, from, elements, Access::Read)?;
        let target = self.run_in_ram(env, op, to, elements, Access::Write)?;
        env.copy_elements(source, target, elements, op.size.into(), self.state.has_flags(Rflags::DF));
        self.advance_by(op, RSI, elements);
        self.advance_by(op, RDI, elements);
        Some(Run::Done(elements))
    }

    fn store_run<E: Env>(&mut self, env: &mut E, op: &Op, to: (SegReg, u64), elements: u64) -> Option<Run> {
        let target = self.run_in_ram(env, op, to, elements, Access::Write)?;
        env.fill_elements(target, self.state.gpr[RAX], elements, op.size.into());
        self.advance_by(op, RDI, elements);
        Some(Run::Done(elements))
    }

    /// Of all elements that LODS loads, the last one stays.
    fn load_run<E: Env>(&mut self, env: &mut E, op: &Op, from: (SegReg, u64), elements: u64) -> Option<Run> {
        let lowest = self.run_in_ram(env, op, from, elements, Access::Read)?;
        let size = usize::from(op.size);
        let above = if self.state.has_flags(Rflags::DF) { 0 } else { (elements - 1) * size as u64 };
        self.set_gpr(A, size, load(env, lowest + above, size));
        self.advance_by(op, RSI, elements);
        Some(Run::Done(elements))
    }

    fn scan_run<E: Env>(&mut self, env: &mut E, op: &Op, to: (SegReg, u64), elements: u64) -> Option<Run> {
        if self.state.has_flags(Rflags::DF) {
            return None;
        }
        let right = self.run_in_ram(env, op, to, elements, Access::Read)?;
        let value = self.gpr(A, op.size.into());
        let equal = !op.instruction.has_repne_prefix();
        let compared = env.scan_elements(value, right, elements, op.size.into(), equal)?;
        self.advance_by(op, RDI, compared.count);
        Some(self.end_of_comparison(op, compared))
    }

    fn compare_run<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        (from, to): ((SegReg, u64), (SegReg, u64)),
        elements: u64,
    ) -> Option<Run> {
        if self.state.has_flags(Rflags::DF) {
            return None;
        }
        // The order shows in the accessed flags of the pages.
        let (left, right);
        if compares_left_first(op) {
            left = self.run_in_ram(env, op, from, elements, Access::Read)?;
            right = self.run_in_ram(env, op, to, elements, Access::Read)?;
        } else {
            right = self.run_in_ram(env, op, to, elements, Access::Read)?;
            left = self.run_in_ram(env, op, from, elements, Access::Read)?;
        }
        let equal = !op.instruction.has_repne_prefix();
        let compared = env.compare_elements(left, right, elements, op.size.into(), equal)?;
        self.advance_by(op, RSI, compared.count);
        self.advance_by(op, RDI, compared.count);
        Some(self.end_of_comparison(op, compared))
    }

    /// Flags and count after a comparison.
    fn end_of_comparison(&mut self, op: &Op, compared: Compared) -> Run {
        self.state.rflags = self.state.rflags & !ARITHMETIC | compared.flags;
        if (compared.flags & ZF != 0) != op.instruction.has_repne_prefix() {
            return Run::Done(compared.count);
        }
        let size = op.address_size.into();
        self.set_gpr(RCX as u8, size, self.gpr(RCX as u8, size) - compared.count);
        Run::Ended
    }
}
