//! How the real machine is switched off, from the firmware's tables (ACPI Specification 6.5). There is no interpreter of AML: the
//! package `_S5`, of two small numbers, is found by its name.
#![allow(unsafe_code)]

use alloc::vec;
use alloc::vec::Vec;

use crate::boot::{AcpiRoot, PhysicalMemory};
use crate::processor::port;

/// Bytes of a table's header (5.2.6).
const HEADER: usize = 36;
/// A table that is longer is damaged.
const LONGEST: u32 = 4 << 20;
/// Fields of the FADT (5.2.9).
mod fadt {
    pub(super) const DSDT: usize = 40;
    pub(super) const SMI_COMMAND: usize = 48;
    pub(super) const ACPI_ENABLE: usize = 52;
    pub(super) const PM1_CONTROL: [usize; 2] = [64, 68];
    pub(super) const WIDE_DSDT: usize = 140;
}
/// The PM1 control register (4.8.3.2): ACPI mode is on; the type of the sleeping state; go to sleep.
const SCI_ENABLE: u16 = 1;
const SLEEP_TYPE: u16 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;
/// How often the chipset is asked whether it has gone over to ACPI mode.
const PATIENCE: usize = 1_000_000;

/// How to switch the machine off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SoftOff {
    /// What to write to which port so that the chipset listens.
    enable: Option<(u16, u8)>,
    /// Registers, and the type of the state S5 for each.
    registers: Vec<(u16, u16)>,
}

impl SoftOff {
    /// Reads the tables; `None` if they don't say it.
    ///
    /// # Safety
    /// The firmware has said that the root is there.
    pub(crate) unsafe fn find(memory: &impl PhysicalMemory, root: AcpiRoot) -> Option<Self> {
        // SAFETY: tables of the firmware's are where the firmware says; they don't change, and lie in no RAM of ours.
        unsafe {
            let list = table(memory, root.address)?;
            let width = if root.is_wide { 8 } else { 4 };
            let mut tables = list.get(HEADER..)?.chunks_exact(width).map(number);
            let fadt = tables.find_map(|at| table(memory, at).filter(|table| table.starts_with(b"FACP")))?;
            let field = |at: usize, size: usize| fadt.get(at..at + size).map_or(0, number);
            let dsdt = match field(fadt::WIDE_DSDT, 8) {
                0 => field(fadt::DSDT, 4),
                wide => wide,
            };
            let types = sleep_types(table(memory, dsdt)?.get(HEADER..)?)?;
            let registers: Vec<(u16, u16)> = fadt::PM1_CONTROL
                .iter()
                .zip(types)
                .filter_map(|(at, kind)| Some((u16::try_from(field(*at, 4)).ok()?, kind)))
                .filter(|(port, _)| *port != 0)
                .collect();
            let command = u16::try_from(field(fadt::SMI_COMMAND, 4)).ok().filter(|port| *port != 0);
            let enable = command.map(|port| (port, field(fadt::ACPI_ENABLE, 1) as u8));
            (!registers.is_empty()).then_some(Self { enable, registers })
        }
    }

    /// Switches the machine off; returns if that has no effect.
    pub(crate) fn execute(&self) {
        let Some((first, _)) = self.registers.first() else { return };
        let listens = || port::inw(*first) & SCI_ENABLE != 0;
        if let Some((command, value)) = self.enable
            && !listens()
        {
            port::outb(command, value);
            // If it never listens, there is still nothing better to do than to try.
            let _ = (0..PATIENCE).any(|_| listens());
        }
        for (register, kind) in &self.registers {
            port::outw(*register, kind << SLEEP_TYPE | SLEEP_ENABLE | SCI_ENABLE);
        }
    }
}

/// A little-endian number of up to 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A table, with its header.
///
/// # Safety
/// As [`SoftOff::find`].
unsafe fn table(memory: &impl PhysicalMemory, at: u64) -> Option<Vec<u8>> {
    let mut head = [0; 8];
    // SAFETY: the caller's promise.
    unsafe {
        if !memory.read(at, &mut head) {
            return None;
        }
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        if length < HEADER as u32 || length > LONGEST {
            return None;
        }
        let mut table = vec![0; length as usize];
        memory.read(at, &mut table).then_some(table)
    }
}

