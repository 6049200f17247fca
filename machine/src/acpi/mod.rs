//! The ACPI tables: what an operating system is told about the machine that it can't find out by itself
//! (ACPI specification 6.5, chapter 5). They lie in the BIOS area, where old systems look for the root pointer.

mod dsdt;
mod fixed;

use alloc::vec::Vec;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::map::{BIOS_START, ECAM_BASE, HIGH_MEMORY_START};
use crate::memory::{GuestMemory, OutsideRam};

const OEM: [u8; 6] = *b"BIVISR";
const OEM_TABLE: [u8; 8] = *b"BIVISOR ";
const OEM_REVISION: u32 = 1;
/// The FACS must be aligned to this; the others may be.
const ALIGN: u64 = 64;

/// What the tables describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of processors; their local APIC IDs are 0 and up.
    pub cpus: u32,
}

/// Tables in memory order, ready to be copied to where they say they are.
pub struct Tables {
    bytes: Vec<u8>,
    rsdp: u64,
}

impl Tables {
    /// Builds all tables.
    pub fn new(config: &AcpiConfig) -> Self {
        let mut bytes = Vec::new();
        // The root pointer comes first, but is known last.
        let rsdp = append(&mut bytes, &[0; 36]);
        let facs = append_table(&mut bytes, &FACS::new());
        let dsdt = append_table(&mut bytes, &dsdt::dsdt(config));
        let fadt = append_table(&mut bytes, &fixed::fadt(facs, dsdt));
        let madt = append_table(&mut bytes, &fixed::madt(config));
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(ECAM_BASE, 0, 0, 0xff);
        let mcfg = append_table(&mut bytes, &mcfg);
        let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
        for table in [fadt, madt, mcfg] {
            xsdt.add_entry(table);
        }
        let xsdt = append_table(&mut bytes, &xsdt);
        let mut root = Vec::new();
        Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
        if let Some(place) = bytes.get_mut(..root.len()) {
            place.copy_from_slice(&root);
        }
        Self { bytes, rsdp }
    }

    /// Guest-physical address of the root pointer.
    pub fn rsdp(&self) -> u64 {
        self.rsdp
    }

    /// Copies the tables into the BIOS area.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), OutsideRam> {
        memory.write(BIOS_START, &self.bytes)
    }
}

/// Appends bytes at the next aligned address, and returns that.
fn append(bytes: &mut Vec<u8>, table: &[u8]) -> u64 {
    let start = bytes.len().next_multiple_of(ALIGN as usize);
    bytes.resize(start, 0);
    bytes.extend_from_slice(table);
    debug_assert!(bytes.len() as u64 <= HIGH_MEMORY_START - BIOS_START);
    BIOS_START + start as u64
}

fn append_table(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    let mut table_bytes = Vec::new();
    table.to_aml_bytes(&mut table_bytes);
    append(bytes, &table_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Signature and bytes of the table at this address; checks length and checksum.
    fn table(memory: &GuestMemory, gpa: u64) -> ([u8; 4], Vec<u8>) {
        let mut header = [0; 8];
        memory.read(gpa, &mut header).unwrap();
        let signature = *header.first_chunk().unwrap();
        let length = u32::from_le_bytes(*header.last_chunk().unwrap());
        let mut bytes = alloc::vec![0; length as usize];
        memory.read(gpa, &mut bytes).unwrap();
        if &signature != b"FACS" {
            assert_eq!(bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum of {signature:?}");
        }
        (signature, bytes)
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn written(cpus: u32) -> (GuestMemory, u64) {
        let memory = GuestMemory::on_heap(2 << 20);
        let tables = Tables::new(&AcpiConfig { cpus });
        tables.write(&memory).unwrap();
        (memory, tables.rsdp())
    }

    #[test]
    fn every_table_is_found_from_the_root_pointer() {
        let (memory, rsdp) = written(2);
        let mut root = [0; 36];
        memory.read(rsdp, &mut root).unwrap();
        assert_eq!(&root[..8], b"RSD PTR ");
        assert!(rsdp.is_multiple_of(16) && (0xe_0000..0x10_0000).contains(&rsdp));
        let (signature, xsdt) = table(&memory, u64_at(&root, 24));
        assert_eq!(&signature, b"XSDT");
        let found: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap())))
            .collect();
        assert_eq!(found.iter().map(|t| &t.0).collect::<Vec<_>>(), [b"FACP", b"APIC", b"MCFG"]);
        let fadt = &found[0].1;
        let facs = u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap()));
        assert!(facs.is_multiple_of(64));
        assert_eq!(&table(&memory, facs).0, b"FACS");
        assert_eq!(&table(&memory, u64_at(fadt, 140)).0, b"DSDT");
    }

    #[test]
    fn the_largest_machine_fits_into_the_bios_area() {
        let (memory, rsdp) = written(64);
        let mut root = [0; 36];
        memory.read(rsdp, &mut root).unwrap();
        let (_, xsdt) = table(&memory, u64_at(&root, 24));
        let (_, madt) = table(&memory, u64_at(&xsdt, 36 + 8));
        let mut rest = &madt[44..];
        let mut processors = 0;
        while let [kind, length, ..] = *rest {
            processors += usize::from(kind == 0);
            rest = &rest[usize::from(length)..];
        }
        assert_eq!(processors, 64);
    }
}
