//! Ways to lose a machine, by a key: digits end in a triple fault (Intel SDM volume 3, section 6.15, double fault),
//! letters in a CPU that never comes back by itself. The first is a crash of the guest; the second must leave the
//! machine monitor as easy to end as ever.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use kit::{
    apic::{self, register},
    cpu::{self, msr},
    machine,
    memory::{self, Tables, pages, write},
    println, segments, serial, time,
    trap::{self, Frame, Gate, vector},
};

/// Where no RAM is, on a machine of less than 1 GiB.
const HOLE: u64 = 0x4000_0000;
/// Where nothing is mapped.
const NOWHERE: u64 = 1 << 40;
const TIMER: u8 = 0x41;

const WAYS: [(u8, &str, fn()); 17] = [
    (b'1', "an empty interrupt table", || segments::lidt(0, 0)),
    (b'2', "an interrupt table in a hole", || segments::lidt(0xfff, HOLE)),
    (b'3', "an interrupt table of zeros", || segments::lidt(0xfff, pages(1))),
    (b'4', "page tables in a hole", || cpu::write_cr3(HOLE)),
    (b'5', "page tables of zeros", zeroed_tables),
    (b'6', "no stack for any handler", no_stacks),
    (b'7', "a task of no length", short_task),
    (b'8', "handlers without an address", no_handlers),
    (b'a', "a loop with interrupts off", || endless(|| {})),
    (b'b', "HLT with interrupts off", halt),
    (b'c', "a fault in the handler of the fault", || {
        trap::set_raw_gate(vector::UD, to(fault_again as *const ()))
    }),
    (b'd', "a handler of page faults that is not there", absent_handler),
    (b'e', "a breakpoint on the stack of its handler", breakpoint),
    (b'f', "INIT", || apic::send(apic::id(), 0x4500)),
    (b'g', "a string instruction without end", string),
    (b'h', "a deadline that is always past", deadline),
    (b'i', "an NMI in each NMI's handler", nmi),
];

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    println!("lost: waits for a key");
    let mut key = None;
    time::wait(10_000, || {
        key = serial::get();
        key.is_some()
    });
    let Some((_, name, act)) = WAYS.iter().find(|(letter, ..)| Some(*letter) == key) else {
        println!("lost: no such key");
        machine::end(false)
    };
    println!("lost: by {name}");
    serial::flush();
    apic::init();
    act();
    // SAFETY: nothing is left that could handle it.
    unsafe { asm!("ud2", options(noreturn)) }
}

global_asm!(".section .text", ".global fault_again", "fault_again: ud2");

unsafe extern "C" {
    /// A handler that raises #UD.
    fn fault_again();
}

/// An interrupt gate to this code, on IST1.
fn to(code: *const ()) -> Gate {
    let target = code as u64;
    let low =
        target & 0xffff | 0x8e01 << 32 | u64::from(segments::CODE) << 16 | (target >> 16 & 0xffff) << 48;
    Gate { low, high: target >> 32 }
}

fn zeroed_tables() {
    let tables = Tables::new();
    tables.load();
    for entry in 0..512 {
        write(tables.root + entry * 8, 0u64);
    }
    tables.load();
}

fn no_stacks() {
    let mut task = segments::TSS.get();
    task.ist = [NOWHERE; 7];
    segments::TSS.set(task);
}

fn short_task() {
    segments::set_task_descriptor(segments::FREE, segments::TSS.address(), 0, 0x89);
    segments::ltr(segments::FREE);
}

/// Makes the addresses of all handlers non-canonical.
fn no_handlers() {
    for number in 0..32 {
        let low: u64 = memory::read(trap::IDT.address() + u64::from(number) * 16);
        trap::set_raw_gate(number, Gate { low, high: 1 << 31 });
    }
}

/// Repeats something for ever.
fn endless(mut body: impl FnMut()) {
    loop {
        body();
        core::hint::spin_loop();
    }
}

fn halt() {
    // SAFETY: waits for an interrupt that is not let in.
    endless(|| unsafe { asm!("cli", "hlt") });
}

fn absent_handler() {
    trap::set_raw_gate(vector::PF, to(NOWHERE as *const ()));
    memory::read::<u8>(NOWHERE);
}

/// Each delivery of #DB writes to the watched bytes, which raises the next.
fn breakpoint() {
    const WRITES_OF_8: u64 = 1 << 0 | 1 << 8 | 0b1001 << 16;
    trap::set_raw_gate(vector::DB, to(fault_again as *const ()));
    trap::set_raw_gate(vector::UD, to(fault_again as *const ()));
    cpu::write_dr0(segments::stack_top(1) - 8);
    cpu::write_dr7(WRITES_OF_8);
    // SAFETY: INT1.
    unsafe { asm!(".byte 0xf1") }
}

fn string() {
    // SAFETY: nobody takes what is written.
    endless(|| unsafe {
        asm!("rep outsb", inout("rcx") u64::MAX => _, inout("rsi") 0u64 => _, in("dx") 0x5678u16)
    });
}

fn deadline() {
    fn again(_: &mut Frame) {
        cpu::wrmsr(msr::TSC_DEADLINE, 1);
        apic::end_of_interrupt();
    }
    trap::handle(TIMER, Some(again));
    apic::set(register::TIMER, apic::DEADLINE | u32::from(TIMER));
    cpu::wrmsr(msr::TSC_DEADLINE, 1);
    endless(cpu::sti);
}

fn nmi() {
    fn again(_: &mut Frame) {
        apic::send(0, apic::TO_ALL | apic::NMI);
    }
    trap::handle(vector::NMI, Some(again));
    endless(|| apic::send(0, apic::TO_ALL | apic::NMI));
}
