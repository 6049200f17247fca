//! The interrupt table: every vector is recorded, and a guest says what happens then: a handler runs, or the
//! code under test is given up and [`catch`] returns what ended it. A trap that nobody expects ends the guest.
//!
//! Every gate switches to a stack of its own (IST), because precompiled `core` uses the red zone.
use crate::{Global, cpu, machine, println, segments};
use core::arch::{asm, global_asm};

/// Vectors of the exceptions (Intel SDM volume 3, table 6-1).
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// IST numbers of the gates.
pub mod ist {
    #![allow(missing_docs)]
    pub const EXCEPTION: u8 = 1;
    pub const INTERRUPT: u8 = 2;
    pub const NMI: u8 = 3;
    pub const DOUBLE_FAULT: u8 = 4;
    pub const MACHINE_CHECK: u8 = 5;
    /// Free for a test.
    pub const SPARE: u8 = 6;
    /// Free for a test, too.
    pub const SPARE2: u8 = 7;
}

/// What the entry code saved and the CPU pushed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// CR0 before the entry code allowed itself to save the FPU state.
    pub cr0: u64,
    /// R15 down to RAX, in the order in which PUSH left them.
    pub registers: [u64; 15],
    /// Interrupt vector.
    pub vector: u64,
    /// Error code, or 0 where the vector has none.
    pub error: u64,
    /// Interrupted instruction pointer.
    pub rip: u64,
    /// Interrupted code segment.
    pub cs: u64,
    /// Interrupted flags.
    pub rflags: u64,
    /// Interrupted stack pointer.
    pub rsp: u64,
    /// Interrupted stack segment.
    pub ss: u64,
}

/// A caught trap.
#[derive(Clone, Copy)]
pub struct Trap {
    /// Interrupt vector.
    pub vector: u8,
    /// Error code, or 0 where the vector has none.
    pub error: u64,
    /// CR2 at the time of the trap.
    pub cr2: u64,
    /// DR6 at the time of the trap.
    pub dr6: u64,
    /// What the CPU pushed.
    pub frame: Frame,
    /// Stack pointer of the handler just above the pushed words: which stack the CPU took.
    pub stack: u64,
    /// Where the pushed RIP points: "at" the marked instruction, "after" it, or "elsewhere"; see [`crate::trapping!`].
    pub place: &'static str,
    /// RFLAGS in the handler (DF aside, which the entry code clears).
    pub inside: u64,
}

impl core::fmt::Debug for Trap {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Frame { rip, cs, rflags, rsp, ss, .. } = self.frame;
        write!(
            f,
            "vector {} error {:#x} rip {rip:#x} ({}) cs {cs:#x} ",
            self.vector, self.error, self.place
        )?;
        write!(f, "rflags {rflags:#x} rsp {rsp:#x} ss {ss:#x} cr2 {:#x} dr6 {:#x}", self.cr2, self.dr6)
    }
}

global_asm!(
    r#"
    .section .text
    .balign 16
    .global trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    pushq $0
    .endif
    pushq $vector
    jmp trap_entry
    .set vector, vector + 1
    .endr

trap_entry:
    cld
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %cr0, %rax
    pushq %rax
    andq $-13, %rax                     # EM and TS off, so that the FPU state can be saved
    movq %rax, %cr0
    movq %rsp, %rdi
    movq %rsp, %rbp
    subq $512, %rsp
    andq $-16, %rsp
    fxsave64 (%rsp)
    call {trap}
    fxrstor64 (%rsp)
    movq %rbp, %rsp
    popq %rax
    movq %rax, %cr0
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rbp
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

    # extern "C" fn call_protected(function(argument), argument) -> 1 if a trap ended it
    .global call_protected
call_protected:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq {resume_stack}
    movq %rsp, {resume_stack}
    movq %rdi, %rax
    movq %rsi, %rdi
    call *%rax
    xorl %eax, %eax
2:  popq {resume_stack}
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
    .global resume_protected
resume_protected:
    movl $1, %eax
    jmp 2b
    "#,
    trap = sym trap,
    resume_stack = sym RESUME_STACK,
    options(att_syntax)
);

