//! Entry from loaders that leave 32-bit protected mode: PVH (Xen, `docs/misc/pvh.pandoc`) and Multiboot2 (its specification,
//! 3.2 and 3.3). In both, paging is off, EBX holds the address of the loader's information, and there is no stack.

use core::arch::global_asm;

use bivisor_metal::boot::Protocol;

// In AT&T syntax, for the differences of symbols that stand in it: nothing is known of where this is.
global_asm!(
    r#"
    .section .boot.text, "ax"
    .balign 8
multiboot2_header:
    .long 0xe85250d6, 0, multiboot2_header_end - multiboot2_header
    .long -(0xe85250d6 + multiboot2_header_end - multiboot2_header)
    # The memory map is needed, and modules begin at pages.
    .short 1, 0
    .long 12, 6
    .balign 8
    .short 6, 0
    .long 8
    # It may be anywhere from 1 MiB to 4 GiB, at multiples of a page, the lower the better.
    .short 10, 0
    .long 24, 0x100000, 0xffffffff, 4096, 1
    .short 0, 0
    .long 8
multiboot2_header_end:

    .code32
    .global multiboot2_start, pvh_start, boot_protected
multiboot2_start:
    movl ${multiboot2}, %esi
    jmp boot_protected
pvh_start:
    movl ${pvh}, %esi

    # EBX: the loader's information; ESI: the protocol.
boot_protected:
    cli
    cld
    # A call tells where this is; its return address goes where the information begins, for a moment.
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
    movl %eax, boot_gdt_base - boot_gdt(%eax)
    lgdt boot_gdt_pointer - boot_gdt(%eax)
    leal boot_long - boot_here(%ebp), %edx
    pushl $8
    pushl %edx
    lret

    .section .data.boot, "aw"
    .global boot_gdt, boot_gdt_pointer, boot_gdt_base, boot_stack_end
    .balign 8
boot_gdt:
    # Nothing, 64-bit code, data, 32-bit code.
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
boot_gdt_pointer:
    .short 31
boot_gdt_base:
    .quad 0

    .section .bss.boot, "aw", @nobits
    .balign 4096
boot_tables:
    .fill 0x6000, 1, 0
    .fill 0x10000, 1, 0
boot_stack_end:
    .text
    .code64
    "#,
    multiboot2 = const Protocol::Multiboot2 as u32,
    pvh = const Protocol::Pvh as u32,
    options(att_syntax)
);
