//! Segments from tables of junk, in holes and absent pages; returns, jumps and system calls to nowhere (Intel SDM
//! volume 3, chapters 3 and 5).
use crate::tools::{FAR, LastPage, PAGE, Random, copy, fault, holes_are_ones, short};
use core::arch::asm;
use kit::{
    Suite, Trap, catch, cpu,
    cpu::msr,
    memory::{self, Tables, bit, fault as code, pages, write},
    segments::{self, FREE, GDT},
    trap::vector,
    trapping,
    user::Space,
};

/// Bytes of the table.
const SIZE: u64 = 0x100;

pub fn all(s: &mut Suite) {
    data_segments(s);
    stack_segments(s);
    table_at_the_end(s);
    table_in_pages(s);
    local_tables(s);
    if holes_are_ones() {
        s.group("descriptors: transfers: ");
        returns(s);
        far_transfers(s);
        s.group("descriptors: ");
    } else {
        s.skip("transfers", "holes are zeros, and zeros are code");
    }
    system_calls(s);
    segments::set_descriptor(FREE, 0);
    segments::set_descriptor(FREE + 8, 0);
}

fn load_es(selector: u16) -> Option<Trap> {
    let got = trapping!(=> "mov es, {0:e}"; in(reg) u32::from(selector));
    // SAFETY: the kernel's own data segment.
    unsafe { asm!("mov es, {0:e}", in(reg) u32::from(segments::DATA)) };
    got
}

const CODE: u64 = 1 << 43;
const WRITABLE_OR_READABLE: u64 = 1 << 41;
const CONFORMING: u64 = 1 << 42;
const SEGMENT: u64 = 1 << 44;
const PRESENT: u64 = 1 << 47;

fn data_segments(s: &mut Suite) {
    const ROUNDS: usize = 4_000;
    let mut random = Random::new(40);
    let right = (0..ROUNDS).filter(|_| {
        let descriptor = random.next();
        segments::set_descriptor(FREE, descriptor);
        let selector = random.pick(&[FREE, FREE | 1, FREE | 2, FREE | 3, FREE | 4, 0, 3, 0x100, 0xffff]);
        let index = u64::from(selector & !3);
        let (dpl, rpl) = (descriptor >> 45 & 3, u64::from(selector & 3));
        let readable = descriptor & CODE == 0 || descriptor & WRITABLE_OR_READABLE != 0;
        let any_ring = descriptor & (CODE | CONFORMING) == CODE | CONFORMING;
        let expected = match () {
            () if index == 0 => None,
            () if index != FREE.into() || descriptor & SEGMENT == 0 || !readable => Some((vector::GP, index)),
            () if !any_ring && rpl > dpl => Some((vector::GP, index)),
            () if descriptor & PRESENT == 0 => Some((vector::NP, index)),
            () => None,
        };
        short(load_es(selector)) == expected
    });
    s.check("four thousand data segments of junk", right.count(), ROUNDS);
}

fn stack_segments(s: &mut Suite) {
    const ROUNDS: usize = 4_000;
    let mut random = Random::new(41);
    let right = (0..ROUNDS).filter(|_| {
        // Writable data for ring 0, but for one thing or another.
        let data = 0x9200_0000_0000 ^ 1 << (40 + random.below(8));
        let descriptor = random.next() & !(0xff << 40) | random.pick(&[0x9200_0000_0000, data]);
        segments::set_descriptor(FREE, descriptor);
        let selector = random.pick(&[FREE, FREE, FREE | 1, FREE | 4, 0, 0x100]);
        let got = trapping!("mov ss, {0:e}", => "mov ss, {1:e}"; in(reg) u32::from(selector), in(reg) u32::from(segments::DATA));
        let index = u64::from(selector & !3);
        let access = descriptor & (SEGMENT | CODE | WRITABLE_OR_READABLE);
        let fits = access == SEGMENT | WRITABLE_OR_READABLE && descriptor >> 45 & 3 == 0 && selector & 3 == 0;
        let expected = match () {
            () if index == 0 => None,
            () if index != FREE.into() || !fits => Some((vector::GP, index)),
            () if descriptor & PRESENT == 0 => Some((vector::SS, index)),
            () => None,
        };
        short(got) == expected
    });
    s.check("four thousand stack segments of junk", right.count(), ROUNDS);
}