unsafe extern "C" {
    fn call_protected(function: extern "C" fn(*mut u8), argument: *mut u8) -> u64;
    fn resume_protected();
    static trap_stubs: [[u8; 16]; 256];
}

/// A gate of the interrupt table (Intel SDM volume 3, figure 6-8).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Gate {
    /// Low half of the descriptor.
    pub low: u64,
    /// Upper half of the target address.
    pub high: u64,
}

/// The interrupt table.
pub static IDT: Global<[Gate; 256]> = Global::new([Gate { low: 0, high: 0 }; 256]);

/// A handler; it may change what is resumed.
pub type Handler = fn(&mut Frame);

static HANDLERS: Global<[Option<Handler>; 256]> = Global::new([None; 256]);
static RESUME_STACK: Global<u64> = Global::new(0);
static CAUGHT: Global<Option<Trap>> = Global::new(None);
static COUNTS: Global<[u32; 256]> = Global::new([0; 256]);

/// Address of the instruction under test; see [`crate::trapping!`].
pub static MARK_AT: Global<u64> = Global::new(0);
/// Address of the instruction after the one under test.
pub static MARK_AFTER: Global<u64> = Global::new(0);

/// Access byte of a present interrupt gate for ring 0.
pub const INTERRUPT_GATE: u8 = 0x8e;
/// Access byte of a present trap gate for ring 0.
pub const TRAP_GATE: u8 = 0x8f;
/// Access byte of a present interrupt gate that ring 3 may call.
pub const USER_GATE: u8 = 0xee;

/// Writes a gate that leads to this module's entry code.
pub fn set_gate(vector: u8, access: u8, ist: u8, selector: u16) {
    // SAFETY: only the address of the stub is taken.
    let target = unsafe { &raw const trap_stubs[usize::from(vector)] } as u64;
    let low = target & 0xffff
        | u64::from(selector) << 16
        | u64::from(ist) << 32
        | u64::from(access) << 40
        | (target >> 16 & 0xffff) << 48;
    set_raw_gate(vector, Gate { low, high: target >> 32 });
}

/// Writes a gate as given.
pub fn set_raw_gate(vector: u8, gate: Gate) {
    IDT.set_at(vector.into(), gate);
}

/// Restores the gate that [`load`] made for this vector.
pub fn reset_gate(vector: u8) {
    let ist = match vector {
        vector::NMI => ist::NMI,
        vector::DF => ist::DOUBLE_FAULT,
        vector::MC => ist::MACHINE_CHECK,
        0..32 => ist::EXCEPTION,
        _ => ist::INTERRUPT,
    };
    // Software interrupts from ring 3 are open where a test leaves ring 3 by them.
    let access = if vector == LEAVE_USER { USER_GATE } else { INTERRUPT_GATE };
    set_gate(vector, access, ist, segments::CODE);
}

/// The software interrupt by which code in ring 3 comes back to [`catch`].
pub const LEAVE_USER: u8 = 0x80;

/// Fills and loads the interrupt table.
pub(crate) fn load() {
    for vector in 0..=255 {
        reset_gate(vector);
    }
    load_table();
}

/// Loads the interrupt table register with this module's table.
pub fn load_table() {
    segments::lidt(4095, IDT.address());
}

/// Sets or clears the handler of a vector.
pub fn handle(vector: u8, handler: Option<Handler>) {
    HANDLERS.set_at(vector.into(), handler);
}

/// How often a vector's handler has run since [`reset_count`].
pub fn count(vector: u8) -> u32 {
    COUNTS.at(vector.into())
}

/// Sets the count of a vector back to 0.
pub fn reset_count(vector: u8) {
    COUNTS.set_at(vector.into(), 0);
}

/// Runs `body` and returns the trap that ended it, if one did. Calls nest.
///
/// A trap from ring 3, or with a handler's stack in use, comes back here as well: segments, flags and CR0's
/// FPU bits are the kernel's again. Nothing in `body` may own what needs dropping.
pub fn catch<F: FnMut()>(mut body: F) -> Option<Trap> {
    extern "C" fn run<F: FnMut()>(argument: *mut u8) {
        // SAFETY: `argument` is the `body` of the call below, which is alive and used by nobody else.
        unsafe { (*argument.cast::<F>())() }
    }
    // SAFETY: the function fits the argument; on a trap the entry code returns here with the registers that
    // the C calling convention preserves, as if `run` had returned.
    let trapped = unsafe { call_protected(run::<F>, (&raw mut body).cast()) };
    if trapped == 1 { CAUGHT.get() } else { None }
}

