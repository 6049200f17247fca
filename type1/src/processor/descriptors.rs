//! Segments, the task state with its stacks, and the interrupt table (SDM Vol. 3A, chapters 6 and 8).
//!
//! An interrupt of the host's only acknowledges itself: what it stands for is looked at by whoever let it in. So no handler runs
//! Rust code, and no vector register has to be saved. An exception is the hypervisor's end.
#![allow(unsafe_code)]

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::AtomicU64;

use crate::ending;

/// Vector of the local APIC's timer.
pub(super) const TIMER_VECTOR: u8 = 0x20;
/// Vector of the local APIC's spurious interrupts, which are not acknowledged.
pub(super) const SPURIOUS_VECTOR: u8 = 0xff;

const CODE: u16 = 0x08;
const TASK: u16 = 0x18;
const STACK_SIZE: usize = 16 << 10;
/// Of exceptions, interrupts, NMIs, double faults and machine checks: none can come into another one's way.
const STACKS: usize = 5;

/// Address of the local APIC's register by which an interrupt is acknowledged; 0 if it is an MSR.
pub(super) static END_OF_INTERRUPT: AtomicU64 = AtomicU64::new(0);

// The stubs are 16 bytes each. What they push is the vector; where the processor pushes no error code, the frame is
// shorter by one word, which only the report of an exception has to know.
global_asm!(
    r#"
    .section .text.interrupts, "ax"
    .balign 16
bivisor_vectors:
    .set bivisor_vector, 0
    .rept 256
    .balign 16
    pushq $bivisor_vector
    jmp bivisor_interrupt
    .set bivisor_vector, bivisor_vector + 1
    .endr

bivisor_interrupt:
    cmpq $2, (%rsp)                     # an NMI is nothing but noticed
    je 2f
    cmpq $32, (%rsp)
    jb 3f
    cmpq $255, (%rsp)
    je 2f
    pushq %rax
    movq {end_of_interrupt}(%rip), %rax
    testq %rax, %rax
    jz 1f
    movl $0, (%rax)
    popq %rax
    jmp 2f
1:  pushq %rcx
    pushq %rdx
    movl $0x80b, %ecx                   # x2APIC EOI
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
2:  addq $8, %rsp
    iretq
3:  cld
    movq %rsp, %rdi
    andq $-16, %rsp
    call {exception}
    ud2
    "#,
    exception = sym exception,
    end_of_interrupt = sym END_OF_INTERRUPT,
    options(att_syntax)
);

unsafe extern "C" {
    static bivisor_vectors: u8;
}

/// Reports an exception of the hypervisor's own, and ends.
extern "C" fn exception(frame: *const u64) -> ! {
    // SAFETY: the stub left the vector there, above it what the processor pushed.
    let [vector, first, second] = unsafe { frame.cast::<[u64; 3]>().read() };
    let with_code = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
    let (code, rip) = if with_code { (first, second) } else { (0, first) };
    let cr2: u64;
    // SAFETY: reading CR2 changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack, preserves_flags)) };
    ending::give_up(format_args!(
        "exception {vector} in the hypervisor at {rip:#x}, error code {code:#x}, CR2 {cr2:#x}"
    ))
}

