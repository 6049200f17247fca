//! Interrupts of every vector and kind that a CPU can send to itself, and gates that take them all.
use crate::tools::{Random, WATCHDOG, gate, limited, short};
use core::arch::global_asm;
use kit::{
    Global, Suite, apic,
    apic::register,
    catch, cpu, machine, segments,
    trap::{self, Frame, INTERRUPT_GATE, ist, vector},
};

global_asm!(
    r#"
    .section .text
    .balign 16
    .global quiet_stubs
quiet_stubs:
    .set number, 0
    .rept 256
    .balign 16
    .byte 0x68                          # PUSH imm32
    .long number
    jmp quiet
    .set number, number + 1
    .endr

quiet:
    push rax
    push rcx
    push rdx
    mov rax, [rsp + 24]
    inc dword ptr [{counts} + rax * 4]
    mov rcx, [{total}]
    inc qword ptr [{total}]
    and ecx, 255
    mov byte ptr [{order} + rcx], al
    cmp byte ptr [{x2apic}], 0
    jne 2f
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    jmp 3f
2:  mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
3:  pop rdx
    pop rcx
    pop rax
    add rsp, 8
    iretq
    "#,
    counts = sym COUNTS,
    total = sym TOTAL,
    order = sym ORDER,
    x2apic = sym X2APIC,
);

unsafe extern "C" {
    static quiet_stubs: [[u8; 16]; 256];
}

static COUNTS: Global<[u32; 256]> = Global::new([0; 256]);
static TOTAL: Global<u64> = Global::new(0);
static ORDER: Global<[u8; 256]> = Global::new([0; 256]);
static X2APIC: Global<bool> = Global::new(false);

/// Vectors from here on are interrupts even at the local APIC; below, an error (Intel SDM volume 3, section 10.5.2).
const FIRST: usize = 16;

/// Runs code while every vector from 16 on has a handler that counts it and ends the interrupt. Exceptions of those
/// vectors, which push an error code, must not come.
fn quietly(body: impl FnOnce()) {
    COUNTS.set([0; 256]);
    TOTAL.set(0);
    let stubs = (&raw const quiet_stubs) as u64;
    for number in FIRST..256 {
        let target = stubs + number as u64 * 16;
        trap::set_raw_gate(number as u8, gate(target, segments::CODE, ist::INTERRUPT, INTERRUPT_GATE));
    }
    body();
    for number in FIRST..256 {
        trap::reset_gate(number as u8);
    }
}

/// Starts the local APIC anew and ends what it still has, in service or requested.
pub fn drain() {
    apic::init();
    quietly(|| {
        for _ in 0..32 {
            apic::end_of_interrupt();
        }
        for _ in 0..256 {
            cpu::interrupt_window();
        }
        for _ in 0..32 {
            apic::end_of_interrupt();
        }
    });
    apic::set(register::ERROR, 0);
}

fn once_each() -> bool {
    (0..256).all(|number| COUNTS.at(number) == u32::from(number >= FIRST))
}

pub fn all(s: &mut Suite) {
    if machine::is_qemu_tcg() {
        return s.skip("interrupts", "QEMU delivers vectors below 16 as well");
    }
    s.group("vectors: interrupts: ");
    one_by_one(s, "", |number| apic::send(0, apic::TO_SELF | number));
    one_by_one(s, " as a message to all", |number| apic::send(0, apic::TO_ALL | number));
    one_by_one(s, " of lowest priority", |number| apic::send(apic::id(), 0x100 | number));
    at_once(s);
    other_kinds(s);
    nmis(s);
    bad_gates(s);
    if apic::has_x2apic() {
        apic::init_x2apic();
        X2APIC.set(true);
        one_by_one(s, " by x2APIC", |number| apic::send(0, apic::TO_SELF | number));
        one_by_one(s, " by the self-IPI register", |number| apic::set(register::SELF_IPI, number));
        at_once(s);
        x2apic_junk(s);
        X2APIC.set(false);
        apic::init();
    } else {
        s.skip("x2APIC", "not offered");
    }
}

fn one_by_one(s: &mut Suite, how: &str, send: fn(u32)) {
    apic::set(register::ERROR, 0);
    let mut errors = 0;
    quietly(|| {
        for number in 0..256 {
            send(number);
            cpu::interrupt_window();
            apic::set(register::ERROR, 0);
            errors += u32::from(apic::get(register::ERROR) & 0x60 != 0);
        }
    });
    let what = match how {
        "" => "every vector to itself",
        " as a message to all" => "every vector as a message to all",
        " of lowest priority" => "every vector of lowest priority",
        " by x2APIC" => "every vector by x2APIC",
        _ => "every vector by the self-IPI register",
    };
    s.check(what, (once_each(), TOTAL.get(), errors), (true, 240, 16));
}

fn at_once(s: &mut Suite) {
    quietly(|| {
        for number in 0..256u32 {
            apic::send(0, apic::TO_SELF | number);
            apic::send(0, apic::TO_SELF | number);
        }
        for _ in 0..256 {
            cpu::interrupt_window();
        }
    });
    let in_order = (0..240).all(|place| ORDER.at(place) == 255 - place as u8);
    s.check("all of them at once", (once_each(), TOTAL.get()), (true, 240));
    s.check("come by priority", in_order, true);
    apic::set(register::ERROR, 0);
}

