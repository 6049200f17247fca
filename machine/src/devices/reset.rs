//! What a guest can end its machine with: reset and power-off requests go through here to the host.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU8, Ordering};

use super::log::GuestLog;
use crate::device::PortIo;
use crate::host::{EventSink, MachineEvent};

/// Reset control register of Intel's chipsets; inside PCI's address port, where only 32-bit accesses are
/// PCI's ([`super::pci::ConfigPorts`] passes bytes on).
pub const RESET_CONTROL: u16 = 0xcf9;
/// What to write to [`RESET_CONTROL`] for a full reset; for the FADT.
pub const RESET_VALUE: u8 = 0x06;
/// System control port A: fast A20 and fast reset.
pub const PORT_A: u16 = 0x92;

/// CPU reset: the rising edge of this bit of [`RESET_CONTROL`] resets.
const RESET_CPU: u8 = 1 << 2;

/// The reset control register. `full` selects hard reset, which is the only kind here.
pub struct ResetControl {
    sink: Arc<dyn EventSink>,
    value: AtomicU8,
}

impl ResetControl {
    /// The register after reset.
    pub fn new(sink: Arc<dyn EventSink>) -> Arc<Self> {
        Arc::new(Self { sink, value: AtomicU8::new(0) })
    }
    /// Asks for a reset of the machine.
    pub fn reset(&self) {
        self.sink.event(MachineEvent::Reset);
    }
    /// Reads the register.
    pub fn read(&self) -> u8 {
        self.value.load(Ordering::Relaxed)
    }
    /// Takes over a saved value of the register, without effect.
    pub fn restore(&self, value: u8) {
        self.value.store(value, Ordering::Relaxed);
    }
    /// Writes the register.
    pub fn write(&self, value: u8) {
        let before = self.value.swap(value & 0x0a, Ordering::Relaxed);
        if value & RESET_CPU != 0 && before & RESET_CPU == 0 {
            self.reset();
        }
    }
}

/// Port 92h. A20 is never masked; its bit is kept.
pub struct PortA {
    reset: Arc<ResetControl>,
    value: AtomicU8,
}

/// Address line 20 is on.
const A20: u8 = 1 << 1;
/// A rising edge resets.
const FAST_RESET: u8 = 1 << 0;

impl PortA {
    /// The port after reset, with A20 on.
    pub fn new(reset: Arc<ResetControl>) -> Arc<Self> {
        Arc::new(Self { reset, value: AtomicU8::new(A20) })
    }
    /// The port's value, to be saved.
    pub fn value(&self) -> u8 {
        self.value.load(Ordering::Relaxed)
    }
    /// Takes over a saved value, without effect.
    pub fn restore(&self, value: u8) {
        self.value.store(value, Ordering::Relaxed);
    }
}

impl PortIo for PortA {
    fn port_read(&self, _: u16, _: usize) -> u32 {
        self.value().into()
    }
    fn port_write(&self, _: u16, _: usize, value: u32) {
        let value = value as u8;
        let before = self.value.swap(value, Ordering::Relaxed);
        if value & !before & FAST_RESET != 0 {
            self.reset.reset();
        }
    }
}

/// Ports where a PC has something that a virtual one does without (DMA controllers and page registers, POST
/// code, FPU busy latch): writes go nowhere, reads give what was written last, so that probes find no bus error
/// and delays by port 80h cost no log lines.
pub struct QuietPorts {
    first: u16,
    values: [AtomicU8; 32],
}

impl QuietPorts {
    /// Port ranges (first port, count) that software expects on a PC.
    pub const RANGES: [(u16, u32); 5] = [(0x00, 16), (0x80, 16), (0xc0, 32), (0xed, 1), (0xf0, 2)];

    /// Up to 32 ports from `first`.
    pub fn new(first: u16) -> Arc<Self> {
        Arc::new(Self { first, values: [const { AtomicU8::new(0) }; 32] })
    }
    fn value(&self, port: u16) -> Option<&AtomicU8> {
        self.values.get(usize::from(port.wrapping_sub(self.first)))
    }
}

impl PortIo for QuietPorts {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        self.value(port).map_or(0xff, |v| v.load(Ordering::Relaxed)).into()
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        if let Some(v) = self.value(port) {
            v.store(value as u8, Ordering::Relaxed);
        }
    }
}

/// Asks the host to power the machine off, and says so in the log if the guest meant another sleep state.
pub(super) fn sleep(sink: &dyn EventSink, log: &GuestLog, sleep_type: u8, s5: u8) {
    if sleep_type == s5 {
        sink.event(MachineEvent::PowerOff);
    } else {
        log.log(format_args!(
            "guest asked for ACPI sleep type {sleep_type}, which this machine does not have"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Host;

    #[test]
    fn reset_control_resets_on_the_rising_edge() {
        let host = Host::new();
        let control = ResetControl::new(host.clone());
        control.write(0x02);
        assert!(host.events().is_empty());
        assert_eq!(control.read(), 0x02);
        control.write(RESET_VALUE);
        assert_eq!(host.events(), [MachineEvent::Reset]);
    }

    #[test]
    fn port_a_resets_and_keeps_a20() {
        let host = Host::new();
        let port = PortA::new(ResetControl::new(host.clone()));
        assert_eq!(port.port_read(PORT_A, 1), 2);
        port.port_write(PORT_A, 1, 0);
        assert_eq!(port.port_read(PORT_A, 1), 0);
        port.port_write(PORT_A, 1, 1);
        port.port_write(PORT_A, 1, 3);
        assert_eq!(host.events(), [MachineEvent::Reset]);
    }

    #[test]
    fn quiet_ports_keep_bytes() {
        let ports = QuietPorts::new(0x80);
        ports.port_write(0x87, 1, 0x55);
        assert_eq!((ports.port_read(0x87, 1), ports.port_read(0x80, 1)), (0x55, 0));
    }
}
