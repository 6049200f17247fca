//! Model-specific, control and debug registers with junk in them; CPUID, hypercalls and the instructions of
//! hypervisors (Intel SDM volume 3, sections 2.5 and 9.4; volume 4).
use crate::tools::{Random, short};
use core::arch::asm;
use kit::{
    Suite, Trap, catch,
    cpu::{self, msr},
    machine,
    trap::{self, Frame, vector},
    trapping,
    user::Space,
};

const GP: Option<(u8, u64)> = Some((vector::GP, 0));
const UD: Option<(u8, u64)> = Some((vector::UD, 0));

pub fn all(s: &mut Suite) {
    read_msrs(s);
    write_msrs(s);
    control_bits(s);
    absent_registers(s);
    debug_registers(s);
    extended_control(s);
    identification(s);
    invalidations(s);
    hypercalls(s);
    hypervisors(s);
}

/// RDMSR, which may fault.
pub fn rdmsr(number: u32) -> Option<Trap> {
    trapping!(=> "rdmsr"; in("ecx") number, out("edx") _)
}

/// WRMSR, which may fault.
pub fn wrmsr(number: u32, value: u64) -> Option<Trap> {
    trapping!("mov eax, {0:e}", => "wrmsr"; in(reg) value, in("ecx") number, in("edx") (value >> 32) as u32)
}

/// Every number in the ranges where processors and hypervisors have registers.
fn numbers() -> impl Iterator<Item = u32> {
    let ranges = [0..0x2000u32, 0x4000_0000..0x4000_1100, 0x4b56_4d00..0x4b56_4d20, 0xc000_0000..0xc000_2000];
    ranges.into_iter().flatten().chain(0xc001_0000..0xc001_3000)
}

fn read_msrs(s: &mut Suite) {
    let mut random = Random::new(50);
    let strange = numbers().filter(|&number| !matches!(short(rdmsr(number)), None | GP)).count();
    s.check("RDMSR of every number is #GP or nothing", strange, 0);
    let refused = (0..5_000).filter(|_| short(rdmsr(random.next() as u32 | 1 << 29)) == GP).count();
    s.check("and of numbers that nobody has, #GP", refused, 5_000);
    let refused =
        numbers().filter(|&number| rdmsr(number).is_some() && short(wrmsr(number, random.next())) != GP);
    // Write-only registers: microcode update, prediction commands.
    s.check("what can't be read can't be written, but for a few", refused.count() < 10, true);
}

/// Junk into every register that can be read; it gets its value back.
fn write_msrs(s: &mut Suite) {
    if machine::is_qemu_tcg() {
        return s.skip("WRMSR of junk", "QEMU's TCG takes what is not allowed and is lost");
    }
    s.group("registers: WRMSR of junk: ");
    let mut random = Random::new(51);
    let (mut strange, mut lost, mut written) = (0, 0, 0);
    // The local APIC's place and its deadline have stages of their own.
    let spared = |number: &u32| *number == msr::APIC_BASE || *number == msr::TSC_DEADLINE;
    for number in numbers().filter(|number| !spared(number)) {
        if rdmsr(number).is_some() {
            continue;
        }
        let before = cpu::rdmsr(number);
        let junk = [0, u64::MAX, 0x5555_5555_5555_5555, 1 << 47, random.next(), random.next() & 0xffff_ffff];
        for value in junk {
            let got = short(wrmsr(number, value));
            strange += u32::from(!matches!(got, None | GP));
            written += u32::from(got.is_none());
        }
        if number == msr::EFER || wrmsr(number, before).is_none() {
            // The time goes on meanwhile.
            lost += u32::from(!matches!(number, 0x10 | 0x3b) && cpu::rdmsr(number) != before);
        }
    }
    s.check("#GP or nothing", strange, 0);
    s.check("some of it is taken", written > 100, true);
    s.check("and all get their values back", lost, 0);
    // The counter, too.
    wrmsr(0x3b, 0);
    s.group("registers: ");
}

/// Writes a control register and puts it back at once: whether that faults, and what was read in between.
macro_rules! try_register {
    ($name:literal, $value:expr, $back:expr) => {{
        let mut seen = 0u64;
        let got = catch(|| {
            // SAFETY: what is written faults, or holds for two instructions that don't depend on it.
            unsafe {
                asm!(
                    concat!("mov ", $name, ", {0}"), concat!("mov {1}, ", $name), concat!("mov ", $name, ", {2}"),
                    in(reg) $value, out(reg) seen, in(reg) $back
                )
            }
        });
        (short(got), seen)
    }};
}

