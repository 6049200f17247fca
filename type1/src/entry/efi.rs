//! Entry as a UEFI application (UEFI Specification, 2.3.4): 64-bit mode, RCX is the image's handle, RDX the system table. The
//! way on is that of the other loaders, from 32-bit mode: so nothing of the firmware's paging is left.

use core::arch::global_asm;

use bivisor_metal::boot::{Protocol, efi};

global_asm!(
    r#"
    .section .boot.text, "ax"
    .code64
    .global efi_start
efi_start:
    push rsi
    push rdi
    sub rsp, 40                         # what the convention keeps for the called one, and alignment
    call boot_relocate
    call {main}
    mov ecx, eax
    shr rax, 32
    jnz efi_failed
    # Boot services have ended. ECX: the information.
    cli
    mov ebx, ecx
    lea rax, [rip + boot_gdt]
    mov [rip + boot_gdt_base], rax
    lgdt [rip + boot_gdt_pointer]
    push 0x18
    lea rax, [rip + efi_protected]
    push rax
    retfq
efi_failed:
    mov eax, 1                          # EFI_LOAD_ERROR
    bts rax, 63
    add rsp, 40
    pop rdi
    pop rsi
    ret

    .code32
efi_protected:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080                 # EFER without LME
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    mov esi, {efi}
    jmp boot_protected
    .text
    .code64
    "#,
    main = sym efi::main,
    efi = const Protocol::Efi as u32,
);
