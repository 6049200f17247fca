//! The I/O APIC, with the 8254 as an edge and the UART as a level source.
use crate::PATIENCE;
use kit::{
    Global, Suite, acpi, apic, cpu,
    memory::read,
    pic, time,
    trap::{self, Frame},
};

const EDGE: u8 = 0x70;
const LEVEL: u8 = 0x71;

/// The UART's interrupt enable and identification registers.
const UART_ENABLE: u16 = 0x3f9;
const UART_IDENTIFY: u16 = 0x3fa;
const UART_PIN: u32 = 4;

fn end(_: &mut Frame) {
    apic::end_of_interrupt();
}

fn wait_for(vector: u8, times: u32) -> bool {
    cpu::sti();
    let came = time::wait(PATIENCE, || trap::count(vector) >= times);
    cpu::cli();
    came
}

/// The I/O APIC's pin for an ISA interrupt: its own number, or what an override of the MADT says
/// (ACPI 6.5, section 5.2.12.5).
fn pin_of(irq: u8) -> u32 {
    let Some(madt) = acpi::find().and_then(|tables| tables.get(b"APIC")) else { return irq.into() };
    let end = madt + u64::from(acpi::length(madt));
    let mut at = madt + 44;
    while at + 2 <= end {
        let (kind, length): (u8, u8) = (read(at), read(at + 1));
        if kind == 2 && read::<u8>(at + 3) == irq {
            return read(at + 4);
        }
        at += u64::from(length.max(2));
    }
    irq.into()
}

pub fn all(s: &mut Suite) {
    pic::set_masks(0xffff);
    trap::handle(EDGE, Some(end));
    s.check("the I/O APIC has 24 pins", apic::pins(), 24);
    edge(s);
    level(s);
    trap::handle(EDGE, None);
    trap::handle(LEVEL, None);
}

fn edge(s: &mut Suite) {
    let pin = pin_of(0);
    apic::route(pin, EDGE.into());
    s.check("an entry reads back", apic::routed(pin), EDGE.into());
    trap::reset_count(EDGE);
    time::pit(0, 2, 1193);
    s.check("the 8254 interrupts through the I/O APIC", wait_for(EDGE, 5), true);
    apic::route(pin, apic::MASKED | u32::from(EDGE));
    cpu::interrupt_window();
    trap::reset_count(EDGE);
    cpu::sti();
    time::wait(5, || false);
    cpu::cli();
    s.check("a masked pin does not", trap::count(EDGE), 0);
    apic::route(pin, EDGE.into());
    s.check("until it is unmasked", wait_for(EDGE, 1), true);
    apic::route(pin, apic::MASKED);
    cpu::outb(0x43, 0x30);
    cpu::interrupt_window();
}

static REMOTE: Global<bool> = Global::new(false);

fn level(s: &mut Suite) {
    // The UART keeps its line up while its transmitter is empty and nobody has asked why it interrupts.
    fn third_time(_: &mut Frame) {
        REMOTE.set(apic::routed(UART_PIN) & apic::REMOTE_REQUEST != 0);
        if trap::count(LEVEL) == 3 {
            cpu::outb(UART_ENABLE, 0);
            cpu::inb(UART_IDENTIFY);
        }
        apic::end_of_interrupt();
    }
    kit::serial::flush();
    trap::handle(LEVEL, Some(third_time));
    trap::reset_count(LEVEL);
    apic::route(UART_PIN, apic::LEVEL | u32::from(LEVEL));
    // OUT2 opens the UART's line.
    cpu::outb(0x3fc, 0x0b);
    cpu::outb(UART_ENABLE, 2);
    let came = wait_for(LEVEL, 3);
    cpu::sti();
    time::wait(2, || false);
    cpu::cli();
    let times = trap::count(LEVEL);
    apic::route(UART_PIN, apic::MASKED);
    cpu::outb(UART_ENABLE, 0);
    s.check("a level interrupt comes again while its line is up", came, true);
    s.check("and no more when it is down", times, 3);
    s.check("its entry shows that it was accepted", REMOTE.get(), true);
    s.check("and then that it was ended", apic::routed(UART_PIN) & apic::REMOTE_REQUEST, 0);
}
