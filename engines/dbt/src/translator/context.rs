//! What translated code works on: the *context* of one virtual processor, and which host register holds what.
//!
//! While translated code runs, the host's RSP points at the context; the memory below it is free stack, where the
//! host may push a signal frame. Guest registers live in the host registers of the same name, but
//! - guest RSP in host R12,
//! - guest R12 to R15 in [`Context::spilled`],
//! - host R13, R14 and R15 are scratch.
//!
//! Arithmetic flags are the host's. Vector and x87 registers are the host's too, from the first block that uses
//! them until translated code is left ([`Context::vectors_in_memory`]).

use std::mem::offset_of;
use std::sync::atomic::{AtomicU8, AtomicU64};

use bivisor_x86::state::CpuState;

use super::emit::{Mem, Reg, at, indexed, reg};

/// Scratch: the linear address of an access, or the target of a jump.
pub const ADDRESS: Reg = reg::R14;
/// Scratch: what is to be added to a linear address to get the host's, or an index.
pub const ADDEND: Reg = reg::R13;
/// Scratch.
pub const TEMPORARY: Reg = reg::R15;
/// Where guest RSP is.
pub const GUEST_RSP: Reg = reg::R12;
/// Where the context is.
pub const CONTEXT: Reg = reg::RSP;

/// Entries of each [`Tlb`]; as many as a byte can index.
pub const TLB_ENTRIES: usize = 256;
/// A tag that no page number equals.
pub const TLB_EMPTY: u64 = u64::MAX;
/// Entries of [`JumpCache`]; a power of two.
pub const JUMP_ENTRIES: usize = 4096;
/// Bit of [`Context::jump_bias`] that is set when an event waits: no lookup hits any more.
pub const EVENT_BIT: u64 = 1 << 63;

/// The inline TLB of one privilege class: linear page to what must be added to reach the host's memory.
#[repr(C)]
pub struct Tlb {
    /// Page numbers that may be read.
    pub read: [u64; TLB_ENTRIES],
    /// Page numbers that may be written.
    pub write: [u64; TLB_ENTRIES],
    /// Host address minus linear address; of the page in either tag, which never differ unless one is empty.
    pub addend: [u64; TLB_ENTRIES],
}

/// From a linear instruction pointer to translated code, for jumps whose target is not fixed.
#[repr(C)]
pub struct JumpCache {
    /// What, added to the instruction pointer and [`Context::jump_bias`], gives zero.
    pub complement: [u64; JUMP_ENTRIES],
    /// Host address of the block.
    pub host: [u64; JUMP_ENTRIES],
}

/// The context. Its first 128 bytes, reached by short displacements, are the hottest.
#[repr(C, align(64))]
pub struct Context {
    /// Guest R12 to R15.
    pub spilled: [u64; 4],
    /// Linear address of the page that the current block's first byte lies in.
    pub page_base: u64,
    /// Tells address spaces, modes and times apart in [`JumpCache`]: bits 48 to 62. Bit 63: [`EVENT_BIT`].
    pub jump_bias: AtomicU64,
    /// Bits of an instruction pointer that index [`JumpCache`].
    pub jump_mask: u64,
    /// Holds RCX or RAX during a few instructions.
    pub saved: u64,
    /// Addend of the page that the current block's stack accesses lie in.
    pub stack_addend: u64,
    /// Arithmetic flags put aside within a block: AX as LAHF and SETO AL leave it.
    pub block_flags: u64,
    /// Nonzero: the guest's SSE and AVX registers are in the state, not in the host's.
    pub vectors_in_memory: u8,
    /// Nonzero: the guest's x87 registers are in the state, not in the host's.
    pub x87_in_memory: u8,
    /// Nonzero: an event waits; set together with [`EVENT_BIT`].
    pub event: AtomicU8,
    padding: [u8; 5],
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// What ended the last run: number of a site.
    pub site: u32,
    /// Host MXCSR for our own code.
    pub host_mxcsr: u32,
    // ---- from here on, long displacements ----
    /// Arithmetic flags on entry and exit, in the form of `block_flags`.
    pub flags: u64,
    /// [`ADDRESS`] on exit.
    pub address: u64,
    /// Host stack pointer of the caller.
    pub host_rsp: u64,
    /// Where to go on entry.
    pub target: u64,
    /// The processor's state.
    pub state: *mut CpuState,
    /// TLBs: user, supervisor, supervisor with RFLAGS.AC.
    pub tlb: [Tlb; 3],
    /// Jump cache.
    pub jumps: JumpCache,
}

