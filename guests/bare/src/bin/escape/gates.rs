//! Interrupt tables and task state segments full of junk, in holes, in absent pages (Intel SDM volume 3, sections
//! 6.12 to 6.14 and 8.7).
use crate::tools::{FAR, LastPage, PAGE, Random, address, copy, fault, gate, recover, short};
use kit::{
    Suite, Trap, cpu, machine,
    memory::{self, Tables, bit, fault as code, pages, write},
    segments::{self, FREE, TASK},
    trap::{self, INTERRUPT_GATE, ist, vector},
    trapping,
};

/// The vector whose gate is spoilt.
const SPARE: u8 = 0x91;
/// Error code bit: the index is one of the interrupt table.
const IN_IDT: u64 = 2;

pub fn all(s: &mut Suite) {
    junk(s);
    table_at_the_end(s);
    table_in_pages(s);
    table_of_registers(s);
    s.check("#GP by a table at a non-canonical address", load_table(1 << 63), Some((vector::GP, 0)));
    if machine::is_qemu_tcg() {
        s.skip("tasks", "QEMU's TCG checks no limit of a task, and ends");
    } else {
        s.group("gates: tasks: ");
        task_limits(s);
        task_at_the_end(s);
        task_in_pages(s);
        task_descriptors(s);
        s.group("gates: ");
    }
    segments::load_task();
    trap::load_table();
}

/// `INT n` of one of these vectors, or of the spare one.
fn interrupt(number: u8) -> Option<Trap> {
    match number {
        0x7f => trapping!(=> "int 0x7f"),
        0x80 => trapping!(=> "int 0x80"),
        0x81 => trapping!(=> "int 0x81"),
        0xff => trapping!(=> "int 0xff"),
        _ => trapping!(=> "int 0x91"),
    }
}

fn load_table(base: u64) -> Option<(u8, u64)> {
    let pointer = segments::TablePointer { limit: 0xfff, base };
    short(trapping!(=> "lidt [{0}]"; in(reg) &raw const pointer))
}

/// A gate of random bits, and what `INT n` through it must come to.
struct Junk {
    target: u64,
    selector: u16,
    access: u8,
    ist: u8,
    /// The code segment at [`FREE`].
    descriptor: u64,
}

impl Junk {
    fn new(random: &mut Random) -> Self {
        const SELECTORS: [u16; 12] = [
            0,
            3,
            segments::CODE,
            segments::CODE | 3,
            segments::DATA,
            segments::CODE32,
            segments::USER_CODE,
            TASK,
            FREE,
            FREE | 1,
            0x7f8,
            0xc,
        ];
        let upper = random.next() | 0xffff_8000_0000_0000;
        Self {
            target: if random.below(4) == 0 { random.next() | 1 << 47 } else { upper },
            selector: random.pick(&SELECTORS),
            access: if random.below(3) == 0 { random.next() as u8 } else { 0x8e | random.below(2) as u8 },
            ist: random.below(8) as u8,
            descriptor: random.next() & 0x0060_ff00_0000_0000,
        }
    }

    fn expected(&self) -> (u8, u64) {
        let by_gate = u64::from(SPARE) * 8 | IN_IDT;
        let selector = u64::from(self.selector & !3);
        let descriptor = match self.selector & !3 {
            FREE => self.descriptor,
            segments::CODE => 0x00af_9b00_0000_0000,
            segments::DATA => 0x00cf_9300_0000_0000,
            segments::CODE32 => 0x00cf_9b00_0000_0000,
            0x30 => 0x00af_fb00_0000_0000,
            _ => 0,
        };
        let (is_segment, is_code) = (1 << 44, 1 << 43);
        let (long, big, present) = (1 << 53, 1 << 54, 1 << 47);
        let inner = descriptor >> 45 & 3 == 0;
        match () {
            () if !matches!(self.access & 0x1f, 0x0e | 0x0f) => (vector::GP, by_gate),
            () if self.access & 0x80 == 0 => (vector::NP, by_gate),
            () if selector == 0 => (vector::GP, 0),
            () if descriptor & (is_segment | is_code) != is_segment | is_code => (vector::GP, selector),
            // Conforming or not, the handler may not be less privileged.
            () if !inner => (vector::GP, selector),
            () if descriptor & (long | big) != long => (vector::GP, selector),
            () if descriptor & present == 0 => (vector::NP, selector),
            () if (self.target << 16) as i64 >> 16 != self.target as i64 => (vector::GP, 0),
            // Nothing is mapped there.
            () => (vector::PF, code::I),
        }
    }
}

fn junk(s: &mut Suite) {
    const ROUNDS: u32 = 5_000;
    let mut random = Random::new(30);
    let (mut right, mut through) = (0, 0);
    for _ in 0..ROUNDS {
        let junk = Junk::new(&mut random);
        segments::set_descriptor(FREE, junk.descriptor);
        trap::set_raw_gate(SPARE, gate(junk.target, junk.selector, junk.ist, junk.access));
        let got = interrupt(SPARE);
        let expected = junk.expected();
        right += u32::from(short(got) == Some(expected));
        through += u32::from(expected.0 == vector::PF && got.is_some_and(|trap| trap.cr2 == junk.target));
    }
    trap::reset_gate(SPARE);
    segments::set_descriptor(FREE, 0);
    s.check("five thousand gates of junk", right, ROUNDS);
    s.check("of which some lead somewhere", through > 100, true);
}