/// The table's entries from [`FREE`] on lie beyond the end of RAM: ones, which is conforming code for any ring.
fn table_at_the_end(s: &mut Suite) {
    let page = LastPage::borrow();
    let base = page.end - u64::from(FREE);
    copy(GDT.address(), base, FREE.into());
    segments::lgdt(SIZE as u16 - 1, base);
    let data = (short(load_es(FREE)), short(load_es(FREE | 3)));
    let stack = short(trapping!(=> "mov ss, {0:e}"; in(reg) u32::from(FREE)));
    let task = short(trapping!(=> "ltr {0:x}"; in(reg) FREE));
    let last = short(load_es(segments::DATA16));
    segments::lgdt(SIZE as u16 - 1, GDT.address());
    page.restore();
    s.check("a table across the end of RAM: code of ones is readable", data, (None, None));
    let refused = Some((vector::GP, FREE.into()));
    s.check("but no stack and no task", (stack, task), (refused, refused));
    s.check("the last one in RAM", last, None);
}

fn table_in_pages(s: &mut Suite) {
    let tables = Tables::new();
    let (first, second) = (pages(1), pages(1));
    let base = FAR + PAGE - u64::from(FREE);
    copy(GDT.address(), first + PAGE - u64::from(FREE), FREE.into());
    // Data that was never accessed.
    write(second, 0x00cf_9200_0000_ffffu64);
    tables.map(FAR, first, bit::P | bit::W);
    tables.entry(FAR + PAGE, 1);
    tables.load();
    segments::lgdt(SIZE as u16 - 1, base);
    let absent = fault(load_es(FREE));
    tables.map(FAR + PAGE, second, bit::P);
    let read_only = fault(load_es(FREE));
    tables.map(FAR + PAGE, second, bit::P | bit::W);
    let there = short(load_es(FREE));
    segments::lgdt(SIZE as u16 - 1, GDT.address());
    cpu::write_cr3(memory::boot_root());
    let at = FAR + PAGE;
    s.check("a table that ends in an absent page", absent, Some((vector::PF, 0, at)));
    let read_only = read_only.map(|(vector, error, address)| (vector, error, address & !7));
    s.check("in a read-only one, to be marked", read_only, Some((vector::PF, code::P | code::W, at)));
    s.check("marked at last", (there, memory::read::<u64>(second)), (None, 0x00cf_9300_0000_ffff));
}

/// A local table in a hole, and of junk descriptors.
fn local_tables(s: &mut Suite) {
    const ROUNDS: usize = 1_000;
    let lldt = |selector: u16| trapping!(=> "lldt {0:x}"; in(reg) selector);
    segments::set_task_descriptor(FREE, crate::tools::ram_end() + 0x2000, 0xff, 0x82);
    let loaded = short(lldt(FREE));
    let by_ones = (short(load_es(4)), short(load_es(0xff)), short(load_es(0x104)));
    s.check("a local table in a hole", (loaded, by_ones), (None, (None, None, Some((vector::GP, 0x104)))));
    let mut random = Random::new(42);
    let right = (0..ROUNDS).filter(|_| {
        let access = if random.below(3) == 0 { 0x82 } else { random.next() as u8 };
        segments::set_task_descriptor(FREE, random.next() >> 20, random.next() as u32 & 0xf_ffff, access);
        let expected = match () {
            () if access & 0x1f != 2 => Some((vector::GP, FREE.into())),
            () if access & 0x80 == 0 => Some((vector::NP, FREE.into())),
            () => None,
        };
        short(lldt(FREE)) == expected
    });
    s.check("a thousand local tables of junk", right.count(), ROUNDS);
    segments::lldt(0);
}

/// What may end a transfer to nowhere.
fn is_refusal(got: Option<Trap>) -> bool {
    let refusals = [vector::UD, vector::GP, vector::NP, vector::SS, vector::PF, vector::DB];
    got.is_some_and(|trap| refusals.contains(&trap.vector))
}

/// An address at which nothing is, or which is none. As an address of 32-bit code, it is in a hole.
fn nowhere(random: &mut Random) -> u64 {
    let upper = random.next() | if random.below(2) == 0 { 0xffff_8000_0000_0000 } else { 1 << 33 };
    upper & !0x8000_0000 | 0x4000_0000
}

/// A descriptor of junk, but with base 0, so that code in it is where [`nowhere`] says.
fn flat(random: &mut Random) -> u64 {
    random.next() & 0x00ff_ff00_0000_ffff
}

