//! What each bit of an entry forbids, at each level, to ring 0 and to ring 3.
use crate::{ALL, FAR, Fault, fault, fetch, page_fault, read, write};
use kit::{
    Suite, Trap,
    cpu::{self, cr0, cr4, msr},
    memory::{self, LARGE, bit, fault as code, pages},
    segments,
    trap::LEAVE_USER,
    trapping,
    user::{self, Space},
};

const RET: u8 = 0xc3;

/// Accesses of ring 3, by an address in RBX that the code page's last word holds.
const POINTER: u64 = 0xff0;

fn aim(space: &Space, address: u64) {
    memory::write(space.code + POINTER, address);
}

fn user_read(space: &Space, address: u64) -> Option<Trap> {
    aim(space, address);
    kit::ring3!(space, "mov rbx, [rip + 0xff0 - 7]", "mov eax, [rbx]")
}

fn user_write(space: &Space, address: u64) -> Option<Trap> {
    aim(space, address);
    kit::ring3!(space, "mov rbx, [rip + 0xff0 - 7]", "mov [rbx], eax")
}

fn user_fetch(space: &Space, address: u64) -> Option<Trap> {
    aim(space, address);
    kit::ring3!(space, "mov rbx, [rip + 0xff0 - 7]", "call rbx")
}

/// Ring 3 came to its end without a fault.
fn through(trap: Option<Trap>) -> bool {
    trap.is_some_and(|trap| trap.vector == LEAVE_USER)
}

pub fn all(s: &mut Suite, space: &Space) {
    let page = pages(1);
    memory::write(page, RET);
    space.tables.map(FAR, page, ALL);
    s.check("ring 0 reads, writes and fetches", [read(FAR), write(FAR)].iter().all(Option::is_none), true);
    memory::write(page, RET);
    let user = [user_read(space, FAR), user_fetch(space, FAR), user_write(space, FAR)];
    s.check("ring 3 reads, writes and fetches", user.into_iter().all(through), true);
    memory::write(page, RET);
    absent(s, space);
    for (group, level) in [("4 KiB page: ", 1), ("directory: ", 2), ("directory pointer: ", 3), ("PML4: ", 4)]
    {
        s.group(group);
        rights(s, space, level);
    }
    s.group("");
    memory::write(space.tables.entry(FAR, 1), page | ALL);
    write_protection(s, space);
    large(s, space);
    memory::write(page, RET);
    supervisor_modes(s, space);
}

fn absent(s: &mut Suite, space: &Space) {
    let gone = FAR + 0x1000;
    s.check("read of an absent page", fault(read(gone)), page_fault(0, gone));
    s.check("write of an absent page", fault(write(gone)), page_fault(code::W, gone));
    s.check("fetch of an absent page", fault(fetch(gone)), page_fault(code::I, gone));
    s.check("ring 3 reads an absent page", fault(user_read(space, gone)), page_fault(code::U, gone));
    s.check(
        "ring 3 writes an absent page",
        fault(user_write(space, gone)),
        page_fault(code::U | code::W, gone),
    );
    s.check(
        "ring 3 fetches an absent page",
        fault(user_fetch(space, gone)),
        page_fault(code::U | code::I, gone),
    );
    // Everything else in an absent entry is software's.
    memory::write(space.tables.entry(gone, 1), !bit::P);
    s.check("an absent entry may hold anything", fault(read(gone)), page_fault(0, gone));
    memory::write(space.tables.entry(gone, 1), 0u64);
}

