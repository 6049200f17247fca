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
    request();
    let got = caught(trapping!("sti", "pause", => "nop"));
    s.check("PAUSE is what STI lets through", got, Some((SELF, "at")));
    string(s);
    pauses(s);
}

fn end(_: &mut Frame) {
    apic::end_of_interrupt();
}

/// Does something again and again until the timer has interrupted it often; whether it has.
fn in_a_storm(mut work: impl FnMut()) -> bool {
    trap::handle(TIMER, Some(end));
    trap::reset_count(TIMER);
    apic::set(register::DIVIDE, 0xb);
    apic::set(register::TIMER, apic::PERIODIC | u32::from(TIMER));
    apic::set(register::INITIAL_COUNT, 200_000);
    cpu::sti();
    time::wait(2000, || {
        work();
        trap::count(TIMER) >= 10
    });
    cpu::cli();
    apic::set(register::TIMER, apic::MASKED);
    apic::set(register::INITIAL_COUNT, 0);
    cpu::interrupt_window();
    trap::count(TIMER) >= 10
}

/// A sum of 128 bits, whose carry lives across a PAUSE.
fn pauses(s: &mut Suite) {
    let mut wrong = 0;
    let stormy = in_a_storm(|| {
        let (mut low, mut high, mut r12): (u64, u64, u64) = (0, 0, 0x1234_5678_9abc_def0);
        // SAFETY: changes the named registers alone.
        unsafe {
            core::arch::asm!(
                "2:",
                "add {low}, {step}",
                "pause",
                "adc {high}, 0",
                "pause",
                "dec ecx",
                "pause",
                "jnz 2b",
                low = inout(reg) low,
                high = inout(reg) high,
                step = in(reg) 0xc000_0000_0000_0001_u64,
                inout("ecx") 1000 => _,
                inout("r12") r12,
            );
        }
        let sum = 1000 * 0xc000_0000_0000_0001_u128;
        let right = (low, high, r12) == (sum as u64, (sum >> 64) as u64, 0x1234_5678_9abc_def0);
        wrong += u32::from(!right);
    });
    s.check("PAUSE keeps flags and registers under a storm of interrupts", (stormy, wrong), (true, 0));
}

fn string(s: &mut Suite) {
    const BYTES: u64 = 1 << 20;
    let (source, target) = (pages(BYTES / 4096), pages(BYTES / 4096));
    for offset in (0..BYTES).step_by(8) {
        write(source + offset, offset.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    let stormy = in_a_storm(|| {
        // SAFETY: both areas were taken for this.
        unsafe {
            core::arch::asm!("rep movsb", inout("rcx") BYTES => _, inout("rsi") source => _, inout("rdi") target => _)
        };
    });
    let same =
        (0..BYTES).step_by(8).all(|offset| read::<u64>(source + offset) == read::<u64>(target + offset));
    s.check("REP MOVSB is whole under a storm of interrupts", (same, stormy), (true, true));
    trap::handle(TIMER, None);
}