fn returns(s: &mut Suite) {
    const ROUNDS: usize = 20_000;
    let mut random = Random::new(43);
    let any_selector = |random: &mut Random| random.next() & if random.below(4) == 0 { 0xffff } else { 0x7f };
    let ended = (0..ROUNDS).filter(|_| {
        // Interrupts stay off.
        let flags = random.next() & !0x200;
        let frame = [
            nowhere(&mut random),
            any_selector(&mut random),
            flags,
            random.next(),
            any_selector(&mut random),
        ];
        segments::set_descriptor(FREE, flat(&mut random));
        let got = trapping!("mov rsp, {0}", => "iretq"; in(reg) frame.as_ptr());
        is_refusal(got)
    });
    s.check("twenty thousand IRETQ with junk", ended.count(), ROUNDS);
    let ended = (0..ROUNDS).filter(|_| {
        let frame =
            [nowhere(&mut random), any_selector(&mut random), random.next(), any_selector(&mut random)];
        segments::set_descriptor(FREE, flat(&mut random));
        is_refusal(trapping!("mov rsp, {0}", => "retfq"; in(reg) frame.as_ptr()))
    });
    s.check("twenty thousand far returns with junk", ended.count(), ROUNDS);
    segments::load();
}

/// Far jumps and calls through call gates of junk.
fn far_transfers(s: &mut Suite) {
    const ROUNDS: usize = 5_000;
    let mut random = Random::new(44);
    let ended = (0..ROUNDS).filter(|_| {
        let access = if random.below(2) == 0 { 0x8c } else { random.next() & 0xff };
        let selector = random.pick(&[0u64, 8, 0x10, 0x18, 0x30, 0x33, 0x40, 0x60, 0x7f8]);
        let target = nowhere(&mut random);
        let low = target & 0xffff | selector << 16 | access << 40 | (target >> 16 & 0xffff) << 48;
        segments::set_descriptor(FREE, low);
        segments::set_descriptor(FREE + 8, target >> 32 & 0xffff_ffff | (random.next() & 0x1f00) << 32);
        // Absolute, to an offset above 1 GiB where only ones are, and a selector, mostly of the gate.
        let selector = random.pick(&[FREE, FREE, FREE | 3, FREE + 8, 0x40, 0x50, 0, 0x7f8]);
        let pointer = 0x4000_0000u64 | u64::from(selector) << 32;
        let got = if random.below(2) == 0 {
            trapping!(=> "jmp fword ptr [{0}]"; in(reg) &raw const pointer)
        } else {
            trapping!(=> "call fword ptr [{0}]"; in(reg) &raw const pointer)
        };
        is_refusal(got)
    });
    s.check("five thousand far jumps and calls through junk", ended.count(), ROUNDS);
    segments::load();
}

/// SYSCALL to nowhere, from ring 0 and ring 3, and back by SYSRET with junk.
fn system_calls(s: &mut Suite) {
    const ROUNDS: usize = 1_000;
    let mut random = Random::new(45);
    let space = Space::new();
    cpu::wrmsr(msr::STAR, u64::from(segments::USER_CODE32) << 48 | u64::from(segments::CODE) << 32);
    let ended = (0..ROUNDS).filter(|_| {
        let target = random.next() | 0xffff_8000_0000_0000;
        cpu::wrmsr(msr::LSTAR, target);
        cpu::wrmsr(msr::SFMASK, random.next() | 0x200);
        let got = kit::ring3!(space, "syscall");
        let inner = trapping!(=> "syscall"; out("rcx") _, out("r11") _);
        let expected = Some((vector::PF, code::I, target));
        fault(got) == expected && fault(inner) == expected
    });
    s.check("a thousand system calls to nowhere", ended.count(), ROUNDS);
    let ended = (0..ROUNDS).filter(|_| {
        cpu::wrmsr(msr::STAR, random.next());
        let (target, flags) = (nowhere(&mut random), random.next() & !0x200);
        let got = catch(|| {
            // SAFETY: it ends in a fault, in one ring or the other.
            unsafe { asm!("sysretq", in("rcx") target, in("r11") flags, options(noreturn)) }
        });
        got.is_some_and(|trap| matches!(trap.vector, vector::GP | vector::PF | vector::DB))
    });
    s.check("a thousand SYSRET to nowhere", ended.count(), ROUNDS);
    cpu::write_cr3(memory::boot_root());
}
