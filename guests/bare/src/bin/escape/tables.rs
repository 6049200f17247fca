//! Page tables that lie where no table can, that lead to themselves, that are full of junk (Intel SDM volume 3,
//! chapter 4).
use crate::tools::{FAR, LastPage, PAGE, Random, copy, fault, ram_end};
use core::arch::asm;
use kit::{
    Suite, Trap, cpu,
    memory::{self, ADDRESS, Tables, bit, fault as code, pages, read, write},
    trap::vector,
    trapping,
};

/// The rights of an entry that leads to another table.
const TABLE: u64 = bit::P | bit::W | bit::U;
/// First entry of the upper half.
const UPPER: u64 = 256;

pub fn all(s: &mut Suite) {
    nowhere(s);
    at_the_end(s);
    recursive(s);
    all_recursive(s);
    over_itself(s);
    junk(s);
}

fn touch(address: u64) -> Option<Trap> {
    trapping!(=> "mov rax, [{0}]"; in(reg) address)
}

/// Tables of every level in holes, among device registers, beyond all memory.
fn nowhere(s: &mut Suite) {
    let top = (1u64 << (cpu::cpuid(0x8000_0008, 0).eax & 0xff).min(51)) - PAGE;
    let places = [ram_end(), 0xe000_0000, 0xfec0_0000, 0xfee0_0000, 0xffff_f000, 1 << 32, top];
    for level in [4, 3, 2] {
        let tables = Tables::new();
        tables.load();
        let mut reserved = 0;
        for place in places {
            write(tables.entry(FAR, level), place | TABLE);
            cpu::invlpg(FAR);
            let expected = Some((vector::PF, code::P | code::RSVD, FAR));
            let written = trapping!(=> "mov [{0}], rax"; in(reg) FAR);
            let with_write = expected.map(|(vector, error, address)| (vector, error | code::W, address));
            reserved += u32::from(fault(touch(FAR)) == expected && fault(written) == with_write);
        }
        let what = match level {
            4 => "directory pointers outside of RAM are ones, which are reserved",
            3 => "directories outside of RAM, too",
            _ => "tables outside of RAM, too",
        };
        s.check(what, reserved, places.len() as u32);
    }
    cpu::write_cr3(memory::boot_root());
}

/// Tables in the last page of RAM.
fn at_the_end(s: &mut Suite) {
    let page = LastPage::borrow();
    let tables = Tables::new();
    let target = pages(1);
    write(target + 8, 0x1234u64);
    tables.map(FAR, target, TABLE);
    copy(tables.root, page.start, PAGE);
    cpu::write_cr3(page.start);
    s.check("the root in the last page of RAM", read::<u64>(FAR + 8), 0x1234);
    tables.load();
    let table = tables.entry(FAR, 1) & ADDRESS;
    copy(table, page.start, PAGE);
    write(tables.entry(FAR, 2), page.start | TABLE);
    cpu::invlpg(FAR);
    // SAFETY: the first page is the target's; what lies behind belongs to nobody.
    unsafe { asm!("mov qword ptr [{0}], 0x77", in(reg) FAR + 16) };
    s.check(
        "a table in the last page of RAM",
        (read::<u64>(FAR + 8), read::<u64>(target + 16)),
        (0x1234, 0x77),
    );
    cpu::write_cr3(memory::boot_root());
    page.restore();
}

/// Address that walks through these entries, 0 to 511, of levels 4 to 1.
fn walk(entries: [u64; 4], offset: u64) -> u64 {
    let address = entries.iter().fold(0, |address, entry| address << 9 | entry) << 12 | offset;
    ((address << 16) as i64 >> 16) as u64
}

/// A root with one entry that leads to itself: the tables are seen, and changed, through themselves.
fn recursive(s: &mut Suite) {
    const SELF: u64 = 510;
    let tables = Tables::new();
    let (one, two) = (pages(1), pages(1));
    write(one, 1u64);
    write(two, 2u64);
    tables.map(FAR, one, TABLE);
    write(tables.root + SELF * 8, tables.root | TABLE);
    tables.load();
    let root = walk([SELF; 4], 0);
    s.check("a root seen through itself", read::<u64>(root + SELF * 8) & ADDRESS, tables.root);
    let entry = read::<u64>(tables.root + SELF * 8);
    s.check("was accessed and not written", entry & (bit::A | bit::D), bit::A);
    let index = |level: u64| FAR >> (12 + 9 * (level - 1)) & 511;
    let leaf = walk([SELF, index(4), index(3), index(2)], index(1) * 8);
    s.check("an entry seen through the tables", read::<u64>(leaf) & ADDRESS, one);
    let first = read::<u64>(FAR);
    write(leaf, two | TABLE);
    cpu::invlpg(FAR);
    s.check("and changed through them", (first, read::<u64>(FAR)), (1, 2));
    // The entry by which it is seen takes itself away.
    write(root + SELF * 8, 0u64);
    cpu::invlpg(root);
    s.check("an entry that removes itself", fault(touch(root)), Some((vector::PF, 0, root)));
    cpu::write_cr3(memory::boot_root());
}

