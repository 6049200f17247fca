//! Ends of the machine: the test device, power-off and reset.
use crate::{acpi, cpu, serial};

/// Port of the isa-debug-exit device (QEMU `hw/misc/debugexit.c`): writing N ends with status 2N + 1.
const DEBUG_EXIT: u16 = 0xf4;

/// Whether instructions are executed by QEMU's translator, which leaves some checks of the architecture out: it is the
/// machine's own, or the processor that a hypervisor's guest runs on, which has its name then.
pub fn is_qemu_tcg() -> bool {
    let hypervisor = cpu::cpuid(0x4000_0000, 0);
    let tcg = u32::from_le_bytes(*b"TCGT");
    let brand = cpu::cpuid(0x8000_0002, 0);
    let [qemu, name] = [*b"QEMU", *b" TCG"].map(u32::from_le_bytes);
    cpu::feature_1_ecx(31) && (hypervisor.ebx == tcg || (brand.eax, brand.ebx) == (qemu, name))
}

/// Ends the machine with a verdict: status 33 for true and 35 for false where there is a test device,
/// a power-off elsewhere.
pub fn end(passed: bool) -> ! {
    serial::flush();
    cpu::outb(DEBUG_EXIT, if passed { 0x10 } else { 0x11 });
    power_off()
}

/// Enters ACPI's S5, or halts for good where there is no ACPI.
pub fn power_off() -> ! {
    serial::flush();
    if let Some(sleep) = acpi::find().and_then(|tables| tables.soft_off()) {
        cpu::outw(sleep.control_port, sleep.value);
    }
    loop {
        cpu::cli();
        cpu::wait_for_interrupt();
    }
}

/// Resets the machine: by the FADT's reset register, the PCI reset port, the keyboard controller, a triple fault.
pub fn reset() -> ! {
    serial::flush();
    if let Some((port, value)) = acpi::find().and_then(|tables| tables.reset_port()) {
        cpu::outb(port, value);
    }
    cpu::outb(0xcf9, 0x06);
    cpu::outb(0x64, 0xfe);
    crate::segments::lidt(0, 0);
    // SAFETY: with no interrupt table this shuts the CPU down, which resets a PC.
    unsafe { core::arch::asm!("int3", options(noreturn)) }
}
