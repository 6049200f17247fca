//! The way into a guest and back (SDM Vol. 3C, chapters 27 and 28).
#![allow(unsafe_code)]

use core::arch::naked_asm;
use core::mem::offset_of;

use bivisor_x86::registers::gpr;

use super::field::Field;
use crate::host::HOST_MXCSR;

/// What the switch works on. All addresses are valid while it runs.
#[repr(C)]
pub(super) struct Switch {
    /// The guest's general registers; RSP is in the control structure.
    pub(super) registers: *mut [u64; 16],
    /// The guest's XSAVE area.
    pub(super) xsave: *mut u8,
    /// XCR0 of the guest.
    pub(super) guest_xcr0: u64,
    /// XCR0 of the host: the components that are switched.
    pub(super) host_xcr0: u64,
    /// CR2 of the guest.
    pub(super) cr2: u64,
    /// The control structure has been launched on this processor; zero if not.
    pub(super) launched: u64,
}

/// Enters the guest, and returns when the processor has left it: zero, or that it was not entered (1, or 2 where the instruction
/// error field says why). An interrupt of the host's that has come stays pending.
///
/// # Safety
/// At privilege level 0 with interrupts disabled (RFLAGS.IF clear), in VMX root operation, CR4.OSXSAVE set and XCR0 equal to
/// `host_xcr0`. The current control structure sends all that is the host's to it, its host state but for RSP and RIP is that of
/// this processor, and its EPT maps only what the guest may access. The fields of `switch` say what they are: the XSAVE area has
/// room for the components of `host_xcr0` and is valid for XRSTOR.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn enter(switch: *mut Switch) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "mov eax, {host_rsp}",
        "vmwrite rax, rsp",
        "lea rcx, [rip + 6f]",
        "mov eax, {host_rip}",
        "vmwrite rax, rcx",
        // Vector registers, x87.
        "mov rsi, [rdi + {xsave}]",
        "mov rax, [rdi + {host_xcr0}]",
        "mov rdx, rax",
        "shr rdx, 32",
        "xrstor64 [rsi]",
        "mov r8, rax",
        "mov rax, [rdi + {guest_xcr0}]",
        "cmp rax, r8",
        "je 2f",
        "mov rdx, rax",
        "shr rdx, 32",
        "xor ecx, ecx",
        "xsetbv",
        "2:",
        "mov rax, [rdi + {cr2}]",
        "mov cr2, rax",
        // No instruction before the entry changes the flags of this.
        "cmp qword ptr [rdi + {launched}], 0",
        "mov rdi, [rdi + {registers}]",
        "mov rax, [rdi + {rax}]",
        "mov rcx, [rdi + {rcx}]",
        "mov rdx, [rdi + {rdx}]",
        "mov rbx, [rdi + {rbx}]",
        "mov rbp, [rdi + {rbp}]",
        "mov rsi, [rdi + {rsi}]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rdi, [rdi + {rdi}]",
        "jne 4f",
        "vmlaunch",
        "jmp 5f",
        "4:",
        "vmresume",
        // Not entered: the carry flag if there is no error field, else the zero flag.
        "5:",
        "mov eax, 1",
        "mov ecx, 2",
        "cmovz eax, ecx",
        "mov rdi, [rsp]",
        "jmp 7f",
        // Left: RSP is as it was written above.
        "6:",
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov rdi, [rdi + {registers}]",
        "mov [rdi + {rax}], rax",
        "mov [rdi + {rcx}], rcx",
        "mov [rdi + {rdx}], rdx",
        "mov [rdi + {rbx}], rbx",
        "mov [rdi + {rbp}], rbp",
        "mov [rdi + {rsi}], rsi",
        "mov [rdi + 64], r8",
        "mov [rdi + 72], r9",
        "mov [rdi + 80], r10",
        "mov [rdi + 88], r11",
        "mov [rdi + 96], r12",
        "mov [rdi + 104], r13",
        "mov [rdi + 112], r14",
        "mov [rdi + 120], r15",
        "pop rax",
        "mov [rdi + {rdi}], rax",
        "mov rdi, [rsp]",
        "mov rax, cr2",
        "mov [rdi + {cr2}], rax",
        "xor eax, eax",
        "7:",
        "pop rdi",
        "mov r9d, eax",
        "mov rax, [rdi + {host_xcr0}]",
        "mov rdx, rax",
        "shr rdx, 32",
        "cmp rax, [rdi + {guest_xcr0}]",
        "je 3f",
        "xor ecx, ecx",
        "xsetbv",
        "3:",
        "mov rsi, [rdi + {xsave}]",
        "xsave64 [rsi]",
        "fninit",
        "ldmxcsr [rip + {mxcsr}]",
        "mov eax, r9d",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_rsp = const Field::HostRsp as u32,
        host_rip = const Field::HostRip as u32,
        xsave = const offset_of!(Switch, xsave),
        host_xcr0 = const offset_of!(Switch, host_xcr0),
        guest_xcr0 = const offset_of!(Switch, guest_xcr0),
        cr2 = const offset_of!(Switch, cr2),
        launched = const offset_of!(Switch, launched),
        registers = const offset_of!(Switch, registers),
        rax = const 8 * gpr::RAX,
        rcx = const 8 * gpr::RCX,
        rdx = const 8 * gpr::RDX,
        rbx = const 8 * gpr::RBX,
        rbp = const 8 * gpr::RBP,
        rsi = const 8 * gpr::RSI,
        rdi = const 8 * gpr::RDI,
        mxcsr = sym HOST_MXCSR,
    )
}
