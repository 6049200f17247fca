//! Measures how many guest instructions per second the interpreter executes: `cargo run --release -p bivisor-dbt
//! --example mips`. The guest fills a table, walks it with calls, and chases indices through it, in 64-bit
//! mode with paging.

use std::sync::Arc;
use std::time::Instant;

use bivisor_dbt::code_tracker::CodeTracker;
use bivisor_dbt::env::VcpuEnv;
use bivisor_machine::engine::VcpuBus;
use bivisor_machine::host::Waker;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpu::{Cpu, RunExit};
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::env::Event;
use bivisor_x86::registers::{Cr0, Cr4, Efer, gpr};
use bivisor_x86::state::{CpuState, SegReg, Segment};

/// The program: RCX rounds of about 16,000 instructions each, then HLT.
#[rustfmt::skip]
const PROGRAM: [u8; 216] = [
    0x53, 0x55, 0x48, 0x89, 0xcd, 0x31, 0xdb, 0xbf, 0x00, 0x00, 0x20, 0x00, 0xbe, 0x00, 0x02, 0x00, 0x00, 0xe8,
    0x2f, 0x00, 0x00, 0x00, 0xbf, 0x00, 0x00, 0x20, 0x00, 0xbe, 0x00, 0x02, 0x00, 0x00, 0xe8, 0x4a, 0x00, 0x00,
    0x00, 0x48, 0x01, 0xc3, 0xbf, 0x00, 0x00, 0x20, 0x00, 0xbe, 0xff, 0x01, 0x00, 0x00, 0xe8, 0x84, 0x00, 0x00,
    0x00, 0x48, 0x31, 0xc3, 0x48, 0xff, 0xcd, 0x75, 0xc8, 0x48, 0x89, 0xd8, 0x5d, 0x5b, 0xf4, 0x41, 0x54, 0x49,
    0x89, 0xfc, 0x31, 0xc0, 0x8d, 0x54, 0x80, 0x07, 0x81, 0xe2, 0xff, 0x01, 0x00, 0x00, 0x89, 0x17, 0x89, 0x47,
    0x04, 0xc6, 0x47, 0x08, 0x01, 0x48, 0x83, 0xc7, 0x10, 0xff, 0xc0, 0x39, 0xf0, 0x72, 0xe3, 0x4c, 0x89, 0xe0,
    0x41, 0x5c, 0xc3, 0x31, 0xc0, 0x85, 0xf6, 0x74, 0x19, 0x0f, 0xb6, 0x4f, 0x08, 0xf6, 0xc1, 0x01, 0x74, 0x07,
    0x57, 0xe8, 0x0b, 0x00, 0x00, 0x00, 0x5f, 0x48, 0x83, 0xc7, 0x10, 0x83, 0xee, 0x01, 0x75, 0xe7, 0xc3, 0x55,
    0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x8b, 0x0f, 0x8b, 0x57, 0x04, 0x48, 0x89, 0x4d, 0xf8, 0x48, 0x31,
    0xd1, 0x48, 0xc1, 0xe1, 0x03, 0x48, 0x01, 0xc8, 0x48, 0x83, 0xf9, 0x64, 0x48, 0x0f, 0x47, 0xca, 0x48, 0x8b,
    0x55, 0xf8, 0x48, 0x01, 0xd0, 0xc9, 0xc3, 0x31, 0xc0, 0x31, 0xc9, 0x89, 0xca, 0x48, 0xc1, 0xe2, 0x04, 0x8b,
    0x0c, 0x17, 0x03, 0x44, 0x17, 0x04, 0x0f, 0xba, 0xe0, 0x03, 0x83, 0xd0, 0x00, 0xff, 0xce, 0x75, 0xe8, 0xc3,
];
const PROGRAM_AT: u64 = 0x40_0000;
const STACK_AT: u64 = 0x50_0000;
const TABLES_AT: u64 = 0x10_0000;
const ROUNDS: u64 = 10_000;

/// A machine without devices.
struct NoBus;

impl VcpuBus for NoBus {
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

/// Page tables that map the first 16 MiB to themselves, 4 KiB each.
fn write_page_tables(memory: &GuestMemory) {
    const PRESENT_WRITABLE: u64 = 3;
    let (pdpt, directory, tables) = (TABLES_AT + 0x1000, TABLES_AT + 0x2000, TABLES_AT + 0x3000);
    memory.store64(TABLES_AT, pdpt | PRESENT_WRITABLE);
    memory.store64(pdpt, directory | PRESENT_WRITABLE);
    for table in 0..8 {
        memory.store64(directory + table * 8, (tables + table * 0x1000) | PRESENT_WRITABLE);
    }
    for page in 0..8 * 512 {
        memory.store64(tables + page * 8, page << 12 | PRESENT_WRITABLE);
    }
}

fn main() -> std::io::Result<()> {
    let memory = Arc::new(GuestMemory::on_heap(16 << 20));
    memory.store_bytes(PROGRAM_AT, &PROGRAM);
    write_page_tables(&memory);
    let tracker = Arc::new(CodeTracker::new(memory.size()));
    let mut env = VcpuEnv::new(memory, Arc::new(NoBus), tracker, Arc::default(), 0)?;
    let mut cpu = Cpu::new(Arc::new(CpuModel::reference(1)));
    let state = &mut cpu.state;
    state.cr0 = (Cr0::PE | Cr0::PG | Cr0::ET).bits();
    state.cr3 = TABLES_AT;
    state.cr4 = Cr4::PAE.bits();
    state.msr.efer = (Efer::LME | Efer::LMA).bits();
    state.seg[SegReg::Cs as usize] = Segment { base: 0, limit: u32::MAX, selector: 8, attributes: 0xa09b };
    state.seg[SegReg::Ss as usize] = Segment { base: 0, limit: u32::MAX, selector: 16, attributes: 0xc093 };
    state.rip = PROGRAM_AT;
    state.gpr[gpr::RSP] = STACK_AT;
    state.gpr[gpr::RCX] = ROUNDS;
    cpu.state_changed();

    const SLICE: u64 = 1 << 16;
    let start = Instant::now();
    let mut slices = 0u64;
    while cpu.run(&mut env, SLICE) == RunExit::Budget {
        slices += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    let millions = (slices * SLICE) as f64 / 1e6;
    println!("{millions:.0} million instructions in {seconds:.2} s: {:.1} MIPS", millions / seconds);
    println!("RAX {:#x}", cpu.state.gpr[gpr::RAX]);
    Ok(())
}
