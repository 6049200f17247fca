//! What translated code works on: the *context* of one virtual processor, and which host register holds what.
//!
//! While translated code runs, the host's RSP points at the context; the memory below it is free stack, where the
//! host may push a signal frame. Guest registers live in the host registers of the same name, but
//! - guest RSP in host R12,
//! - guest R12, R13 and R14 in host R9, R10 and R11,
//! - guest R9, R10, R11 and R15, which compilers use least, in [`Context::spilled`],
//! - host R13, R14 and R15 are scratch.
//!
//! Arithmetic flags are the host's. Vector registers are the host's too: always in user mode, else from the first
//! block that uses them until translated code is left ([`Context::vectors`]); x87 registers likewise from the first
//! block that uses them.
//!
//! Behind the context lie the inline TLBs of one address space. The context itself is mapped several times, each time
//! with other TLBs behind it ([`super::windows`]): to change the address space is to enter by another address.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use bivisor_x86::state::{CpuState, Segment};

use super::checks::MAX_WINDOWS;
use super::emit::{Mem, Reg, at, indexed, reg};
use super::pause::PAUSES;

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
/// Guest registers that live in memory.
pub const SPILLED: [u8; 4] = [9, 10, 11, 15];
/// Guest registers that live in host registers, and which.
pub const HOMES: [(u8, Reg); 12] = [
    (0, reg::RAX),
    (1, reg::RCX),
    (2, reg::RDX),
    (3, reg::RBX),
    (4, GUEST_RSP),
    (5, reg::RBP),
    (6, reg::RSI),
    (7, reg::RDI),
    (8, reg::R8),
    (12, Reg(9)),
    (13, Reg(10)),
    (14, Reg(11)),
];

/// Entries of each [`Tlb`]; a power of two.
pub const TLB_ENTRIES: usize = 4096;
/// log2 of the size of a [`TlbEntry`].
const TLB_ENTRY_SHIFT: u32 = 5;
/// A linear address shifted right by this, and masked by [`TLB_INDEX_MASK`], is the offset of its entry.
pub const TLB_INDEX_SHIFT: u8 = (12 - TLB_ENTRY_SHIFT) as u8;
/// See [`TLB_INDEX_SHIFT`].
pub const TLB_INDEX_MASK: i32 = (TLB_ENTRIES as i32 - 1) << TLB_ENTRY_SHIFT;
/// A tag that no page number equals.
pub const TLB_EMPTY: u64 = u64::MAX;
/// Entries of the jump cache; a power of two.
pub const JUMP_ENTRIES: usize = 1 << 16;
/// Bytes of code that share an entry of the jump cache.
const JUMP_GRANULE: usize = 4;
/// log2 of what [`jump_tag`] and [`jump_host`] multiply their index by.
const JUMP_SCALE: u8 = 2;
/// Mask that makes an instruction pointer what they are indexed by.
pub const JUMP_MASK: i32 = ((JUMP_ENTRIES - 1) * JUMP_GRANULE) as i32;
/// Pages of code whose instruction pointers have different entries.
pub const JUMP_PAGES: u64 = (JUMP_ENTRIES * JUMP_GRANULE >> 12) as u64;
const _: () = assert!(JUMP_GRANULE << JUMP_SCALE == size_of::<JumpEntry>());
/// Links between pages at most.
pub const LINKS: usize = 1 << 18;
/// Bit of [`Context::jump_bias`] that is set when an event waits: no lookup hits any more.
pub const EVENT_BIT: u64 = 1 << 63;
/// [`Context::stack_page`] where no page is checked: not canonical, so no stack comes near it.
pub const NO_STACK_PAGE: u64 = 1 << 62;

/// [`Context::vectors`]: the guest's SSE and AVX registers are in the host's.
pub const VECTORS_LOADED: u8 = 0;
/// [`Context::vectors`]: they are in [`Context::ymm`].
pub const VECTORS_IN_CONTEXT: u8 = 1;
/// [`Context::vectors`]: they are in the state.
pub const VECTORS_IN_STATE: u8 = 2;

/// The arithmetic flags.
pub const ARITHMETIC: u64 = 0x8d5;

/// An entry of the inline TLB: linear page to what must be added to reach the host's memory.
#[repr(C)]
pub struct TlbEntry {
    /// Page number, if it may be read.
    pub read: AtomicU64,
    /// Page number, if it may be written.
    pub write: AtomicU64,
    /// Host address minus linear address; of the page in either tag, which never differ unless one is empty.
    pub addend: AtomicU64,
    /// 1: the page is global.
    pub global: AtomicU64,
}

const _: () = assert!(size_of::<TlbEntry>() == 1 << TLB_ENTRY_SHIFT);

