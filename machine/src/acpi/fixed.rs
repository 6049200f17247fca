//! The tables of fixed layout: FADT (ACPI specification 6.5, section 5.2.9) and MADT (section 5.2.12).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, OEM, OEM_REVISION, OEM_TABLE};
use crate::devices::acpi_pm::{
    GPE0, GPE0_LENGTH, PM_TIMER, PM_TIMER_LENGTH, PM1_CONTROL, PM1_CONTROL_LENGTH, PM1_EVENT,
    PM1_EVENT_LENGTH,
};
use crate::devices::rtc::CENTURY;
use crate::irq::TIMER_PIN;
use crate::map::{IOAPIC_BASE, LAPIC_BASE, RESET_PORT, RESET_VALUE, SCI_IRQ};

/// IAPC_BOOT_ARCH: there are devices on ISA ports; no VGA. Without the bit for a keyboard controller, none is
/// looked for.
const LEGACY_DEVICES: u16 = 1 << 0;
const NO_VGA: u16 = 1 << 2;
/// A latency that says: there is no such sleep state (above 100 µs for C2, above 1000 µs for C3).
const NO_C_STATE: u16 = 0xfff;

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
}

/// Full-hardware ACPI, always in ACPI mode (no SMI command port), the power button among the fixed registers.
pub fn fadt(facs: u64, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = (SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT).into();
    fadt.pm1_evt_len = PM1_EVENT_LENGTH;
    fadt.x_pm1a_evt_blk = port(PM1_EVENT, 8 * PM1_EVENT_LENGTH, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL).into();
    fadt.pm1_cnt_len = PM1_CONTROL_LENGTH;
    fadt.x_pm1a_cnt_blk = port(PM1_CONTROL, 8 * PM1_CONTROL_LENGTH, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(PM_TIMER).into();
    fadt.pm_tmr_len = PM_TIMER_LENGTH;
    fadt.x_pm_tmr_blk = port(PM_TIMER, 8 * PM_TIMER_LENGTH, AccessSize::DwordAccess);
    fadt.gpe0_blk = u32::from(GPE0).into();
    fadt.gpe0_blk_len = GPE0_LENGTH;
    fadt.x_gpe0_blk = port(GPE0, 8 * GPE0_LENGTH, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = NO_C_STATE.into();
    fadt.p_lvl3_lat = NO_C_STATE.into();
    fadt.century = CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// MADT flag: there is a PIC too, to be masked.
const PCAT_COMPAT: u32 = 1;
/// Processor flag: can be used.
const ENABLED: u32 = 1;
/// MPS INTI flags: polarity and trigger mode, two bits each.
const CONFORMS_TO_BUS: u16 = 0;
const ACTIVE_HIGH_LEVEL: u16 = 0b11_01;
/// Every processor, in an NMI entry.
const ALL_PROCESSORS: u8 = 0xff;

/// Local APICs, the I/O APIC, how ISA interrupts reach it, and NMI on LINT1.
pub fn madt(config: &AcpiConfig) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, LAPIC_BASE as u32);
    madt.write_u32(40, PCAT_COMPAT);
    for id in 0..config.cpus.min(255) {
        // Processor local APIC: ACPI processor UID, APIC ID, flags.
        madt.append_slice(&[0, 8, id as u8, id as u8]);
        madt.append_slice(&ENABLED.to_le_bytes());
    }
    // I/O APIC: ID, reserved, address, first global interrupt.
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append_slice(&(IOAPIC_BASE as u32).to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    interrupt_source_override(&mut madt, 0, TIMER_PIN as u32, CONFORMS_TO_BUS);
    interrupt_source_override(&mut madt, SCI_IRQ as u8, SCI_IRQ as u32, ACTIVE_HIGH_LEVEL);
    // Local APIC NMI: processor, flags, LINT number.
    madt.append_slice(&[4, 6, ALL_PROCESSORS, 0, 0, 1]);
    madt
}

/// ISA interrupt `source` is at pin `pin` of the I/O APIC, with this polarity and trigger mode.
fn interrupt_source_override(madt: &mut Sdt, source: u8, pin: u32, flags: u16) {
    madt.append_slice(&[2, 10, 0, source]);
    madt.append_slice(&pin.to_le_bytes());
    madt.append_slice(&flags.to_le_bytes());
}
