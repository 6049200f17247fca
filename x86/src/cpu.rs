//! One logical processor as the interpreter drives it.

use crate::cpuid::{CpuModel, Word};
use crate::debug::DebugWatch;
use crate::interp::cache::DecodeCache;
use crate::state::CpuState;
use crate::tlb::Tlb;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A logical processor: its architectural state and what is cached from it.
pub struct Cpu {
    /// Architectural state. After changing it from outside, call [`Cpu::state_changed`].
    pub state: CpuState,
    /// What CPUID says.
    pub model: Arc<CpuModel>,
    /// Number of the local APIC, as CPUID tells it: the processor's number, from 0 on. Zero unless set.
    pub apic_id: u32,
    /// While an instruction executes (`state.rip` is still its own): where execution goes on, without the base
    /// of CS. The run loop sets it to the following instruction before, and moves it to `state.rip` after.
    pub next_rip: u64,
    /// Linear addresses of instructions that a debugger outside wants [`Cpu::run`] to return before.
    pub breakpoints: Vec<u64>,
    /// The next HLT does not halt ([`crate::env::Event::Unhalt`]).
    pub(crate) unhalted: bool,
    pub(crate) decode_cache: DecodeCache,
    pub(crate) tlb: Tlb,
    /// Set by every access that goes past the TLB, as all accesses to devices do.
    pub(crate) went_past_tlb: bool,
    pub(crate) watch: DebugWatch,
    /// 1 GiB pages (CPUID 8000_0001h EDX bit 26).
    pub(crate) gigabyte_pages: bool,
}

/// What a memory access is for: selects the permission checked and the error code of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A data read.
    Read,
    /// A data write, or a read-modify-write, which must be permitted as a write from the start.
    Write,
    /// An instruction fetch.
    Execute,
}

/// Why [`Cpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunExit {
    /// The given number of instructions was executed.
    Budget,
    /// The processor waits in HLT and no event is there.
    Halted,
    /// Waits for a SIPI.
    WaitForSipi,
    /// A triple fault.
    Shutdown,
    /// Somebody asked for the engine's return ([`crate::env::Event::Kick`]).
    Kicked,
    /// The next instruction stands at a breakpoint of the debugger (not the guest's).
    Breakpoint,
}

impl Cpu {
    /// A processor in its state after power-up.
    pub fn new(model: Arc<CpuModel>) -> Self {
        let gigabyte_pages = model.has(Word::X1Edx, 26);
        Self {
            state: CpuState::default(),
            model,
            apic_id: 0,
            next_rip: 0,
            breakpoints: Vec::new(),
            unhalted: false,
            decode_cache: DecodeCache::default(),
            tlb: Tlb::new(),
            went_past_tlb: false,
            watch: DebugWatch::default(),
            gigabyte_pages,
        }
    }

    /// The bits that a guest-physical address may have.
    pub fn physical_mask(&self) -> u64 {
        (1 << self.model.physical_bits.clamp(32, 52)) - 1
    }

    /// Drops what was cached from `state` and guest memory (TLB, decoded code); call after changing it from outside.
    pub fn state_changed(&mut self) {
        self.forget_debug_hits();
        self.debug_changed();
        self.flush_tlb();
        self.decode_cache = DecodeCache::default();
    }
}
