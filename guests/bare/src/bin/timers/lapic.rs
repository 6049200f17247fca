//! The local APIC: its timer in every mode, interrupts to itself, priorities, errors; first as xAPIC, then as x2APIC.
use crate::PATIENCE;
use kit::{
    Global, Suite, apic,
    apic::register,
    catch,
    cpu::{self, msr},
    segments, time,
    trap::{self, Frame, INTERRUPT_GATE, ist, vector},
};

const TIMER: u8 = 0x40;
const LOW: u8 = 0x51;
const HIGH: u8 = 0x61;
const ERROR: u8 = 0xe0;

fn end(_: &mut Frame) {
    apic::end_of_interrupt();
}

/// Waits with interrupts on until a vector came so often.
fn wait_for(vector: u8, times: u32) -> bool {
    cpu::sti();
    let came = time::wait(PATIENCE, || trap::count(vector) >= times);
    cpu::cli();
    came
}

/// Lets pending interrupts in and counts those of a vector.
fn delivered(vector: u8) -> u32 {
    trap::reset_count(vector);
    cpu::interrupt_window();
    trap::count(vector)
}

pub fn all(s: &mut Suite) {
    for vector in [TIMER, LOW, HIGH, ERROR] {
        trap::handle(vector, Some(end));
    }
    s.check("the local APIC has a version of its kind", apic::get(register::VERSION) & 0xf0, 0x10);
    timer(s);
    deadline(s);
    messages(s);
    priorities(s);
    errors(s);
    nmi(s);
    if apic::has_x2apic() {
        s.group("x2APIC: ");
        let before = apic::id();
        apic::init_x2apic();
        s.check("the ID stays", apic::id(), before);
        timer(s);
        deadline(s);
        messages(s);
        apic::set(register::SELF_IPI, LOW.into());
        s.check("the self-IPI register interrupts", delivered(LOW), 1);
        let reserved = catch(|| cpu::wrmsr(0x80b, 1)).map(|trap| (trap.vector, trap.error));
        s.check("#GP by an end of interrupt other than 0", reserved, Some((vector::GP, 0)));
        let back = cpu::rdmsr(msr::APIC_BASE) & !(1 << 10);
        let got = catch(|| cpu::wrmsr(msr::APIC_BASE, back)).map(|trap| (trap.vector, trap.error));
        s.check("#GP by going straight back to xAPIC mode", got, Some((vector::GP, 0)));
        apic::init();
        s.group("");
    } else {
        s.skip("x2APIC", "not offered");
    }
    apic::set(register::TIMER, apic::MASKED);
}

fn timer(s: &mut Suite) {
    // How fast it counts, by 16.
    apic::set(register::DIVIDE, 3);
    apic::set(register::TIMER, apic::MASKED | u32::from(TIMER));
    apic::set(register::INITIAL_COUNT, u32::MAX);
    time::wait(2, || false);
    let per_ms = (u32::MAX - apic::get(register::CURRENT_COUNT)) / 2;
    s.check("the timer counts", per_ms > 0, true);
    apic::set(register::INITIAL_COUNT, per_ms);
    let ended = time::wait(PATIENCE, || apic::get(register::CURRENT_COUNT) == 0);
    s.check("one-shot mode stops at 0", ended, true);
    s.check("a masked timer requests nothing", apic::vector_bit(register::REQUEST, TIMER), false);

    trap::reset_count(TIMER);
    apic::set(register::TIMER, TIMER.into());
    let start = cpu::rdtsc();
    apic::set(register::INITIAL_COUNT, per_ms * 5);
    s.check("one-shot mode interrupts", wait_for(TIMER, 1), true);
    let early = cpu::rdtsc() - start < 3 * time::ticks_per_ms();
    s.check("and not too early", early, false);
    cpu::sti();
    time::wait(10, || false);
    cpu::cli();
    s.check("and once", trap::count(TIMER), 1);

    trap::reset_count(TIMER);
    apic::set(register::TIMER, apic::PERIODIC | u32::from(TIMER));
    apic::set(register::INITIAL_COUNT, per_ms);
    s.check("periodic mode interrupts again and again", wait_for(TIMER, 5), true);
    apic::set(register::INITIAL_COUNT, 0);
    cpu::interrupt_window();
    trap::reset_count(TIMER);
    cpu::sti();
    time::wait(5, || false);
    cpu::cli();
    s.check("an initial count of 0 stops it", trap::count(TIMER), 0);

    trap::reset_count(TIMER);
    apic::set(register::TIMER, TIMER.into());
    apic::set(register::INITIAL_COUNT, per_ms);
    while trap::count(TIMER) == 0 {
        cpu::wait_for_interrupt();
    }
    s.check("HLT wakes up for the timer", trap::count(TIMER), 1);
}

