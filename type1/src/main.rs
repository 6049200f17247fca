//! The image: the way from a boot loader to [`bivisor_metal::run`], and what Rust code needs on the bare machine.
//!
//! Entry state of PVH: 32-bit protected mode, paging off, EBX holds the address of `hvm_start_info`, no stack (Xen,
//! `docs/misc/pvh.pandoc`).
#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::arch::global_asm;
use core::panic::PanicInfo;

use bivisor_metal::memory::heap::Heap;

#[global_allocator]
static HEAP: Heap = Heap::new();

// In AT&T syntax, for the differences of symbols that stand in it: nothing is known of where this is.
global_asm!(
    r#"
    .section .boot.text, "ax"
    .code32
    .global pvh_start
pvh_start:
    cli
    cld
    # A call tells where this is; its return address goes where the loader's magic number is, for a moment.
    movl (%ebx), %edi
    leal 4(%ebx), %esp
    call boot_here
boot_here:
    popl %ebp
    movl %edi, (%ebx)
    leal boot_stack_end - boot_here(%ebp), %esp

    # Maps 4 GiB, virtual = physical, in pages of 2 MiB.
    leal boot_tables - boot_here(%ebp), %edi
    leal 0x1003(%edi), %eax
    movl %eax, (%edi)
    leal 0x1000(%edi), %edx
    movl $4, %ecx
boot_pointers:
    addl $0x1000, %eax
    movl %eax, (%edx)
    addl $8, %edx
    loop boot_pointers
    leal 0x2000(%edi), %edx
    movl $0x83, %eax
    movl $2048, %ecx
boot_pages:
    movl %eax, (%edx)
    addl $8, %edx
    addl $0x200000, %eax
    loop boot_pages

    movl $0x620, %eax                   # PAE, OSFXSR, OSXMMEXCPT: precompiled code uses SSE
    movl %eax, %cr4
    movl %edi, %cr3
    movl $0xc0000080, %ecx              # EFER: LME, NXE
    rdmsr
    orl $0x900, %eax
    wrmsr
    movl $0x80010033, %eax              # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    leal boot_gdt - boot_here(%ebp), %eax
    movl %eax, 26(%eax)
    lgdt 24(%eax)
    leal boot_long - boot_here(%ebp), %edx
    pushl $8
    pushl %edx
    lret
    .code64
    "#,
    options(att_syntax)
);

global_asm!(
    r#"
    .section .boot.text, "ax"
    .code64
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

    # R_X86_64_RELATIVE, the only kind there is.
    lea rdi, [rip + image_start]
    sub rdi, 0x200000
    lea rsi, [rip + rela_start]
    lea rdx, [rip + rela_end]
boot_relocate:
    cmp rsi, rdx
    jae boot_relocated
    mov rax, [rsi]
    mov rcx, [rsi + 16]
    add rcx, rdi
    mov [rdi + rax], rcx
    add rsi, 24
    jmp boot_relocate
boot_relocated:
    mov edi, ebx
    call {start}
    ud2

    .section .data.boot, "aw"
    .balign 8
boot_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
    .short 23                           # the table's limit, and room for its address
    .quad 0

    .section .bss.boot, "aw", @nobits
    .balign 4096
boot_tables:
    .fill 0x6000, 1, 0
    .fill 0x10000, 1, 0
boot_stack_end:

    .section .text.memory, "ax"
    .global memcpy, memmove, memset, memcmp, bcmp
memcpy:
    mov rax, rdi
memcpy_up:
    mov rcx, rdx
    shr rcx, 3
    rep movsq
    mov ecx, edx
    and ecx, 7
    rep movsb
    ret
memmove:
    mov rax, rdi
    mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    jae memcpy_up
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    mov rcx, rdx
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    movzx eax, sil
    mov rcx, 0x0101010101010101
    imul rax, rcx
    mov rcx, rdx
    shr rcx, 3
    rep stosq
    mov ecx, edx
    and ecx, 7
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    xor ecx, ecx
memcmp_next:
    cmp rcx, rdx
    je memcmp_end
    movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    inc rcx
    sub eax, r8d
    je memcmp_next
memcmp_end:
    ret
    "#,
    start = sym start,
);

unsafe extern "C" {
    static image_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
}

extern "C" fn start(start_info: u64) -> ! {
    let address = |symbol: *const u8| symbol as u64;
    let image = bivisor_metal::memory::Image {
        start: address(&raw const image_start),
        text_end: address(&raw const text_end),
        rodata_end: address(&raw const rodata_end),
        end: address(&raw const image_end),
    };
    // SAFETY: the loader's entry code above comes here once, with the address that the loader left, on a processor that
    // nobody else uses, with 4 GiB mapped as they are and interrupts off. The image's bounds are the linker's.
    unsafe { bivisor_metal::run(start_info, &image, &HEAP) }
}

/// Precompiled `core` names it in its unwind tables; with panic = "abort" nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Precompiled `alloc` calls it behind landing pads, which with panic = "abort" nothing reaches.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    unreachable!("nothing unwinds")
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    bivisor_metal::ending::panic(info)
}
