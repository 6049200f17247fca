//! Repeated string instructions by runs, against the same executed one element at a time.

use crate::env::Env;
use crate::exception::Exception;
use crate::interp::decode::InstructionDecoder;
use crate::registers::gpr::{RAX, RCX, RDI, RSI};
use crate::registers::{Cr0, Rflags};
use crate::state::{CpuState, SegReg, Segment};
use crate::testing::{Machine, at};
use alloc::vec::Vec;

/// Linear address of the pages that the tests use.
const DATA: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
/// The pages: RAM that is not contiguous, one page twice, and further down what is no writable RAM.
const MAPPED: [u64; 16] = [
    0x2_0007, 0x2_5007, 0x2_6007, 0x2_3007, 0x3_0007, 0x2_0007, 0x3_8007, 0x3_9007, 0x3_a007, 0x2_1007,
    ABSENT, 0x2_2007, READ_ONLY, DEVICE, 0x3_1007, ABSENT,
];
const ABSENT: u64 = 0;
const READ_ONLY: u64 = 0x2_7005;
const DEVICE: u64 = 0xfee0_0007;
const READ_ONLY_PAGE: u64 = DATA + 12 * PAGE;
const DEVICE_PAGE: u64 = DATA + 13 * PAGE;

/// 64-bit mode with [`MAPPED`] at [`DATA`], filled with a pattern in which elements repeat.
fn machine() -> Machine {
    let machine = Machine::long();
    let env = &machine.env;
    env.store64(at::PAGES + 0x1008, at::PAGES + 0x2000 | 7);
    env.store64(at::PAGES + 0x2000, at::PAGES + 0x3000 | 7);
    for (index, &entry) in (0..).zip(&MAPPED) {
        env.store64(at::PAGES + 0x3000 + 8 * index, entry);
    }
    for offset in 0x2_0000..0x4_0000u64 {
        env.store8(offset, (offset / 8 % 61 * 37) as u8);
    }
    machine
}

/// Executes one instruction as often as it wants to be, up to `takes`; the processor is the same otherwise.
fn execute(machine: &mut Machine, code: &[u8], takes: usize) -> (Result<(), Exception>, usize) {
    let Machine { cpu, env } = machine;
    let mut bytes = [0x90; 15];
    bytes[..code.len()].copy_from_slice(code);
    let op = InstructionDecoder::new(&cpu.model).decode(&bytes, cpu.state.code_bits(), &cpu.model).unwrap();
    for take in 1..=takes {
        cpu.next_rip = cpu.state.rip + code.len() as u64;
        if let Err(exception) = cpu.execute(env, &op) {
            return (Err(exception), take);
        }
        if cpu.next_rip != cpu.state.rip {
            return (Ok(()), take);
        }
    }
    (Ok(()), takes)
}

/// Executes an instruction by runs and one element at a time, and expects the same of both. Returns the machine
/// that did it by runs, and the result.
fn same(setup: &dyn Fn(&mut Machine), code: &[u8]) -> (Machine, Result<(), Exception>) {
    let (mut fast, mut slow) = (machine(), machine());
    setup(&mut fast);
    setup(&mut slow);
    slow.cpu.state.rflags |= Rflags::TF.bits();
    let fast_result = execute(&mut fast, code, usize::MAX).0;
    let slow_result = execute(&mut slow, code, usize::MAX).0;
    slow.cpu.state.rflags &= !Rflags::TF.bits();
    assert_eq!(fast_result, slow_result, "{code:02x?}");
    let seen = |state: &CpuState| (state.gpr, state.rflags, state.cr2);
    assert_eq!(seen(&fast.cpu.state), seen(&slow.cpu.state), "{code:02x?}");
    assert!(fast.env.ram == slow.env.ram, "{code:02x?}: RAM differs");
    assert_eq!(fast.env.mmio_writes, slow.env.mmio_writes);
    assert_eq!(slow.env.runs.get(), 0);
    (fast, fast_result)
}

fn registers(machine: &mut Machine, rcx: u64, rsi: u64, rdi: u64, rax: u64) {
    let gpr = &mut machine.cpu.state.gpr;
    (gpr[RCX], gpr[RSI], gpr[RDI], gpr[RAX]) = (rcx, rsi, rdi, rax);
}