fn deadline(s: &mut Suite) {
    if !apic::has_deadline() {
        s.skip("TSC deadline", "not offered");
        return;
    }
    apic::set(register::TIMER, apic::DEADLINE | u32::from(TIMER));
    trap::reset_count(TIMER);
    // Far enough not to come between the write and the read when the host is busy.
    let far = cpu::rdtsc() + 10_000 * time::ticks_per_ms();
    cpu::wrmsr(msr::TSC_DEADLINE, far);
    s.check("TSC deadline: the register shows it", cpu::rdmsr(msr::TSC_DEADLINE), far);
    let when = cpu::rdtsc() + 3 * time::ticks_per_ms();
    cpu::wrmsr(msr::TSC_DEADLINE, when);
    s.check("TSC deadline: it interrupts", wait_for(TIMER, 1), true);
    s.check("TSC deadline: and not too early", cpu::rdtsc() >= when, true);
    s.check("TSC deadline: and disarms itself", cpu::rdmsr(msr::TSC_DEADLINE), 0);
    cpu::wrmsr(msr::TSC_DEADLINE, 1);
    s.check("TSC deadline: one in the past comes at once", wait_for(TIMER, 2), true);
    // Far enough not to come between the two writes when the host is busy.
    cpu::wrmsr(msr::TSC_DEADLINE, cpu::rdtsc() + 100 * time::ticks_per_ms());
    cpu::wrmsr(msr::TSC_DEADLINE, 0);
    cpu::sti();
    time::wait(120, || false);
    cpu::cli();
    s.check("TSC deadline: 0 disarms it", trap::count(TIMER), 2);
    apic::set(register::TIMER, apic::MASKED);
}

fn messages(s: &mut Suite) {
    apic::send(0, apic::TO_SELF | u32::from(LOW));
    s.check("a message to itself is requested", apic::vector_bit(register::REQUEST, LOW), true);
    s.check("and delivered", delivered(LOW), 1);
    s.check("and no more requested", apic::vector_bit(register::REQUEST, LOW), false);
    s.check("nor in service", apic::vector_bit(register::IN_SERVICE, LOW), false);
    apic::send(apic::id(), LOW.into());
    s.check("a message by physical ID is delivered", delivered(LOW), 1);
    apic::send(0, apic::TO_ALL | u32::from(LOW));
    s.check("a message to all is delivered", delivered(LOW), 1);
    // In x2APIC mode the logical ID is read-only and derived; bit 0 of cluster 0 is CPU 0's in both modes.
    apic::send(1, apic::LOGICAL_MODE | u32::from(LOW));
    s.check("a message by logical ID is delivered", delivered(LOW), 1);
    apic::send(apic::id() + 1, LOW.into());
    s.check("a message to nobody is not", delivered(LOW), 0);
    apic::send(0, apic::TO_SELF | u32::from(LOW));
    apic::send(0, apic::TO_SELF | u32::from(LOW));
    s.check("two requests before delivery are one", delivered(LOW), 1);
}

static ORDER: Global<[u8; 4]> = Global::new([0; 4]);

fn note(frame: &mut Frame) {
    let order = ORDER.get();
    let place = order.iter().position(|&vector| vector == 0).unwrap_or(3);
    ORDER.set_at(place, frame.vector as u8);
    apic::end_of_interrupt();
}

