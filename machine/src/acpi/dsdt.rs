//! The DSDT: devices that can't be discovered, in ACPI's machine language (ACPI specification 6.5, chapters 6,
//! 19 and 20).

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{AcpiConfig, OEM, OEM_REVISION, OEM_TABLE};
use crate::devices::acpi_pm::{self, SLEEP_TYPE_S5};
use crate::devices::rtc;
use crate::map::{
    COM1_IRQ, COM1_PORT, ECAM_BASE, ECAM_SIZE, IOAPIC_BASE, PCI_CONFIG_PORT, PCI_MEMORY_END,
    PCI_MEMORY_START, PCI_MEMORY64_SIZE, PCI_MEMORY64_START, RTC_IRQ, RTC_PORT, pci_interrupt_pin,
};

/// The whole table.
pub fn dsdt(config: &AcpiConfig) -> Sdt {
    let mut aml = Vec::new();
    let s5 = SLEEP_TYPE_S5;
    Name::new("_S5_".into(), &Package::new(vec![&s5, &s5, &ZERO, &ZERO])).to_aml_bytes(&mut aml);
    let (pci, motherboard, com1, clock) = (pci_root(), motherboard(), com1(), real_time_clock());
    let system: [&[u8]; 5] = [&pci, &motherboard, &com1, &clock, &processors(config.cpus)];
    aml.extend(Scope::raw("_SB_".into(), system.concat()));
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    table
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Finished machine language.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The PCI Express host bridge: its windows, its interrupt wires, and who controls what.
fn pci_root() -> Vec<u8> {
    let no_cache = AddressSpaceCacheable::NotCacheable;
    let after_config = PCI_CONFIG_PORT + 8;
    let after_ecam = (ECAM_BASE + ECAM_SIZE) as u32;
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0u16, 0xff),
            &IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8),
            &AddressSpace::new_io(0u16, PCI_CONFIG_PORT - 1, None),
            &AddressSpace::new_io(after_config, 0xffff, None),
            &AddressSpace::new_memory(
                no_cache,
                true,
                PCI_MEMORY_START as u32,
                PCI_MEMORY_END as u32 - 1,
                None,
            ),
            &AddressSpace::new_memory(no_cache, true, after_ecam, IOAPIC_BASE as u32 - 1, None),
            &AddressSpace::new_memory(
                no_cache,
                true,
                PCI_MEMORY64_START,
                PCI_MEMORY64_START + PCI_MEMORY64_SIZE - 1,
                None,
            ),
        ]),
    );
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &resources,
            &Name::new("_PRT".into(), &interrupt_routing()),
            &Raw(operating_system_capabilities()),
        ],
    ))
}

/// Which pin of the I/O APIC each interrupt pin of each device is wired to.
fn interrupt_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(device) << 16 | 0xffff;
            let wire = pci_interrupt_pin(device, pin);
            table.add_element(&Package::new(vec![&address, &pin, &ZERO, &wire]));
        }
    }
    table
}

/// `_OSC` (section 6.2.11; PCI Firmware Specification 3.3, section 4.5): the system asks for control of PCI
/// Express features by bits in the third word of its buffer. It gets what needs no firmware: power-management
/// events, error reporting, the capability structure. Hot plug stays here: there is none.
fn operating_system_capabilities() -> Vec<u8> {
    const GRANTED: u8 = 0x1c;
    const UNKNOWN_UUID: u8 = 0x04;
    const UNKNOWN_REVISION: u8 = 0x08;
    const MASKED: u8 = 0x10;
    const UUID_PCI_HOST_BRIDGE: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
    let path = |name: &str| Path::new(name);
    let (status, control) = (path("CDW1"), path("CDW3"));
    let buffer = Arg(3);
    bytes(&Method::new(
        path("_OSC"),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &buffer, &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(UUID_PCI_HOST_BRIDGE)),
                vec![
                    &CreateDWordField::new(&control, &buffer, &8u8),
                    &Store::new(&Local(0), &control),
                    &And::new(&control, &Local(0), &GRANTED),
                    &If::new(&NotEqual::new(&control, &Local(0)), vec![&Or::new(&status, &status, &MASKED)]),
                    &If::new(
                        &NotEqual::new(&Arg(1), &ONE),
                        vec![&Or::new(&status, &status, &UNKNOWN_REVISION)],
                    ),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &UNKNOWN_UUID)]),
            &Return::new(&buffer),
        ],
    ))
}

/// What belongs to the board itself, so that nothing else is put there. Linux uses ECAM only if it is here.
fn motherboard() -> Vec<u8> {
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_SIZE as u32),
            &IO::new(acpi_pm::BASE, acpi_pm::BASE, 1, acpi_pm::PORTS as u8),
        ]),
    );
    bytes(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &resources,
        ],
    ))
}

/// An ISA device with one range of ports and one interrupt, edge triggered and active high.
fn isa_device(name: &str, id: &str, port: u16, ports: u8, irq: usize) -> Vec<u8> {
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &IO::new(port, port, 1, ports),
            &Interrupt::new(true, true, false, false, irq as u32),
        ]),
    );
    bytes(&Device::new(
        name.into(),
        vec![&Name::new("_HID".into(), &EISAName::new(id)), &Name::new("_UID".into(), &ZERO), &resources],
    ))
}

fn com1() -> Vec<u8> {
    isa_device("COM1", "PNP0501", COM1_PORT, 8, COM1_IRQ)
}

fn real_time_clock() -> Vec<u8> {
    isa_device("RTC_", "PNP0B00", RTC_PORT, rtc::PORTS as u8, RTC_IRQ)
}

/// One device per processor; its unique ID is that of the MADT.
fn processors(count: u32) -> Vec<u8> {
    (0..count.min(255))
        .flat_map(|id| {
            bytes(&Device::new(
                format!("C{id:03}").as_str().into(),
                vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &(id as u8))],
            ))
        })
        .collect()
}
