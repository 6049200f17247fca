//! Memory space where no RAM is: holes, device registers in every size and place, stacks and operands there.
use crate::tools::{
    FAR, LastPage, PAGE, RECOVERED, Random, address, fault, gate, holes_are_ones, ram_end, recover, short,
};
use core::arch::asm;
use kit::{
    Suite, Trap, apic,
    apic::register,
    catch, cpu, machine,
    memory::{self, Tables, bit, pages, read, write},
    segments,
    trap::{self, INTERRUPT_GATE, ist, vector},
    trapping,
};

const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
const ECAM: u64 = 0xe000_0000;

pub fn all(s: &mut Suite) {
    holes(s);
    end_of_memory(s);
    odd_operands(s);
    stacks(s);
    local_apic(s);
    moved_apic(s);
    io_apic(s);
    anywhere(s);
    above(s);
}

/// Reads 1, 2, 4, 8 or 16 bytes.
fn load(address: u64, size: u64) -> u128 {
    match size {
        1 => read::<u8>(address).into(),
        2 => read::<u16>(address).into(),
        4 => read::<u32>(address).into(),
        8 => read::<u64>(address).into(),
        _ => {
            let mut value = 0u128;
            // SAFETY: reads 16 bytes of memory space, which the guest owns, into a variable.
            unsafe {
                asm!("movups xmm0, [{0}]", "movups [{1}], xmm0", in(reg) address, in(reg) &raw mut value, out("xmm0") _)
            };
            value
        }
    }
}

/// Writes 1, 2, 4, 8 or 16 bytes.
fn store(address: u64, size: u64, value: u64) {
    match size {
        1 => write(address, value as u8),
        2 => write(address, value as u16),
        4 => write(address, value as u32),
        8 => write(address, value),
        // SAFETY: 16 bytes of memory space, which the guest owns.
        _ => unsafe {
            asm!("movq xmm0, {1}", "movups [{0}], xmm0", in(reg) address, in(reg) value, out("xmm0") _)
        },
    }
}

const SIZES: [u64; 5] = [1, 2, 4, 8, 16];

fn holes(s: &mut Suite) {
    let mut random = Random::new(10);
    let start = ram_end();
    let mut ones = true;
    let got = catch(|| {
        for _ in 0..5_000 {
            let (at, size) = (start + random.below(ECAM - 64 - start), random.pick(&SIZES));
            store(at, size, random.next());
            ones &= load(at, size) == u128::MAX >> (128 - 8 * size as u32);
        }
    });
    s.check("holes take everything", short(got), None);
    s.check("and read as ones in every size", ones, true);
}

fn end_of_memory(s: &mut Suite) {
    let page = LastPage::borrow();
    let end = page.end;
    let got = catch(|| {
        write(end - 4, 0x1122_3344_5566_7788_u64);
        write(end - 1, 0xabcd_u16);
    });
    s.check("writes across the end of RAM", short(got), None);
    s.check("leave there what fits", read::<u32>(end - 4), 0xcd66_7788);
    s.check("and read back with ones behind", read::<u64>(end - 4), 0xffff_ffff_cd66_7788);
    let old: u64;
    // SAFETY: the page is borrowed.
    unsafe { asm!("lock xadd [{0}], {1}", in(reg) end - 4, inout(reg) 1u64 => old) };
    let seen = (old, read::<u32>(end - 4));
    s.check("a locked addition across the end", seen, (0xffff_ffff_cd66_7788, 0xcd66_7789));
    // SAFETY: as above; the rest goes where nothing is.
    unsafe {
        asm!("rep stosb", inout("rcx") 8192u64 => _, inout("rdi") end - 4096 => _, in("al") 0x5au8);
    }
    s.check(
        "REP STOSB across the end",
        (read::<u64>(end - 4096), read::<u8>(end - 1)),
        (0x5a5a_5a5a_5a5a_5a5a, 0x5a),
    );
    page.restore();
}

