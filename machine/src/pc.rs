//! The devices of the PC and their wires.

use alloc::sync::Arc;

use crate::bus::{MmioMap, PortMap};
use crate::devices::uart::{self, SerialPort, Uart};
use crate::devices::{RestoreError, Saved, pic};
use crate::host::{ByteStream, Clock, EventSink};
use crate::irq::{Interrupts, IoApicMmio, PicPorts, SavedInterrupts};
use crate::machine::{MachineConfig, MachineError};
use crate::map::{COM1_IRQ, COM1_PORT, IOAPIC_BASE, IOAPIC_SIZE, SCI_IRQ};
use crate::timer::TimerHub;

/// All devices but the local APICs.
pub struct Pc {
    ports: Arc<PortMap>,
    mmio: Arc<MmioMap>,
    interrupts: Arc<Interrupts>,
    com1: Arc<SerialPort>,
}

/// What [`Pc::save`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedPc {
    /// PIC and I/O APIC.
    pub interrupts: SavedInterrupts,
    /// The first serial port.
    pub com1: Saved<Uart>,
}

impl Pc {
    /// Makes all devices, and wires them as a PC's are.
    pub fn new(
        _config: &MachineConfig,
        _clock: &Arc<dyn Clock>,
        _timers: &Arc<TimerHub>,
        interrupts: &Arc<Interrupts>,
        _events: Arc<dyn EventSink>,
        console: Arc<dyn ByteStream>,
    ) -> Result<Self, MachineError> {
        let ports = Arc::new(PortMap::new());
        let mmio = Arc::new(MmioMap::new());
        let pic_ports = Arc::new(PicPorts(interrupts.clone()));
        for first in [pic::MASTER, pic::SLAVE, pic::ELCR] {
            ports.insert(first, 2, 1, pic_ports.clone())?;
        }
        mmio.insert(IOAPIC_BASE, IOAPIC_SIZE, Arc::new(IoApicMmio(interrupts.clone())))?;
        let com1 = SerialPort::new(interrupts.line(COM1_IRQ), console);
        ports.insert(COM1_PORT, uart::PORTS, 1, com1.clone())?;
        // As firmware does for the interrupts that are no edges: ACPI's.
        interrupts.set_level_triggered(1 << SCI_IRQ);
        Ok(Self { ports, mmio, interrupts: interrupts.clone(), com1 })
    }

    /// The machine's ports.
    pub fn ports(&self) -> &Arc<PortMap> {
        &self.ports
    }
    /// The machine's device registers in memory space.
    pub fn mmio(&self) -> &Arc<MmioMap> {
        &self.mmio
    }

    /// Bytes from the far end of the first serial line; says how many it took.
    pub fn console_receive(&self, bytes: &[u8]) -> usize {
        self.com1.receive(bytes)
    }

    /// Presses the power button.
    pub fn power_button(&self) {}

    /// Everything that the devices hold.
    pub fn save(&self) -> SavedPc {
        SavedPc { interrupts: self.interrupts.save(), com1: self.com1.save() }
    }

    /// Takes over what [`Pc::save`] gave.
    pub fn restore(&self, saved: &SavedPc) -> Result<(), RestoreError> {
        self.interrupts.restore(&saved.interrupts)?;
        self.com1.restore(&saved.com1)
    }
}
