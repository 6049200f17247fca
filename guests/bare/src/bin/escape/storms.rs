//! Faults without end, and interrupts faster than anybody can serve them.
use crate::tools::{
    FAR, PAGE, RECOVERED, WATCHDOG, address, fault, fault_again, gate, limited, recover, short,
};
use kit::{
    Suite, apic,
    apic::register,
    cpu::{self, msr},
    machine,
    memory::{self, Tables, bit, fault as code, pages},
    segments, time,
    trap::{self, Frame, INTERRUPT_GATE, TRAP_GATE, ist, vector},
    trapping,
};

/// Where nothing is.
const NOWHERE: u64 = 1 << 40;
const TIMER: u8 = 0x41;
const NESTING: u8 = 0x94;

pub fn all(s: &mut Suite) {
    endless_faults(s);
    until_the_stack_ends(s);
    double_faults(s);
    steps(s);
    if machine::is_qemu_tcg() {
        s.skip("timers", "QEMU has no shortest period, and does nothing else");
    } else {
        s.group("storms: timers: ");
        timer(s);
        interval_timer(s);
        s.group("storms: ");
    }
    level(s);
}

/// Handlers that fault in their first instruction, with interrupts on: an interrupt ends it.
fn endless_faults(s: &mut Suite) {
    let by = |number: u8, target: u64, trigger: fn()| {
        trap::set_raw_gate(number, gate(target, segments::CODE, ist::SPARE, TRAP_GATE));
        let got = limited(trigger);
        trap::reset_gate(number);
        short(got)
    };
    fn undefined() {
        // SAFETY: ends in the watchdog's trap.
        unsafe { core::arch::asm!("ud2") }
    }
    fn absent() {
        memory::read::<u8>(NOWHERE);
    }
    let ended = Some((WATCHDOG, 0));
    s.check("a handler of #UD that raises #UD", by(vector::UD, address(fault_again), undefined), ended);
    s.check("a handler of #PF that is not there", by(vector::PF, NOWHERE, absent), ended);
    s.check("a handler of #UD in a hole", by(vector::UD, crate::tools::ram_end(), undefined), ended);
    // The same where each delivery faults first.
    trap::set_raw_gate(vector::GP, gate(address(fault_again), segments::CODE, ist::SPARE, TRAP_GATE));
    let got = by(vector::UD, 1 << 47, undefined);
    trap::reset_gate(vector::GP);
    s.check("a handler of #UD without an address", got, ended);
}

core::arch::global_asm!(
    r#"
    .section .text
    .global nest
nest:
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    mov eax, 0xfee00300
    mov dword ptr [rax], 0x40094
    sti
    nop
2:  pause
    jmp 2b
    "#
);

unsafe extern "C" {
    /// Handler of [`NESTING`]: ends its interrupt, requests the next and lets it in.
    fn nest();
}

/// Handlers within handlers on one stack, down to the absent page below it.
fn until_the_stack_ends(s: &mut Suite) {
    let tables = Tables::new();
    let stack = pages(4);
    for offset in (0..4 * PAGE).step_by(PAGE as usize) {
        tables.map(FAR + offset, stack + offset, bit::P | bit::W);
    }
    tables.load();
    let top = FAR + 4 * PAGE;
    let expected = Some((vector::PF, code::W, FAR - 8));
    trap::set_raw_gate(vector::UD, gate(address(fault_again), segments::CODE, 0, INTERRUPT_GATE));
    let got = trapping!("mov rcx, rsp", "mov rsp, {0}", => "ud2"; in(reg) top, out("rcx") _);
    trap::reset_gate(vector::UD);
    s.check("faults in faults until the stack ends", fault(got), expected);
    trap::set_raw_gate(NESTING, gate(address(nest), segments::CODE, 0, INTERRUPT_GATE));
    let got = trapping!("mov rcx, rsp", "mov rsp, {0}", => "int 0x94"; in(reg) top, out("rcx") _);
    trap::reset_gate(NESTING);
    apic::end_of_interrupt();
    s.check("interrupts in interrupts, too", fault(got), expected);
    // With no stack at all for the fault either.
    let mut task = segments::TSS.get();
    task.ist[usize::from(ist::SPARE) - 1] = NOWHERE;
    segments::TSS.set(task);
    trap::set_raw_gate(vector::PF, gate(address(recover), segments::CODE, ist::SPARE, INTERRUPT_GATE));
    let got = trapping!("mov rcx, rsp", "mov rsp, {0}", => "push rax"; in(reg) FAR, out("rcx") _);
    trap::reset_gate(vector::PF);
    task.ist[usize::from(ist::SPARE) - 1] = segments::stack_top(ist::SPARE.into());
    segments::TSS.set(task);
    s.check("and no stack for the fault either", short(got), Some((vector::DF, 0)));
    cpu::write_cr3(memory::boot_root());
}

