//! Every port, in every size, with junk; string I/O from and to where nothing is.
use crate::tools::{FAR, PAGE, Random, fault, limited, ram_end, short};
use kit::{
    Suite, Trap, acpi, catch, cpu, machine,
    memory::{self, Tables, bit, fault as code, pages},
    pic, serial, time,
    trap::vector,
    trapping,
};

pub fn all(s: &mut Suite) {
    reads(s);
    writes(s);
    ending_ports(s);
    pci(s);
    serial_port(s);
    clock(s);
    strings(s);
    restore();
    time::pit(0, 0, 0);
    let first = time::pit_count(0);
    s.check("the timer counts as before", time::wait(100, || time::pit_count(0) != first), true);
}

fn input(port: u16, size: u64) -> u32 {
    match size {
        1 => cpu::inb(port).into(),
        2 => cpu::inw(port).into(),
        _ => cpu::inl(port),
    }
}

fn output(port: u16, size: u64, value: u32) {
    match size {
        1 => cpu::outb(port, value as u8),
        2 => cpu::outw(port, value as u16),
        _ => cpu::outl(port, value),
    }
}

fn reads(s: &mut Suite) {
    let got = catch(|| {
        for port in 0..=u16::MAX {
            // A wide access to the serial port ends QEMU.
            let serial = machine::is_qemu_tcg() && (0x3f5..=0x3ff).contains(&port);
            for size in [1, 2, 4].into_iter().filter(|&size| size == 1 || !serial) {
                input(port, size);
            }
        }
    });
    s.check("IN of every port in every size", short(got), None);
    s.check("a port where nothing is reads as ones", (input(0x5678, 1), input(0x5678, 4)), (0xff, u32::MAX));
    s.check("and so do the four bytes from the last one on", input(0xffff, 4), u32::MAX);
}

/// Ranges of ports that end the machine, print, or are what the others hang from.
fn spared() -> [(u32, u32); 8] {
    const NONE: (u32, u32) = (u32::MAX, u32::MAX);
    let off = acpi::find().and_then(|tables| tables.soft_off());
    let power = off.map_or(NONE, |off| (off.control_port.into(), u32::from(off.control_port) + 1));
    // QEMU's firmware configuration writes to memory.
    let firmware = if machine::is_qemu_tcg() { (0x500, 0x5ff) } else { NONE };
    let (keyboard, port_a, pci_and_reset) = ((0x60, 0x64), (0x92, 0x92), (0xcf8, 0xcff));
    let (test_console, test_exit, serial) = ((0xe9, 0xe9), (0xf4, 0xf7), (0x3f8, 0x3ff));
    [keyboard, port_a, test_console, test_exit, serial, pci_and_reset, power, firmware]
}

fn writes(s: &mut Suite) {
    let spared = spared();
    let skipped = |port: u16, size: u64| {
        let (first, last) = (u32::from(port), u32::from(port) + size as u32 - 1);
        spared.iter().any(|range| first <= range.1 && range.0 <= last)
    };
    // QEMU's PCI functions answer at ports from here on, and its power management at 600h to 63Fh.
    let last = if machine::is_qemu_tcg() { 0x5ff } else { u16::MAX };
    let mut random = Random::new(1);
    let got = catch(|| {
        for port in 0..=last {
            for size in [1, 2, 4].into_iter().filter(|&size| !skipped(port, size)) {
                for value in [0, u32::MAX, random.next() as u32] {
                    output(port, size, value);
                }
            }
        }
    });
    restore();
    s.check("OUT of junk to every other port in every size", short(got), None);
}

/// Brings the interrupt controllers and timers back to what the kit expects.
fn restore() {
    for line in 0..24 {
        cpu::outb(0x2000 + line, 0);
    }
    cpu::outw(0x4d0, 0x0200);
    pic::init();
    cpu::outb(0x43, 0x30);
    time::set_cmos(0x0a, 0x26);
    time::set_cmos(0x0b, 0x02);
    time::cmos(0x0c);
}

/// The ports that can end the machine, with values that must not.
fn ending_ports(s: &mut Suite) {
    let mut random = Random::new(2);
    let got = catch(|| {
        for value in 0..=u8::MAX {
            // Without the rising edge of the reset bits.
            cpu::outb(0x92, value & 0xfe | 2);
            cpu::outb(0xcf9, value & 0xfb);
            // Not the output port (D1h), whose bit 0 is the reset, nor A20 off, nor pulses on that bit.
            let resets = value >= 0xf0 && value & 1 == 0;
            if !resets && !matches!(value, 0xd1 | 0xdd) {
                cpu::outb(0x64, value);
                cpu::outb(0x60, random.next() as u8);
                cpu::inb(0x60);
                cpu::inb(0x64);
            }
        }
        cpu::outb(0x92, 2);
        cpu::outb(0xcf9, 0);
        cpu::outb(0x64, 0xd1);
        cpu::outb(0x60, 0xff);
        cpu::outb(0x64, 0xad);
    });
    s.check("what would reset, all but the bit that does", short(got), None);
    let Some(off) = acpi::find().and_then(|tables| tables.soft_off()) else {
        return s.skip("sleep types without the sleep bit", "no ACPI");
    };
    let got = catch(|| {
        for value in 0..=u16::MAX {
            cpu::outw(off.control_port, value & !(1 << 13));
        }
        cpu::outw(off.control_port, 0);
    });
    s.check("sleep types without the sleep bit", short(got), None);
}

