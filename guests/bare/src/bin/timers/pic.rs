//! The 8259A pair, with the 8254 on IRQ 0 and the CMOS clock on IRQ 8 as sources.
use crate::PATIENCE;
use kit::{
    Global, Suite, cpu,
    pic::{self, BASE},
    time,
    trap::{self, Frame},
};

const IRQ0: u8 = BASE;
const IRQ8: u8 = BASE + 8;

static IN_SERVICE: Global<u16> = Global::new(0);

fn timer(_: &mut Frame) {
    IN_SERVICE.set(pic::in_service());
    pic::end_of_interrupt(0);
}

fn clock(_: &mut Frame) {
    IN_SERVICE.set(pic::in_service());
    // Reading register C ends the request.
    time::cmos(12);
    pic::end_of_interrupt(8);
}

/// Waits with interrupts on until a vector came so often.
fn wait_for(vector: u8, times: u32) -> bool {
    cpu::sti();
    let came = time::wait(PATIENCE, || trap::count(vector) >= times);
    cpu::cli();
    came
}

pub fn all(s: &mut Suite) {
    trap::handle(IRQ0, Some(timer));
    trap::handle(IRQ8, Some(clock));
    pic::set_masks(0xa5ff);
    s.check("the 8259A keeps its masks", pic::masks(), 0xa5ff);
    pic::set_masks(0xffff);
    timer_interrupts(s);
    clock_interrupts(s);
    trap::handle(IRQ0, None);
    trap::handle(IRQ8, None);
    pic::init();
}

fn timer_interrupts(s: &mut Suite) {
    // A rising edge of OUT while the line is masked stays requested.
    trap::reset_count(IRQ0);
    time::pit(0, 0, 100);
    s.check("a masked interrupt is requested", time::wait(PATIENCE, || pic::requests() & 1 == 1), true);
    cpu::sti();
    time::wait(1, || false);
    cpu::cli();
    s.check("and not delivered", trap::count(IRQ0), 0);
    pic::unmask(0);
    s.check("until it is unmasked", wait_for(IRQ0, 1), true);
    s.check("it is in service in its handler", IN_SERVICE.get(), 1);
    s.check("and no more after the end of interrupt", pic::in_service(), 0);
    time::wait(2, || false);
    s.check("mode 0 interrupts once", (cpu::interrupt_window(), trap::count(IRQ0)).1, 1);

    trap::reset_count(IRQ0);
    time::pit(0, 2, 1193);
    let start = cpu::rdtsc();
    s.check("mode 2 interrupts again and again", wait_for(IRQ0, 10), true);
    // Ten periods of 1 ms; the first may have begun before, and the calibration has an error of its own.
    let early = cpu::rdtsc() - start < 8 * time::ticks_per_ms();
    s.check("and not too early", early, false);
    trap::reset_count(IRQ0);
    time::pit(0, 3, 1193);
    s.check("mode 3 does the same", wait_for(IRQ0, 3), true);

    // Without the end of interrupt nothing of equal or lower priority comes.
    fn no_end(_: &mut Frame) {}
    trap::handle(IRQ0, Some(no_end));
    trap::reset_count(IRQ0);
    wait_for(IRQ0, 1);
    cpu::sti();
    time::wait(5, || false);
    cpu::cli();
    s.check("an interrupt in service holds off the next", trap::count(IRQ0), 1);
    pic::end_of_interrupt(0);
    s.check("which comes after its end", wait_for(IRQ0, 2), true);
    pic::init_with(pic::AUTO_EOI);
    pic::unmask(0);
    trap::reset_count(IRQ0);
    s.check("with automatic ends none is held off", wait_for(IRQ0, 3), true);
    s.check("and none stays in service", pic::in_service() & 1, 0);
    pic::init();
    // Mode 0 with a fresh control word and no count: the output goes low and stays there.
    cpu::outb(0x43, 0x30);
}

fn clock_interrupts(s: &mut Suite) {
    const PERIODIC: u8 = 1 << 6;
    const UPDATE_ENDED: u8 = 1 << 4;
    let status_b = time::cmos(11);
    // 1024 Hz.
    time::set_cmos(10, time::cmos(10) & 0xf0 | 6);
    time::cmos(12);
    trap::reset_count(IRQ8);
    pic::unmask(8);
    time::set_cmos(11, status_b | PERIODIC);
    s.check("the CMOS clock interrupts periodically", wait_for(IRQ8, 4), true);
    s.check("the cascade is in service at both controllers", IN_SERVICE.get(), 0x104);
    time::set_cmos(11, status_b | UPDATE_ENDED);
    time::cmos(12);
    cpu::interrupt_window();
    trap::reset_count(IRQ8);
    s.check("and at the end of an update", wait_for(IRQ8, 1), true);
    time::set_cmos(11, status_b & !(PERIODIC | UPDATE_ENDED));
    time::cmos(12);
    pic::set_masks(0xffff);
    cpu::interrupt_window();
}
