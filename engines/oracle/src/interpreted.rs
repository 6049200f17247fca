//! Executes single instructions in the interpreter: a guest of one processor in user mode, with the address space of
//! the native process.
//!
//! Physical memory: page tables, then a page of system tables and a kernel stack, then code and data. An exception
//! goes through the IDT; which one it was is told by the handler's address, and all else by the frame on the stack.

use std::io::Result;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bivisor_dbt::code_tracker::CodeTracker;
use bivisor_dbt::env::VcpuEnv;
use bivisor_machine::engine::VcpuBus;
use bivisor_machine::host::Waker;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpu::Cpu;
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::env::{Env, Event};
use bivisor_x86::registers::{Cr0, Cr4, Efer, Rflags, gpr};
use bivisor_x86::state::{CpuState, SegReg, Segment};

use crate::layout::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, FS_BASE, GS_BASE, IMAGE_SIZE, IMAGES, Image, Outcome, PAGE,
    USER_CS, USER_SS,
};

const PML4: u64 = 0x1000;
const LOW_TABLES: [u64; 3] = [0x2000, 0x3000, 0x4000];
const HIGH_TABLES: [u64; 3] = [0x5000, 0x6000, 0x7000];
const SYSTEM: u64 = 0x8000;
const CODE_PAGES: u64 = 0x1_0000;
const DATA_PAGES: u64 = 0x2_0000;
const RAM_SIZE: usize = 0x4_0000;

/// Linear address of the kernel's pages: IDT, handlers, GDT and TSS in the first, the stack in the second.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const GDT: u64 = KERNEL + 0x400;
const TSS: u64 = KERNEL + 0x500;
const HANDLERS: u64 = KERNEL + 0x800;
const IDT: u64 = KERNEL;
const KERNEL_STACK_END: u64 = KERNEL + 2 * PAGE;
const KERNEL_CS: u64 = 0x10;

/// Bits of page-table entries.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
/// Accessed and dirty.
const USED: u64 = 0x60;
const NO_EXECUTE: u64 = 1 << 63;

/// Exceptions that push an error code.
const WITH_ERROR_CODE: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17;

/// Stands for the vector when the interpreter panicked.
pub const PANIC: u64 = 256;

/// A bus without anything on it.
struct EmptyBus;

impl VcpuBus for EmptyBus {
    fn mmio_read(&self, _gpa: u64, _size: usize) -> u64 {
        u64::MAX
    }
    fn mmio_write(&self, _gpa: u64, _size: usize, _value: u64) {}
    fn port_in(&self, _port: u16, _size: usize) -> u32 {
        u32::MAX
    }
    fn port_out(&self, _port: u16, _size: usize, _value: u32) {}
    fn has_event(&self) -> bool {
        false
    }
    fn set_observer(&self, _observer: Arc<dyn Waker>) {}
    fn take_event(&self, _interrupts: bool, _nmis: bool) -> Option<Event> {
        None
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _value: u8) {}
    fn read_msr(&self, _msr: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> bool {
        false
    }
    fn on_init(&self) {}
    fn tsc_offset(&self) -> u64 {
        0
    }
    fn set_tsc(&self, _value: u64) {}
    fn hypercall(&self, _state: &CpuState) -> Option<u64> {
        None
    }
}

/// The guest.
pub struct Interpreted {
    cpu: Cpu,
    env: VcpuEnv,
    memory: Arc<GuestMemory>,
    initial: CpuState,
    images: Box<[Image; IMAGES]>,
    image: usize,
}

/// Bytes 0 to 7 of a segment descriptor of 4 GiB with these access rights, and L or D/B set.
fn descriptor(access: u64, long: bool) -> u64 {
    0x000f_0000_0000_ffff | access << 40 | if long { 0xa0 << 48 } else { 0xc0 << 48 }
}

impl Interpreted {
    /// A guest of this CPU model.
    ///
    /// # Errors
    /// The host gives no memory for executing vector instructions.
    pub fn new(model: Arc<CpuModel>, images: Box<[Image; IMAGES]>) -> Result<Self> {
        let memory = Arc::new(GuestMemory::on_heap(RAM_SIZE));
        build_page_tables(&memory);
        build_system_tables(&memory);
        memory.store_bytes(DATA_PAGES, &images[0]);
        let tracker = Arc::new(CodeTracker::new(memory.size()));
        let env = VcpuEnv::new(Arc::clone(&memory), Arc::new(EmptyBus), tracker)?;
        let mut cpu = Cpu::new(model);
        cpu.state = initial_state();
        cpu.state_changed();
        Ok(Self { initial: cpu.state.clone(), cpu, env, memory, images, image: 0 })
    }

    /// The CPU model.
    pub fn model(&self) -> &CpuModel {
        &self.cpu.model
    }

    /// Executes one case.
    pub fn execute(&mut self, case: &Case, outcome: &mut Outcome) {
        let at = (case.rip - CODE) as usize;
        let length = case.code.len().min(CODE_SIZE - at);
        for (i, byte) in case.code[..length].iter().enumerate() {
            self.env.store8(CODE_PAGES + (at + i) as u64, *byte);
        }
        let image = case.image as usize % IMAGES;
        if image != self.image {
            self.image = image;
            self.memory.store_bytes(DATA_PAGES, &self.images[image][..DATA_SIZE]);
        }
        let state = &mut self.cpu.state;
        state.clone_from(&self.initial);
        state.gpr = case.gpr;
        state.rip = case.rip;
        state.rflags = case.rflags | if case.steps { Rflags::TF.bits() } else { 0 };
        state.xsave.bytes = case.xsave;
        // A panic is a difference as any other.
        let ran = catch_unwind(AssertUnwindSafe(|| self.cpu.run(&mut self.env, 1)));
        self.save_outcome(outcome);
        if ran.is_err() {
            outcome.vector = PANIC;
        }
    }

