//! The devices of the PC and their wires.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::bus::{MapError, MmioMap, PortMap};
use crate::devices::acpi_pm::{self, AcpiPm, PowerManagement};
use crate::devices::i8042::{self, I8042, KeyboardController};
use crate::devices::log::GuestLog;
use crate::devices::pci::{self, Bdf, ConfigPorts, Ecam, NoSuchSlot, PciRoot};
use crate::devices::pit::{self, IntervalTimer, Pit};
use crate::devices::reset::{PORT_A, PortA, QuietPorts, ResetControl};
use crate::devices::rtc::{self, RealTimeClock, Rtc};
use crate::devices::testdev::{
    self, DebugConsole, DebugExit, Echo, FirmwareConfig, Flush, IoMemory, IrqPorts,
};
use crate::devices::uart::{self, SerialPort, Uart};
use crate::devices::{RestoreError, Saved, pic};
use crate::dma::Dma;
use crate::firmware;
use crate::host::{ByteStream, Clock, EventSink};
use crate::irq::{Interrupts, IoApicMmio, LINES, PicPorts, SavedInterrupts};
use crate::map::{
    COM1_IRQ, COM1_PORT, ECAM_BASE, ECAM_SIZE, IOAPIC_BASE, IOAPIC_SIZE, PCI_CONFIG_PORT, PCI_MEMORY_START,
    SCI_IRQ, pci_interrupt_pin,
};
use crate::timer::TimerHub;
use crate::virtio;
use crate::virtio::device::VirtioDevice;
use crate::virtio::pci::{FunctionParts, SavedFunction, VirtioFunction};

/// What the devices are made with.
pub struct PcParts {
    /// With QEMU's test devices.
    pub testdev: bool,
    /// Bytes of RAM below and above the hole, which the CMOS RAM tells.
    pub memory: (u64, u64),
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Deadlines.
    pub timers: Arc<TimerHub>,
    /// Interrupt controllers.
    pub interrupts: Arc<Interrupts>,
    /// Hears what the guest asks of the whole machine.
    pub events: Arc<dyn EventSink>,
    /// The far end of the first serial line.
    pub console: Arc<dyn ByteStream>,
    /// RAM, as devices access it.
    pub dma: Dma,
    /// Devices on the PCI bus, in the order of their slots.
    pub devices: Vec<Arc<dyn VirtioDevice>>,
    /// They offer packed rings.
    pub packed_rings: bool,
}

/// Slots of the PCI bus but that of the host bridge.
pub const MAX_DEVICES: usize = 31;

/// The PC can't be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PcError {
    /// Two devices are at the same place.
    #[error("devices collide: {0}")]
    Map(#[from] MapError),
    /// Too many devices for one bus.
    #[error(
        "{0} disks, network interfaces and other devices are more than the {MAX_DEVICES} that a machine can have: leave some away"
    )]
    TooManyDevices(usize),
    /// Two devices are in the same slot.
    #[error(transparent)]
    Slot(#[from] NoSuchSlot),
}

/// All devices but the local APICs.
pub struct Pc {
    ports: Arc<PortMap>,
    mmio: Arc<MmioMap>,
    interrupts: Arc<Interrupts>,
    com1: Arc<SerialPort>,
    power: Arc<PowerManagement>,
    keyboard: Arc<KeyboardController>,
    pit: Arc<IntervalTimer>,
    rtc: Arc<RealTimeClock>,
    reset: Arc<ResetControl>,
    port_a: Arc<PortA>,
    pci: Arc<PciRoot>,
    pci_ports: Arc<ConfigPorts>,
    functions: Vec<Arc<VirtioFunction>>,
}

/// What [`Pc::save`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedPc {
    /// PIC and I/O APIC.
    pub interrupts: SavedInterrupts,
    /// The first serial port.
    pub com1: Saved<Uart>,
    /// ACPI power management.
    pub power: Saved<AcpiPm>,
    /// The keyboard controller.
    pub keyboard: Saved<I8042>,
    /// The interval timer.
    pub pit: Saved<Pit>,
    /// The real-time clock.
    pub rtc: Saved<Rtc>,
    /// The reset control register.
    pub reset_control: u8,
    /// System control port A.
    pub port_a: u8,
    /// The PCI address register.
    pub pci_address: u32,
    /// Devices on the PCI bus, by slot.
    pub functions: Vec<SavedFunction>,
}