/// Junk in PCI's address and data ports.
fn pci(s: &mut Suite) {
    if machine::is_qemu_tcg() {
        return s.skip("PCI", "junk would move QEMU's devices");
    }
    s.group("ports: PCI: ");
    let mut random = Random::new(3);
    cpu::outl(0xcf8, 0x8000_0000);
    let identity = cpu::inl(0xcfc);
    let got = catch(|| {
        for _ in 0..10_000 {
            cpu::outl(0xcf8, random.next() as u32);
            let (port, size) = (0xcfc + random.below(4) as u16, 1 << random.below(3));
            input(port, size);
            output(port, size, random.next() as u32);
        }
    });
    s.check("configuration full of junk", short(got), None);
    cpu::outl(0xcf8, 0x8000_0000);
    s.check("leaves the host bridge what it is", cpu::inl(0xcfc), identity);
    s.group("ports: ");
}

/// Junk in the serial port's registers, with its line looped back so that nobody hears.
fn serial_port(s: &mut Suite) {
    const LOOP: u32 = 0x10;
    serial::flush();
    let mut random = Random::new(4);
    let got = catch(|| {
        cpu::outb(0x3fc, LOOP as u8);
        for _ in 0..20_000 {
            let (register, value) = (random.below(8) as u16, random.next() as u32);
            let value = if register == 4 { value | LOOP } else { value };
            cpu::outb(0x3f8 + register, value as u8);
            cpu::inb(0x3f8 + random.below(8) as u16);
        }
        cpu::outb(0x3fc, LOOP as u8);
        cpu::outb(0x3fb, 0);
        cpu::outb(0x3fa, 7);
    });
    serial::init();
    s.check("a serial port with junk in all its registers", short(got), None);
}

/// Junk in the clock: dates that no calendar has.
fn clock(s: &mut Suite) {
    let mut random = Random::new(5);
    let before: [u8; 10] = core::array::from_fn(|register| time::cmos(register as u8));
    let got = catch(|| {
        for _ in 0..2_000 {
            time::set_cmos(random.below(14) as u8, random.next() as u8);
            time::cmos(random.next() as u8 & 0x7f);
        }
        // Updates of nonsense: binary and BCD, 12 and 24 hours.
        for mode in [0x00, 0x02, 0x04, 0x06] {
            for (register, value) in
                (0..10).zip([0xffu8, 0x99, 0x80, 0x0a, 0xd5, 0x00, 0xf0, 0x3f, 0xee, 0xaa])
            {
                time::set_cmos(register, value);
            }
            time::set_cmos(0x0a, 0x26);
            time::set_cmos(0x0b, mode);
            (0..10).for_each(|register| {
                time::cmos(register);
            });
        }
    });
    time::set_cmos(0x0b, 0x82);
    for (register, value) in (0..).zip(before) {
        time::set_cmos(register, value);
    }
    restore();
    s.check("a clock set to dates that don't exist", short(got), None);
}

/// REP INS: what ended it and, of its registers, RCX and RDI.
fn ins(port: u16, count: u64, to: u64) -> (Option<Trap>, u64, u64) {
    let (mut count, mut to) = (count, to);
    let got = trapping!(=> "rep insb"; inout("rcx") count, inout("rdi") to, in("dx") port);
    if let Some(trap) = got {
        (count, to) = (trap.frame.registers[13], trap.frame.registers[8]);
    }
    (got, count, to)
}

fn strings(s: &mut Suite) {
    let hole = ram_end() + 0x10_0000;
    let got = ins(0x5678, 4096, hole);
    s.check("REP INSB into a hole", (short(got.0), got.1, got.2), (None, 0, hole + 4096));
    let got =
        trapping!(=> "rep outsd"; inout("rcx") 4096u64 => _, inout("rsi") hole => _, in("dx") 0x5678u16);
    s.check("REP OUTSD from a hole", short(got), None);

    let tables = Tables::new();
    let page = pages(1);
    tables.map(FAR, page, bit::P | bit::W);
    tables.entry(FAR + PAGE, 1);
    tables.load();
    let (got, count, to) = ins(0x5678, u64::MAX, FAR);
    let end = FAR + PAGE;
    s.check(
        "REP INSB without end into an absent page",
        (fault(got), count, to),
        (Some((vector::PF, code::W, end)), u64::MAX - PAGE, end),
    );
    let got = trapping!(=> "rep outsb"; inout("rcx") u64::MAX => _, inout("rsi") FAR => _, in("dx") 0x80u16);
    s.check("REP OUTSB without end from one", fault(got), Some((vector::PF, 0, end)));
    let got = trapping!("std", => "rep insw"; inout("rcx") u64::MAX => _, inout("rdi") FAR + 1 => _, in("dx") 0x5678u16);
    s.check("REP INSW downwards out of a page", short(got), Some((vector::PF, code::W)));
    let got = trapping!(=> "insd"; inout("rdi") 1u64 << 63 => _, in("dx") 0x5678u16);
    s.check("INSD to a non-canonical address", short(got), Some((vector::GP, 0)));
    cpu::write_cr3(memory::boot_root());

    let got = limited(|| {
        // SAFETY: nothing listens at the port; the source is all of memory and beyond.
        unsafe {
            core::arch::asm!("rep outsb", inout("rcx") u64::MAX => _, inout("rsi") page => _, in("dx") 0x5678u16)
        }
    });
    s.check("an interrupt ends REP OUTSB without end", short(got), Some((crate::tools::WATCHDOG, 0)));
}