    fn save_outcome(&mut self, outcome: &mut Outcome) {
        let state = &self.cpu.state;
        outcome.gpr = state.gpr;
        outcome.rip = state.rip;
        outcome.rflags = state.rflags;
        outcome.vector = 1;
        outcome.error = 0;
        outcome.cr2 = 0;
        outcome.xsave = state.xsave.bytes;
        if state.cpl == 0 {
            outcome.vector = (state.rip.wrapping_sub(HANDLERS)) / 16;
            outcome.cr2 = if outcome.vector == 14 { state.cr2 } else { 0 };
            let mut stack = state.gpr[gpr::RSP].wrapping_sub(KERNEL) + SYSTEM;
            let mut pop = || {
                let value = self.memory.load64(stack);
                stack = stack.wrapping_add(8);
                value
            };
            if WITH_ERROR_CODE >> (outcome.vector & 31) & 1 != 0 {
                outcome.error = pop();
            }
            outcome.rip = pop();
            pop();
            outcome.rflags = pop();
            outcome.gpr[gpr::RSP] = pop();
        }
        let mut data = [0; DATA_SIZE];
        self.memory.load_bytes(DATA_PAGES, &mut data);
        let image = &self.images[self.image][..DATA_SIZE];
        if outcome.record_changes(image, &data) {
            self.memory.store_bytes(DATA_PAGES, image);
        }
    }
}

fn build_page_tables(memory: &GuestMemory) {
    let table = PRESENT | WRITABLE | USER | USED;
    let index = |linear: u64, level: u32| 8 * (linear >> (12 + 9 * level) & 0x1ff);
    for (linear, [third, second, first]) in [(CODE, LOW_TABLES), (KERNEL, HIGH_TABLES)] {
        memory.store64(PML4 + index(linear, 3), third | table);
        memory.store64(third + index(linear, 2), second | table);
        memory.store64(second + index(linear, 1), first | table);
    }
    let pages = |size: usize| (0..size as u64).step_by(PAGE as usize);
    let last = LOW_TABLES[2];
    for page in pages(CODE_SIZE) {
        memory.store64(last + index(CODE + page, 0), CODE_PAGES + page | PRESENT | USER | USED);
    }
    for page in pages(IMAGE_SIZE) {
        let writable = if page < DATA_SIZE as u64 { WRITABLE } else { 0 };
        let entry = DATA_PAGES + page | PRESENT | USER | USED | writable | NO_EXECUTE;
        memory.store64(last + index(DATA + page, 0), entry);
    }
    for page in pages(2 * PAGE as usize) {
        memory.store64(HIGH_TABLES[2] + index(KERNEL + page, 0), SYSTEM + page | PRESENT | WRITABLE | USED);
    }
}

fn build_system_tables(memory: &GuestMemory) {
    let place = |linear: u64| linear - KERNEL + SYSTEM;
    for vector in 0..32u64 {
        let handler = HANDLERS + 16 * vector;
        // An interrupt gate that user mode may call, for INT3.
        let low = handler & 0xffff | KERNEL_CS << 16 | 0xee00 << 32 | (handler >> 16 & 0xffff) << 48;
        memory.store64(place(IDT) + 16 * vector, low);
        memory.store64(place(IDT) + 16 * vector + 8, handler >> 32);
    }
    memory.store64(place(GDT) + KERNEL_CS, descriptor(0x9b, true));
    memory.store64(place(GDT) + u64::from(USER_SS & !3), descriptor(0xf3, false));
    memory.store64(place(GDT) + u64::from(USER_CS & !3), descriptor(0xfb, true));
    memory.store64(place(TSS) + 4, KERNEL_STACK_END);
    // No I/O permission bitmap.
    memory.store16(place(TSS) + 0x66, 0xffff);
}

/// The state that all cases start with, as Linux sets it up for a program.
fn initial_state() -> CpuState {
    let cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
    let mut state = CpuState { cr0: cr0.bits(), cr3: PML4, xcr0: 7, cpl: 3, ..CpuState::default() };
    state.cr4 = (Cr4::PAE
        | Cr4::PGE
        | Cr4::OSFXSR
        | Cr4::OSXMMEXCPT
        | Cr4::UMIP
        | Cr4::FSGSBASE
        | Cr4::OSXSAVE
        | Cr4::SMEP
        | Cr4::SMAP)
        .bits();
    state.msr.efer = (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
    let null = Segment { attributes: Segment::UNUSABLE, ..Segment::default() };
    state.seg = [null; 6];
    let user = |selector, attributes| Segment { base: 0, limit: u32::MAX, selector, attributes };
    state.seg[SegReg::Cs as usize] = user(USER_CS, 0xa0fb);
    state.seg[SegReg::Ss as usize] = user(USER_SS, 0xc0f3);
    state.seg[SegReg::Fs as usize].base = FS_BASE;
    state.seg[SegReg::Gs as usize].base = GS_BASE;
    state.gdtr.base = GDT;
    state.gdtr.limit = 0x3f;
    state.idtr.base = IDT;
    state.idtr.limit = 0x1ff;
    state.tr = Segment { base: TSS, limit: 0x67, selector: 0x40, attributes: 0x8b };
    state
}
