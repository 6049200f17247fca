//! When the CPU lets an interrupt in: the shadow of STI, HLT, string instructions.
use kit::{
    Suite, apic,
    apic::register,
    cpu,
    memory::{pages, read, write},
    time,
    trap::{self, Frame},
    trapping,
};

const SELF: u8 = 0x55;
const TIMER: u8 = 0x41;

/// Requests an interrupt that has no handler, so that it ends what runs as a trap.
fn request() {
    apic::send(0, apic::TO_SELF | u32::from(SELF));
}

/// Ends the interrupt that was delivered as a trap.
fn caught(got: Option<kit::Trap>) -> Option<(u8, &'static str)> {
    if got.is_some_and(|trap| trap.vector == SELF) {
        apic::end_of_interrupt();
    }
    got.map(|trap| (trap.vector, trap.place))
}

pub fn all(s: &mut Suite) {
    trap::handle(SELF, None);
    request();
    let got = caught(trapping!("sti", => "nop"));
    s.check("an interrupt waits for the instruction after STI", got, Some((SELF, "after")));
    request();
    let got = caught(trapping!("pushfq", "or dword ptr [rsp], 0x200", "popfq", => "nop"));
    s.check("it does not wait after POPFQ", got, Some((SELF, "at")));
    request();
    let got = caught(trapping!("sti", => "hlt"));
    s.check("HLT with one pending goes on", got, Some((SELF, "after")));
    request();
    let got = caught(trapping!("sti", "cli", => "nop"));
    s.check("STI and CLI let nothing in", got, None);
    // That one is still requested.
    let got = caught(trapping!("sti", => "nop"));
    s.check("but lose nothing", got, Some((SELF, "after")));
    let got = caught(trapping!("sti", "nop", => "ud2"));
    s.check("an exception with interrupts on", got, Some((trap::vector::UD, "at")));
    string(s);
}

fn string(s: &mut Suite) {
    const BYTES: u64 = 1 << 20;
    fn end(_: &mut Frame) {
        apic::end_of_interrupt();
    }
    let (source, target) = (pages(BYTES / 4096), pages(BYTES / 4096));
    for offset in (0..BYTES).step_by(8) {
        write(source + offset, offset.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    trap::handle(TIMER, Some(end));
    trap::reset_count(TIMER);
    apic::set(register::DIVIDE, 0xb);
    apic::set(register::TIMER, apic::PERIODIC | u32::from(TIMER));
    apic::set(register::INITIAL_COUNT, 200_000);
    cpu::sti();
    let mut rounds = 0;
    time::wait(2000, || {
        rounds += 1;
        // SAFETY: both areas were taken for this.
        unsafe {
            core::arch::asm!("rep movsb", inout("rcx") BYTES => _, inout("rsi") source => _, inout("rdi") target => _)
        };
        trap::count(TIMER) >= 10
    });
    cpu::cli();
    apic::set(register::TIMER, apic::MASKED);
    apic::set(register::INITIAL_COUNT, 0);
    cpu::interrupt_window();
    let same =
        (0..BYTES).step_by(8).all(|offset| read::<u64>(source + offset) == read::<u64>(target + offset));
    s.check("REP MOVSB is whole under a storm of interrupts", (same, trap::count(TIMER) >= 10), (true, true));
    trap::handle(TIMER, None);
}
