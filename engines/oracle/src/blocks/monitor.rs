//! The supervisor of the guest: it enters each run from the mailbox, takes its exception, and puts the state into the
//! mailbox. After that it says so by a port, upon which the host refills the mailbox.
#![allow(unsafe_code)]

use std::ptr::addr_of;

use bivisor_x86::state::PAT_RESET;

use crate::layout::{FS_BASE, GS_BASE, PAGE, USER_SS};
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

/// Linear address of the page table that has the entries of code and data pages.
pub const PAGE_TABLE: u64 = SYSTEM_PAGE + 16 * PAGE;

/// Offsets in the mailbox: a run is there (4 bytes).
pub const READY: u64 = 0;
/// The code pages were exchanged (4 bytes).
pub const EXCHANGED: u64 = 4;
/// System registers are loaded before and stored after (4 bytes).
pub const PRIVILEGED: u64 = 8;
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
/// System registers before: CR0, CR4, LSTAR.
pub const SYSTEM: u64 = 0x900;
/// System registers after, as [`SYSTEM_NAMES`] lists them.
pub const SYSTEM_AFTER: u64 = 0x940;

/// Names of the system registers that are stored, 8 bytes each.
pub const SYSTEM_NAMES: [&str; 32] = [
    "cr0",
    "cr4",
    "cr3",
    "cr2",
    "cr8",
    "xcr0",
    "efer",
    "star",
    "lstar",
    "sfmask",
    "fs base",
    "gs base",
    "kernel gs base",
    "tsc aux",
    "pat",
    "ds",
    "es",
    "fs",
    "gs",
    "tr",
    "ldtr",
    "gdt limit",
    "gdt base",
    "idt limit",
    "idt base",
    "dr0",
    "dr1",
    "dr2",
    "dr3",
    "dr6",
    "dr7",
    "cs and ss",
];

/// CR0 and CR4 of the supervisor.
pub const CR0: u64 = 0x8005_0033;
/// See [`CR0`].
pub const CR4: u64 = 0x0005_06a0;
/// STAR, so that SYSRET loads the selectors that Linux gives programs.
pub const STAR: u64 = 0x0023_0010 << 32;
/// SFMASK: TF, IF, DF and AC.
pub const SFMASK: u64 = 0x4_0700;
/// EFER: SCE, LME, LMA, NXE.
pub const EFER: u64 = 0xd01;

/// Instructions that the supervisor executes for each run: what a count of steps has too many.
pub const INSTRUCTIONS: u64 = 72;
/// Further ones for privileged runs.
pub const PRIVILEGED_INSTRUCTIONS: u64 = 152;

std::arch::global_asm!(
    ".pushsection .rodata.bivisor_oracle_monitor, \"a\", @progbits",
    ".balign 16",
    ".macro load_msr number, place",
    "mov ecx, \\number",
    "mov eax, [rbx + \\place]",
    "mov edx, [rbx + \\place + 4]",
    "wrmsr",
    ".endm",
    ".macro store_msr number, place, value",
    "mov ecx, \\number",
    "rdmsr",
    "mov [rbx + {system_after} + \\place], eax",
    "mov [rbx + {system_after} + \\place + 4], edx",
    "movabs rax, \\value",
    "mov rdx, rax",
    "shr rdx, 32",
    "wrmsr",
    ".endm",
    ".macro store_control register, place, value",
    "mov rax, \\register",
    "mov [rbx + {system_after} + \\place], rax",
    "mov eax, \\value",
    "mov \\register, rax",
    ".endm",
    ".macro store_segment register, place, value",
    "mov eax, \\register",
    "mov [rbx + {system_after} + \\place], rax",
    "mov eax, \\value",
    "mov \\register, eax",
    ".endm",
    ".macro store_debug register, place",
    "mov rax, \\register",
    "mov [rbx + {system_after} + \\place], rax",
    "xor eax, eax",
    "mov \\register, rax",
    ".endm",
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
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "cmp dword ptr [rbx + {privileged}], 0",
    "je 13f",
    "load_msr 0xc0000082, {system} + 16",
    "mov rax, [rbx + {system}]",
    "mov cr0, rax",
    "mov rax, [rbx + {system} + 8]",
    "mov cr4, rax",
    "13:",
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
    "xor eax, eax",
    "mov cr2, rax",
    "cmp dword ptr [rbx + {privileged}], 0",
    "jne 30f",
    "21:",
    "mov eax, 7",
    "xor edx, edx",
    "xsave64 [rbx + {vectors_after}]",
    "jmp 10b",
    // System registers: stored, and brought back to what the supervisor wants. DR7 first: nothing may trap here.
    "30:",
    "mov rax, dr7",
    "mov [rbx + {system_after} + 240], rax",
    "mov eax, 0x400",
    "mov dr7, rax",
    "store_control cr0, 0, {cr0}",
    "store_control cr4, 8, {cr4}",
    "mov rax, cr3",
    "mov [rbx + {system_after} + 16], rax",
    "mov rax, [rbx + {exception} + 56]",
    "mov [rbx + {system_after} + 24], rax",
    "store_control cr8, 32, 0",
    "xor ecx, ecx",
    "xgetbv",
    "mov [rbx + {system_after} + 40], rax",
    "mov eax, 7",
    "xsetbv",
    "store_msr 0xc0000080, 48, {efer}",
    "store_msr 0xc0000081, 56, {star}",
    "store_msr 0xc0000082, 64, 0",
    "store_msr 0xc0000084, 72, {sfmask}",
    "store_segment ds, 120, {data}",
    "store_segment es, 128, {data}",
    "store_segment fs, 136, 0",
    "store_segment gs, 144, 0",
    "store_msr 0xc0000100, 80, {fs_base}",
    "store_msr 0xc0000101, 88, {gs_base}",
    "store_msr 0xc0000102, 96, 0",
    "store_msr 0xc0000103, 104, 0",
    "store_msr 0x277, 112, {pat}",
    "str [rbx + {system_after} + 152]",
    "sldt [rbx + {system_after} + 160]",
    "sgdt [rbx + {system_after} + 174]",
    "sidt [rbx + {system_after} + 190]",
    "store_debug dr0, 200",
    "store_debug dr1, 208",
    "store_debug dr2, 216",
    "store_debug dr3, 224",
    "mov rax, dr6",
    "mov [rbx + {system_after} + 232], rax",
    "mov eax, 0xffff0ff0",
    "mov dr6, rax",
    "mov rax, [rbx + {exception} + 24]",
    "mov [rbx + {system_after} + 248], ax",
    "mov rax, [rbx + {exception} + 48]",
    "mov [rbx + {system_after} + 250], ax",
    "jmp 21b",
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
    privileged = const PRIVILEGED,
    system = const SYSTEM,
    system_after = const SYSTEM_AFTER,
    cr0 = const CR0,
    cr4 = const CR4,
    efer = const EFER,
    star = const STAR,
    sfmask = const SFMASK,
    fs_base = const FS_BASE,
    gs_base = const GS_BASE,
    pat = const PAT_RESET,
    data = const USER_SS,
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