/// Takes rights away, or sets reserved bits, in the entry of one level that leads to `FAR`.
fn rights(s: &mut Suite, space: &Space, level: u32) {
    let entry = space.tables.entry(FAR, level);
    let whole: u64 = memory::read(entry);
    let with = |value: u64, access: &dyn Fn() -> Option<Trap>| -> Fault {
        memory::write(entry, value);
        cpu::invlpg(FAR);
        let got = fault(access());
        memory::write(entry, whole);
        cpu::invlpg(FAR);
        got
    };
    s.check("absent", with(whole & !bit::P, &|| read(FAR)), page_fault(0, FAR));
    let got = with(whole & !bit::W, &|| write(FAR));
    s.check("ring 0 writes read-only", got, page_fault(code::P | code::W, FAR));
    s.check("ring 0 reads read-only", with(whole & !bit::W, &|| read(FAR)), None);
    let got = with(whole & !bit::W, &|| user_write(space, FAR));
    s.check("ring 3 writes read-only", got, page_fault(code::P | code::W | code::U, FAR));
    let got = with(whole & !bit::U, &|| user_read(space, FAR));
    s.check("ring 3 reads ring 0's", got, page_fault(code::P | code::U, FAR));
    let got = with(whole & !bit::U, &|| user_write(space, FAR));
    s.check("ring 3 writes ring 0's", got, page_fault(code::P | code::U | code::W, FAR));
    let got = with(whole & !bit::U, &|| user_fetch(space, FAR));
    s.check("ring 3 fetches ring 0's", got, page_fault(code::P | code::U | code::I, FAR));
    let got = with(whole | bit::NX, &|| fetch(FAR));
    s.check("ring 0 fetches no-execute", got, page_fault(code::P | code::I, FAR));
    let got = with(whole | bit::NX, &|| user_fetch(space, FAR));
    s.check("ring 3 fetches no-execute", got, page_fault(code::P | code::I | code::U, FAR));
    s.check("no-execute is read", with(whole | bit::NX, &|| read(FAR)), None);
    cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) & !(1 << 11));
    let got = with(whole | bit::NX, &|| read(FAR));
    cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) | 1 << 11);
    s.check("without EFER.NXE the bit is reserved", got, page_fault(code::P | code::RSVD, FAR));
    if cpu::cpuid(0x8000_0008, 0).eax & 0xff < 52 {
        let got = with(whole | 1 << 51, &|| read(FAR));
        s.check("an address bit beyond the CPU's", got, page_fault(code::P | code::RSVD, FAR));
        let got = with(whole | 1 << 51, &|| user_write(space, FAR));
        s.check(
            "the same, written by ring 3",
            got,
            page_fault(code::P | code::RSVD | code::W | code::U, FAR),
        );
    } else {
        s.skip("an address bit beyond the CPU's", "it has 52");
        s.skip("the same, written by ring 3", "it has 52");
    }
    s.check(
        "cache bits and those of software change nothing",
        with(whole | bit::PWT | bit::PCD | 7 << 9, &|| write(FAR)),
        None,
    );
    memory::write(entry, whole & !(bit::A | bit::D));
    cpu::invlpg(FAR);
    read(FAR);
    let after: u64 = memory::read(entry);
    s.check("a read sets the accessed bit", after & (bit::A | bit::D), bit::A);
    memory::write(entry, whole & !(bit::A | bit::D));
    cpu::invlpg(FAR);
    write(FAR);
    let after: u64 = memory::read(entry);
    let both = if level == 1 { bit::A | bit::D } else { bit::A };
    s.check("a write sets the dirty bit of the page alone", after & (bit::A | bit::D), both);
    memory::write(entry, whole);
    memory::write(memory::read::<u64>(space.tables.entry(FAR, 1)) & memory::ADDRESS, RET);
    cpu::invlpg(FAR);
}

fn write_protection(s: &mut Suite, space: &Space) {
    let entry = space.tables.entry(FAR, 1);
    let whole: u64 = memory::read(entry);
    memory::write(entry, whole & !(bit::W | bit::D));
    cpu::invlpg(FAR);
    let before = cpu::read_cr0();
    write(FAR);
    let clean = memory::read::<u64>(entry) & bit::D;
    s.check("a forbidden write leaves the dirty bit alone", clean, 0);
    cpu::write_cr0(before & !cr0::WP);
    let got = write(FAR);
    let user = user_write(space, FAR);
    cpu::write_cr0(before);
    s.check("without CR0.WP ring 0 writes read-only pages", got.is_none(), true);
    let dirty = memory::read::<u64>(entry) & bit::D;
    s.check("and makes them dirty", dirty, bit::D);
    s.check("and ring 3 does not", fault(user), page_fault(code::P | code::W | code::U, FAR));
    cpu::invlpg(FAR);
    s.check("with it again neither does", fault(write(FAR)), page_fault(code::P | code::W, FAR));
    memory::write(entry, whole);
    cpu::invlpg(FAR);
}