impl TlbEntry {
    /// Makes the entry match nothing.
    pub fn clear(&self) {
        self.read.store(TLB_EMPTY, Ordering::Relaxed);
        self.write.store(TLB_EMPTY, Ordering::Relaxed);
    }
}

/// The inline TLB of one privilege class.
#[repr(C)]
pub struct Tlb {
    /// The entries, by the low bits of the page number.
    pub entries: [TlbEntry; TLB_ENTRIES],
}

impl Tlb {
    /// The entry that a linear address may be in.
    pub fn entry(&self, linear: u64) -> &TlbEntry {
        &self.entries[(linear >> 12) as usize % TLB_ENTRIES]
    }
}

/// The inline TLBs of one address space: user, supervisor, supervisor with RFLAGS.AC.
#[repr(C)]
pub struct Tlbs {
    /// By privilege class.
    pub class: [Tlb; 3],
}

/// From a linear instruction pointer to translated code, for jumps whose target is not fixed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct JumpEntry {
    /// The instruction pointer, exclusive-or [`Context::jump_bias`] where it holds; 0 in an empty entry.
    pub tag: u64,
    /// Host address of the block.
    pub host: u64,
}

impl JumpEntry {
    /// Matches nothing.
    pub const EMPTY: Self = Self { tag: 0, host: 0 };
}

/// A result of CPUID.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CpuidEntry {
    /// EAX as asked, plus ECX shifted left by 32; [`CPUID_EMPTY`] in an empty entry.
    pub key: u64,
    /// EAX, EBX, ECX, EDX.
    pub result: [u32; 4],
    /// Fills up to a power of two.
    pub padding: u64,
}

/// Entries of [`Context::cpuid`].
pub const CPUID_ENTRIES: usize = 16;
/// A key that no CPUID has: leaf FFFF_FFFFh is never entered.
pub const CPUID_EMPTY: u64 = u64::MAX;

/// A page that hot code accesses: the universal TLB's answer, kept for one place in the code or one window of a block.
#[repr(C)]
pub struct Slot {
    /// Linear address of the page, or [`NO_STACK_PAGE`].
    pub page: AtomicU64,
    /// Its addend.
    pub addend: AtomicU64,
    /// Its host address.
    pub host: AtomicU64,
    /// How often it held another page, until somebody sets it to zero.
    pub misses: AtomicU64,
}

/// Slots at most.
pub const SLOTS: usize = 1024;

/// What SYSCALL and SYSRET load into CS and SS, worked out beforehand.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Selectors {
    /// CS.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
}

/// What an IRETQ to 64-bit code loads into CS and SS, if it pops these selectors and their descriptors are these.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct InterruptReturn {
    /// Selector of CS; [`NO_RETURN`] in an empty entry.
    pub cs: u64,
    /// Selector of SS.
    pub ss: u64,
    /// Descriptor of CS.
    pub cs_descriptor: u64,
    /// Descriptor of SS.
    pub ss_descriptor: u64,
    /// What is loaded.
    pub selectors: Selectors,
}

/// Entries of [`Context::returns`]: as many as two bits can index.
pub const RETURNS: usize = 4;
/// No selector.
pub const NO_RETURN: u64 = u64::MAX;

