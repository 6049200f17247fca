//! Where things are in the PC's address spaces, as far as a device does not say so itself. Compatible with the
//! PCs that firmware and old kernels know.

pub use crate::devices::acpi_pm::SCI as SCI_IRQ;
pub use crate::devices::ioapic::{BASE as IOAPIC_BASE, SIZE as IOAPIC_SIZE};
pub use crate::devices::lapic::DEFAULT_BASE as LAPIC_BASE;
pub use crate::devices::pci::CONFIG_ADDRESS as PCI_CONFIG_PORT;
pub use crate::devices::reset::{RESET_CONTROL as RESET_PORT, RESET_VALUE};
pub use crate::devices::rtc::{BASE as RTC_PORT, IRQ as RTC_IRQ};

/// Start of the extended BIOS data area at the end of conventional memory.
pub const EBDA_START: u64 = 0x9_fc00;
/// Start of video memory and option ROMs: no RAM for the guest's use from here to [`HIGH_MEMORY_START`].
pub const VIDEO_START: u64 = 0xa_0000;
/// Start of the BIOS area, where the ACPI tables are.
pub const BIOS_START: u64 = 0xe_0000;
/// End of the BIOS area, start of memory above 1 MiB.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// First address of the window for 32-bit memory BARs; just above the largest low RAM.
pub const PCI_MEMORY_START: u64 = crate::memory::LOW_RAM_END;
/// Its end.
pub const PCI_MEMORY_END: u64 = 0xe000_0000;
/// PCI Express configuration space (ECAM) of segment 0, buses 0 to 255.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Bytes of [`ECAM_BASE`]'s range.
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// First address of the window for 64-bit memory BARs; RAM ends below.
pub const PCI_MEMORY64_START: u64 = 0x40_0000_0000;
/// Its bytes. It ends at 512 GiB, within 39 bits of physical address.
pub const PCI_MEMORY64_SIZE: u64 = 0x40_0000_0000;
/// First serial port.
pub const COM1_PORT: u16 = 0x3f8;
/// ISA interrupt of the first serial port.
pub const COM1_IRQ: usize = 4;
/// I/O APIC pins 16 to 19 carry the PCI interrupts.
pub const PCI_FIRST_PIN: u32 = 16;

/// The I/O APIC pin of interrupt pin `pin` (0 is INTA#) of a PCI device on bus 0.
pub const fn pci_interrupt_pin(device: u8, pin: u8) -> u32 {
    PCI_FIRST_PIN + (device as u32 + pin as u32) % 4
}