extern "C" fn trap(frame: &mut Frame) {
    let vector = frame.vector as u8;
    let index = usize::from(vector);
    let cr2 = cpu::read_cr2();
    if let Some(handler) = HANDLERS.at(index) {
        COUNTS.set_at(index, COUNTS.at(index).wrapping_add(1));
        return handler(frame);
    }
    let stack = (&raw const *frame) as u64 + size_of::<Frame>() as u64;
    let inside = cpu::rflags();
    let place = match frame.rip {
        rip if rip == MARK_AT.get() => "at",
        rip if rip == MARK_AFTER.get() => "after",
        _ => "elsewhere",
    };
    let trap =
        Trap { vector, error: frame.error, cr2, dr6: cpu::read_dr6(), frame: *frame, stack, place, inside };
    if RESUME_STACK.get() == 0 {
        println!("unexpected trap: {trap:?}");
        machine::end(false);
    }
    CAUGHT.set(Some(trap));
    // SAFETY: the selector is the kernel's own data segment.
    unsafe { asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(segments::DATA), options(nostack)) };
    frame.rip = resume_protected as *const () as u64;
    frame.cs = segments::CODE.into();
    frame.ss = segments::DATA.into();
    frame.rsp = RESUME_STACK.get();
    frame.rflags = 2;
    frame.cr0 &= !(cpu::cr0::EM | cpu::cr0::TS);
}

/// Runs one instruction in 32-bit compatibility mode, ring 0, under [`catch`] and marked as by [`trapping!`].
#[macro_export]
macro_rules! compat {
    ($($setup:literal,)* => $instruction:literal $(; $($operands:tt)*)?) => {
        $crate::catch(|| {
            // SAFETY: as in `trapping!`; the code returns to 64-bit mode if nothing traps, and the stack lies
            // below 4 GiB.
            unsafe {
                core::arch::asm!(
                    "lea rax, [rip + 2f]",
                    "mov [{mark_at}], rax",
                    "lea rax, [rip + 3f]",
                    "mov [{mark_after}], rax",
                    "push {code32}",
                    "lea rax, [rip + 4f]",
                    "push rax",
                    "retfq",
                    ".code32",
                    "4:",
                    $($setup,)*
                    concat!("2: ", $instruction),
                    "3:",
                    ".byte 0xea",
                    ".long 5f",
                    ".short 8",
                    ".code64",
                    "5:",
                    $($($operands)*,)?
                    code32 = const $crate::segments::CODE32,
                    mark_at = sym $crate::trap::MARK_AT,
                    mark_after = sym $crate::trap::MARK_AFTER,
                    out("rax") _,
                )
            }
        })
    };
}

/// Runs the last of the given instructions under [`catch`], marked so that [`Trap::place`] tells whether the
/// pushed RIP points at it or behind it. Operands follow after a semicolon, as in `asm!`.
#[macro_export]
macro_rules! trapping {
    ($($setup:literal,)* => $instruction:literal $(; $($operands:tt)*)?) => {
        $crate::catch(|| {
            // SAFETY: a trap ends in `catch`, which keeps the calling convention's promises; what the
            // instructions write is named by the operands or belongs to the test.
            #[allow(unused_unsafe)]
            unsafe {
                core::arch::asm!(
                    "lea rax, [rip + 2f]",
                    "mov [{mark_at}], rax",
                    "lea rax, [rip + 3f]",
                    "mov [{mark_after}], rax",
                    $($setup,)*
                    concat!("2: ", $instruction),
                    "3:",
                    $($($operands)*,)?
                    mark_at = sym $crate::trap::MARK_AT,
                    mark_after = sym $crate::trap::MARK_AFTER,
                    out("rax") _,
                )
            }
        })
    };
}