/// The types of S5 for both registers, from AML (20.2.5.4): the name, a package, its length in one or more bytes, the number
/// of its elements, and then numbers.
fn sleep_types(aml: &[u8]) -> Option<[u16; 2]> {
    const PACKAGE: u8 = 0x12;
    let mut places =
        aml.windows(5).enumerate().filter(|(_, bytes)| *bytes == [b'_', b'S', b'5', b'_', PACKAGE]);
    places.find_map(|(at, _)| {
        let rest = aml.get(at + 5..)?;
        // The first byte of the length says in its upper bits how many follow.
        let elements = rest.get(1 + usize::from(rest.first()? >> 6) + 1..)?;
        let (first, elements) = constant(elements)?;
        Some([first, constant(elements)?.0])
    })
}

/// A number of AML, and what follows it (20.2.3).
fn constant(aml: &[u8]) -> Option<(u16, &[u8])> {
    match aml {
        [0x00, rest @ ..] => Some((0, rest)),
        [0x01, rest @ ..] => Some((1, rest)),
        [0x0a, value, rest @ ..] => Some((u16::from(*value), rest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tables(Vec<u8>);
    impl PhysicalMemory for Tables {
        unsafe fn read(&self, address: u64, to: &mut [u8]) -> bool {
            let from = self.0.get(address as usize..).and_then(|from| from.get(..to.len()));
            from.map(|from| to.copy_from_slice(from)).is_some()
        }
    }

    fn put(memory: &mut [u8], at: usize, name: &[u8; 4], length: u32) {
        memory[at..at + 4].copy_from_slice(name);
        memory[at + 4..at + 8].copy_from_slice(&length.to_le_bytes());
    }

    fn tables(s5: &[u8]) -> Tables {
        let mut memory = vec![0; 0x1000];
        put(&mut memory, 0x100, b"RSDT", 44);
        memory[0x124..0x12c].copy_from_slice(&[0, 2, 0, 0, 0, 3, 0, 0]);
        put(&mut memory, 0x200, b"APIC", 36);
        put(&mut memory, 0x300, b"FACP", 116);
        memory[0x328..0x32c].copy_from_slice(&0x500u32.to_le_bytes());
        memory[0x330..0x335].copy_from_slice(&[0xb2, 0, 0, 0, 0xf1]);
        memory[0x340..0x344].copy_from_slice(&0x604u32.to_le_bytes());
        put(&mut memory, 0x500, b"DSDT", 36 + 64);
        memory[0x530..0x530 + s5.len()].copy_from_slice(s5);
        Tables(memory)
    }

    fn find(s5: &[u8]) -> Option<SoftOff> {
        let root = AcpiRoot { address: 0x100, is_wide: false };
        // SAFETY: it is only bytes.
        unsafe { SoftOff::find(&tables(s5), root) }
    }

    #[test]
    fn the_tables_tell_how_to_switch_off() {
        let off = find(b"\x08_S5_\x12\x06\x04\x0a\x05\x0a\x07\0\0").unwrap();
        assert_eq!(off, SoftOff { enable: Some((0xb2, 0xf1)), registers: vec![(0x604, 5)] });
        let off = find(b"\x08_S5_\x12\x45\x00\x04\x01\0\0\0").unwrap();
        assert_eq!(off.registers, [(0x604, 1)]);
    }

    #[test]
    fn tables_that_do_not_tell_are_of_no_use() {
        assert_eq!(find(b"\x08_S4_\x12\x06\x04\x0a\x05\x0a\x07"), None);
        assert_eq!(find(b"\x08_S5_\x12\x06\x04\x0b\x05\x00"), None);
        let root = AcpiRoot { address: 0x200, is_wide: true };
        // SAFETY: it is only bytes.
        assert_eq!(unsafe { SoftOff::find(&tables(b""), root) }, None);
    }
}
