//! The run loop: events, blocks of instructions, and single ones where something must be looked at in between.

use iced_x86::Mnemonic;

use crate::cpu::{Cpu, RunExit};
use crate::env::{Env, Event};
use crate::exception::Exception;
use crate::interp::cache::DecodeCache;
use crate::interp::decode::InstructionDecoder;
use crate::interp::op::{MAX_INSTRUCTION_LENGTH, Op};
use crate::paging::Place;
use crate::registers::Rflags;
use crate::state::{Activity, SegReg};

impl Cpu {
    /// Executes instructions and delivers exceptions and events until something ends it. `budget`: at most this
    /// many instructions; an iteration of a repeated string instruction counts as one at most.
    pub fn run<E: Env>(&mut self, env: &mut E, budget: u64) -> RunExit {
        let mut cache = core::mem::take(&mut self.decode_cache);
        let exit = self.run_with(env, &mut cache, budget);
        self.decode_cache = cache;
        exit
    }

    fn run_with<E: Env>(&mut self, env: &mut E, cache: &mut DecodeCache, budget: u64) -> RunExit {
        let decoder = InstructionDecoder::new(&self.model);
        let mut left = budget;
        loop {
            if (self.state.activity != Activity::Running || env.has_event())
                && let Some(exit) = self.between_instructions(env)
            {
                return exit;
            }
            if left == 0 {
                return RunExit::Budget;
            }
            if !self.breakpoints.is_empty() && left != budget {
                let linear = self.code_address(self.state.rip);
                if self.breakpoints.contains(&linear) {
                    return RunExit::Breakpoint;
                }
            }
            let executed = if self.needs_care() {
                self.run_one(env, decoder);
                1
            } else {
                self.run_block(env, cache, decoder, left)
            };
            left = left.saturating_sub(executed);
        }
    }

    /// Whether something is to be done before or after the next instruction alone.
    #[inline(always)]
    fn needs_care(&self) -> bool {
        self.state.rflags & (Rflags::TF.bits() | Rflags::RF.bits()) != 0
            || self.state.interrupt_shadow
            || self.debug_active()
            || !self.breakpoints.is_empty()
    }

    /// Takes an event if one may be taken now; what ends the run, if anything does.
    #[cold]
    #[inline(never)]
    fn between_instructions<E: Env>(&mut self, env: &mut E) -> Option<RunExit> {
        let state = &self.state;
        let executing = matches!(state.activity, Activity::Running | Activity::Halted);
        let interrupts = executing && state.has_flags(Rflags::IF) && !state.interrupt_shadow;
        let nmis = executing && !state.nmi_blocked && !state.ss_shadow;
        if state.activity == Activity::Shutdown {
            return Some(RunExit::Shutdown);
        }
        match env.take_event(interrupts, nmis) {
            Some(Event::Kick) => return Some(RunExit::Kicked),
            Some(event) => self.deliver_event(env, event),
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

    /// Executes straight-line code until its end, a transfer, an exception, an event, or a write to any
    /// cached code. Returns how many instructions it began.
    #[inline(always)]
    fn run_block<E: Env>(
        &mut self,
        env: &mut E,
        cache: &mut DecodeCache,
        decoder: InstructionDecoder,
        budget: u64,
    ) -> u64 {
        let rip = self.state.rip;
        let linear = self.code_address(rip);
        let offset = match self.translate_fetch(env, linear) {
            Ok(Place::Ram(offset)) => offset,
            // One by one: from a device, or with the fault raised in order with the limit check.
            _ => {
                self.run_one(env, decoder);
                return 1;
            }
        };
        let mask = self.instruction_pointer_mask();
        let bits = if mask == u64::MAX { 64 } else { self.state.code_bits() };
        let epoch = env.code_epoch();
        let block = cache.block(env, offset, bits, decoder, &self.model);
        let ops = cache.ops(&block);
        let last = rip.wrapping_add(u64::from(block.length)).wrapping_sub(1);
        if ops.is_empty() || bits != 64 && last > self.state.seg[SegReg::Cs as usize].limit.into() {
            self.run_one(env, decoder);
            return 1;
        }
        let mut executed = 0;
        for op in ops {
            let following = self.state.rip.wrapping_add(op.length.into()) & mask;
            self.next_rip = following;
            executed += 1;
            if let Err(exception) = self.execute(env, op) {
                self.deliver_exception(env, exception);
                break;
            }
            self.state.rip = self.next_rip;
            if self.next_rip != following
                || executed >= budget
                || env.code_epoch() != epoch
                || env.has_event()
            {
                break;
            }
        }
        executed
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

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