fn double_faults(s: &mut Suite) {
    const ROUNDS: usize = 10_000;
    trap::set_gate(vector::PF, INTERRUPT_GATE & !0x80, 0, segments::CODE);
    let doubled = (0..ROUNDS).filter(|_| {
        let got = trapping!(=> "mov al, [{0}]"; in(reg) NOWHERE);
        short(got) == Some((vector::DF, 0))
    });
    let doubled = doubled.count();
    trap::reset_gate(vector::PF);
    s.check("ten thousand double faults", doubled, ROUNDS);
    let single = (0..ROUNDS).filter(|_| {
        trap::set_raw_gate(vector::UD, gate(address(recover), segments::CODE, ist::SPARE, INTERRUPT_GATE));
        let got = trapping!(=> "ud2");
        trap::reset_gate(vector::UD);
        short(got) == Some((RECOVERED, 0))
    });
    s.check("ten thousand faults whose handlers never return", single.count(), ROUNDS);
}

/// A debug trap after each of some thousand instructions.
fn steps(s: &mut Suite) {
    trap::handle(vector::DB, Some(|_: &mut Frame| {}));
    trap::reset_count(vector::DB);
    // SAFETY: counts a register down.
    unsafe {
        core::arch::asm!(
            "pushfq", "or dword ptr [rsp], 0x100", "popfq",
            "mov ecx, 5000", "2:", "dec ecx", "jnz 2b",
            "pushfq", "and dword ptr [rsp], 0xfffffeff", "popfq",
            out("ecx") _
        )
    };
    // MOV, five thousand times two, and the three that end it.
    s.check("ten thousand single steps", trap::count(vector::DB), 10_004);
    trap::handle(vector::DB, None);
}

fn end(_: &mut Frame) {
    apic::end_of_interrupt();
}

/// Waits until so many interrupts came; whether they did, and whether the program got on meanwhile.
fn weather(number: u8, interrupts: u32) -> (bool, bool) {
    let mut rounds = 0;
    cpu::sti();
    let came = time::wait(10_000, || {
        rounds += 1;
        trap::count(number) >= interrupts
    });
    cpu::cli();
    (came, rounds > interrupts)
}

/// Ticks of the local APIC's timer as short as they come.
fn timer(s: &mut Suite) {
    const STORM: u32 = 10_000;
    let start = |mode: u32, handler: trap::Handler| {
        apic::set(register::DIVIDE, 0xb);
        trap::handle(TIMER, Some(handler));
        trap::reset_count(TIMER);
        apic::set(register::TIMER, mode | u32::from(TIMER));
    };
    start(apic::PERIODIC, end);
    apic::set(register::INITIAL_COUNT, 1);
    s.check("a period of one tick leaves time for the program", weather(TIMER, 100), (true, true));
    let halts = (0..50).filter(|_| {
        cpu::wait_for_interrupt();
        true
    });
    s.check("and wakes it from HLT", halts.count(), 50);
    apic::set(register::INITIAL_COUNT, 0);
    cpu::interrupt_window();
    fn again(_: &mut Frame) {
        if trap::count(TIMER) < STORM {
            apic::set(register::INITIAL_COUNT, 1);
        }
        apic::end_of_interrupt();
    }
    start(0, again);
    apic::set(register::INITIAL_COUNT, 1);
    s.check("ten thousand shots of one tick", weather(TIMER, STORM).0, true);
    if apic::has_deadline() {
        fn late(_: &mut Frame) {
            if trap::count(TIMER) < STORM {
                cpu::wrmsr(msr::TSC_DEADLINE, 1);
            }
            apic::end_of_interrupt();
        }
        start(apic::DEADLINE, late);
        cpu::wrmsr(msr::TSC_DEADLINE, 1);
        s.check("ten thousand deadlines in the past", weather(TIMER, STORM).0, true);
    } else {
        s.skip("ten thousand deadlines in the past", "no TSC deadline");
    }
    apic::set(register::TIMER, apic::MASKED);
    trap::handle(TIMER, None);
}

/// The 8254 at its highest rate, by the I/O APIC's pin 2.
fn interval_timer(s: &mut Suite) {
    const PIN: u32 = 2;
    trap::handle(TIMER, Some(end));
    trap::reset_count(TIMER);
    apic::route(PIN, TIMER.into());
    time::pit(0, 2, 2);
    s.check("the 8254 at its highest rate", weather(TIMER, 100), (true, true));
    time::pit(0, 3, 2);
    trap::reset_count(TIMER);
    s.check("and in its other mode", weather(TIMER, 100), (true, true));
    cpu::outb(0x43, 0x30);
    apic::route(PIN, apic::MASKED);
    cpu::interrupt_window();
    trap::handle(TIMER, None);
}

/// A level that nobody takes down: the interrupt comes again as soon as it is ended.
fn level(s: &mut Suite) {
    const UART_PIN: u32 = 4;
    const STORM: u32 = 10_000;
    fn closing(_: &mut Frame) {
        if trap::count(TIMER) == STORM {
            cpu::outb(0x3f9, 0);
            cpu::inb(0x3fa);
        }
        apic::end_of_interrupt();
    }
    kit::serial::flush();
    trap::handle(TIMER, Some(closing));
    trap::reset_count(TIMER);
    apic::route(UART_PIN, apic::LEVEL | u32::from(TIMER));
    cpu::outb(0x3f9, 2);
    let came = weather(TIMER, STORM).0;
    cpu::interrupt_window();
    let times = trap::count(TIMER);
    apic::route(UART_PIN, apic::MASKED);
    cpu::outb(0x3f9, 0);
    trap::handle(TIMER, None);
    s.check("ten thousand interrupts of one level", (came, times), (true, STORM));
}