impl Pc {
    /// Makes all devices, and wires them as a PC's are.
    pub fn new(parts: PcParts) -> Result<Self, PcError> {
        let PcParts { testdev, memory, clock, timers, interrupts, events, console, .. } = parts;
        let ports = Arc::new(PortMap::new());
        let mmio = Arc::new(MmioMap::new());
        let log = GuestLog::new(events.clone(), clock.clone());

        let pic_ports = Arc::new(PicPorts(interrupts.clone()));
        for first in [pic::MASTER, pic::SLAVE, pic::ELCR] {
            ports.insert(first, 2, 1, pic_ports.clone())?;
        }
        firmware::set_up_pic(&*pic_ports);
        mmio.insert(IOAPIC_BASE, IOAPIC_SIZE, Arc::new(IoApicMmio(interrupts.clone())))?;
        // As firmware does for the one ISA interrupt that is no edge: ACPI's.
        interrupts.set_level_triggered(1 << SCI_IRQ);

        let com1 = SerialPort::new(interrupts.line(COM1_IRQ), console.clone());
        ports.insert(COM1_PORT, uart::PORTS, 1, com1.clone())?;

        let pit = IntervalTimer::new(interrupts.line(pit::IRQ), clock.clone(), &timers);
        ports.insert(pit::BASE, pit::PORTS, 1, pit.clone())?;
        ports.insert(pit::PORT_B, 1, 1, pit.clone())?;
        let (below, above) = memory;
        let rtc = RealTimeClock::new(interrupts.line(rtc::IRQ), clock.clone(), &timers, below, above);
        ports.insert(rtc::BASE, rtc::PORTS, 1, rtc.clone())?;

        let reset = ResetControl::new(events.clone());
        let power = PowerManagement::new(interrupts.line(SCI_IRQ), clock, events.clone(), log.clone());
        ports.insert(acpi_pm::BASE, acpi_pm::PORTS, 4, power.clone())?;
        let keyboard = KeyboardController::new(
            interrupts.line(i8042::KEYBOARD_IRQ),
            interrupts.line(i8042::MOUSE_IRQ),
            reset.clone(),
        );
        ports.insert(i8042::DATA, 1, 1, keyboard.clone())?;
        ports.insert(i8042::COMMAND, 1, 1, keyboard.clone())?;
        let port_a = PortA::new(reset.clone());
        ports.insert(PORT_A, 1, 1, port_a.clone())?;
        for (first, count) in QuietPorts::RANGES {
            ports.insert(first, count, 1, QuietPorts::new(first))?;
        }

        let pci = PciRoot::new();
        let pci_ports = ConfigPorts::new(pci.clone(), reset.clone());
        ports.insert(PCI_CONFIG_PORT, pci::PORTS, 4, pci_ports.clone())?;
        mmio.insert(ECAM_BASE, ECAM_SIZE, Arc::new(Ecam(pci.clone())))?;

        if parts.devices.len() > MAX_DEVICES {
            return Err(PcError::TooManyDevices(parts.devices.len()));
        }
        let functions = plug_in(parts.devices, &pci, |slot| FunctionParts {
            dma: parts.dma.clone(),
            mmio: mmio.clone(),
            interrupts: interrupts.clone(),
            wire: interrupts.line(pci_interrupt_pin(slot, 0) as usize),
            bar_address: PCI_MEMORY_START + u64::from(slot) * virtio::pci::BAR_SIZE,
            log: log.clone(),
            slot,
            packed: parts.packed_rings,
        })?;

        if testdev {
            insert_testdev(&ports, &mmio, &interrupts, events, console)?;
            let config = FirmwareConfig::new(below + above, interrupts.apics().len() as u16);
            ports.insert(testdev::CONFIG, 2, 2, config)?;
        }
        Ok(Self {
            ports,
            mmio,
            interrupts,
            com1,
            power,
            keyboard,
            pit,
            rtc,
            reset,
            port_a,
            pci,
            pci_ports,
            functions,
        })
    }