#[repr(C, packed(4))]
struct TaskState {
    reserved0: u32,
    stacks: [u64; 3],
    reserved1: u64,
    interrupt_stacks: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

#[repr(C, align(16))]
struct Tables {
    gdt: [u64; 5],
    idt: [[u64; 2]; 256],
    task: TaskState,
    stacks: [[u8; STACK_SIZE]; STACKS],
}

/// The one processor's tables.
struct Cell(UnsafeCell<Tables>);

// SAFETY: written once, by `load`, before the processor uses them, and read by the processor only.
unsafe impl Sync for Cell {}

static TABLES: Cell = Cell(UnsafeCell::new(Tables {
    gdt: [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0, 0],
    idt: [[0; 2]; 256],
    task: TaskState {
        reserved0: 0,
        stacks: [0; 3],
        reserved1: 0,
        interrupt_stacks: [0; 7],
        reserved2: 0,
        reserved3: 0,
        io_map: size_of::<TaskState>() as u16,
    },
    stacks: [[0; STACK_SIZE]; STACKS],
}));

/// The stack of a vector, 1 to [`STACKS`].
const fn stack(vector: usize) -> u64 {
    match vector {
        2 => 3,
        8 => 4,
        18 => 5,
        0..32 => 1,
        _ => 2,
    }
}

/// A 64-bit interrupt gate (SDM Vol. 3A, figure 6-8).
const fn gate(handler: u64, stack: u64) -> [u64; 2] {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00 << 32;
    let low = handler & 0xffff | (CODE as u64) << 16 | stack << 32 | PRESENT_INTERRUPT_GATE;
    [low | (handler >> 16 & 0xffff) << 48, handler >> 32]
}

/// The descriptor of a 64-bit task state segment (SDM Vol. 3A, figure 8-4).
const fn task_descriptor(base: u64, limit: u64) -> [u64; 2] {
    const PRESENT_TASK: u64 = 0x89 << 40;
    let low = limit & 0xffff | (base & 0xff_ffff) << 16 | PRESENT_TASK | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

/// Makes the tables and loads them.
///
/// # Safety
/// Once, at privilege level 0, with interrupts disabled, on the only running processor.
pub(super) unsafe fn load() {
    let tables = TABLES.0.get();
    let vectors = (&raw const bivisor_vectors) as u64;
    let pointer = |limit: usize, base: u64| {
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&(limit as u16).to_le_bytes());
        bytes[2..].copy_from_slice(&base.to_le_bytes());
        bytes
    };
    // SAFETY: nobody else has the tables (the caller's promise), which are static. The new segments are like those of the
    // loader's entry code, whose selectors stay valid.
    unsafe {
        for number in 0..STACKS {
            let end = (&raw const (*tables).stacks).cast::<[u8; STACK_SIZE]>().add(number + 1) as u64;
            (&raw mut (*tables).task.interrupt_stacks).cast::<u64>().add(number).write_unaligned(end);
        }
        let task = task_descriptor((&raw const (*tables).task) as u64, size_of::<TaskState>() as u64 - 1);
        (*tables).gdt[TASK as usize / 8] = task[0];
        (*tables).gdt[TASK as usize / 8 + 1] = task[1];
        for vector in 0..256 {
            (*tables).idt[vector] = gate(vectors + 16 * vector as u64, stack(vector));
        }
        let gdtr = pointer(size_of::<[u64; 5]>() - 1, (&raw const (*tables).gdt) as u64);
        let idtr = pointer(size_of::<[[u64; 2]; 256]>() - 1, (&raw const (*tables).idt) as u64);
        asm!("lgdt [{}]", in(reg) gdtr.as_ptr(), options(nostack, preserves_flags));
        asm!("ltr {0:x}", in(reg) TASK, options(nostack, preserves_flags));
        asm!("lidt [{}]", in(reg) idtr.as_ptr(), options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_and_descriptors_are_laid_out_as_the_manual_says() {
        assert_eq!(gate(0x1234_5678_9abc_def0, 3), [0x9abc_8e03_0008_def0, 0x1234_5678]);
        assert_eq!(task_descriptor(0x1234_5678_9abc_def0, 0x67), [0x9a00_89bc_def0_0067, 0x1234_5678]);
        assert_eq!(size_of::<TaskState>(), 104);
    }

    #[test]
    fn every_vector_has_a_stack_and_the_grave_ones_have_their_own() {
        assert!((0..256).all(|vector| (1..=STACKS as u64).contains(&stack(vector))));
        for grave in [2, 8, 18] {
            assert_eq!((0..256).filter(|vector| stack(*vector) == stack(grave)).count(), 1);
        }
    }
}