/// The context. Its first 128 bytes, reached by short displacements, are the hottest.
#[repr(C, align(4096))]
pub struct Context {
    /// The guest registers of [`SPILLED`].
    pub spilled: [u64; 4],
    /// Linear address of the page that the current block's first byte lies in.
    pub page_base: u64,
    /// Linear address of the page that stack accesses were last found to lie in, or [`NO_STACK_PAGE`].
    pub stack_page: AtomicU64,
    /// Addend of that page.
    pub stack_addend: AtomicU64,
    /// Tells address spaces, modes and times apart in the jump cache ([`super::biases`]). Bit 63: [`EVENT_BIT`].
    pub jump_bias: AtomicU64,
    /// Holds RCX or RAX during a few instructions.
    pub saved: u64,
    /// The processor's state.
    pub state: *mut CpuState,
    /// Arithmetic flags put aside within a block: AX as LAHF and SETO AL leave it.
    pub block_flags: u64,
    /// Where the guest's vector registers are, such as [`VECTORS_LOADED`].
    pub vectors: u8,
    /// Nonzero: the guest's x87 registers are in the state, not in the host's.
    pub x87_in_memory: u8,
    /// Nonzero: an event waits; set together with [`EVENT_BIT`].
    pub event: AtomicU8,
    /// Nonzero: an event waits that could not be taken when it was last looked at.
    pub pending: u8,
    /// Nonzero: SYSCALL and SYSRET work without further checks.
    pub fast_system_calls: u8,
    /// Nonzero: RDFSBASE and its like are enabled.
    pub base_instructions: u8,
    /// Nonzero: a return to an outer privilege level changes data segments.
    pub inner_segments: u8,
    padding: u8,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// What ended the last run: number of a site; stored with 64 bits.
    pub site: u32,
    site_upper: u32,
    // ---- from here on, long displacements ----
    /// Entries into translated code and exits from it: odd while the processor's thread is inside.
    pub passages: AtomicU64,
    /// So many more PAUSE are executed before the next leaves translated code.
    pub pauses: u64,
    /// Arithmetic flags on entry and exit, in the form of `block_flags`.
    pub flags: u64,
    /// [`ADDRESS`] on exit.
    pub address: u64,
    /// [`TEMPORARY`] on exit.
    pub temporary: u64,
    /// Host stack pointer of the caller.
    pub host_rsp: u64,
    /// Where to go on entry.
    pub target: u64,
    /// Where an indirect call goes, while it pushes the return address: entering translated code must not change it.
    pub call_target: u64,
    /// What the return address of an indirect call was pushed over.
    pub overwritten: u64,
    /// Biases of the jump cache for the privilege classes.
    pub class_bias: [u64; 3],
    /// What to add to the host's time-stamp counter.
    pub tsc_offset: u64,
    /// [`ARITHMETIC`].
    pub arithmetic_mask: u64,
    /// The flags that PUSHF pushes, without the arithmetic ones.
    pub pushed_mask: u64,
    /// Masks of a bit's number in 64 and in 32 bits.
    pub bit_mask: [u64; 2],
    /// What SYSCALL loads.
    pub syscall: Selectors,
    /// What SYSRET loads.
    pub sysret: Selectors,
    /// What IRETQ loads, by the lowest bits of the index of SS.
    pub returns: [InterruptReturn; RETURNS],
    /// The frame that IRETQ has popped.
    pub frame: [u64; 5],
    /// Host MXCSR for our own code.
    pub host_mxcsr: u32,
    /// Guest MXCSR where `vectors` is [`VECTORS_IN_CONTEXT`].
    pub mxcsr: u32,
    /// Guest vector registers where `vectors` is [`VECTORS_IN_CONTEXT`].
    pub ymm: [[u8; 32]; 16],
    /// Results of CPUID, by the low bits of EAX plus ECX.
    pub cpuid: [CpuidEntry; CPUID_ENTRIES],
    /// Addends of the current block's windows.
    pub window_addends: [u64; MAX_WINDOWS],
    /// Slots of hot code.
    pub slots: [Slot; SLOTS],
    /// A bit for each slot, set before it is filled. Only the processor's own thread clears any.
    pub filled_slots: [AtomicU64; SLOTS / 64],
    /// Host addresses that jumps between pages go to.
    pub links: [u64; LINKS],
    /// The jump cache.
    pub jumps: [JumpEntry; JUMP_ENTRIES],
}

/// Short names for context fields as memory operands.
macro_rules! field {
    ($($field:ident)*) => {
        $(
            #[doc = concat!("[`Context::", stringify!($field), "`].")]
            pub const fn $field() -> Mem {
                at(CONTEXT, offset_of!(Context, $field) as i32)
            }
        )*
    };
}
field!(page_base stack_page stack_addend jump_bias saved state block_flags vectors x87_in_memory event pending);
field!(fast_system_calls inner_segments base_instructions fs_base gs_base site host_mxcsr flags address temporary host_rsp target call_target overwritten tsc_offset pauses);
field!(arithmetic_mask pushed_mask bit_mask syscall sysret mxcsr filled_slots);

