//! The devices of the PC. Each is a pure register machine (time comes in as an argument, effects go out as
//! results), then an adapter that gives it a lock, a bus, a clock, timers and an interrupt line.
//!
//! Locks are taken in this order: a device's own, then the interrupt controllers' (PIC and I/O APIC), then a
//! local APIC's; the timer hub's comes last of all.

pub mod acpi_pm;
pub mod i8042;
pub mod ioapic;
pub mod lapic;
pub mod local_apic;
pub mod log;
pub mod message;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod reset;
pub mod rtc;
pub mod testdev;
#[cfg(test)]
pub(crate) mod testing;
pub mod uart;

/// What a register machine saves: its registers, and the version of their layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved<T> {
    /// Layout of `registers`; see [`Registers::VERSION`].
    pub version: u32,
    /// The register machine itself, which is plain data.
    pub registers: T,
}

/// A saved state does not fit this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Saved by another version.
    #[error("saved registers have version {found}, this program has {expected}")]
    Version {
        /// Version of the saved state.
        found: u32,
        /// Version of this program.
        expected: u32,
    },
    /// It breaks a rule that these registers always keep.
    #[error("saved registers contradict each other")]
    Invalid,
}

/// A register machine: plain data that can be saved and restored.
pub trait Registers: Clone {
    /// Version of the layout; grows when a field changes its meaning.
    const VERSION: u32;

    /// Whether the registers keep the rules that the code relies on.
    fn valid(&self) -> bool {
        true
    }
    /// A copy of all registers.
    fn save(&self) -> Saved<Self> {
        Saved { version: Self::VERSION, registers: self.clone() }
    }
    /// Takes over saved registers.
    fn restore(&mut self, saved: &Saved<Self>) -> Result<(), RestoreError> {
        if saved.version != Self::VERSION {
            return Err(RestoreError::Version { found: saved.version, expected: Self::VERSION });
        }
        if !saved.registers.valid() {
            return Err(RestoreError::Invalid);
        }
        self.clone_from(&saved.registers);
        Ok(())
    }
}