fn down(machine: &mut Machine) {
    machine.cpu.state.rflags |= Rflags::DF.bits();
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn all_kinds_sizes_and_directions_at_any_place() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut runs, mut faults) = (0, 0);
    for _ in 0..1500 {
        let opcode = [0xa4, 0xa6, 0xaa, 0xac, 0xae][random.below(5) as usize];
        let (size, wide): (u64, &[u8]) =
            [(1, &[][..]), (2, &[0x66]), (4, &[]), (8, &[0x48])][random.below(4) as usize];
        let (rex, operand_size) = if size == 8 { (wide, &[][..]) } else { (&[][..], wide) };
        let address_size: &[u8] = if random.below(4) == 0 { &[0x67] } else { &[] };
        let repeat = [0xf3, 0xf2][random.below(2) as usize];
        let opcode = [opcode | u8::from(size > 1)];
        let code: Vec<u8> = [address_size, operand_size, &[repeat], rex, &opcode].concat();
        let place =
            |random: &mut Random| DATA + random.below(10) * PAGE + random.below(2) * random.below(PAGE);
        let from = place(&mut random);
        // Often close to the source.
        let to = if random.below(3) == 0 { from + random.below(48) - 24 } else { place(&mut random) };
        let count = [random.below(3), random.below(30), random.below(9000)][random.below(3) as usize] / size;
        let value = [0, 37, u64::from_le_bytes([111; 8])][random.below(3) as usize];
        let is_down = random.below(3) == 0;
        let setup = |machine: &mut Machine| {
            registers(machine, count, from, to, value);
            machine.cpu.state.rflags |= if is_down { Rflags::DF.bits() } else { 0 };
        };
        let (machine, result) = same(&setup, &code);
        runs += machine.env.runs.get();
        faults += usize::from(result.is_err());
    }
    assert!(runs > 500 && faults > 10, "{runs} runs, {faults} faults");
}

#[test]
fn long_comparisons_that_are_equal_cross_pages() {
    // repe cmpsb of a page with itself through another address, then into pages that differ; repne scasq.
    let setup = |machine: &mut Machine| registers(machine, 3 * PAGE, DATA + 0x10, DATA + 5 * PAGE + 0x10, 0);
    let (machine, _) = same(&setup, &[0xf3, 0xa6]);
    assert_eq!(machine.cpu.state.gpr[RSI], DATA + PAGE + 1);
    assert_eq!(machine.env.runs.get(), 2);
    let setup = |machine: &mut Machine| registers(machine, 800, 0, DATA + 0x12, 0x77);
    let (machine, _) = same(&setup, &[0xf2, 0x48, 0xaf]);
    assert_eq!(machine.cpu.state.gpr[RCX], 0);
}

#[test]
fn a_copy_that_overlaps_itself_replicates() {
    for distance in [1, 2, 3, 7, 8, 9, 0x800] {
        let setup = |machine: &mut Machine| registers(machine, 3000, DATA, DATA + distance, 0);
        let (machine, _) = same(&setup, &[0xf3, 0xa4]);
        assert!(machine.env.runs.get() > 0);
        let expected = machine.env.get::<1>(0x2_0000);
        assert_eq!(machine.env.get::<1>(0x2_0000 + distance * (0xfff / distance).min(3)), expected);
        let setup = |machine: &mut Machine| registers(machine, 300, DATA, DATA + distance, 0);
        assert_eq!(same(&setup, &[0xf3, 0x48, 0xa5]).1, Ok(()));
    }
    // The same page of RAM under two addresses.
    let setup = |machine: &mut Machine| registers(machine, PAGE - 4, DATA, DATA + 5 * PAGE + 4, 0);
    assert_eq!(same(&setup, &[0xf3, 0xa4]).1, Ok(()));
}

#[test]
fn faults_in_the_middle_leave_exact_registers() {
    // Into the page that is not there: upwards, and downwards from above it.
    let setup = |machine: &mut Machine| registers(machine, 5 * PAGE, DATA, DATA + 8 * PAGE + 1, 0);
    let (machine, result) = same(&setup, &[0xf3, 0xa4]);
    assert_eq!(result, Err(Exception::page_fault(DATA + 10 * PAGE, 2)));
    let gpr = &machine.cpu.state.gpr;
    let done = 2 * PAGE - 1;
    assert_eq!((gpr[RCX], gpr[RSI], gpr[RDI]), (5 * PAGE - done, DATA + done, DATA + 10 * PAGE));
    let setup = |machine: &mut Machine| {
        registers(machine, 5 * PAGE, 0, DATA + 11 * PAGE + 0x7f, 0);
        down(machine);
    };
    let (machine, result) = same(&setup, &[0xf3, 0xaa]);
    assert_eq!(result, Err(Exception::page_fault(DATA + 11 * PAGE - 1, 2)));
    assert_eq!(machine.cpu.state.gpr[RCX], 5 * PAGE - 0x80);
    // Into a page that may only be read, by elements that straddle; from a page that is not there.
    let setup = |machine: &mut Machine| registers(machine, PAGE, DATA, READ_ONLY_PAGE - 0x104, 0);
    let (_, result) = same(&setup, &[0xf3, 0x48, 0xa5]);
    assert_eq!(result, Err(Exception::page_fault(READ_ONLY_PAGE, 3)));
    let setup = |machine: &mut Machine| registers(machine, PAGE, DATA + 10 * PAGE - 0x20, DATA, 0);
    for code in [&[0xf3, 0xa4][..], &[0xf3, 0xa6], &[0xf3, 0xac]] {
        assert!(same(&setup, code).1.is_err() || code[1] == 0xa6);
    }
}

