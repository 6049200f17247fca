//! One logical processor as the interpreter drives it.

use crate::cpuid::CpuModel;
use crate::env::Env;
use crate::exception::Exception;
use crate::state::{CpuState, SegReg};
use alloc::sync::Arc;

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
        Self { state: CpuState::default(), model, apic_id: 0, next_rip: 0 }
    }
    /// Drops what was cached from `state` and guest memory (TLB, decoded code); call after changing it from outside.
    pub fn state_changed(&mut self) {
        todo!()
    }
    /// Executes instructions and delivers exceptions and events until something ends it. `budget`: at most this
    /// many instructions.
    pub fn run<E: Env>(&mut self, _env: &mut E, _budget: u64) -> RunExit {
        todo!()
    }

    // ---- virtual memory, as instructions use it (memory.rs) ----

    /// Reads `size` (1, 2, 4, 8) bytes at segment:offset, with limit, canonicality, alignment and page checks.
    pub fn read<E: Env>(
        &mut self,
        _env: &mut E,
        _seg: SegReg,
        _offset: u64,
        _size: usize,
    ) -> Result<u64, Exception> {
        todo!()
    }
    /// Writes `size` bytes at segment:offset. Nothing is written if any byte faults.
    pub fn write<E: Env>(
        &mut self,
        _env: &mut E,
        _seg: SegReg,
        _offset: u64,
        _size: usize,
        _value: u64,
    ) -> Result<(), Exception> {
        todo!()
    }
    /// Reads bytes (up to a page) at segment:offset.
    pub fn read_bytes<E: Env>(
        &mut self,
        _env: &mut E,
        _seg: SegReg,
        _offset: u64,
        _to: &mut [u8],
    ) -> Result<(), Exception> {
        todo!()
    }
    /// Writes bytes (up to a page). Nothing is written if any byte faults.
    pub fn write_bytes<E: Env>(
        &mut self,
        _env: &mut E,
        _seg: SegReg,
        _offset: u64,
        _from: &[u8],
    ) -> Result<(), Exception> {
        todo!()
    }
    /// Atomic or plain read-modify-write of `size` bytes: `update` maps the old value to the new; returns
    /// the old one. With `locked` it is one atomic operation (`update` may then be called again). The write
    /// permission is checked before the read.
    pub fn read_modify_write<E: Env>(
        &mut self,
        _env: &mut E,
        _seg: SegReg,
        _offset: u64,
        _size: usize,
        _locked: bool,
        _update: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        todo!()
    }
    /// The same for 16 bytes, aligned (CMPXCHG16B).
    pub fn read_modify_write128<E: Env>(
        &mut self,
        _env: &mut E,
        _seg: SegReg,
        _offset: u64,
        _update: &mut dyn FnMut(u128) -> u128,
    ) -> Result<u128, Exception> {
        todo!()
    }
    /// Pushes `size` (2, 4, 8) bytes on the stack; RSP changes only on success.
    pub fn push<E: Env>(&mut self, _env: &mut E, _size: usize, _value: u64) -> Result<(), Exception> {
        todo!()
    }
    /// Pops `size` bytes; RSP changes only on success.
    pub fn pop<E: Env>(&mut self, _env: &mut E, _size: usize) -> Result<u64, Exception> {
        todo!()
    }
}
