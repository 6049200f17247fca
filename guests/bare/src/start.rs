//! The way from the PVH entry (32-bit protected mode, paging off) to Rust in long mode, and what precompiled
//! `core` expects to find there: SSE switched on, `memcpy` and its kin.
//!
//! Entry state: the PVH boot ABI (Xen `docs/misc/pvh.pandoc`); EBX holds the address of `hvm_start_info`.
use crate::{Global, cpu, machine, segments, serial, trap};
use core::arch::global_asm;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                      # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start32

    .section .text.start, "ax"
    .code32
    .global start32
start32:
    cli
    cld
    mov esp, offset boot_stack_end
    mov [{start_info}], ebx
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER: SCE, LME, NXE
    rdmsr
    or eax, 0x901
    wrmsr
    mov eax, 0x80010033                 # PG, WP, NE, ET, MP, PE
    mov cr0, eax
    lgdt [boot_gdtr]
    mov eax, 8                          # an immediate operand of PUSH would be taken as 16 bits
    push eax
    mov eax, offset start64
    push eax
    retf
    .code64
start64:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [rip + boot_stack_end]
    xor ebp, ebp
    call {rust_start}
    ud2

    .section .rodata
    .balign 8
boot_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
boot_gdtr:
    .short 23
    .quad boot_gdt

    .section .data
    .balign 4096
    .global boot_pml4
boot_pml4:
    .quad boot_pdpt + 3
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 3, boot_pd + 0x1003, boot_pd + 0x2003, boot_pd + 0x3003
    .fill 508, 8, 0
boot_pd:
    .set address, 0
    .rept 2048
    .quad address + 0x83
    .set address, address + 0x200000
    .endr

    .section .bss
    .balign 4096
    .fill 0x20000, 1, 0
boot_stack_end:

    .section .text
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
memmove:
    mov rax, rdi
    mov rcx, rdx
    mov r8, rdi
    sub r8, rsi
    cmp r8, rdx
    jb 2f
    rep movsb
    ret
2:  lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    xor ecx, ecx
3:  cmp rcx, rdx
    je 4f
    movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    inc rcx
    sub eax, r8d
    je 3b
4:  ret
    .global memcpy, memmove, memset, memcmp, bcmp
    "#,
    start_info = sym START_INFO,
    rust_start = sym rust_start,
);

/// Physical address of the `hvm_start_info` structure that the loader left for us.
pub static START_INFO: Global<u32> = Global::new(0);

unsafe extern "Rust" {
    /// The guest's own program, written by every binary with `#[unsafe(no_mangle)]`.
    safe fn guest_main() -> !;
}

extern "C" fn rust_start() -> ! {
    serial::init();
    mask_pic();
    segments::load();
    trap::load();
    cpu::enable_xsave();
    guest_main()
}

/// Masks both interrupt controllers, which firmware may have left open: their vectors are the exceptions'.
fn mask_pic() {
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
}

/// Precompiled `core` names it in its unwind tables; with panic = "abort" nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    crate::println!("panic: {info}");
    machine::end(false)
}
