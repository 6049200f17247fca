//! The run loop: events, blocks of instructions, and single ones where something must be looked at in between.

use iced_x86::Mnemonic;

use crate::cpu::{Cpu, RunExit};
use crate::env::{Env, Event};
use crate::exception::Exception;
use crate::interp::cache::{DecodeCache, Lookup};
use crate::interp::decode::InstructionDecoder;
use crate::interp::op::{MAX_INSTRUCTION_LENGTH, Op, Then};
use crate::paging::Place;
use crate::registers::Rflags;
use crate::state::{Activity, SegReg};

const PAGE_MASK: u64 = !0xfff;
/// Equal to no page's address.
const NO_PAGE: u64 = 1;

/// How the code segment and the page being executed are seen. It holds as long as nothing but near transfers and
/// instructions on data are executed.
#[derive(Clone, Copy, Debug)]
struct CodeView {
    /// Base of CS.
    base: u64,
    /// The bits that an instruction pointer, and a linear address of code, has.
    mask: u64,
    /// Last valid instruction pointer.
    limit: u64,
    /// Size of code: 16, 32 or 64.
    bits: u32,
    /// Linear address of the page, or [`NO_PAGE`].
    page: u64,
    /// Its offset in RAM.
    offset: u64,
}

impl CodeView {
    /// Nothing is known.
    const NONE: Self = Self { base: 0, mask: 0, limit: 0, bits: 0, page: NO_PAGE, offset: 0 };

    fn is_none(&self) -> bool {
        self.page == NO_PAGE
    }

    #[inline(always)]
    fn linear(&self, rip: u64) -> u64 {
        self.base.wrapping_add(rip) & self.mask
    }
}

impl Cpu {
    /// Executes instructions and delivers exceptions and events until something ends it. `budget`: at most this
    /// many instructions; a repeated string instruction counts each time that it is taken up.
    pub fn run<E: Env>(&mut self, env: &mut E, budget: u64) -> RunExit {
        let mut cache = core::mem::take(&mut self.decode_cache);
        let exit = self.run_with(env, &mut cache, budget);
        self.decode_cache = cache;
        exit
    }

    fn run_with<E: Env>(&mut self, env: &mut E, cache: &mut DecodeCache, budget: u64) -> RunExit {
        let decoder = InstructionDecoder::new(&self.model);
        let mut view = CodeView::NONE;
        let mut left = budget;
        loop {
            if (view.is_none() && self.state.activity != Activity::Running || env.has_event())
                && let Some(exit) = self.between_instructions(env, &mut view)
            {
                return exit;
            }
            if left == 0 {
                return RunExit::Budget;
            }
            if view.is_none() && self.needs_care() {
                if left != budget && self.at_breakpoint() {
                    return RunExit::Breakpoint;
                }
                self.run_one(env, decoder);
                left -= 1;
            } else {
                left -= self.run_block(env, cache, &mut view, decoder, left);
            }
        }
    }

    /// Executes the next instruction, or delivers the exception that it raises, without what was cached of translations and
    /// code, and without looking for events: for an engine whose guest runs natively, so that nothing here hears when
    /// it changes its page tables or code.
    pub fn execute_next<E: Env>(&mut self, env: &mut E) {
        self.flush_tlb();
        self.run_one(env, InstructionDecoder::new(&self.model));
    }

    /// Executes instructions of the page that the next one lies in, at least one and at most `most`, reading each anew: for
    /// code that is written as often as it is executed, so that noticing the writes would cost more than decoding. Ends
    /// early where an event waits, and where [`Cpu::runs_plainly`] no longer holds, which must hold at the beginning.
    /// Returns how many it executed.
    pub fn execute_written<E: Env>(&mut self, env: &mut E, most: u64) -> u64 {
        let decoder = InstructionDecoder::new(&self.model);
        let page = self.code_address(self.state.rip) & PAGE_MASK;
        let mut executed = 0;
        while executed < most {
            self.run_one(env, decoder);
            executed += 1;
            let left = self.code_address(self.state.rip) & PAGE_MASK != page;
            if left || env.has_event() || !self.runs_plainly() {
                break;
            }
        }
        executed
    }

    /// Whether the next instructions may be executed by somebody who knows nothing of single steps, breakpoints,
    /// interrupt shadows and alignment checks.
    pub fn runs_plainly(&self) -> bool {
        self.state.activity == Activity::Running && !self.needs_care() && !self.alignment_checked()
    }