/// Instructions that rarely have a device for an operand.
fn odd_operands(s: &mut Suite) {
    let hole = ram_end() + 0x3000;
    let table = segments::TablePointer { limit: 0x00ff, base: segments::GDT.address() };
    let runs: [(&str, Option<Trap>); 8] = [
        ("LOCK INC", trapping!(=> "lock inc qword ptr [{0}]"; in(reg) hole)),
        ("XCHG", trapping!("mov eax, 7", => "xchg [{0}], rax"; in(reg) hole)),
        ("FNSAVE", trapping!(=> "fnsave [{0}]"; in(reg) hole)),
        ("FXSAVE", trapping!(=> "fxsave64 [{0}]"; in(reg) hole)),
        ("SGDT", trapping!(=> "sgdt [{0}]"; in(reg) hole)),
        ("CLFLUSH", trapping!(=> "clflush [{0}]"; in(reg) hole)),
        ("PREFETCHT0", trapping!(=> "prefetcht0 [{0}]"; in(reg) hole)),
        // Its limit and base are all ones; nothing reads a descriptor before the right table is back.
        ("LGDT", trapping!("lgdt [{0}]", => "lgdt [{1}]"; in(reg) hole, in(reg) &raw const table)),
    ];
    for (what, got) in runs {
        s.check(what, short(got), None);
    }
    segments::lgdt(0xff, segments::GDT.address());
    let got = trapping!(
        "push rbx", "xor ebx, ebx", "xor eax, eax", "lock cmpxchg16b [{0}]", "pop rbx", => "nop";
        in(reg) hole, inout("rcx") 0u64 => _, inout("rdx") 0u64 => _
    );
    s.check("CMPXCHG16B", short(got), None);
    let got = trapping!(=> "fxrstor64 [{0}]"; in(reg) hole);
    s.check("FXRSTOR takes no MXCSR of ones", short(got), Some((vector::GP, 0)));
    trapping!(=> "fninit");
    if !cpu::has_xsave() {
        s.skip("XSAVE", "not offered");
        return s.skip("XRSTOR takes no header of ones", "no XSAVE");
    }
    let got = trapping!("mov eax, 7", => "xsave64 [{0}]"; in(reg) hole, in("edx") 0);
    s.check("XSAVE", short(got), None);
    let got = trapping!("mov eax, 7", => "xrstor64 [{0}]"; in(reg) hole, in("edx") 0);
    s.check("XRSTOR takes no header of ones", short(got), Some((vector::GP, 0)));
}

fn stacks(s: &mut Suite) {
    if !holes_are_ones() {
        return s.skip("stacks in holes", "holes are zeros");
    }
    s.group("devices: stacks in holes: ");
    let hole = ram_end() + 0x5000;
    let popped: u64;
    // SAFETY: the stack pointer comes back; interrupts are off.
    unsafe {
        asm!("mov {save}, rsp", "mov rsp, {hole}", "push 5", "pop {popped}", "mov rsp, {save}",
             save = out(reg) _, hole = in(reg) hole, popped = out(reg) popped)
    };
    s.check("POP gives ones", popped, u64::MAX);
    let got =
        trapping!("mov rcx, rsp", "mov rsp, {0}", "call 5f", "5:", => "ret"; in(reg) hole, out("rcx") _);
    let seen = got.map(|trap| (trap.vector, trap.frame.rip, trap.frame.rsp));
    // The last byte of the address space is absent.
    s.check("RET leads to the last byte of all", seen, Some((vector::PF, u64::MAX, hole)));
    let got = trapping!(
        "mov rcx, rsp", "mov rdx, rbp", "mov rsp, {0}", "mov rbp, rsp", "enter 0, 31", "mov rbp, rdx", => "mov rsp, rcx";
        in(reg) hole, out("rcx") _, out("rdx") _
    );
    s.check("ENTER with 31 levels", short(got), None);
    let mut task = segments::TSS.get();
    task.ist[usize::from(ist::SPARE) - 1] = hole;
    segments::TSS.set(task);
    for number in [0x91, vector::UD] {
        trap::set_raw_gate(number, gate(address(recover), segments::CODE, ist::SPARE, INTERRUPT_GATE));
    }
    let soft = trapping!(=> "int 0x91");
    let fault = trapping!(=> "ud2");
    trap::reset_gate(0x91);
    trap::reset_gate(vector::UD);
    task.ist[usize::from(ist::SPARE) - 1] = segments::stack_top(ist::SPARE.into());
    segments::TSS.set(task);
    let both = Some((RECOVERED, 0));
    s.check("handlers begin", (short(soft), short(fault)), (both, both));
    s.group("devices: ");
}

