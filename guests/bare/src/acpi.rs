//! Just enough ACPI (specification 6.5) to power off, reset and list tables.
use crate::{memory::read, start::START_INFO};

/// The root table.
#[derive(Clone, Copy)]
pub struct Tables {
    /// Physical address of the RSDT or XSDT.
    root: u64,
    /// Bytes of an entry: 4 in the RSDT, 8 in the XSDT.
    entry_size: u64,
}

/// How to enter S5.
#[derive(Clone, Copy)]
pub struct SoftOff {
    /// Port of PM1a_CNT.
    pub control_port: u16,
    /// What to write: SLP_TYPa of \_S5 and SLP_EN.
    pub value: u16,
}

/// The machine's ACPI tables, by the RSDP that the boot loader names or that lies in the BIOS area (section 5.2.5).
pub fn find() -> Option<Tables> {
    let is_rsdp = |address: &u64| read::<[u8; 8]>(*address) == *b"RSD PTR ";
    // hvm_start_info: rsdp_paddr is the 64-bit field at offset 32.
    let named = match START_INFO.get() {
        0 => 0,
        info => read::<u64>(u64::from(info) + 32),
    };
    let scanned = || (0xe_0000u64..0x10_0000).step_by(16).find(is_rsdp);
    let rsdp = Some(named).filter(|&at| at != 0).filter(is_rsdp).or_else(scanned)?;
    let (revision, rsdt, xsdt): (u8, u32, u64) = (read(rsdp + 15), read(rsdp + 16), read(rsdp + 24));
    if revision >= 2 && xsdt != 0 {
        Some(Tables { root: xsdt, entry_size: 8 })
    } else {
        (rsdt != 0).then_some(Tables { root: rsdt.into(), entry_size: 4 })
    }
}

impl Tables {
    /// Physical addresses of the tables that the root table lists.
    pub fn iter(self) -> impl Iterator<Item = u64> {
        let entries = (u64::from(length(self.root)).saturating_sub(36)) / self.entry_size;
        (0..entries).map(move |index| {
            let entry = self.root + 36 + index * self.entry_size;
            if self.entry_size == 8 { read::<u64>(entry) } else { read::<u32>(entry).into() }
        })
    }

    /// The first table with this signature.
    pub fn get(self, wanted: &[u8; 4]) -> Option<u64> {
        self.iter().find(|&table| signature(table) == *wanted)
    }

    /// What the FADT and the DSDT's \_S5 package say about powering off.
    pub fn soft_off(self) -> Option<SoftOff> {
        let fadt = self.get(b"FACP")?;
        let (dsdt, control_port): (u32, u32) = (read(fadt + 40), read(fadt + 64));
        let dsdt = u64::from(dsdt);
        let end = dsdt + u64::from(length(dsdt));
        let name = (dsdt + 36..end.saturating_sub(12)).find(|&at| read::<[u8; 5]>(at) == *b"_S5_\x12")?;
        // PackageOp, PkgLength (one byte: the package is short), NumElements, then SLP_TYPa as a byte
        // constant (prefix 0x0a) or as ZeroOp or OneOp (section 20.2.3).
        let sleep_type = match read::<u8>(name + 7) {
            0x0a => read::<u8>(name + 8),
            small => small,
        };
        const SLEEP_ENABLE: u16 = 1 << 13;
        Some(SoftOff {
            control_port: control_port as u16,
            value: u16::from(sleep_type & 7) << 10 | SLEEP_ENABLE,
        })
    }

    /// Port and value of the FADT's reset register, if it has one in port space.
    pub fn reset_port(self) -> Option<(u16, u8)> {
        let fadt = self.get(b"FACP")?;
        let supported = length(fadt) >= 129 && read::<u32>(fadt + 112) & 1 << 10 != 0;
        let in_port_space = supported && read::<u8>(fadt + 116) == 1;
        in_port_space.then(|| (read::<u64>(fadt + 120) as u16, read(fadt + 128)))
    }
}

/// Signature of a table.
pub fn signature(table: u64) -> [u8; 4] {
    read(table)
}

/// Length of a table in bytes, its header included.
pub fn length(table: u64) -> u32 {
    read(table + 4)
}
