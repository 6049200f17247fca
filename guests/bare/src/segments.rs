//! Segment descriptors and the task state segment (Intel SDM volume 3, chapters 3 and 8).
use crate::Global;
use core::arch::asm;

/// 64-bit code, ring 0.
pub const CODE: u16 = 0x08;
/// Flat data, ring 0.
pub const DATA: u16 = 0x10;
/// 32-bit code, ring 0.
pub const CODE32: u16 = 0x18;
/// 32-bit code, ring 3; also the base of SYSRET's selectors.
pub const USER_CODE32: u16 = 0x23;
/// Flat data, ring 3.
pub const USER_DATA: u16 = 0x2b;
/// 64-bit code, ring 3.
pub const USER_CODE: u16 = 0x33;
/// The task state segment (two entries).
pub const TASK: u16 = 0x40;
/// 16-bit code with base 0, ring 0.
pub const CODE16: u16 = 0x50;
/// 16-bit data with base 0 and limit 64 KiB, ring 0.
pub const DATA16: u16 = 0x58;
/// Entries from here on are free for a test.
pub const FREE: u16 = 0x60;

const ENTRIES: usize = 32;

/// The global descriptor table.
pub static GDT: Global<[u64; ENTRIES]> = Global::new([
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
    0,
    0x0000_9b00_0000_ffff,
    0x0000_9300_0000_ffff,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
]);

/// The 64-bit task state segment: a stack for ring 0 and seven for gates that ask for one.
#[derive(Clone, Copy)]
#[repr(C, packed(4))]
pub struct TaskState {
    reserved: u32,
    /// RSP for a change to ring 0, 1 and 2.
    pub rsp: [u64; 3],
    reserved_ist: u64,
    /// IST1 to IST7.
    pub ist: [u64; 7],
    reserved_end: u64,
    reserved_word: u16,
    /// Offset of the I/O permission bitmap; at the segment's end: no port is open to ring 3.
    pub io_map: u16,
}

/// The task state segment in use.
pub static TSS: Global<TaskState> = Global::new(TaskState {
    reserved: 0,
    rsp: [0; 3],
    reserved_ist: 0,
    ist: [0; 7],
    reserved_end: 0,
    reserved_word: 0,
    io_map: 104,
});

const STACK_SIZE: usize = 0x4000;

#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Stack([u8; STACK_SIZE]);

static STACKS: Global<[Stack; 8]> = Global::new([Stack([0; STACK_SIZE]); 8]);

/// The top of a spare stack: 0 for RSP0, 1 to 7 for the ISTs.
pub fn stack_top(index: usize) -> u64 {
    STACKS.address() + ((index + 1) * STACK_SIZE) as u64
}

/// Writes one descriptor of the table.
pub fn set_descriptor(selector: u16, descriptor: u64) {
    GDT.set_at(usize::from(selector >> 3), descriptor);
}

/// Writes the 16-byte descriptor of a task state segment; `present_type` is its access byte.
pub fn set_task_descriptor(selector: u16, base: u64, limit: u32, access: u8) {
    let low = u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56;
    set_descriptor(selector, low);
    set_descriptor(selector + 8, base >> 32);
}

/// An operand of LGDT and LIDT.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub struct TablePointer {
    /// Offset of the last byte.
    pub limit: u16,
    /// Linear address.
    pub base: u64,
}

/// Loads the descriptor table register.
pub fn lgdt(limit: u16, base: u64) {
    let pointer = TablePointer { limit, base };
    // SAFETY: reads ten bytes; the segments in use stay cached until they are loaded again.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// Loads the interrupt table register.
pub fn lidt(limit: u16, base: u64) {
    let pointer = TablePointer { limit, base };
    // SAFETY: reads ten bytes; what a bad table does is up to the test that loads it.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

/// Loads the task register.
pub fn ltr(selector: u16) {
    // SAFETY: a bad selector faults.
    unsafe { asm!("ltr {0:x}", in(reg) selector, options(nostack)) };
}

/// Loads the local descriptor table register.
pub fn lldt(selector: u16) {
    // SAFETY: a bad selector faults.
    unsafe { asm!("lldt {0:x}", in(reg) selector, options(nostack)) };
}

/// Loads the tables that this module describes.
pub fn load() {
    let mut task = TSS.get();
    task.rsp = [stack_top(0); 3];
    task.ist = core::array::from_fn(|index| stack_top(index + 1));
    TSS.set(task);
    lgdt((ENTRIES * 8 - 1) as u16, GDT.address());
    load_task();
    lldt(0);
}

/// Loads the task register with this module's task.
pub fn load_task() {
    set_task_descriptor(TASK, TSS.address(), size_of::<TaskState>() as u32 - 1, 0x89);
    ltr(TASK);
}
