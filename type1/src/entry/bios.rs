//! What a PC's BIOS starts: a boot sector, and behind it a loader that puts the image and the machines into memory and enters
//! the image by PVH. Not part of the image in memory: `bivisor metal build` takes this section out and fills in what is
//! left open here (`type2/src/metal/disk.rs`, which knows its layout).
//!
//! The boot sector is at 7C00h, the rest behind it at 7E00h, where a CD's is loaded without the boot sector. Disks are read by the
//! BIOS's extended calls (EDD-3, INT 13h functions 42h and 48h) into a buffer at 10000h and copied from there, with segments
//! of 4 GiB in real mode. The memory map is that of INT 15h, E820h (ACPI Specification, 15.1).

use core::arch::global_asm;

// An address is the distance from the section's begin, plus 7C00h: the linker knows nothing of it.
global_asm!(
    r#"
    .section .bios, ""
    .code16
bios_sector:
    cli
    xorw %ax, %ax
    movw %ax, %ss
    movw $0x7c00, %sp
    movw %ax, %ds
    sti
    movw $(bios_sector_packet - bios_sector + 0x7c00), %si
    movb $0x42, %ah
    int $0x13
    jc bios_sector_fails
    ljmp $0, $0x7e00
bios_sector_fails:
    movw $(bios_sector_words - bios_sector + 0x7c00), %si
bios_says:
1:  lodsb
    testb %al, %al
    jz 2f
    movb $0x0e, %ah
    movw $7, %bx
    int $0x10
    jmp 1b
2:  hlt
    jmp 2b
bios_sector_words:
    .asciz "bivisor: the disk can't be read by extended calls\r\n"
    .balign 4
bios_sector_packet:
    .byte 16, 0
    .short (bios_end - bios_loader + 511) / 512
    .short 0x7e00, 0
    .quad 4                             # bytes 2048 on, where a CD's sector begins
    .org bios_sector + 440
    .org bios_sector + 510
    .short 0xaa55

bios_loader:
    jmp bios_go
    .balign 4
    # Filled in when an image is made. Two pieces: first 512-byte sector, bytes, address; then what to clear.
bios_pieces:
    .long 0, 0, 0
    .long 0, 0, 0
bios_clear_start:
    .long 0
bios_clear_bytes:
    .long 0
bios_entry:
    .long 0
    # PVH's start information and its list of modules.
bios_start_info:
    .long 0x336ec578, 1, 0, 1
    .quad bios_module - bios_sector + 0x7c00
    .quad 0, 0
    .quad 0x1000                        # the memory map
bios_map_entries:
    .long 0, 0
bios_module:
    .quad 0, 0, 0, 0

bios_go:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    ljmp $0, $(bios_here - bios_sector + 0x7c00)
bios_here:
    sti
    movb %dl, (bios_drive - bios_sector + 0x7c00)

    # Sectors may have 512, 2048 or 4096 bytes.
    movw $0x600, %si
    movw $0x1e, (%si)
    movb $0x48, %ah
    int $0x13
    jc 1f
    movw 0x618, %ax
    xorb %cl, %cl
2:  cmpw $512, %ax
    jbe 3f
    shrw $1, %ax
    incb %cl
    jmp 2b
3:  movb %cl, (bios_shift - bios_sector + 0x7c00)
1:
    # A20: by the BIOS, and by the chipset's port.
    movw $0x2401, %ax
    int $0x15
    inb $0x92, %al
    testb $2, %al
    jnz 1f
    orb $2, %al
    andb $0xfe, %al
    outb %al, $0x92
1:
    # The memory map: entries of 24 bytes, of which the BIOS fills 20, as PVH wants them.
    xorl %ebx, %ebx
    movw $0x1000, %di
1:  movl $0xe820, %eax
    movl $0x534d4150, %edx
    movl $20, %ecx
    movl $0, 20(%di)
    int $0x15
    jc 2f
    cmpl $0x534d4150, %eax
    jne 2f
    incl (bios_map_entries - bios_sector + 0x7c00)
    addw $24, %di
    cmpw $0x6000, %di
    jae 2f
    testl %ebx, %ebx
    jnz 1b
2:
    movw $(bios_pieces - bios_sector + 0x7c00), %si
    call bios_load
    movw $(bios_pieces - bios_sector + 0x7c00 + 12), %si
    call bios_load

    call bios_large_segments
    movl (bios_clear_start - bios_sector + 0x7c00), %edi
    movl (bios_clear_bytes - bios_sector + 0x7c00), %ecx
    shrl $2, %ecx
    xorl %eax, %eax
    rep stosl %eax, %es:(%edi)

    movl (bios_entry - bios_sector + 0x7c00), %ebp
    lgdtl (bios_gdt_pointer - bios_sector + 0x7c00)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $(bios_protected - bios_sector + 0x7c00)

    # Loads the piece that SI describes, 32 KiB at a time.
bios_load:
    cmpl $0, 4(%si)
    je 2f
    movl (%si), %eax
    movb (bios_shift - bios_sector + 0x7c00), %cl
    movl $1, %edx
    shll %cl, %edx
    decl %edx
    andl %eax, %edx
    shll $9, %edx                       # EDX: where in the buffer the piece begins
    shrl %cl, %eax
    movl %eax, (bios_packet_sector - bios_sector + 0x7c00)
    movw $64, %ax
    shrw %cl, %ax
    movw %ax, (bios_packet_count - bios_sector + 0x7c00)
    pushl %edx
    pushw %si
    movb (bios_drive - bios_sector + 0x7c00), %dl
    movw $(bios_packet - bios_sector + 0x7c00), %si
    movb $0x42, %ah
    int $0x13
    popw %si
    popl %edx
    jc bios_fails
    call bios_large_segments
    movl $0x8000, %ecx
    subl %edx, %ecx
    cmpl 4(%si), %ecx
    jbe 1f
    movl 4(%si), %ecx
1:  movl 8(%si), %edi
    addl %ecx, 8(%si)
    subl %ecx, 4(%si)
    movl %ecx, %eax
    shrl $9, %eax
    addl %eax, (%si)
    pushw %si
    leal 0x10000(%edx), %esi
    addl $3, %ecx
    shrl $2, %ecx
    rep movsl (%esi), %es:(%edi)
    sti
    popw %si
    jmp bios_load
2:  ret

    # Gives DS and ES limits of 4 GiB, with interrupts off: the BIOS may take them back whenever it executes.
bios_large_segments:
    cli
    lgdtl (bios_gdt_pointer - bios_sector + 0x7c00)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    jmp 1f
1:  movw $0x10, %bx
    movw %bx, %ds
    movw %bx, %es
    andb $0xfe, %al
    movl %eax, %cr0
    jmp 2f
2:  xorw %bx, %bx
    movw %bx, %ds
    movw %bx, %es
    ret

bios_fails:
    movw $(bios_words - bios_sector + 0x7c00), %si
    jmp bios_says
bios_words:
    .asciz "bivisor: the disk can't be read to the end\r\n"

    .code32
bios_protected:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $(bios_start_info - bios_sector + 0x7c00), %ebx
    jmp *%ebp

    .balign 8
bios_gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
bios_gdt_pointer:
    .short 23
    .long bios_gdt - bios_sector + 0x7c00
bios_drive:
    .byte 0
bios_shift:
    .byte 0
    .balign 4
bios_packet:
    .byte 16, 0
bios_packet_count:
    .short 0
    .short 0, 0x1000
bios_packet_sector:
    .quad 0
    .balign 512
bios_end:
    .text
    .code64
    "#,
    options(att_syntax)
);
