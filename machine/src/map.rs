//! Where things are in the PC's address spaces. Compatible with the PCs that firmware and old kernels know.

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
/// The I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of its range.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Every processor's local APIC after reset.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Bytes of its range.
pub const LAPIC_SIZE: u64 = 0x1000;
