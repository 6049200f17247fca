//! The way into a guest and back (APM Vol. 2, sections 15.5 and 15.6).
#![allow(unsafe_code)]

use core::arch::naked_asm;
use core::mem::offset_of;

use bivisor_x86::registers::gpr;

use crate::host::HOST_MXCSR;

/// What the switch works on. All addresses are valid while it runs.
#[repr(C)]
pub(super) struct Switch {
    /// The guest's general registers; RAX and RSP are in the control block.
    pub(super) registers: *mut [u64; 16],
    /// The guest's XSAVE area.
    pub(super) xsave: *mut u8,
    /// XCR0 of the guest.
    pub(super) guest_xcr0: u64,
    /// XCR0 of the host: the components that are switched.
    pub(super) host_xcr0: u64,
    /// Physical address of the guest's control block.
    pub(super) guest: u64,
    /// Physical address of a page for what VMSAVE keeps of the host.
    pub(super) host: u64,
}

/// Enters the guest, and returns when the processor has left it. An interrupt of the host's that has come stays pending.
///
/// # Safety
/// At privilege level 0 with interrupts disabled (RFLAGS.IF clear), EFER.SVME and CR4.OSXSAVE set and XCR0 equal to
/// `host_xcr0`, with VM_HSAVE_PA set. The fields of `switch` say what they are: the control block intercepts VMRUN and has
/// V_INTR_MASKING, its nested tables map only what the guest may access; the XSAVE area has room for the components of
/// `host_xcr0` and is valid for XRSTOR; the host's VMCB page belongs to this guest alone.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn enter(switch: *mut Switch) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
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
        // From here to STGI nothing interrupts: the host's task register is not its own.
        "clgi",
        "mov rax, [rdi + {host}]",
        "vmsave rax",
        "mov rax, [rdi + {guest}]",
        "vmload rax",
        "mov rdi, [rdi + {registers}]",
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
        // With V_INTR_MASKING it is the host's IF that lets an interrupt end the run.
        "sti",
        "vmrun rax",
        "cli",
        "vmsave rax",
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov rdi, [rdi + {registers}]",
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
        "pop rdi",
        "mov rax, [rdi + {host}]",
        "vmload rax",
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
        "stgi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        xsave = const offset_of!(Switch, xsave),
        host_xcr0 = const offset_of!(Switch, host_xcr0),
        guest_xcr0 = const offset_of!(Switch, guest_xcr0),
        host = const offset_of!(Switch, host),
        guest = const offset_of!(Switch, guest),
        registers = const offset_of!(Switch, registers),
        rcx = const 8 * gpr::RCX,
        rdx = const 8 * gpr::RDX,
        rbx = const 8 * gpr::RBX,
        rbp = const 8 * gpr::RBP,
        rsi = const 8 * gpr::RSI,
        rdi = const 8 * gpr::RDI,
        mxcsr = sym HOST_MXCSR,
    )
}
