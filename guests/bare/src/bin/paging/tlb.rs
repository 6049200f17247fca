//! What must make the CPU forget a translation, and what tells translations apart.
use crate::{ALL, FAR};
use kit::{
    Suite, catch,
    cpu::{self, cr4},
    memory::{self, Tables, bit, pages},
    trap::vector,
    user::Space,
};

pub fn all(s: &mut Suite, space: &Space) {
    let (one, two) = (pages(1), pages(1));
    memory::write(one, 1u64);
    memory::write(two, 2u64);
    let entry = space.tables.entry(FAR, 1);
    let see = || memory::read::<u64>(FAR);
    let set = |page: u64, bits: u64| memory::write(entry, page | ALL | bits);
    // Each time: have the old translation used, change the entry, invalidate, look.
    let changed = |s: &mut Suite, what: &str, bits: u64, invalidate: &dyn Fn()| {
        set(one, bits);
        cpu::write_cr4(cpu::read_cr4() ^ cr4::PGE);
        cpu::write_cr4(cpu::read_cr4() ^ cr4::PGE);
        let before = see();
        set(two, bits);
        invalidate();
        s.check(what, (before, see()), (1, 2));
    };
    changed(s, "INVLPG makes a change seen", 0, &|| cpu::invlpg(FAR));
    changed(s, "INVLPG of another byte of the page, too", 0, &|| cpu::invlpg(FAR + 0xabc));
    changed(s, "and a load of CR3", 0, &|| cpu::write_cr3(cpu::read_cr3()));
    let before = cpu::read_cr4();
    cpu::write_cr4(before | cr4::PGE);
    changed(s, "INVLPG works on global pages", bit::G, &|| cpu::invlpg(FAR));
    changed(s, "and a change of CR4.PGE", bit::G, &|| {
        cpu::write_cr4(before & !cr4::PGE);
        cpu::write_cr4(before | cr4::PGE);
    });
    changed(s, "a load of CR0 that changes CR0.PG or WP", 0, &|| {
        cpu::write_cr0(cpu::read_cr0() ^ cpu::cr0::WP);
        cpu::write_cr0(cpu::read_cr0() ^ cpu::cr0::WP);
        cpu::invlpg(FAR);
    });
    cpu::write_cr4(before);

    // An upper level changes: INVLPG drops what was cached of it.
    let directory = space.tables.entry(FAR, 2);
    let table = memory::read::<u64>(directory);
    let other = pages(1);
    memory::write(other + (FAR >> 12 & 511) * 8, one | ALL);
    set(two, 0);
    cpu::invlpg(FAR);
    let seen = see();
    memory::write(directory, other | ALL);
    cpu::invlpg(FAR);
    s.check("INVLPG makes a change of an upper level seen", (seen, see()), (2, 1));
    memory::write(directory, table);
    cpu::invlpg(FAR);

    // The same page at two addresses.
    let alias = FAR + 0x20_0000;
    space.tables.map(alias, two, ALL);
    memory::write(alias, 22u64);
    s.check("two addresses of one page show the same", see(), 22);
    memory::write(two, 2u64);

    let spaces = Tables::new();
    spaces.map(FAR, one, ALL);
    spaces.load();
    let there = see();
    space.tables.load();
    s.check("address spaces are apart", (there, see()), (1, 2));
    if cpu::feature_1_ecx(17) {
        process_contexts(s, space, &spaces);
    } else {
        s.skip("PCID", "not offered");
    }
    if cpu::feature_7_ebx(10) {
        invpcid(s, space, one, two);
    } else {
        s.skip("INVPCID", "not offered");
    }
}

const KEEP: u64 = 1 << 63;

fn process_contexts(s: &mut Suite, space: &Space, other: &Tables) {
    let see = || memory::read::<u64>(FAR);
    let before = cpu::read_cr4();
    let gp = |got: Option<kit::Trap>| got.map(|trap| (trap.vector, trap.error));
    let got = catch(|| cpu::write_cr3(space.tables.root | KEEP));
    s.check("PCID: bit 63 of CR3 is reserved without it", gp(got), Some((vector::GP, 0)));
    cpu::write_cr3(space.tables.root | 8);
    let got = catch(|| cpu::write_cr4(before | cr4::PCIDE));
    s.check("PCID: #GP by switching it on with CR3 bits 11 to 0", gp(got), Some((vector::GP, 0)));
    space.tables.load();
    cpu::write_cr4(before | cr4::PCIDE);
    cpu::write_cr3(space.tables.root | 1);
    let here = see();
    cpu::write_cr3(other.root | 2);
    let there = see();
    cpu::write_cr3(space.tables.root | 1 | KEEP);
    s.check("PCID: contexts are apart without a flush", (here, there, see()), (2, 1, 2));
    s.check("PCID: bit 63 is not kept in CR3", cpu::read_cr3(), space.tables.root | 1);
    // A load without bit 63 forgets the context's own.
    let entry = space.tables.entry(FAR, 1);
    let mapped: u64 = memory::read(entry);
    memory::write(entry, memory::read::<u64>(other.entry(FAR, 1)));
    cpu::write_cr3(space.tables.root | 1);
    s.check("PCID: a load without bit 63 makes a change seen", see(), 1);
    memory::write(entry, mapped);
    cpu::write_cr3(space.tables.root | 1);
    let got = catch(|| cpu::write_cr0(cpu::read_cr0() & !cpu::cr0::PG));
    s.check("PCID: #GP by switching paging off with it", gp(got), Some((vector::GP, 0)));
    space.tables.load();
    cpu::write_cr4(before);
}

fn invpcid(s: &mut Suite, space: &Space, one: u64, two: u64) {
    let run = |kind: u64, context: u64, address: u64| {
        let descriptor = [context, address];
        catch(|| {
            // SAFETY: reads 16 bytes and drops translations.
            unsafe {
                core::arch::asm!("invpcid {0}, [{1}]", in(reg) kind, in(reg) &descriptor, options(nostack))
            }
        })
        .map(|trap| (trap.vector, trap.error))
    };
    let see = || memory::read::<u64>(FAR);
    let entry = space.tables.entry(FAR, 1);
    for (what, kind) in [
        ("INVPCID: one address", 0u64),
        ("INVPCID: one context", 1),
        ("INVPCID: everything with global pages", 2),
        ("INVPCID: everything but global pages", 3),
    ] {
        memory::write(entry, one | ALL);
        cpu::invlpg(FAR);
        let before = see();
        memory::write(entry, two | ALL);
        let got = run(kind, 0, FAR);
        s.check(what, (before, got, see()), (1, None, 2));
    }
    s.check("INVPCID: #GP by an unknown kind", run(4, 0, 0), Some((vector::GP, 0)));
    s.check("INVPCID: #GP by a non-canonical address", run(0, 0, 1 << 63), Some((vector::GP, 0)));
    s.check("INVPCID: #GP by reserved bits", run(0, 1 << 12, 0), Some((vector::GP, 0)));
}