/// What the local APIC must keep whatever is written beside its registers.
fn kept() -> [u32; 5] {
    [register::ID, register::VERSION, register::SPURIOUS, register::TIMER, register::LINT0].map(apic::get)
}

fn local_apic(s: &mut Suite) {
    let before = kept();
    let mut random = Random::new(11);
    let got = catch(|| {
        for offset in 0..PAGE {
            for size in SIZES {
                load(LOCAL_APIC + offset, size);
            }
        }
    });
    s.check("the local APIC is read in every size and place", short(got), None);
    let got = catch(|| {
        for offset in 0..PAGE {
            for size in SIZES.into_iter().filter(|&size| size < 4 || size == 4 && offset & 3 != 0) {
                store(LOCAL_APIC + offset, size, random.next());
            }
        }
    });
    s.check("and written beside its registers", short(got), None);
    s.check("which changes nothing", kept(), before);
    if machine::is_qemu_tcg() {
        return s.skip("junk in the local APIC", "QEMU resets");
    }
    s.group("devices: junk in the local APIC: ");
    // To nobody: the destination is no APIC's.
    apic::set(register::COMMAND_HIGH, 0x55 << 24);
    let got = catch(|| {
        for _ in 0..20_000 {
            let offset = random.below(256) as u32 * 16;
            let value = random.next() as u32;
            match offset {
                register::ID | register::COMMAND_HIGH => {}
                register::COMMAND => apic::set(offset, value & !(3 << 18 | apic::LOGICAL_MODE)),
                _ => apic::set(offset, value),
            }
        }
    });
    crate::vectors::drain();
    s.check("all its registers take it", short(got), None);
    s.check("it is what it was after a new start", kept(), before);
    s.group("devices: ");
}

/// The local APIC's page, moved about.
fn moved_apic(s: &mut Suite) {
    if machine::is_qemu_tcg() {
        return s.skip("a local APIC elsewhere", "QEMU's is lost then");
    }
    s.group("devices: a local APIC elsewhere: ");
    const BASE: u32 = cpu::msr::APIC_BASE;
    let before = cpu::rdmsr(BASE);
    let version = read::<u32>(LOCAL_APIC + 0x30);
    let top = 1 << (cpu::cpuid(0x8000_0008, 0).eax & 0xff);
    let places = [ram_end(), ECAM, IO_APIC, 0xffff_f000];
    let seen = places.map(|place| {
        cpu::wrmsr(BASE, before & 0xfff | place);
        (read::<u32>(place + 0x30) == version, read::<u32>(LOCAL_APIC + 0x30) == u32::MAX)
    });
    s.check("in holes and over other devices", seen, [(true, true); 4]);
    // RAM hides it.
    let ram = pages(1);
    write(ram + 0x30, 0x1234_5678u32);
    cpu::wrmsr(BASE, before & 0xfff | ram);
    s.check("behind RAM", read::<u32>(ram + 0x30), 0x1234_5678);
    cpu::wrmsr(BASE, before & 0xfff | (top - PAGE));
    s.check("out of sight", read::<u32>(LOCAL_APIC + 0x30), u32::MAX);
    let bad = [before | top, before & !(1 << 11) | 1 << 10, before | 1].map(|value| {
        short(trapping!("mov eax, {0:e}", => "wrmsr"; in(reg) value, in("ecx") BASE, in("edx") (value >> 32) as u32))
    });
    s.check("#GP by what is no place", bad, [Some((vector::GP, 0)); 3]);
    cpu::wrmsr(BASE, before & !(1 << 11));
    let off = (read::<u32>(LOCAL_APIC + 0x30), short(catch(|| write(LOCAL_APIC + 0xb0, 0u32))));
    cpu::wrmsr(BASE, before);
    apic::init();
    s.check("switched off, it is a hole", off, (u32::MAX, None));
    s.check("and comes back", read::<u32>(LOCAL_APIC + 0x30), version);
    s.group("devices: ");
}