fn priorities(s: &mut Suite) {
    for vector in [LOW, HIGH] {
        trap::handle(vector, Some(note));
    }
    ORDER.set([0; 4]);
    apic::send(0, apic::TO_SELF | u32::from(LOW));
    apic::send(0, apic::TO_SELF | u32::from(HIGH));
    cpu::interrupt_window();
    s.check("the higher vector comes first", ORDER.get(), [HIGH, LOW, 0, 0]);

    // A handler that lets interrupts in: only a higher class comes through.
    fn open(_: &mut Frame) {
        apic::send(0, apic::TO_SELF | u32::from(LOW) + 1);
        apic::send(0, apic::TO_SELF | u32::from(HIGH));
        cpu::interrupt_window();
        ORDER.set_at(1, LOW);
        apic::end_of_interrupt();
    }
    ORDER.set([0; 4]);
    trap::set_gate(HIGH, INTERRUPT_GATE, ist::SPARE, segments::CODE);
    trap::handle(LOW, Some(open));
    trap::handle(LOW + 1, Some(note));
    apic::send(0, apic::TO_SELF | u32::from(LOW));
    cpu::interrupt_window();
    s.check(
        "a higher class interrupts a handler, the same class waits",
        ORDER.get(),
        [HIGH, LOW, LOW + 1, 0],
    );
    trap::reset_gate(HIGH);
    for vector in [LOW, HIGH, LOW + 1] {
        trap::handle(vector, Some(end));
    }

    cpu::write_cr8(u64::from(LOW >> 4));
    s.check("CR8 is the task priority's upper half", apic::get(register::TPR), u32::from(LOW >> 4) << 4);
    apic::send(0, apic::TO_SELF | u32::from(LOW));
    s.check("the task priority holds off its own class", delivered(LOW), 0);
    s.check("which stays requested", apic::vector_bit(register::REQUEST, LOW), true);
    apic::send(0, apic::TO_SELF | u32::from(HIGH));
    s.check("and lets a higher one through", delivered(HIGH), 1);
    s.check("the processor priority is the task's", apic::get(register::PPR), u32::from(LOW >> 4) << 4);
    apic::set(register::TPR, 0);
    s.check("the task priority is CR8", cpu::read_cr8(), 0);
    s.check("lowering it lets the waiting one in", delivered(LOW), 1);
    apic::set(register::TPR, 0xf0);
    apic::send(0, apic::TO_SELF | 0xf1);
    trap::handle(0xf1, Some(end));
    s.check("priority 15 holds off everything", delivered(0xf1), 0);
    cpu::write_cr8(0);
    s.check("until it is 0", delivered(0xf1), 1);
    trap::handle(0xf1, None);
}

fn errors(s: &mut Suite) {
    apic::set(register::ERROR, 0);
    apic::set(register::ERROR_VECTOR, ERROR.into());
    // An APIC that does not check would deliver it as #BR.
    trap::handle(vector::BR, Some(end));
    apic::send(0, apic::TO_SELF | u32::from(vector::BR));
    s.check("a message with a vector below 16 is an error", delivered(ERROR), 1);
    apic::set(register::ERROR, 0);
    // Bit 5: an illegal vector was sent; bit 6: one was received.
    s.check("which the error register names", apic::get(register::ERROR) & 0x20, 0x20);
    apic::set(register::ERROR, 0);
    s.check("until it is written again", apic::get(register::ERROR), 0);
    trap::handle(vector::BR, None);
    apic::set(register::ERROR_VECTOR, apic::MASKED);
    // Software disabling masks the local vector table.
    apic::set(register::SPURIOUS, apic::SPURIOUS_VECTOR.into());
    s.check(
        "a disabled APIC masks its local vectors",
        apic::get(register::TIMER) & apic::MASKED,
        apic::MASKED,
    );
    apic::init();
}

static NMIS: Global<u32> = Global::new(0);
static NESTED: Global<bool> = Global::new(false);

fn nmi(s: &mut Suite) {
    fn count(_: &mut Frame) {
        NMIS.set(NMIS.get() + 1);
    }
    trap::handle(vector::NMI, Some(count));
    apic::send(apic::id(), apic::NMI);
    s.check("an NMI comes with interrupts off", time::wait(PATIENCE, || NMIS.get() == 1), true);

    // Sent from its own handler, the next waits for the handler's IRET.
    fn again(_: &mut Frame) {
        NMIS.set(NMIS.get() + 1);
        if NMIS.get() == 1 {
            apic::send(apic::id(), apic::NMI);
            time::wait(1, || false);
            NESTED.set(NMIS.get() != 1);
        }
    }
    NMIS.set(0);
    trap::handle(vector::NMI, Some(again));
    apic::send(apic::id(), apic::NMI);
    s.check("a second NMI comes after the first", time::wait(PATIENCE, || NMIS.get() == 2), true);
    s.check("and not within it", NESTED.get(), false);
    trap::handle(vector::NMI, None);
}