fn control_bits(s: &mut Suite) {
    if machine::is_qemu_tcg() {
        return s.skip("junk in CR", "QEMU's TCG takes what is not allowed and is lost");
    }
    s.group("registers: junk in CR: ");
    let mut random = Random::new(52);
    let (cr0, cr3, cr4) = (cpu::read_cr0(), cpu::read_cr3(), cpu::read_cr4());
    // PE and PG can't go in 64-bit mode; NW needs CD; the upper half is reserved; what is unknown is dropped.
    let refused = |bit: u32| matches!(bit, 0 | 29 | 31..);
    let right = (0..64).filter(|&bit| (try_register!("cr0", cr0 ^ 1 << bit, cr0).0 == GP) == refused(bit));
    s.check("bits of CR0", right.count(), 64);
    let bits = cpu::cpuid(0x8000_0008, 0).eax & 0xff;
    let right = (0..64).filter(|&bit| {
        // Bits of the address would lead elsewhere.
        (12..bits).contains(&bit) || (try_register!("cr3", cr3 ^ 1 << bit, cr3).0 == GP) == (bit >= bits)
    });
    s.check("bits of CR3", right.count(), 64);
    let (mut strange, mut refused) = (0, 0);
    for bit in 0..64 {
        let (got, seen) = try_register!("cr4", cr4 ^ 1 << bit, cr4);
        strange += u32::from(!(got == GP || got.is_none() && seen == cr4 ^ 1 << bit));
        refused += u32::from(got == GP);
    }
    // PAE, LA57, VMXE and SMXE at least, and the upper half.
    s.check("bits of CR4", (strange, refused >= 36), (0, true));
    let right = (0..64).filter(|&bit| (try_register!("cr8", 1u64 << bit, 0u64).0 == GP) == (bit > 3));
    s.check("bits of CR8", right.count(), 64);
    let wild = (0..5_000).filter(|_| {
        let value = random.next() | 1 << (32 + random.below(32));
        let (cr0_got, cr4_got) = (try_register!("cr0", value, cr0).0, try_register!("cr4", value, cr4).0);
        let cr3_got = try_register!("cr3", value | 1 << 63, cr3).0;
        let cr2_got = try_register!("cr2", value, 0u64);
        [cr0_got, cr3_got, cr4_got] == [GP; 3] && cr2_got == (None, value)
    });
    s.check("five thousand numbers in all", wild.count(), 5_000);
    let now = (cpu::read_cr0(), cpu::read_cr3(), cpu::read_cr4(), cpu::read_cr8());
    s.check("which changes nothing", now, (cr0, cr3, cr4, 0));
    s.group("registers: ");
}

/// MOV to and from control and debug registers that there are none of.
fn absent_registers(s: &mut Suite) {
    let got = [
        trapping!(=> ".byte 0x0f, 0x20, 0xc8"),
        trapping!(=> ".byte 0x0f, 0x22, 0xc8"),
        trapping!(=> ".byte 0x0f, 0x20, 0xe8"),
        trapping!(=> ".byte 0x0f, 0x22, 0xf8"),
        trapping!(=> ".byte 0x44, 0x0f, 0x20, 0xc8"),
        trapping!(=> ".byte 0x44, 0x0f, 0x22, 0xf8"),
        trapping!(=> ".byte 0x44, 0x0f, 0x21, 0xc0"),
        trapping!(=> ".byte 0x44, 0x0f, 0x23, 0xf8"),
    ];
    s.check("#UD by control and debug registers that don't exist", got.map(short), [UD; 8]);
}

fn debug_registers(s: &mut Suite) {
    let mut random = Random::new(53);
    let wild = (0..2_000).filter(|_| {
        let value = random.next();
        let addresses = [try_register!("dr0", value, 0u64), try_register!("dr3", value, 0u64)];
        let upper = value | 1 << 40;
        let controls = [try_register!("dr6", upper, 0u64).0, try_register!("dr7", upper, 0u64).0];
        addresses == [(None, value); 2] && controls == [GP; 2]
    });
    s.check("debug registers with junk", wild.count(), 2_000);
    // Every kind of breakpoint at once, in code that runs: instructions, data, ports; not general detect.
    let got = catch(|| {
        for _ in 0..2_000 {
            cpu::write_dr0(random.next());
            cpu::write_dr1(random.next() & 0xff_ffff);
            cpu::write_dr7(random.next() & 0xffff_00ff);
            cpu::inb(0x80);
        }
        cpu::write_dr7(0);
    });
    cpu::write_dr7(0);
    let fine = matches!(short(got), None | Some((vector::DB, 0)));
    s.check("and in force", fine, true);
}

fn extended_control(s: &mut Suite) {
    if !cpu::has_xsave() {
        return s.skip("XCR0 with junk", "no XSAVE");
    }
    let mut random = Random::new(54);
    let xsetbv = |number: u32, value: u64| {
        short(
            trapping!("mov eax, {0:e}", => "xsetbv"; in(reg) value, in("ecx") number, in("edx") (value >> 32) as u32),
        )
    };
    let wild = (0..2_000).filter(|_| {
        let value = random.next() | 1 << 62;
        xsetbv(0, value) == GP && xsetbv(random.next() as u32 | 8, 7) == GP && xsetbv(0, value & !1) == GP
    });
    s.check("XCR0 with junk", wild.count(), 2_000);
}