    /// Clears RFLAGS.RF, as executing the next instruction does, where it has no effect on that: no breakpoint is enabled.
    pub fn drop_idle_resume_flag(&mut self) {
        if !self.debug_active() && self.breakpoints.is_empty() {
            self.state.rflags &= !Rflags::RF.bits();
        }
    }

    /// Whether something is to be done before or after the next instruction alone.
    fn needs_care(&self) -> bool {
        self.state.rflags & (Rflags::TF.bits() | Rflags::RF.bits()) != 0
            || self.state.interrupt_shadow
            || self.debug_active()
            || !self.breakpoints.is_empty()
    }

    /// Whether the debugger outside has a breakpoint at the next instruction.
    fn at_breakpoint(&self) -> bool {
        self.breakpoints.contains(&self.code_address(self.state.rip))
    }

    /// Takes an event if one may be taken now; what ends the run, if anything does.
    #[cold]
    #[inline(never)]
    fn between_instructions<E: Env>(&mut self, env: &mut E, view: &mut CodeView) -> Option<RunExit> {
        let state = &self.state;
        let executing = matches!(state.activity, Activity::Running | Activity::Halted);
        let interrupts = executing && state.has_flags(Rflags::IF) && !state.interrupt_shadow;
        // As on processors that let NMIs wait after STI too: kernels rely on STI; HLT being taken as one.
        let nmis = executing && !state.nmi_blocked && !state.interrupt_shadow;
        if state.activity == Activity::Shutdown {
            return Some(RunExit::Shutdown);
        }
        let event = loop {
            match env.take_event(interrupts, nmis) {
                Some(event @ (Event::FlushTlb | Event::Unhalt)) => {
                    *view = CodeView::NONE;
                    self.deliver_event(env, event);
                }
                other => break other,
            }
        };
        match event {
            Some(Event::Kick) => return Some(RunExit::Kicked),
            Some(event) => {
                *view = CodeView::NONE;
                self.deliver_event(env, event);
            }
            None => {}
        }
        match self.state.activity {
            Activity::Running => None,
            Activity::Halted => Some(RunExit::Halted),
            Activity::WaitForSipi => Some(RunExit::WaitForSipi),
            Activity::Shutdown => Some(RunExit::Shutdown),
        }
    }

    /// The bits that an instruction pointer has in the current mode.
    #[inline(always)]
    fn instruction_pointer_mask(&self) -> u64 {
        if self.in_64bit_mode() { u64::MAX } else { 0xffff_ffff }
    }

    /// Executes straight-line code until its end, a transfer, an exception, or a write to any cached code or to
    /// a device. Returns how many instructions it began. What the block leaves unknown is dropped from `view`.
    #[inline(always)]
    fn run_block<E: Env>(
        &mut self,
        env: &mut E,
        cache: &mut DecodeCache,
        view: &mut CodeView,
        decoder: InstructionDecoder,
        budget: u64,
    ) -> u64 {
        let mut rip = self.state.rip;
        if view.linear(rip) & PAGE_MASK != view.page {
            *view = self.new_code_view(env);
        }
        let epoch = env.code_epoch();
        let offset = view.offset | view.linear(rip) & !PAGE_MASK;
        let (ops, length) = if view.is_none() {
            Default::default()
        } else {
            let lookup = Lookup { epoch, bits: view.bits, decoder, model: &self.model };
            cache.block(env, offset, &lookup)
        };
        let last = rip.wrapping_add(u64::from(length)).wrapping_sub(1);
        let ops = ops.get(..ops.len().min(budget as usize)).unwrap_or_default();
        if ops.is_empty() || last > view.limit {
            // One by one: across two pages, from a device, or with the fault raised in order with the limit check.
            *view = CodeView::NONE;
            self.run_one(env, decoder);
            return 1;
        }
        self.went_past_tlb = false;
        let mut executed = 0;
        for op in ops {
            executed += 1;
            let following = rip.wrapping_add(op.length.into()) & view.mask;
            self.next_rip = following;
            if let Err(exception) = self.execute(env, op) {
                *view = CodeView::NONE;
                self.deliver_exception(env, exception);
                break;
            }
            match op.then {
                Then::Next => {}
                Then::NextIfUnchanged => {
                    if self.went_past_tlb || env.code_epoch() != epoch {
                        self.state.rip = following;
                        break;
                    }
                }
                Then::Either => {
                    if self.next_rip != following {
                        self.state.rip = self.next_rip;
                        break;
                    }
                }
                Then::Elsewhere => {
                    self.state.rip = self.next_rip;
                    break;
                }
                Then::Anything => {
                    self.state.rip = self.next_rip;
                    *view = CodeView::NONE;
                    self.step_sysret(env, op);
                    break;
                }
            }
            self.state.rip = following;
            rip = following;
        }
        executed
    }

