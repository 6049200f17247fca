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
use bivisor_machine::engine::EmptyBus;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpu::Cpu;
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::env::Env;
use bivisor_x86::registers::{Rflags, gpr};
use bivisor_x86::state::CpuState;

use crate::layout::{CODE, CODE_SIZE, Case, DATA, DATA_SIZE, IMAGE_SIZE, IMAGES, Image, Outcome, PAGE};
use crate::system::{self, NO_EXECUTE, PageTables, SYSTEM_PAGE, USER, WITH_ERROR_CODE, WRITABLE, pages};

const TABLES: u64 = 0x1000;
const SYSTEM: u64 = 0x8000;
const STACK: u64 = 0x9000;
const CODE_PAGES: u64 = 0x1_0000;
const DATA_PAGES: u64 = 0x2_0000;
const RAM_SIZE: usize = 0x4_0000;

/// Linear address of the handlers, 16 bytes each; nothing is there, they are never executed.
const HANDLERS: u64 = SYSTEM_PAGE + 0x800;
/// Linear address behind the kernel's stack.
const STACK_END: u64 = SYSTEM_PAGE + 2 * PAGE;

/// Stands for the vector when the interpreter panicked.
pub const PANIC: u64 = 256;

/// The guest.
pub struct Interpreted {
    cpu: Cpu,
    env: VcpuEnv,
    memory: Arc<GuestMemory>,
    initial: CpuState,
    images: Box<[Image; IMAGES]>,
    image: usize,
}

impl Interpreted {
    /// A guest of this CPU model.
    ///
    /// # Errors
    /// The host gives no memory for executing vector instructions.
    pub fn new(model: Arc<CpuModel>, images: Box<[Image; IMAGES]>) -> Result<Self> {
        let memory = Arc::new(GuestMemory::on_heap(RAM_SIZE));
        build_page_tables(&memory);
        system::write_tables(&memory, SYSTEM, HANDLERS, STACK_END, false);
        memory.store_bytes(DATA_PAGES, &images[0]);
        let tracker = Arc::new(CodeTracker::new(memory.size()));
        let env =
            VcpuEnv::new(Arc::clone(&memory), Arc::new(EmptyBus::default()), tracker, Arc::default(), 0)?;
        let mut cpu = Cpu::new(model);
        cpu.state = system::initial_state(TABLES);
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
            outcome.state.vector = PANIC;
        }
    }

    fn save_outcome(&mut self, outcome: &mut Outcome) {
        let state = &self.cpu.state;
        let after = &mut outcome.state;
        after.gpr = state.gpr;
        after.rip = state.rip;
        after.rflags = state.rflags;
        after.vector = 1;
        after.error = 0;
        after.cr2 = 0;
        after.xsave = state.xsave.bytes;
        if state.cpl == 0 {
            after.vector = (state.rip.wrapping_sub(HANDLERS)) / 16;
            after.cr2 = if after.vector == 14 { state.cr2 } else { 0 };
            let mut stack = state.gpr[gpr::RSP].wrapping_sub(STACK_END - PAGE) + STACK;
            let mut pop = || {
                let value = self.memory.load64(stack);
                stack = stack.wrapping_add(8);
                value
            };
            if WITH_ERROR_CODE >> (after.vector & 31) & 1 != 0 {
                after.error = pop();
            }
            after.rip = pop();
            pop();
            after.rflags = pop();
            after.gpr[gpr::RSP] = pop();
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
    let mut tables = PageTables::new(memory, TABLES);
    for page in pages(CODE_SIZE) {
        tables.map(CODE + page, CODE_PAGES + page, USER);
    }
    for page in pages(IMAGE_SIZE) {
        let writable = if page < DATA_SIZE as u64 { WRITABLE } else { 0 };
        tables.map(DATA + page, DATA_PAGES + page, USER | writable | NO_EXECUTE);
    }
    tables.map(SYSTEM_PAGE, SYSTEM, WRITABLE);
    tables.map(SYSTEM_PAGE + PAGE, STACK, WRITABLE);
}