fn identification(s: &mut Suite) {
    let mut random = Random::new(55);
    let got = catch(|| {
        for base in [0, 0x4000_0000, 0x8000_0000, 0xc000_0000] {
            for leaf in 0..0x120 {
                for subleaf in [0, 1, 2, 63, u32::MAX] {
                    cpu::cpuid(base + leaf, subleaf);
                }
            }
        }
        for _ in 0..20_000 {
            cpu::cpuid(random.next() as u32, random.next() as u32);
        }
    });
    s.check("CPUID of whatever leaf", short(got), None);
}

fn invalidations(s: &mut Suite) {
    let mut random = Random::new(56);
    let got = catch(|| (0..5_000).for_each(|_| cpu::invlpg(random.next())));
    s.check("INVLPG of any address", short(got), None);
    if !cpu::feature_7_ebx(10) {
        return s.skip("INVPCID with junk", "no INVPCID");
    }
    let wild = (0..5_000).filter(|_| {
        let descriptor = [random.next() | 1 << 12, random.next()];
        let any = random.next();
        let kind = random.pick(&[0, 1, 2, 3, 4, any, 1 << 32]);
        let got = trapping!(=> "invpcid {0}, [{1}]"; in(reg) kind, in(reg) descriptor.as_ptr());
        // Reserved bits of the descriptor count for all kinds on some processors, for two of them on others.
        matches!((kind, short(got)), (2 | 3, None) | (_, GP))
    });
    s.check("INVPCID with junk", wild.count(), 5_000);
}

/// Hypercalls with junk, which may interrupt this CPU and no more.
fn hypercalls(s: &mut Suite) {
    let mut random = Random::new(57);
    trap::handle(vector::NMI, Some(|_: &mut Frame| {}));
    let mut call = |number: u64| {
        let (rbx, rcx, rdx, rsi) =
            (random.next(), random.next() & 3, random.next() & 1, random.next() & 0x7ff);
        let wild = random.below(2) == 0;
        let (rdx, rsi) = if wild { (random.next(), random.next()) } else { (rdx, rsi) };
        let intel = trapping!("push rbx", "mov rbx, {0}", "mov rax, {1}", "vmcall", "pop rbx", => "nop";
            in(reg) rbx, in(reg) number, in("rcx") rcx, in("rdx") rdx, in("rsi") rsi);
        let amd = trapping!("push rbx", "mov rbx, {0}", "mov rax, {1}", "vmmcall", "pop rbx", => "nop";
            in(reg) rbx, in(reg) number, in("rcx") rcx, in("rdx") rdx, in("rsi") rsi);
        [intel, amd].into_iter().all(|got| matches!(short(got), None | UD))
    };
    let fine = (0..64).chain((0..2_000).map(|round| if round & 1 == 0 { 10 } else { round << 32 | round }));
    let strange = fine.filter(|&number| !call(number)).count();
    crate::vectors::drain();
    trap::handle(vector::NMI, None);
    s.check("hypercalls with junk", strange, 0);
    let space = Space::new();
    let user = short(kit::ring3!(space, "mov eax, 10", "vmmcall", "cmp rax, -1", "mov eax, 0", "int 0x80"));
    s.check("and from ring 3", matches!(user, UD | Some((trap::LEAVE_USER, 0))), true);
    cpu::write_cr3(kit::memory::boot_root());
}

/// What a CPU without virtualization, system management and enclaves has none of.
fn hypervisors(s: &mut Suite) {
    let got = [
        trapping!(=> ".byte 0xf3, 0x0f, 0xc7, 0x34, 0x24"),
        trapping!(=> ".byte 0x66, 0x0f, 0xc7, 0x34, 0x24"),
        trapping!(=> ".byte 0x0f, 0xc7, 0x34, 0x24"),
        trapping!(=> "vmlaunch"),
        trapping!(=> "vmresume"),
        trapping!(=> "vmxoff"),
        trapping!(=> "vmfunc"),
        trapping!(=> "vmread rax, rax"),
        trapping!(=> "vmwrite rax, rax"),
        trapping!(=> "vmrun"),
        trapping!(=> "vmload"),
        trapping!(=> "vmsave"),
        trapping!(=> "stgi"),
        trapping!(=> "clgi"),
        trapping!(=> "invlpga rax, ecx"; in("ecx") 0),
        trapping!("xor eax, eax", => "skinit"),
        trapping!(=> "rsm"),
        trapping!("xor eax, eax", => "getsec"),
        trapping!("xor eax, eax", => "encls"),
        trapping!("xor eax, eax", => "enclu"),
    ];
    s.check("the instructions of hypervisors are #UD", got.map(short), [UD; 20]);
}
