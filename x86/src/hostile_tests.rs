//! Processors whose code, tables and registers are junk: whatever a guest does, the interpreter comes back.

use crate::cpu::RunExit;
use crate::cpuid::Vendor;
use crate::env::{Env, Event, HostExecution};
use crate::registers::{Cr0, Cr4, Efer, Rflags, gpr};
use crate::state::{Activity, CpuState, SegReg};
use crate::testing::{Machine, at, sel, test_cpu};

/// Machines tried.
const ROUNDS: u64 = 3_000;
/// Instructions of each.
const BUDGET: u64 = 150;
/// Where the code is, in a page of its own.
const CODE: u64 = 0x5000;

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 20) % limit
    }
    /// True once in so many times.
    fn rarely(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
    /// A number that means something to a machine of [`Machine`] more often than chance would have it.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(0x100),
            1 => 0x1000 + self.below(0x8000),
            2 => u64::MAX - self.below(0x1000),
            3 => 1 << self.below(64),
            4 => u64::from(sel::CODE) + self.below(0x70),
            5 => 0x3_fff8 + self.below(16),
            _ => self.next(),
        }
    }
}

/// A machine in some mode, its tables partly spoilt.
fn machine(random: &mut Random) -> Machine {
    let mut machine = if random.rarely(2) { Machine::long() } else { Machine::protected() };
    if random.rarely(3) {
        machine.cpu.model = test_cpu(Vendor::Amd).model;
    }
    for number in 0..=255u8 {
        let long = machine.cpu.in_long_mode();
        let selector = if long { sel::CODE64 } else { sel::CODE };
        let rights = if random.rarely(4) { 0x80 | random.next() as u8 } else { 0xee };
        machine.gate(number, selector, CODE + random.below(0x800), rights, random.below(4) as u8);
    }
    for _ in 0..random.below(40) {
        // Tables and task-state segments: a byte, or a descriptor of junk.
        let table = [at::GDT, at::IDT, at::TSS, at::PAGES, at::PAGES + 0x1000][random.below(5) as usize];
        let offset = random.below(if table == at::TSS { 0x100 } else { 0x200 });
        if random.rarely(2) {
            machine.env.store8(table + offset, random.next() as u8);
        } else {
            let value = random.value();
            machine.env.store64(table + (offset & !7), value);
        }
    }
    set_mode(&mut machine, random);
    for _ in 0..random.below(4) {
        let selector = sel::CODE + 8 * random.below(12) as u16;
        let seg = [SegReg::Es, SegReg::Ds, SegReg::Fs, SegReg::Gs][random.below(4) as usize];
        machine.ring_data(seg, selector);
    }
    machine
}

/// Perhaps another mode or ring, and flags.
fn set_mode(machine: &mut Machine, random: &mut Random) {
    let long = machine.cpu.in_long_mode();
    match random.below(5) {
        0 if !long => {
            machine.cpu.state = CpuState { gdtr: machine.cpu.state.gdtr, ..CpuState::default() };
            machine.cpu.state.seg[SegReg::Cs as usize].base = 0;
        }
        1 if !long => {
            machine.ring(sel::USER_CODE, sel::USER_DATA);
            machine.cpu.state.rflags |= Rflags::VM.bits();
        }
        1 | 2 => machine.ring(if long { sel::USER_CODE64 } else { sel::USER_CODE }, sel::USER_DATA),
        3 if long => machine.ring(sel::CODE, sel::DATA),
        _ => {}
    }
    let state = &mut machine.cpu.state;
    state.rip = CODE;
    let flags = Rflags::AC | Rflags::TF | Rflags::IF | Rflags::DF | Rflags::NT | Rflags::RF;
    state.rflags |= random.next() & random.next() & (flags.bits() | Rflags::ARITHMETIC.bits() | 3 << 12);
    if random.rarely(4) {
        state.cr0 |= (Cr0::AM | Cr0::WP).bits() & random.next();
        state.cr4 |=
            (Cr4::DE | Cr4::SMAP | Cr4::SMEP | Cr4::OSFXSR | Cr4::OSXSAVE | Cr4::UMIP).bits() & random.next();
    }
    if random.rarely(6) {
        state.dr[7] = random.next() & 0xffff_03ff | 0x400;
        state.dr[0] = random.value();
        state.dr[1] = random.value();
    }
    if !long && random.rarely(6) {
        // Paging by tables of junk, 2-level or PAE.
        state.cr3 = at::PAGES;
        state.cr4 |= Cr4::PAE.bits() & random.next() | Cr4::PSE.bits();
        state.cr0 |= (Cr0::PG | Cr0::PE).bits();
        state.msr.efer |= Efer::NXE.bits() & random.next();
        state.pdpte = [at::PAGES + 1, random.value(), 0, random.next()];
    }
    for register in 0..16 {
        if register != gpr::RSP || random.rarely(3) {
            state.gpr[register] = random.value();
        }
    }
    machine.cpu.state_changed();
}