/// Short names for context fields as memory operands.
macro_rules! field {
    ($name:ident, $field:ident) => {
        #[doc = concat!("[`Context::", stringify!($field), "`].")]
        pub const fn $name() -> Mem {
            at(CONTEXT, offset_of!(Context, $field) as i32)
        }
    };
}
field!(page_base, page_base);
field!(jump_bias, jump_bias);
field!(jump_mask, jump_mask);
field!(saved, saved);
field!(stack_addend, stack_addend);
field!(block_flags, block_flags);
field!(vectors_in_memory, vectors_in_memory);
field!(x87_in_memory, x87_in_memory);
field!(event, event);
field!(fs_base, fs_base);
field!(gs_base, gs_base);
field!(site, site);
field!(host_mxcsr, host_mxcsr);
field!(flags, flags);
field!(address, address);
field!(host_rsp, host_rsp);
field!(target, target);
field!(state, state);

/// Guest register 12 to 15 in [`Context::spilled`].
pub const fn spilled(number: u8) -> Mem {
    at(CONTEXT, offset_of!(Context, spilled) as i32 + (number as i32 - 12) * 8)
}

const fn tlb_offset(class: usize) -> i32 {
    (offset_of!(Context, tlb) + class * size_of::<Tlb>()) as i32
}
/// Tag to compare for an access of this kind by this privilege class; `index` holds the entry's number.
pub const fn tlb_tag(class: usize, write: bool, index: Reg) -> Mem {
    let table = if write { offset_of!(Tlb, write) } else { offset_of!(Tlb, read) };
    indexed(CONTEXT, index, 3, tlb_offset(class) + table as i32)
}
/// The entry's addend.
pub const fn tlb_addend(class: usize, index: Reg) -> Mem {
    indexed(CONTEXT, index, 3, tlb_offset(class) + offset_of!(Tlb, addend) as i32)
}
/// The jump cache's complement.
pub const fn jump_complement(index: Reg) -> Mem {
    indexed(CONTEXT, index, 3, (offset_of!(Context, jumps) + offset_of!(JumpCache, complement)) as i32)
}
/// The jump cache's host address.
pub const fn jump_host(index: Reg) -> Mem {
    indexed(CONTEXT, index, 3, (offset_of!(Context, jumps) + offset_of!(JumpCache, host)) as i32)
}

/// Bits of an instruction pointer that index the jump cache: its low bits, since code is dense.
pub const JUMP_MASK: u64 = JUMP_ENTRIES as u64 - 1;

/// Entry of the jump cache for an instruction pointer.
pub const fn jump_index(rip: u64) -> usize {
    (rip & JUMP_MASK) as usize
}

impl Context {
    /// Makes all that is cached from the guest's address space empty, and sets what is constant.
    pub fn reset(&mut self, state: *mut CpuState) {
        self.state = state;
        self.jump_mask = JUMP_MASK;
        self.vectors_in_memory = 1;
        self.x87_in_memory = 1;
        self.host_mxcsr = bivisor_x86::state::MXCSR_RESET;
        for class in 0..self.tlb.len() {
            self.flush_tlb(class);
        }
        self.flush_jumps();
    }

    /// Empties the TLB of one privilege class.
    pub fn flush_tlb(&mut self, class: usize) {
        self.tlb[class].read.fill(TLB_EMPTY);
        self.tlb[class].write.fill(TLB_EMPTY);
    }

    /// Empties the jump cache.
    pub fn flush_jumps(&mut self) {
        // With a complement of zero only bias + rip = 0 would hit; biases are at least 1 << 48, and no canonical
        // address complements one below 1 << 63.
        self.jumps.complement.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hot_fields_have_short_displacements() {
        assert!(offset_of!(Context, host_mxcsr) < 128);
        assert_eq!(align_of::<Context>(), 64);
    }
}