/// Delivery modes that do nothing here, or nothing to a CPU that runs: reserved, start-up, and INIT for nobody.
fn other_kinds(s: &mut Suite) {
    const RESERVED: u32 = 3 << 8;
    const INIT: u32 = 5 << 8;
    const START_UP: u32 = 6 << 8;
    let mut random = Random::new(70);
    quietly(|| {
        for _ in 0..1_000 {
            let number = random.next() as u32 & 0xff;
            apic::send(0, apic::TO_SELF | RESERVED | number);
            apic::send(apic::id(), START_UP | number);
            apic::send(0, apic::TO_ALL | START_UP | number);
            // To all but itself, and to an ID that nobody has.
            apic::send(0, 3 << 18 | INIT | 0x4000 | number);
            apic::send(0x55, random.next() as u32 & 0xe7ff);
            // INIT level de-assert: nothing since the Pentium 4.
            apic::send(0, apic::TO_ALL | INIT | 0x8000 | number);
            cpu::interrupt_window();
        }
    });
    s.check("reserved kinds, start-up of a CPU that runs, INIT for nobody", TOTAL.get(), 0);
    drain();
}

fn nmis(s: &mut Suite) {
    // Two more that come while one is handled are one.
    fn twice(_: &mut Frame) {
        if trap::count(vector::NMI) == 1 {
            apic::send(0, apic::TO_ALL | apic::NMI);
            apic::send(0, apic::TO_ALL | apic::NMI);
        }
    }
    fn send() {
        apic::send(0, apic::TO_ALL | apic::NMI);
    }
    trap::reset_count(vector::NMI);
    trap::handle(vector::NMI, Some(twice));
    send();
    s.check("NMIs in an NMI's handler are one", trap::count(vector::NMI), 2);
    trap::handle(vector::NMI, Some(|_| {}));
    trap::reset_count(vector::NMI);
    (0..10_000).for_each(|_| send());
    s.check("ten thousand NMIs", trap::count(vector::NMI), 10_000);
    trap::handle(vector::NMI, None);
}

/// Interrupts whose gates are bad: the fault says so, and that it came from outside.
fn bad_gates(s: &mut Suite) {
    const NUMBER: u8 = 0x77;
    let deliver = |access: u8, selector: u16| {
        trap::set_raw_gate(NUMBER, gate(0x10_0000, selector, 0, access));
        apic::send(0, apic::TO_SELF | u32::from(NUMBER));
        let got = catch(cpu::interrupt_window);
        apic::end_of_interrupt();
        trap::reset_gate(NUMBER);
        short(got)
    };
    let outside = u64::from(NUMBER) * 8 | 2 | 1;
    s.check("an interrupt by an absent gate", deliver(0x0e, segments::CODE), Some((vector::NP, outside)));
    s.check("by one of a wrong type", deliver(0x8c, segments::CODE), Some((vector::GP, outside)));
    let selector = u64::from(segments::DATA) | 1;
    s.check(
        "by one to a data segment",
        deliver(INTERRUPT_GATE, segments::DATA),
        Some((vector::GP, selector)),
    );
    // The interrupt is gone with its fault.
    s.check("is not delivered again", short(catch(cpu::interrupt_window)), None);
    // No gate at all, and a storm.
    segments::lidt(u16::from(NUMBER) * 16 - 1, trap::IDT.address());
    let faults = (0..1_000).filter(|_| {
        apic::send(0, apic::TO_SELF | u32::from(NUMBER));
        let got = catch(cpu::interrupt_window);
        apic::end_of_interrupt();
        short(got) == Some((vector::GP, outside))
    });
    let faults = faults.count();
    trap::load_table();
    s.check("a thousand interrupts beyond the table", faults, 1_000);
}

/// Junk to every x2APIC register; ICR with a destination that nobody is.
fn x2apic_junk(s: &mut Suite) {
    let mut random = Random::new(71);
    let got = limited(|| {
        loop {
            core::hint::spin_loop();
        }
    });
    s.check("the x2APIC's timer ends a loop", short(got), Some((WATCHDOG, 0)));
    let mut strange = 0;
    for _ in 0..20 {
        for number in 0x800..0x900u32 {
            let value = match number {
                0x830 => 0x5555_5555 << 32 | random.next() & 0xc7ff,
                _ if random.below(2) == 0 => random.next() & 0xffff,
                _ => random.next() >> random.below(64),
            };
            let read = crate::registers::rdmsr(number);
            let written = crate::registers::wrmsr(number, value);
            let fine = |got| matches!(got, None | Some((vector::GP, 0)));
            strange += u32::from(!fine(short(read)) || !fine(short(written)));
        }
        apic::set(register::TIMER, apic::MASKED);
    }
    s.check("junk in all x2APIC registers", strange, 0);
    X2APIC.set(true);
    quietly(|| {
        for (register, value) in
            [(register::SPURIOUS, 0x1ff), (register::TPR, 0), (register::ERROR_VECTOR, apic::MASKED)]
        {
            apic::set(register, value);
        }
        for _ in 0..32 {
            apic::end_of_interrupt();
        }
        for _ in 0..256 {
            cpu::interrupt_window();
        }
    });
    apic::set(register::ERROR, 0);
    apic::send(0, apic::TO_SELF | 0x44);
    let got = catch(cpu::interrupt_window);
    apic::end_of_interrupt();
    s.check("leave it at work", short(got), Some((0x44, 0)));
}