/// A guest register in [`Context::spilled`].
pub fn spilled(number: u8) -> Mem {
    let place = SPILLED.iter().position(|&spilled| spilled == number).unwrap_or_default();
    at(CONTEXT, offset_of!(Context, spilled) as i32 + place as i32 * 8)
}
/// A word of the frame that IRETQ has popped.
pub const fn frame(word: usize) -> Mem {
    at(CONTEXT, (offset_of!(Context, frame) + word * 8) as i32)
}
/// A field of the remembered IRETQ whose offset in the table `index` holds.
pub const fn interrupt_return(index: Reg, field: usize) -> Mem {
    indexed(CONTEXT, index, 0, (offset_of!(Context, returns) + field) as i32)
}
/// Bias of the jump cache of a privilege class.
pub const fn class_bias(class: u8) -> Mem {
    at(CONTEXT, (offset_of!(Context, class_bias) + class as usize * 8) as i32)
}
/// Guest vector register.
pub const fn ymm(number: u8) -> Mem {
    at(CONTEXT, (offset_of!(Context, ymm) + number as usize * 32) as i32)
}
/// A link between pages.
pub const fn link(number: u32) -> Mem {
    at(CONTEXT, offset_of!(Context, links) as i32 + number as i32 * 8)
}
/// Addend of a window.
pub const fn window_addend(number: u8) -> Mem {
    at(CONTEXT, offset_of!(Context, window_addends) as i32 + number as i32 * 8)
}
/// Offset of a slot from the context.
pub const fn slot(number: u32) -> usize {
    offset_of!(Context, slots) + number as usize % SLOTS * size_of::<Slot>()
}
/// A slot's page.
pub const fn slot_page(number: u32) -> Mem {
    at(CONTEXT, (slot(number) + offset_of!(Slot, page)) as i32)
}
/// A slot's addend.
pub const fn slot_addend(number: u32) -> Mem {
    at(CONTEXT, (slot(number) + offset_of!(Slot, addend)) as i32)
}
/// Result word of the CPUID entry whose offset in the table `index` holds.
pub const fn cpuid_result(index: Reg, word: usize) -> Mem {
    let offset = offset_of!(Context, cpuid) + offset_of!(CpuidEntry, result) + word * 4;
    indexed(CONTEXT, index, 0, offset as i32)
}
/// Key of that entry.
pub const fn cpuid_key(index: Reg) -> Mem {
    indexed(CONTEXT, index, 0, (offset_of!(Context, cpuid) + offset_of!(CpuidEntry, key)) as i32)
}

const fn tlb_offset(class: u8) -> usize {
    size_of::<Context>() + class as usize * size_of::<Tlb>()
}
/// Tag to compare for an access of this kind by this privilege class; `index` holds the entry's offset.
pub const fn tlb_tag(class: u8, write: bool, index: Reg) -> Mem {
    let tag = if write { offset_of!(TlbEntry, write) } else { offset_of!(TlbEntry, read) };
    indexed(CONTEXT, index, 0, (tlb_offset(class) + tag) as i32)
}
/// The entry's addend.
pub const fn tlb_addend(class: u8, index: Reg) -> Mem {
    indexed(CONTEXT, index, 0, (tlb_offset(class) + offset_of!(TlbEntry, addend)) as i32)
}
/// The jump cache's tag; `index` is made of the instruction pointer by [`JUMP_MASK`].
pub const fn jump_tag(index: Reg) -> Mem {
    indexed(CONTEXT, index, JUMP_SCALE, (offset_of!(Context, jumps) + offset_of!(JumpEntry, tag)) as i32)
}
/// The jump cache's host address.
pub const fn jump_host(index: Reg) -> Mem {
    indexed(CONTEXT, index, JUMP_SCALE, (offset_of!(Context, jumps) + offset_of!(JumpEntry, host)) as i32)
}

/// Entry of the jump cache for an instruction pointer: its low bits, since code is dense.
pub const fn jump_index(rip: u64) -> usize {
    rip as usize / JUMP_GRANULE % JUMP_ENTRIES
}

impl Context {
    /// Sets what is constant, and makes everything cached empty.
    pub fn reset(&mut self, state: *mut CpuState) {
        self.state = state;
        self.vectors = VECTORS_IN_STATE;
        self.x87_in_memory = 1;
        self.pauses = PAUSES;
        self.host_mxcsr = bivisor_x86::state::MXCSR_RESET;
        self.arithmetic_mask = ARITHMETIC;
        // Without VM and RF (SDM Vol. 2B, PUSHF), bits 22 up.
        self.pushed_mask = 0x3c_ffff & !ARITHMETIC;
        self.bit_mask = [63, 31];
        *self.stack_page.get_mut() = NO_STACK_PAGE;
        for slot in &mut self.slots {
            *slot.page.get_mut() = NO_STACK_PAGE;
        }
        self.forget_cpuid();
        self.forget_returns();
        self.flush_jumps();
    }

    /// Empties the jump cache.
    pub fn flush_jumps(&mut self) {
        self.jumps.fill(JumpEntry::EMPTY);
    }

    /// Empties what IRETQ loads.
    pub fn forget_returns(&mut self) {
        self.returns.iter_mut().for_each(|entry| entry.cs = NO_RETURN);
    }

    /// Empties the results of CPUID.
    pub fn forget_cpuid(&mut self) {
        for entry in &mut self.cpuid {
            entry.key = CPUID_EMPTY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hot_fields_have_short_displacements() {
        assert!(offset_of!(Context, site) < 128);
        assert_eq!(size_of::<Context>() % 4096, 0);
        assert_eq!(size_of::<CpuidEntry>(), 32);
    }
}