#[test]
fn only_repe_cmpsb_reads_its_first_operand_first() {
    let (first, second) = (DATA + 10 * PAGE, DATA + 15 * PAGE);
    let setup = |machine: &mut Machine| registers(machine, 9, first, second, 0);
    for (code, address) in
        [(&[0xa6][..], second), (&[0xf3, 0xa6], first), (&[0xf2, 0xa6], second), (&[0xf3, 0xa7], second)]
    {
        assert_eq!(same(&setup, code).1, Err(Exception::page_fault(address, 0)), "{code:02x?}");
    }
}

#[test]
fn devices_see_every_element() {
    let setup = |machine: &mut Machine| registers(machine, 70, DATA, DEVICE_PAGE, 0x55);
    for code in [&[0xf3, 0xa4][..], &[0xf3, 0x66, 0xab], &[0x66, 0xf3, 0xa5]] {
        let (machine, _) = same(&setup, code);
        assert_eq!((machine.env.mmio_writes.len(), machine.env.runs.get()), (70, 0));
    }
    let setup = |machine: &mut Machine| registers(machine, 70, DEVICE_PAGE, DATA, 0xff);
    let (machine, _) = same(&setup, &[0xf3, 0xa4]);
    assert_eq!((machine.env.get::<1>(0x2_0000 + 69), machine.env.runs.get()), ([0xff], 0));
}

#[test]
fn addresses_wrap_at_their_size() {
    // rep stosd with 32-bit addresses from the last bytes of 4 GiB on into page 0.
    let setup = |machine: &mut Machine| {
        registers(machine, 9, 0, 0xffff_fff0, 7);
        machine.env.store64(at::PAGES + 0x1018, at::PAGES + 0x4000 | 7);
        machine.env.store64(at::PAGES + 0x4ff8, at::PAGES + 0x5000 | 7);
        machine.env.store64(at::PAGES + 0x5ff8, 0x2_0007);
    };
    let (machine, _) = same(&setup, &[0x67, 0xf3, 0xab]);
    assert_eq!(machine.cpu.state.gpr[RDI], 0x14);
    // 16-bit code: DI wraps, upwards and downwards.
    for is_down in [false, true] {
        let setup = |machine: &mut Machine| {
            let state = &mut machine.cpu.state;
            state.msr.efer = 0;
            state.cr0 &= !Cr0::PG.bits();
            state.seg[SegReg::Cs as usize].attributes = 0x9b;
            let base = 0x2_0000;
            state.seg[SegReg::Es as usize] = Segment { base, limit: 0xffff, selector: 8, attributes: 0x93 };
            machine.cpu.state_changed();
            let start = if is_down { 0x1234_0003 } else { 0x1234_fffc };
            registers(machine, 0x5678_0009, 0, start, 7);
            if is_down {
                down(machine);
            }
        };
        let (machine, result) = same(&setup, &[0xf3, 0xaa]);
        assert_eq!((result, machine.env.runs.get() > 0), (Ok(()), true));
        let end = if is_down { 0x1234_fffa } else { 0x1234_0005 };
        assert_eq!((machine.cpu.state.gpr[RDI], machine.cpu.state.gpr[RCX]), (end, 0x5678_0000));
    }
}

#[test]
fn segments_have_bases_and_limits() {
    // rep movsb from gs; then es with a limit within the page.
    let setup = |machine: &mut Machine| {
        machine.cpu.state.seg[SegReg::Gs as usize].base = DATA + 0x777;
        registers(machine, 2 * PAGE, 0x10, DATA + 6 * PAGE, 0);
    };
    let (machine, _) = same(&setup, &[0x65, 0xf3, 0xa4]);
    assert_eq!(machine.env.get::<4>(0x3_8000), machine.env.get::<4>(0x2_0787));
    for (attributes, limit) in [(0x93, 0x812), (0x97, 0x4ff), (0x91, 0xffff)] {
        let setup = |machine: &mut Machine| {
            let state = &mut machine.cpu.state;
            state.msr.efer = 0;
            state.cr0 &= !Cr0::PG.bits();
            state.seg[SegReg::Cs as usize].attributes = 0xc09b;
            state.seg[SegReg::Es as usize] = Segment { base: 0x2_0100, limit, selector: 8, attributes };
            machine.cpu.state_changed();
            registers(machine, 0x400, 0, 0x500, 7);
        };
        let (machine, result) = same(&setup, &[0xf3, 0xab]);
        let done = 0x400 - machine.cpu.state.gpr[RCX];
        let expected = match attributes {
            0x93 => (Err(Exception::GP0), 0x313 / 4),
            0x97 => (Ok(()), 0x400),
            _ => (Err(Exception::GP0), 0),
        };
        assert_eq!((result, done), expected, "{attributes:#x}");
    }
}