/// A root whose upper half leads to itself everywhere: every path ends in the root.
fn all_recursive(s: &mut Suite) {
    let root = pages(1);
    copy(memory::boot_root(), root, PAGE);
    for entry in UPPER..512 {
        write(root + entry * 8, root | TABLE);
    }
    cpu::write_cr3(root);
    let mut random = Random::new(20);
    let right = (0..2_000)
        .filter(|_| {
            let path = core::array::from_fn(|_| UPPER + random.below(512 - UPPER));
            let slot = random.below(512);
            // Its first entry leads to the low tables, the rest of the lower half nowhere.
            let got: u64 = read(walk(path, slot * 8));
            got & ADDRESS == if slot >= UPPER { root } else { read::<u64>(root + slot * 8) & ADDRESS }
        })
        .count();
    s.check("two thousand paths through a root of itself", right, 2_000);
    // Its own dirty bit is set by a write through it.
    let slot = walk([UPPER, UPPER + 1, UPPER + 2, UPPER + 3], 511 * 8);
    write(slot, root | TABLE);
    s.check("a write marks the entry it went through", read::<u64>(root + (UPPER + 3) * 8) & bit::D, bit::D);
    cpu::write_cr3(memory::boot_root());
}

/// Stores that overwrite the tables by which they are made.
fn over_itself(s: &mut Suite) {
    let tables = Tables::new();
    tables.map(FAR, pages(1), TABLE);
    let table = tables.entry(FAR, 1) & !(PAGE - 1);
    tables.map(FAR, table, TABLE);
    tables.load();
    // SAFETY: the table is this test's, and nothing else is mapped by it.
    unsafe { asm!("rep stosq", inout("rcx") 512u64 => _, inout("rdi") FAR => _, in("rax") 0u64) };
    cpu::write_cr3(tables.root);
    s.check(
        "a table that zeroes itself",
        (read::<u64>(table), fault(touch(FAR))),
        (0, Some((vector::PF, 0, FAR))),
    );
    tables.map(FAR, table, TABLE);
    let before = read::<u64>(tables.entry(FAR, 1));
    // A read-modify-write of the entry that maps it sets the dirty bit first, and must not lose it.
    // SAFETY: as above.
    unsafe { asm!("lock or qword ptr [{0}], 0", in(reg) FAR + (FAR >> 12 & 511) * 8) };
    let after = read::<u64>(tables.entry(FAR, 1));
    s.check("an entry that is changed through itself", after, before | bit::A | bit::D);
    cpu::write_cr3(memory::boot_root());
}

/// What a read by an entry of junk at this level must come to: an error code, or nothing.
fn expected(entry: u64, level: u32) -> Option<u64> {
    let bits = cpu::cpuid(0x8000_0008, 0).eax & 0xff;
    let large = entry & bit::PS != 0 && level > 1;
    let no_gigabytes = level == 3 && cpu::cpuid(0x8000_0001, 0).edx >> 26 & 1 == 0;
    let unaligned = match level {
        3 => 0x3fff_e000,
        2 => 0x001f_e000,
        _ => 0,
    };
    let reserved = ADDRESS & !((1 << bits) - 1) | if large { unaligned } else { 0 };
    match entry {
        _ if entry & bit::P == 0 => Some(0),
        _ if entry & reserved != 0 || no_gigabytes => Some(code::P | code::RSVD),
        _ => None,
    }
}

/// Tables of random entries, of which only large pages and 4 KiB pages are followed.
fn junk(s: &mut Suite) {
    let mut random = Random::new(21);
    for (level, what) in
        [(1, "a table of junk"), (2, "a directory of junk"), (3, "a directory pointer table of junk")]
    {
        let tables = Tables::new();
        let first = tables.entry(FAR & !((512 << (12 + 9 * (level - 1))) - 1), level);
        tables.load();
        let right = (0..2_048u64)
            .filter(|round| {
                let at = first + round % 512 * 8;
                let leaf = if level > 1 { bit::PS } else { 0 };
                // Not among the registers of the interrupt controllers.
                let entry = random.next() & !(0xff << 24) | leaf;
                let entry = if random.below(2) == 0 { entry & 0xfff0_003f_c000_0fff } else { entry };
                write(at, entry);
                let address =
                    FAR & !((512 << (12 + 9 * (level - 1))) - 1) | round % 512 << (12 + 9 * (level - 1));
                cpu::invlpg(address);
                let got = touch(address);
                write(at, 0u64);
                cpu::invlpg(address);
                fault(got) == expected(entry, level).map(|error| (vector::PF, error, address))
            })
            .count();
        s.check(what, right, 2_048);
    }
    cpu::write_cr3(memory::boot_root());
}