/// Vectors from 80h on lie beyond the end of RAM.
fn table_at_the_end(s: &mut Suite) {
    let page = LastPage::borrow();
    let base = page.end - 0x80 * 16;
    copy(trap::IDT.address(), base, 0x80 * 16);
    segments::lidt(0xfff, base);
    let last = short(interrupt(0x7f));
    let first = short(interrupt(0x80));
    let other = short(interrupt(0xff));
    trap::load_table();
    page.restore();
    s.check("a table across the end of RAM: the last gate in it", last, Some((0x7f, 0)));
    let expected = |number: u64| Some((vector::GP, number * 8 | IN_IDT));
    s.check("and those beyond", (first, other), (expected(0x80), expected(0xff)));
}

/// Vectors from 80h on lie in an absent page, then in one that only ring 3 may use, which is none to the CPU.
fn table_in_pages(s: &mut Suite) {
    let tables = Tables::new();
    let (first, second) = (pages(1), pages(1));
    copy(trap::IDT.address(), first + 0x800, 0x800);
    copy(trap::IDT.address() + 0x800, second, 0x800);
    tables.map(FAR, first, bit::P | bit::W);
    tables.entry(FAR + PAGE, 1);
    tables.load();
    segments::lidt(0xfff, FAR + 0x800);
    let below = short(interrupt(0x7f));
    let absent = fault(interrupt(0x81));
    tables.map(FAR + PAGE, second, bit::P);
    let there = short(interrupt(0x81));
    trap::load_table();
    cpu::write_cr3(memory::boot_root());
    s.check("a table across two pages", (below, there), (Some((0x7f, 0)), Some((0x81, 0))));
    s.check("whose second one is absent", absent, Some((vector::PF, 0, FAR + PAGE + 0x10)));
}

/// Vectors from 80h on are registers of the local APIC.
fn table_of_registers(s: &mut Suite) {
    let tables = Tables::new();
    let first = pages(1);
    copy(trap::IDT.address(), first + 0x800, 0x800);
    tables.map(FAR, first, bit::P | bit::W);
    tables.map(FAR + PAGE, 0xfee0_0000, bit::P | bit::W);
    tables.load();
    segments::lidt(0xfff, FAR + 0x800);
    let got = [0x80, 0x81, SPARE, 0xff].map(|number| short(interrupt(number)));
    trap::load_table();
    cpu::write_cr3(memory::boot_root());
    let expected = [0x80, 0x81, SPARE, 0xff].map(|number| Some((vector::GP, u64::from(number) * 8 | IN_IDT)));
    s.check("a table of the local APIC's registers", got, expected);
}

/// Lets a gate take its stack from IST7 of this task.
fn with_task(base: u64, limit: u32) -> Option<(u8, u64, u64)> {
    segments::set_task_descriptor(FREE, base, limit, 0x89);
    segments::ltr(FREE);
    trap::set_raw_gate(SPARE, gate(address(recover), segments::CODE, ist::SPARE2, INTERRUPT_GATE));
    let got = interrupt(SPARE);
    trap::reset_gate(SPARE);
    segments::load_task();
    fault(got).map(|(vector, error, address)| (vector, error, if vector == vector::PF { address } else { 0 }))
}

fn task_limits(s: &mut Suite) {
    let base = segments::TSS.address();
    // IST7 is at bytes 84 to 91.
    let got = [91, 90, 84, 83].map(|limit| with_task(base, limit));
    let short = Some((vector::TS, u64::from(FREE), 0));
    let fits = Some((crate::tools::RECOVERED, 0, 0));
    s.check("#TS by a stack beyond the task's limit", got, [fits, short, short, short]);
}

/// A task of which IST6 and IST7 lie beyond the end of RAM: a stack of ones.
fn task_at_the_end(s: &mut Suite) {
    let page = LastPage::borrow();
    let base = page.end - 76;
    for offset in (0..76).step_by(4) {
        write(base + offset, memory::read::<u32>(segments::TSS.address() + offset));
    }
    let got = with_task(base, 103);
    page.restore();
    let top: u64 = !15;
    s.check("a task across the end of RAM", got, Some((vector::PF, code::W, top - 8)));
}

fn task_in_pages(s: &mut Suite) {
    let tables = Tables::new();
    let page = pages(1);
    let start = PAGE - 76;
    for offset in (0..76).step_by(4) {
        write(page + start + offset, memory::read::<u32>(segments::TSS.address() + offset));
    }
    tables.map(FAR, page, bit::P | bit::W);
    tables.entry(FAR + PAGE, 1);
    tables.load();
    let got = with_task(FAR + start, 103);
    s.check("a task that ends in an absent page", got, Some((vector::PF, 0, FAR + PAGE + 8)));
    cpu::write_cr3(memory::boot_root());
}

/// LTR of random descriptors.
fn task_descriptors(s: &mut Suite) {
    const ROUNDS: u32 = 2_000;
    let mut random = Random::new(31);
    let right = (0..ROUNDS).filter(|_| {
        let access = if random.below(4) == 0 { 0x89 } else { random.next() as u8 };
        segments::set_task_descriptor(FREE, random.next() >> 20, random.next() as u32 & 0xf_ffff, access);
        let selector = random.pick(&[FREE, FREE | 1, FREE | 3, 0, 4, 0x7f8, 0xf8]);
        let got = trapping!(=> "ltr {0:x}"; in(reg) selector);
        if got.is_none() {
            segments::load_task();
        }
        let index = u64::from(selector & !3);
        let expected = match () {
            () if index == 0 => Some((vector::GP, 0)),
            () if index != FREE.into() || access & 0x1f != 9 => Some((vector::GP, index)),
            () if access & 0x80 == 0 => Some((vector::NP, index)),
            () => None,
        };
        short(got) == expected
    });
    let right = right.count();
    segments::set_descriptor(FREE, 0);
    segments::set_descriptor(FREE + 8, 0);
    s.check("two thousand task descriptors of junk", right as u32, ROUNDS);
}