/// Far transfers and returns, loads of segments and tables, MOV of control and debug registers, RDMSR and WRMSR,
/// system calls, string instructions with prefixes, ENTER, XSAVE and its kin, CMPXCHG16B, INT n.
const STARTS: &[&[u8]] = &[
    &[0xea],
    &[0x9a],
    &[0xcb],
    &[0xca],
    &[0xcf],
    &[0x48, 0xcf],
    &[0xff],
    &[0x48, 0xff],
    &[0x8e],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x21],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0xf3, 0xa4],
    &[0xf2, 0xaf],
    &[0xf3, 0x6c],
    &[0x67, 0xf3, 0xa5],
    &[0x66, 0xf3, 0xab],
    &[0xc8],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x48, 0x0f, 0xc7],
    &[0xcd],
    &[0xcc],
    &[0xf1],
    &[0x9d],
    &[0xfb],
    &[0xf4],
    &[0x62],
    &[0x0f, 0xb2],
    &[0xc4],
    &[0x1f],
    &[0x17],
    &[0xf0],
    &[0x0f, 0xba],
    &[0x0f, 0xa3],
    &[0xd7],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x63],
    &[0xe4],
    &[0xef],
];

/// Fills the page of code with bytes, and with system instructions more often than chance would have it.
fn fill(machine: &Machine, random: &mut Random) {
    let mut at = CODE;
    while at < CODE + 0xff0 {
        if random.rarely(2) {
            let start = STARTS[random.below(STARTS.len() as u64) as usize];
            machine.env.put(at, start);
            at += start.len() as u64;
            // Selectors and small offsets follow where pointers are.
            let value = random.value();
            machine.env.put(at, &value.to_le_bytes()[..6]);
            at += random.below(7);
        } else {
            machine.env.put(at, &random.next().to_le_bytes());
            at += 1 + random.below(8);
        }
    }
}

#[test]
fn junk_always_comes_back() {
    let (mut shut_down, mut halted) = (0, 0);
    for seed in 1..=ROUNDS {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut machine = machine(&mut random);
        fill(&machine, &mut random);
        machine.env.host_execution = [
            HostExecution::Done,
            HostExecution::Undefined,
            HostExecution::SimdException,
            HostExecution::X87Exception,
        ][random.below(4) as usize];
        for _ in 0..random.below(6) {
            let event = match random.below(8) {
                0 => Event::Nmi,
                1 => Event::Init,
                2 => Event::Sipi(random.below(0x40) as u8),
                _ => Event::Interrupt(random.next() as u8),
            };
            machine.env.events.push_back(event);
        }
        let Machine { cpu, env } = &mut machine;
        match cpu.run(env, BUDGET) {
            RunExit::Shutdown => shut_down += 1,
            RunExit::Halted | RunExit::WaitForSipi => halted += 1,
            RunExit::Budget => assert_eq!(cpu.state.activity, Activity::Running, "seed {seed}"),
            other => panic!("seed {seed}: {other:?}"),
        }
        assert!(cpu.state.cpl < 4, "seed {seed}");
    }
    // Neither is the rule.
    assert!(shut_down < ROUNDS / 2 && halted < ROUNDS / 2 && shut_down + halted > 0, "{shut_down} {halted}");
}
