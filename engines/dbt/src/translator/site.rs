//! The places where translated code may leave, and what is to be done there.

use std::num::NonZeroU32;

/// A place where a block may leave translated code.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// The block's number.
    pub block: u32,
    /// Offset in its page of the instruction.
    pub guest: u16,
    /// The guest's flags are in the context's `block_flags`.
    pub flags_aside: bool,
    /// The instruction works on vector or x87 registers, or on their memory image.
    pub vector: bool,
    /// What to do.
    pub kind: SiteKind,
}

/// What is to be done at a [`Site`]. Host places are offsets in the code memory.
#[derive(Clone, Copy, Debug)]
pub enum SiteKind {
    /// A memory access that the inline TLB doesn't allow.
    Access {
        /// It writes.
        write: bool,
        /// Bytes.
        size: u8,
        /// Offset in the page of the next instruction.
        next: u16,
        /// Code of the instruction from its start.
        retry: u32,
        /// Code of the next instruction, if the block goes on there.
        next_host: Option<u32>,
    },
    /// The block's stack accesses don't all lie in one page of the inline TLB.
    Stack {
        /// First byte, from RSP.
        low: i32,
        /// Bytes.
        size: u16,
        /// Behind the check.
        retry: u32,
        /// Displacement of the jump that is taken where they lie in two pages.
        patch: u32,
        /// The code that leaves, which that jump goes to as long as it isn't linked.
        stub: u32,
    },
    /// A window does not lie in one page that the inline TLB, or its slot, knows. The context's `address` is its start.
    Window {
        /// It is written.
        write: bool,
        /// Bytes.
        size: u16,
        /// Code of the instruction from its start.
        retry: u32,
        /// Displacement of the jump that is taken where it lies in two pages.
        patch: u32,
        /// The code that leaves, which that jump goes to as long as it isn't linked.
        stub: u32,
    },
    /// A repeated string instruction that needs a page, or is too odd, for the shared code.
    String {
        /// It is MOVS, not STOS.
        is_move: bool,
        /// Offset in the page of the next instruction.
        next: u16,
        /// Code of the instruction from its start.
        retry: u32,
        /// Code of the next instruction, if the block goes on there.
        next_host: Option<u32>,
    },
    /// The interpreter executes the instruction, and the block goes on.
    Interpret {
        /// Offset in the page of the next instruction.
        next: u16,
        /// Its code, if the block goes on there.
        next_host: Option<u32>,
    },
    /// INVLPG, and the block goes on.
    Invlpg {
        /// Offset in the page of the next instruction.
        next: u16,
        /// Its code.
        next_host: Option<u32>,
    },
    /// CPUID whose result isn't remembered yet.
    Cpuid {
        /// Offset in the page of the next instruction.
        next: u16,
        /// Its code.
        next_host: Option<u32>,
    },
    /// The interpreter executes the instruction.
    InterpretLast,
    /// The interpreter executes the IRETQ.
    InterruptReturn,
    /// A jump within the page whose target was not translated yet.
    Jump {
        /// Offset in the page of the target.
        target: u16,
        /// It goes backwards, or stays.
        backwards: bool,
        /// Displacement of the jump.
        patch: u32,
        /// The code that leaves, which the jump goes to as long as it isn't linked.
        stub: u32,
    },
    /// A jump to another page that isn't linked.
    Link {
        /// The target, from the start of this page.
        target: i32,
        /// Number of the link.
        link: u32,
        /// The code that leaves, which the link leads to as long as it isn't set.
        stub: u32,
        /// The block that counts the site among those that lead to it, if any does. Links are set again and again, in each
        /// address space.
        noted_by: Option<NonZeroU32>,
    },
    /// A jump to a linear address that the jump cache doesn't know.
    Lookup(Undo),
    /// An event waits; the guest goes on at this place, from the start of the page.
    Event {
        /// Offset in the page.
        target: i32,
    },
    /// So many PAUSE were executed that the host may have something better to do.
    Pause {
        /// Code behind the PAUSE.
        resume: u32,
    },
    /// The block needs the vector or x87 registers loaded.
    LoadVectors,
}

/// What a jump has changed before it is known whether its target is canonical: if it isn't, it is the jump that faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undo {
    /// It doesn't fault.
    Never,
    /// JMP: nothing.
    Jump,
    /// RET: so many bytes were taken from the stack.
    Return(u32),
    /// CALL: the return address was pushed; what stood there is in the context.
    Call,
}

/// An instruction of the guest's that stands in the code as it is, and may fault there.
#[derive(Clone, Copy, Debug)]
pub struct FaultPoint {
    /// Offset in the block's code.
    pub host: u32,
    /// Offset in its page of the guest's instruction.
    pub guest: u16,
    /// The guest's flags are in the context's `block_flags`.
    pub flags_aside: bool,
}
