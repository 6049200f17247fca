//! The supervisor of the guest: it enters each run from the mailbox, takes its exception, and puts the state into the
//! mailbox. After that it says so by a port, upon which the host refills the mailbox.
#![allow(unsafe_code)]

use std::ptr::addr_of;

use crate::layout::PAGE;
use crate::system::{SYSTEM_PAGE, WITH_ERROR_CODE};

/// Linear address of the supervisor's code; handlers of exceptions come first, 16 bytes each.
pub const MONITOR: u64 = SYSTEM_PAGE + PAGE;
/// Where it starts.
pub const START: u64 = MONITOR + 0x220;
/// Linear address behind its stack.
pub const STACK_END: u64 = SYSTEM_PAGE + 3 * PAGE;
/// Linear address of the mailbox.
pub const MAILBOX: u64 = SYSTEM_PAGE + 4 * PAGE;
/// The port.
pub const PORT: u16 = 0x5e;

/// Offsets in the mailbox: a run is there (4 bytes).
pub const READY: u64 = 0;
/// The code pages were exchanged (4 bytes).
pub const EXCHANGED: u64 = 4;
/// Frame for IRETQ: RIP, CS, RFLAGS, RSP, SS.
pub const FRAME: u64 = 0x10;
/// General registers before, in encoding order.
pub const REGISTERS: u64 = 0x80;
/// General registers after.
pub const REGISTERS_AFTER: u64 = 0x100;
/// Vector, error code, RIP, CS, RFLAGS, RSP, SS, CR2.
pub const EXCEPTION: u64 = 0x180;
/// Vector state before.
pub const VECTORS: u64 = 0x200;
/// Vector state after.
pub const VECTORS_AFTER: u64 = 0x580;

/// Instructions that the supervisor executes for each run: what a count of steps has too many.
pub const INSTRUCTIONS: u64 = 63;

std::arch::global_asm!(
    ".pushsection .rodata.bivisor_oracle_monitor, \"a\", @progbits",
    ".balign 16",
    ".globl bivisor_oracle_monitor",
    ".globl bivisor_oracle_monitor_end",
    "bivisor_oracle_monitor:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    ".if ((({with_error}) >> vector) & 1) == 0",
    "push 0",
    ".endif",
    "push vector",
    "jmp 20f",
    ".set vector, vector + 1",
    ".endr",
    // The interrupt: it changes some state, and changes it back.
    ".org bivisor_oracle_monitor + 0x200",
    "push rax",
    "push r12",
    "xor eax, eax",
    "lea r12, [rsp + 8]",
    "pop r12",
    "pop rax",
    "iretq",
    ".org bivisor_oracle_monitor + 0x220",
    // The next run.
    "10:",
    "movabs rsp, {stack}",
    "movabs rbx, {mailbox}",
    "mov edx, {port}",
    "out dx, al",
    "11:",
    "pause",
    "cmp dword ptr [rbx + {ready}], 0",
    "je 11b",
    "cmp dword ptr [rbx + {exchanged}], 0",
    "je 12f",
    "mov rax, cr3",
    "mov cr3, rax",
    "12:",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [rbx + {vectors}]",
    "lea rsp, [rbx + {frame}]",
    "mov rax, [rbx + {registers}]",
    "mov rcx, [rbx + {registers} + 8]",
    "mov rdx, [rbx + {registers} + 16]",
    "mov rbp, [rbx + {registers} + 40]",
    "mov rsi, [rbx + {registers} + 48]",
    "mov rdi, [rbx + {registers} + 56]",
    "mov r8, [rbx + {registers} + 64]",
    "mov r9, [rbx + {registers} + 72]",
    "mov r10, [rbx + {registers} + 80]",
    "mov r11, [rbx + {registers} + 88]",
    "mov r12, [rbx + {registers} + 96]",
    "mov r13, [rbx + {registers} + 104]",
    "mov r14, [rbx + {registers} + 112]",
    "mov r15, [rbx + {registers} + 120]",
    "mov rbx, [rbx + {registers} + 24]",
    "iretq",
    // Its exception.
    "20:",
    "push rbx",
    "movabs rbx, {mailbox}",
    "mov [rbx + {after}], rax",
    "mov [rbx + {after} + 8], rcx",
    "mov [rbx + {after} + 16], rdx",
    "pop rax",
    "mov [rbx + {after} + 24], rax",
    "mov [rbx + {after} + 40], rbp",
    "mov [rbx + {after} + 48], rsi",
    "mov [rbx + {after} + 56], rdi",
    "mov [rbx + {after} + 64], r8",
    "mov [rbx + {after} + 72], r9",
    "mov [rbx + {after} + 80], r10",
    "mov [rbx + {after} + 88], r11",
    "mov [rbx + {after} + 96], r12",
    "mov [rbx + {after} + 104], r13",
    "mov [rbx + {after} + 112], r14",
    "mov [rbx + {after} + 120], r15",
    "pop qword ptr [rbx + {exception}]",
    "pop qword ptr [rbx + {exception} + 8]",
    "pop qword ptr [rbx + {exception} + 16]",
    "pop qword ptr [rbx + {exception} + 24]",
    "pop qword ptr [rbx + {exception} + 32]",
    "pop qword ptr [rbx + {exception} + 40]",
    "pop qword ptr [rbx + {exception} + 48]",
    "mov rax, cr2",
    "mov [rbx + {exception} + 56], rax",
    "mov eax, 7",
    "xor edx, edx",
    "xsave64 [rbx + {vectors_after}]",
    "jmp 10b",
    "bivisor_oracle_monitor_end:",
    ".popsection",
    with_error = const WITH_ERROR_CODE,
    stack = const STACK_END,
    mailbox = const MAILBOX,
    port = const PORT,
    ready = const READY,
    exchanged = const EXCHANGED,
    vectors = const VECTORS,
    frame = const FRAME,
    registers = const REGISTERS,
    after = const REGISTERS_AFTER,
    exception = const EXCEPTION,
    vectors_after = const VECTORS_AFTER,
);

unsafe extern "C" {
    static bivisor_oracle_monitor: u8;
    static bivisor_oracle_monitor_end: u8;
}

/// The supervisor's code.
pub fn code() -> &'static [u8] {
    // SAFETY: the two symbols are the ends of the bytes above, which nobody changes.
    unsafe {
        let (start, end) = (addr_of!(bivisor_oracle_monitor), addr_of!(bivisor_oracle_monitor_end));
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}