fn large(s: &mut Suite, space: &Space) {
    const HERE: u64 = 0x2000_0000_0000;
    let physical = memory::aligned_pages(512, LARGE);
    memory::write(physical + 0x12_3450, 0x5eed_u64);
    memory::write(physical + 0x1000, RET);
    let entry = space.tables.entry(HERE, 2);
    let set = |value: u64| {
        memory::write(entry, value);
        cpu::invlpg(HERE);
    };
    set(physical | ALL | bit::PS);
    s.check("a 2 MiB page leads to its memory", memory::read::<u64>(HERE + 0x12_3450), 0x5eed);
    write(HERE + 0x10_0000);
    let bits = memory::read::<u64>(entry) & (bit::A | bit::D);
    s.check("a write makes it dirty", bits, bit::A | bit::D);
    set(physical | ALL | bit::PS | 1 << 12);
    s.check("its PAT bit is no address bit", memory::read::<u64>(HERE + 0x12_3450), 0x5eed);
    set(physical | ALL | bit::PS | 1 << 13);
    s.check("an unaligned 2 MiB page is reserved", fault(read(HERE)), page_fault(code::P | code::RSVD, HERE));
    set(physical | bit::P | bit::U | bit::PS);
    let at = HERE + 0x1f_f000;
    s.check("a read-only 2 MiB page", fault(write(at)), page_fault(code::P | code::W, at));
    set(physical | bit::P | bit::W | bit::PS);
    s.check("ring 0's 2 MiB page", fault(user_read(space, at)), page_fault(code::P | code::U, at));
    set(physical | ALL | bit::PS | bit::NX);
    let at = HERE + 0x1000;
    s.check("a 2 MiB page of data", fault(fetch(at)), page_fault(code::P | code::I, at));
    set(0);

    let entry = space.tables.entry(HERE, 3);
    let table: u64 = memory::read(entry);
    if cpu::cpuid(0x8000_0001, 0).edx >> 26 & 1 == 1 {
        memory::write(entry, ALL | bit::PS);
        cpu::invlpg(HERE);
        let at = HERE + physical + 0x12_3450;
        s.check("1 GiB page: leads to its memory", memory::read::<u64>(at), 0x5eed);
        memory::write(entry, ALL | bit::PS | 1 << 13);
        cpu::write_cr3(space.tables.root);
        s.check(
            "1 GiB page: unaligned, it is reserved",
            fault(read(HERE)),
            page_fault(code::P | code::RSVD, HERE),
        );
    } else {
        s.skip("1 GiB page", "not offered");
    }
    memory::write(entry, table);
    cpu::write_cr3(space.tables.root);
    let entry = space.tables.entry(FAR, 4);
    let whole: u64 = memory::read(entry);
    memory::write(entry, whole | bit::PS);
    cpu::write_cr3(space.tables.root);
    let got = fault(read(FAR));
    memory::write(entry, whole);
    cpu::write_cr3(space.tables.root);
    s.check("the page size bit of the PML4 is reserved", got, page_fault(code::P | code::RSVD, FAR));
}

fn supervisor_modes(s: &mut Suite, space: &Space) {
    let before = cpu::read_cr4();
    if cpu::feature_7_ebx(7) {
        cpu::write_cr4(before | cr4::SMEP);
        s.check(
            "SMEP: ring 0 fetches a page of ring 3",
            fault(fetch(FAR)),
            page_fault(code::P | code::I, FAR),
        );
        s.check("SMEP: ring 3 fetches it", through(user_fetch(space, FAR)), true);
        let entry = space.tables.entry(FAR, 2);
        let whole: u64 = memory::read(entry);
        memory::write(entry, whole & !bit::U);
        cpu::invlpg(FAR);
        s.check(
            "SMEP: ring 0 fetches a page that an upper level takes from ring 3",
            fetch(FAR).is_none(),
            true,
        );
        memory::write(entry, whole);
        cpu::invlpg(FAR);
        cpu::write_cr4(before);
        s.check("SMEP: switched off it lets ring 0 fetch", fetch(FAR).is_none(), true);
    } else {
        s.skip("SMEP", "not offered");
    }
    if !cpu::feature_7_ebx(20) {
        s.skip("SMAP", "not offered");
        return;
    }
    cpu::write_cr4(before | cr4::SMAP);
    s.check("SMAP: ring 0 reads a page of ring 3", fault(read(FAR)), page_fault(code::P, FAR));
    s.check("SMAP: ring 0 writes it", fault(write(FAR)), page_fault(code::P | code::W, FAR));
    let got = trapping!("stac", => "mov rax, [{0}]"; in(reg) FAR);
    trapping!(=> "clac");
    s.check("SMAP: STAC lets ring 0 read", got.is_none(), true);
    s.check("SMAP: CLAC forbids it again", fault(read(FAR)), page_fault(code::P, FAR));
    s.check("SMAP: ring 3 reads it", through(user_read(space, FAR)), true);
    s.check("SMAP: ring 0 fetches it", fetch(FAR).is_none(), true);
    // An LDT in a page of ring 3: the CPU's own accesses are ring 0's, and AC does not help them.
    memory::write(space.data, 0x00cf_9300_0000_ffff_u64);
    segments::set_task_descriptor(segments::FREE, user::DATA, 7, 0x82);
    segments::lldt(segments::FREE);
    let got = trapping!("stac", => "mov es, {0:e}"; in(reg) 4u32);
    trapping!(=> "clac");
    segments::lldt(0);
    s.check("SMAP: the CPU's own accesses count as ring 0's", fault(got), page_fault(code::P, user::DATA));
    cpu::write_cr4(before);
    s.check("SMAP: switched off it lets ring 0 read", read(FAR).is_none(), true);
}