#[test]
fn misaligned_elements_fault_one_by_one_where_alignment_is_checked() {
    let setup = |machine: &mut Machine| {
        machine.cpu.state.cr0 |= Cr0::AM.bits();
        machine.cpu.state.rflags |= Rflags::AC.bits();
        machine.cpu.state.cpl = 3;
        registers(machine, 8, DATA + 8, DATA + 0x101, 0);
    };
    let (machine, result) = same(&setup, &[0xf3, 0xa5]);
    assert_eq!((result, machine.cpu.state.gpr[RCX]), (Err(Exception::AC0), 8));
    assert_eq!(same(&setup, &[0xf3, 0xa4]).1, Ok(()));
}

#[test]
fn events_are_looked_at_after_64_kib_and_after_64_single_elements() {
    let setup = |machine: &mut Machine| registers(machine, 1 << 20, 0, 0x2_0000, 0);
    for (code, done) in [(&[0xf3, 0xaa][..], 0x1_0000), (&[0xf3, 0x48, 0xab], 0x2000)] {
        let mut machine = machine();
        setup(&mut machine);
        assert_eq!(execute(&mut machine, code, 1), (Ok(()), 1));
        assert_eq!(machine.cpu.state.gpr[RCX], (1 << 20) - done);
        assert_eq!(machine.env.runs.get(), 16);
    }
    let mut machine = machine();
    registers(&mut machine, 1000, 0, DEVICE_PAGE, 0);
    assert_eq!(execute(&mut machine, &[0xf3, 0xaa], 1).1, 1);
    assert_eq!(machine.env.mmio_writes.len(), 64);
}

#[test]
fn watched_and_stepped_instructions_take_one_element_at_a_time() {
    let mut watched = machine();
    watched.cpu.write_debug_register(0, DATA + 0x40).unwrap();
    watched.cpu.write_debug_register(7, 1 | 0b0001 << 16).unwrap();
    let mut stepped = machine();
    stepped.cpu.state.rflags |= Rflags::TF.bits();
    for mut machine in [watched, stepped] {
        registers(&mut machine, 100, 0, DATA, 0);
        assert_eq!(execute(&mut machine, &[0xf3, 0xaa], 1).0, Ok(()));
        assert_eq!((machine.cpu.state.gpr[RCX], machine.env.runs.get()), (99, 0));
    }
}

#[test]
fn every_page_written_that_holds_cached_code_is_told() {
    let mut machine = machine();
    let pages = [0x2_5000, 0x2_6000, 0x2_3000];
    pages.iter().for_each(|&page| _ = machine.env.mark_code(page));
    registers(&mut machine, PAGE + 10, DATA + 6 * PAGE, DATA + PAGE, 0);
    assert_eq!(execute(&mut machine, &[0xf3, 0xa4], 1).0, Ok(()));
    let generations = machine.env.generations.borrow();
    assert!(generations[&0x2_5000] > 0 && generations[&0x2_6000] > 0 && generations[&0x2_3000] == 0);
}

#[test]
fn downwards_from_the_end_of_the_address_space() {
    let setup = |machine: &mut Machine| {
        for (table, entry) in [(0, 0x4000), (0x4000, 0x5000), (0x5000, 0x6000)] {
            machine.env.store64(at::PAGES + table + 0xff8, at::PAGES + entry | 7);
        }
        machine.env.store64(at::PAGES + 0x6ff8, 0x2_0007);
        machine.cpu.state.gpr[RCX] = 40;
        machine.cpu.state.gpr[RDI] = u64::MAX - 7;
        machine.cpu.state.gpr[RSI] = u64::MAX - 15;
        machine.cpu.state.rflags |= Rflags::DF.bits();
    };
    let (machine, result) = same(&setup, &[0xf3, 0x48, 0xab]);
    assert_eq!((result, machine.env.runs.get()), (Ok(()), 1));
    let (_, result) = same(&setup, &[0xf3, 0x48, 0xa5]);
    assert_eq!(result, Ok(()));
}
