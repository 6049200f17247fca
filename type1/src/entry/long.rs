//! The way on in 64-bit mode, which all entries take: relocation, then Rust.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .boot.text, "ax"
    .global boot_long, boot_relocate
    # EBX: the loader's information; ESI: the protocol.
boot_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [rip + boot_stack_end]
    xor ebp, ebp
    mov r12d, esi
    call boot_relocate
    mov edi, ebx
    mov esi, r12d
    call {start}
    ud2

    # Applies R_X86_64_RELATIVE, the only kind there is; again, if that was done already, which changes nothing.
boot_relocate:
    lea rdi, [rip + image_start]
    sub rdi, 0x200000
    lea rsi, [rip + rela_start]
    lea r8, [rip + rela_end]
boot_relocate_next:
    cmp rsi, r8
    jae boot_relocated
    mov rax, [rsi]
    mov r9, [rsi + 16]
    add r9, rdi
    mov [rdi + rax], r9
    add rsi, 24
    jmp boot_relocate_next
boot_relocated:
    ret
    .text
    "#,
    start = sym crate::start,
);