fn io_apic(s: &mut Suite) {
    let mut random = Random::new(12);
    let got = catch(|| {
        for offset in 0..PAGE {
            for size in SIZES {
                load(IO_APIC + offset, size);
            }
        }
        for _ in 0..20_000 {
            let (offset, size) = (random.below(PAGE), random.pick(&SIZES));
            // Not its window, by which an entry could be opened.
            if !(offset..offset + size).contains(&0x10) && offset & !3 != 0x10 {
                store(IO_APIC + offset, size, random.next());
            }
        }
        for _ in 0..20_000 {
            // Not its ID; entries stay masked.
            let index = 1 + random.below(255) as u32;
            let masked = if index & 1 == 0 { apic::MASKED } else { 0 };
            apic::io_set(index, random.next() as u32 | masked);
        }
    });
    s.check("the I/O APIC is used in every size and place", short(got), None);
    for pin in 0..apic::pins() {
        apic::io_set(0x11 + pin * 2, 0);
        apic::io_set(0x10 + pin * 2, apic::MASKED);
    }
    let clean = (0..apic::pins()).all(|pin| apic::routed(pin) == apic::MASKED);
    s.check("and is clean again", (apic::pins(), clean), (24, true));
}

/// Junk to everything from the end of RAM to 4 GiB but the interrupt controllers.
fn anywhere(s: &mut Suite) {
    let mut random = Random::new(13);
    let start = ram_end();
    let got = catch(|| {
        for _ in 0..50_000 {
            let at = start + random.below((1 << 32) - 16 - start);
            let size = random.pick(&SIZES);
            if ![LOCAL_APIC, IO_APIC].iter().any(|&page| at + 16 > page && at < page + PAGE) {
                store(at, size, random.next());
                load(at, size);
            }
        }
        for at in (ECAM..ECAM + (1 << 20)).step_by(61) {
            for size in SIZES {
                store(at, size, random.next());
                load(at, size);
            }
        }
    });
    s.check("junk to everything below 4 GiB that is no RAM", short(got), None);
}

/// Physical addresses above 4 GiB, up to the last one that the CPU has.
fn above(s: &mut Suite) {
    let bits = cpu::cpuid(0x8000_0008, 0).eax & 0xff;
    let mut random = Random::new(14);
    let tables = Tables::new();
    tables.load();
    let mut ones = true;
    let got = catch(|| {
        for shift in 32..bits {
            for physical in
                [1 << shift, (2 << shift) - PAGE, 1 << shift | random.below(1 << shift) & !(PAGE - 1)]
            {
                tables.map(FAR, physical, bit::P | bit::W);
                for size in SIZES {
                    store(FAR + 0x123, size, random.next());
                    ones &= load(FAR + 0x123, size) == u128::MAX >> (128 - 8 * size as u32);
                }
            }
        }
    });
    s.check("every size of physical address", short(got), None);
    s.check("reads as ones", ones, true);
    if bits < 52 {
        tables.map(FAR, 1 << bits, bit::P | bit::W);
        let got = trapping!(=> "mov rax, [{0}]"; in(reg) FAR);
        let reserved = memory::fault::P | memory::fault::RSVD;
        s.check("one too large is a reserved bit", fault(got), Some((vector::PF, reserved, FAR)));
    } else {
        s.skip("one too large is a reserved bit", "there is none");
    }
    cpu::write_cr3(memory::boot_root());
}
