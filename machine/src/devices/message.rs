//! Interrupt messages between I/O APIC, devices with MSI, and local APICs (SDM Vol. 3A, sections 11.6 and 11.11).

/// What a message does at the local APIC that accepts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// An interrupt with the message's vector at every destination.
    Fixed,
    /// An interrupt at the one destination that runs at the lowest priority.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up.
    Sipi,
    /// An interrupt whose vector the PIC gives.
    ExtInt,
}

impl Delivery {
    /// Decodes the three bits used by ICR, LVT, I/O APIC entries and MSI data; `None` is reserved.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::Sipi),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }
}

/// Destination that every local APIC accepts, in the 32-bit form.
pub const BROADCAST: u32 = u32::MAX;

/// One message on the interrupt bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// APIC ID or logical destination; [`BROADCAST`] for all.
    pub destination: u32,
    /// The destination is a logical one.
    pub logical: bool,
    /// What it does.
    pub delivery: Delivery,
    /// Interrupt vector, or page number of the start-up code.
    pub vector: u8,
    /// Level triggered: the EOI is told to the I/O APICs.
    pub level: bool,
}

/// An 8-bit destination in the 32-bit form: FFh means all.
pub const fn wide_destination(destination: u8) -> u32 {
    if destination == 0xff { BROADCAST } else { destination as u32 }
}

impl Message {
    /// Decodes a message-signalled interrupt (SDM Vol. 3A, section 11.11): the 32-bit address FEExxxxxh and the
    /// data. Bits 5 to 11 of the address carry bits 8 to 14 of the destination, as KVM and QEMU offer by their
    /// CPUID bit "extended destination ID". `None`: not an interrupt address, or a reserved delivery mode.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let low = (address >> 12) as u8;
        let high = (address >> 5 & 0x7f) as u32;
        let destination = if high == 0 { wide_destination(low) } else { high << 8 | u32::from(low) };
        Some(Self {
            destination,
            logical: address & 4 != 0,
            delivery: Delivery::from_bits(data >> 8)?,
            vector: data as u8,
            level: data >> 15 & 1 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_fields_are_decoded() {
        let m = Message::from_msi(0xfee0_3004, 0x0000_8141).unwrap();
        let expected = Message {
            destination: 3,
            logical: true,
            delivery: Delivery::LowestPriority,
            vector: 0x41,
            level: true,
        };
        assert_eq!(m, expected);
    }

    #[test]
    fn msi_broadcast_is_widened_and_extended_ids_are_not() {
        assert_eq!(Message::from_msi(0xfeef_f000, 0x30).unwrap().destination, BROADCAST);
        assert_eq!(Message::from_msi(0xfeef_f020, 0x30).unwrap().destination, 0x1ff);
    }

    #[test]
    fn other_addresses_and_reserved_modes_are_refused() {
        assert_eq!(Message::from_msi(0xfed0_0000, 0x30), None);
        assert_eq!(Message::from_msi(0x1_fee0_0000, 0x30), None);
        assert_eq!(Message::from_msi(0xfee0_0000, 0x330), None);
    }
}