    /// The machine's ports.
    pub fn ports(&self) -> &Arc<PortMap> {
        &self.ports
    }
    /// The machine's device registers in memory space.
    pub fn mmio(&self) -> &Arc<MmioMap> {
        &self.mmio
    }
    /// Where PCI functions are plugged in.
    pub fn pci(&self) -> &Arc<PciRoot> {
        &self.pci
    }

    /// Bytes from the far end of the first serial line; says how many it took.
    pub fn console_receive(&self, bytes: &[u8]) -> usize {
        self.com1.receive(bytes)
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.power.press_power_button();
    }

    /// Returns when nothing that the guest asked devices for is still going on; nothing comes in either until
    /// [`Pc::resume`]. The processors must stand still.
    pub fn drain(&self) {
        self.functions.iter().for_each(|function| function.drain());
    }
    /// Ends what devices do, and lets their hosts' sides go: the last slot first, so disks come after what may still
    /// write to them. The processors must have stopped for good.
    pub fn stop(&self) {
        self.functions.iter().rev().for_each(|function| function.stop());
    }
    /// Lets devices go on.
    pub fn resume(&self) {
        self.functions.iter().for_each(|function| function.resume());
    }

    /// Everything that the devices hold.
    pub fn save(&self) -> SavedPc {
        SavedPc {
            interrupts: self.interrupts.save(),
            com1: self.com1.save(),
            power: self.power.save(),
            keyboard: self.keyboard.save(),
            pit: self.pit.save(),
            rtc: self.rtc.save(),
            reset_control: self.reset.read(),
            port_a: self.port_a.value(),
            pci_address: self.pci_ports.address(),
            functions: self.functions.iter().map(|function| function.save()).collect(),
        }
    }

    /// Takes over what [`Pc::save`] gave.
    pub fn restore(&self, saved: &SavedPc) -> Result<(), RestoreError> {
        self.reset.restore(saved.reset_control);
        self.port_a.restore(saved.port_a);
        self.pci_ports.set_address(saved.pci_address);
        self.interrupts.restore(&saved.interrupts)?;
        self.com1.restore(&saved.com1)?;
        self.power.restore(&saved.power)?;
        self.keyboard.restore(&saved.keyboard)?;
        self.pit.restore(&saved.pit)?;
        self.rtc.restore(&saved.rtc)?;
        if saved.functions.len() != self.functions.len() {
            return Err(RestoreError::Invalid);
        }
        self.functions.iter().zip(&saved.functions).try_for_each(|(function, saved)| function.restore(saved))
    }
}

/// Puts devices into the slots of bus 0, from 1 on: 0 is the host bridge.
fn plug_in(
    devices: Vec<Arc<dyn VirtioDevice>>,
    pci: &PciRoot,
    parts: impl Fn(u8) -> FunctionParts,
) -> Result<Vec<Arc<VirtioFunction>>, NoSuchSlot> {
    let plug_in = |(device, slot): (_, u8)| {
        let function = VirtioFunction::new(device, parts(slot));
        pci.add(Bdf { bus: 0, device: slot, function: 0 }, function.clone())?;
        Ok(function)
    };
    devices.into_iter().zip(1..).map(plug_in).collect()
}

/// What QEMU has with `-device pc-testdev -device isa-debug-exit,iobase=0xf4,iosize=4 -debugcon stdio`.
fn insert_testdev(
    ports: &PortMap,
    mmio: &MmioMap,
    interrupts: &Arc<Interrupts>,
    events: Arc<dyn EventSink>,
    console: Arc<dyn ByteStream>,
) -> Result<(), MapError> {
    let echo = Arc::new(Echo::default());
    ports.insert(testdev::DEBUG_EXIT, 4, 4, Arc::new(DebugExit(events)))?;
    ports.insert(testdev::DEBUG_CONSOLE, 1, 1, Arc::new(DebugConsole(console)))?;
    ports.insert(testdev::ECHO, 4, 4, echo.clone())?;
    ports.insert(testdev::ECHO_BYTES, 1, 1, echo)?;
    ports.insert(testdev::FLUSH, 4, 4, Arc::new(Flush))?;
    ports.insert(testdev::IRQ_LINES, LINES as u32, 1, IrqPorts::new(interrupts))?;
    mmio.insert(testdev::MEMORY, testdev::MEMORY_SIZE, IoMemory::new())
}