    /// How the code at `state.rip` is seen; nothing if it can't be fetched from RAM.
    #[inline(never)]
    fn new_code_view<E: Env>(&mut self, env: &mut E) -> CodeView {
        let linear = self.code_address(self.state.rip);
        let Ok(Place::Ram(offset)) = self.translate_fetch(env, linear) else { return CodeView::NONE };
        let mask = self.instruction_pointer_mask();
        let cs = &self.state.seg[SegReg::Cs as usize];
        let (bits, base, limit) = match mask {
            u64::MAX => (64, 0, u64::MAX),
            _ => (self.state.code_bits(), cs.base, cs.limit.into()),
        };
        let (page, offset) = (linear & PAGE_MASK, offset & PAGE_MASK);
        CodeView { base, mask, limit, bits, page, offset }
    }

    /// SYSRET is the one instruction that is single-stepped by the TF that it sets itself, as SYSCALL is not by the
    /// one that it masks: to a debugger of user code both are one step.
    fn step_sysret<E: Env>(&mut self, env: &mut E, op: &Op) {
        if self.state.has_flags(Rflags::TF)
            && matches!(op.instruction.mnemonic(), Mnemonic::Sysret | Mnemonic::Sysretq)
            && let Err(exception) = self.debug_trap(true, true)
        {
            self.deliver_exception(env, exception);
        }
    }

    /// Executes one instruction with everything that may have to be done around it.
    #[cold]
    #[inline(never)]
    fn run_one<E: Env>(&mut self, env: &mut E, decoder: InstructionDecoder) {
        let trapped = match self.execute_one(env, decoder) {
            Ok((stepping, branched)) => self.debug_trap(stepping, branched),
            Err(exception) => {
                self.forget_debug_hits();
                Err(exception)
            }
        };
        if let Err(exception) = trapped {
            self.deliver_exception(env, exception);
        }
    }

    /// Fetches and executes one instruction; whether it was single-stepped, and whether it branched.
    fn execute_one<E: Env>(
        &mut self,
        env: &mut E,
        decoder: InstructionDecoder,
    ) -> Result<(bool, bool), Exception> {
        self.instruction_breakpoint()?;
        let stepping = self.state.has_flags(Rflags::TF);
        let op = self.fetch_op(env, decoder)?;
        // All of these hold for this instruction only, unless it sets them itself.
        self.state.rflags &= !Rflags::RF.bits();
        self.state.interrupt_shadow = false;
        self.state.ss_shadow = false;
        let following = self.state.rip.wrapping_add(op.length.into()) & self.instruction_pointer_mask();
        self.next_rip = following;
        self.execute(env, &op)?;
        self.state.rip = self.next_rip;
        let stepping = match op.instruction.mnemonic() {
            // Entering a handler clears TF, and with it the trap.
            Mnemonic::Int | Mnemonic::Int3 | Mnemonic::Int1 | Mnemonic::Into => false,
            // SYSCALL may mask TF for itself, SYSRET restores it for itself.
            Mnemonic::Syscall | Mnemonic::Sysret | Mnemonic::Sysretq => self.state.has_flags(Rflags::TF),
            _ => stepping,
        };
        Ok((stepping, self.next_rip != following))
    }

    /// Fetches and decodes the instruction at `state.rip`, without the cache.
    fn fetch_op<E: Env>(&mut self, env: &mut E, decoder: InstructionDecoder) -> Result<Op, Exception> {
        let mut bytes = [0; MAX_INSTRUCTION_LENGTH];
        let (count, fault) = self.fetch(env, self.state.rip, &mut bytes);
        let bits = self.state.code_bits();
        let op = bytes.get(..count).and_then(|bytes| decoder.decode(bytes, bits, &self.model));
        op.ok_or(fault.unwrap_or(Exception::GP0))
    }
}
