//! String instructions that would never end, over absent pages, devices, and the edges of the address space (Intel
//! SDM volume 1, section 7.3.9).
use crate::tools::{FAR, PAGE, Random, WATCHDOG, fault, limited, ram_end, short};
use core::arch::asm;
use kit::{
    Suite, Trap, cpu,
    memory::{self, Tables, bit, fault as code, pages, read, write},
    trap::vector,
    trapping,
};

/// Last page of the lower half of the canonical addresses.
const BORDER: u64 = 0x7fff_ffff_f000;
/// Last page of the address space.
const TOP: u64 = 0xffff_ffff_ffff_f000;

pub fn all(s: &mut Suite) {
    absent(s);
    borders(s);
    endless(s);
    overlapping(s);
}

/// RCX, RSI and RDI when a string instruction faulted.
fn left(trap: Option<Trap>) -> Option<[u64; 3]> {
    trap.map(|trap| [13, 9, 8].map(|register| trap.frame.registers[register]))
}

/// A string instruction with these RCX, RSI and RDI.
macro_rules! string {
    ($instruction:literal, $count:expr, $from:expr, $to:expr) => {
        trapping!("mov rax, {marker}", => $instruction;
            marker = in(reg) 0x1122_3344_5566_7788u64,
            inout("rcx") $count => _, inout("rsi") $from => _, inout("rdi") $to => _)
    };
}

/// One page, an absent one after and before it.
fn absent(s: &mut Suite) {
    let tables = Tables::new();
    let (page, source) = (pages(1), pages(2));
    tables.map(FAR, page, bit::P | bit::W);
    tables.entry(FAR + PAGE, 1);
    tables.load();
    let (end, all) = (FAR + PAGE, u64::MAX);
    let written = Some((vector::PF, code::W, end));
    let was_read = Some((vector::PF, 0, end));
    let got = string!("rep stosb", all, 0u64, FAR);
    s.check("REP STOSB without end", (fault(got), left(got)), (written, Some([all - PAGE, 0, end])));
    let got = string!("rep movsq", all, source, FAR);
    s.check(
        "REP MOVSQ without end",
        (fault(got), left(got)),
        (written, Some([all - 512, source + PAGE, end])),
    );
    let got = string!("rep movsb", all, FAR + 8, source);
    s.check(
        "REP MOVSB from there",
        (fault(got), left(got)),
        (was_read, Some([all - 4088, end, source + 4088])),
    );
    let got = string!("rep lodsw", all, FAR, 0u64);
    s.check("REP LODSW without end", (fault(got), left(got)), (was_read, Some([all - 2048, end, 0])));
    let got = string!("repne scasb", all, 0u64, FAR);
    s.check("REPNE SCASB without end", (fault(got), left(got)), (was_read, Some([all - PAGE, 0, end])));
    write(page + 0xfff, 0x88u8);
    let got = string!("repne scasb", all, 0u64, FAR);
    s.check("stops at what it looks for", got.is_none(), true);
    let got = string!("repe cmpsd", all, FAR, FAR);
    s.check("REPE CMPSD without end", (fault(got), left(got)), (was_read, Some([all - 1024, end, end])));
    let got = trapping!("std", => "rep stosd"; inout("rcx") all => _, inout("rdi") end - 4 => _);
    s.check(
        "REP STOSD downwards",
        (short(got), left(got).map(|left| left[0])),
        (Some((vector::PF, code::W)), Some(all - 1024)),
    );
    let got = string!("rep stosq", 0u64, 0u64, 1u64 << 63);
    s.check("a count of 0 touches nothing", got.is_none(), true);
    cpu::write_cr3(memory::boot_root());
}

fn borders(s: &mut Suite) {
    let tables = Tables::new();
    let (lower, upper) = (pages(1), pages(1));
    tables.map(BORDER, lower, bit::P | bit::W);
    tables.map(TOP, upper, bit::P | bit::W);
    tables.load();
    let end = BORDER + PAGE;
    let all = u64::MAX;
    let got = string!("rep stosb", all, 0u64, BORDER);
    s.check(
        "REP STOSB up to the last canonical address",
        (short(got), left(got)),
        (Some((vector::GP, 0)), Some([all - PAGE, 0, end])),
    );
    let got = string!("rep stosq", all, 0u64, BORDER + 4);
    s.check(
        "REP STOSQ across it",
        (short(got), left(got)),
        (Some((vector::GP, 0)), Some([all - 511, 0, end - 4])),
    );
    let got = string!("rep movsb", all, 0u64, 0xffff_7fff_ffff_f000u64);
    s.check("REP MOVSB to an address that is none", short(got), Some((vector::GP, 0)));
    // Beyond the last address is the first one, where nobody needs the first bytes.
    let got = string!("rep stosb", PAGE + 16, 0u64, TOP);
    let seen = (read::<u64>(8), read::<u8>(upper + 0xfff));
    s.check(
        "REP STOSB over the end of the address space",
        (short(got), seen),
        (None, (0x8888_8888_8888_8888, 0x88)),
    );
    write(upper + 0xff8, 0x0706_0504_0302_0100u64);
    write(0, 0x0f0e_0d0c_0b0a_0908u64);
    let value: u64 = read(u64::MAX - 2);
    s.check("a read across it", value, 0x0c0b_0a09_0807_0605);
    // With 32-bit addresses the same at 4 GiB, below which is a hole, or a memory that can't be written.
    let to: u64;
    // SAFETY: the first bytes of memory are nobody's.
    unsafe {
        asm!(".byte 0x67, 0xf3, 0xaa", inout("rcx") 0xffff_0000_0000_0010u64 => _, inout("rdi") 0x7777_ffff_fff8u64 => to, in("al") 0x77u8)
    };
    s.check("32-bit addresses wrap at 4 GiB", (to, read::<u64>(0)), (8, 0x7777_7777_7777_7777));
    cpu::write_cr3(memory::boot_root());
}

/// String instructions of 2^64 rounds over what absorbs them; an interrupt ends them.
fn endless(s: &mut Suite) {
    let hole = ram_end();
    let watchdog = Some((WATCHDOG, 0));
    let into = limited(|| {
        // SAFETY: nothing is there; it ends long before the devices.
        unsafe { asm!("rep stosb", inout("rcx") u64::MAX => _, inout("rdi") hole => _) }
    });
    s.check("REP STOSB into a hole is interrupted", short(into), watchdog);
    let went_on =
        into.is_some_and(|trap| trap.frame.registers[8] > hole && trap.frame.registers[13] < u64::MAX);
    s.check("where it stands", went_on, true);
    let same = limited(|| {
        // SAFETY: as above; ones are equal to ones.
        unsafe {
            asm!("repe cmpsb", inout("rcx") u64::MAX => _, inout("rsi") hole => _, inout("rdi") hole + 1 => _)
        }
    });
    s.check("so is REPE CMPSB", short(same), watchdog);
    let register = limited(|| {
        // SAFETY: reads.
        unsafe {
            asm!("rep lodsd", inout("rcx") u64::MAX => _, inout("rsi") 0xe000_0000u64 => _, out("rax") _)
        }
    });
    s.check("and REP LODSD of devices", short(register), watchdog);
}

/// Copies that overlap themselves, of every distance: what is copied is copied again.
fn overlapping(s: &mut Suite) {
    let mut random = Random::new(60);
    let (area, model) = (pages(3), pages(3));
    let right = (0..300).filter(|_| {
        for offset in (0..3 * PAGE).step_by(8) {
            let value = random.next();
            write(area + offset, value);
            write(model + offset, value);
        }
        let (from, distance, bytes) = (random.below(PAGE), 1 + random.below(200), random.below(2 * PAGE - 256));
        for offset in from..from + bytes {
            write(model + offset + distance, read::<u8>(model + offset));
        }
        // SAFETY: within the area.
        unsafe {
            asm!("rep movsb", inout("rcx") bytes => _, inout("rsi") area + from => _, inout("rdi") area + from + distance => _)
        };
        (0..3 * PAGE).step_by(8).all(|offset| read::<u64>(area + offset) == read::<u64>(model + offset))
    });
    s.check("three hundred copies onto themselves", right.count(), 300);
}
