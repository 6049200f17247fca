//! What third-party test kernels expect of `--testdev`: QEMU's isa-debug-exit, debug console and pc-testdev.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::device::{IrqLine, Mmio, PortIo};
use crate::host::{ByteStream, EventSink, MachineEvent};
use crate::irq::{Interrupts, LINES};
use crate::sync::Mutex;

/// First of four ports of isa-debug-exit.
pub const DEBUG_EXIT: u16 = 0xf4;
/// Port of the debug console, which reads as its own number.
pub const DEBUG_CONSOLE: u16 = 0xe9;
/// First of four ports that keep what is written; 32-bit accesses are one access.
pub const ECHO: u16 = 0xe0;
/// First of four ports that take a page's address to flush it from what the hypervisor knows of it: a no-op here.
pub const FLUSH: u16 = 0xe4;
/// First of the ports that keep what is written, taking accesses byte by byte. Its second port is
/// [`DEBUG_CONSOLE`]'s, so only the first is the echo's when there is a debug console.
pub const ECHO_BYTES: u16 = 0xe8;
/// Selector of QEMU's firmware configuration; the data port is the next.
pub const CONFIG: u16 = 0x510;
/// First of the ports that drive the interrupt lines.
pub const IRQ_LINES: u16 = 0x2000;
/// Guest-physical address of the memory of the I/O kind.
pub const MEMORY: u64 = 0xff00_0000;
/// Bytes of that memory.
pub const MEMORY_SIZE: u64 = 0x1_0000;

/// isa-debug-exit: a write ends the machine with status (value << 1) | 1.
pub struct DebugExit(pub Arc<dyn EventSink>);

impl PortIo for DebugExit {
    fn port_read(&self, _: u16, _: usize) -> u32 {
        0
    }
    fn port_write(&self, _: u16, _: usize, value: u32) {
        self.0.event(MachineEvent::TestExit(value << 1 | 1));
    }
}

/// The debug console: bytes go out as they come.
pub struct DebugConsole(pub Arc<dyn ByteStream>);

impl PortIo for DebugConsole {
    fn port_read(&self, _: u16, _: usize) -> u32 {
        DEBUG_CONSOLE.into()
    }
    fn port_write(&self, _: u16, _: usize, value: u32) {
        self.0.write(&[value as u8]);
    }
}

/// Four bytes that keep what is written to them, at [`ECHO`] and again at [`ECHO_BYTES`]. Insert it with width 4
/// and 1.
#[derive(Default)]
pub struct Echo(AtomicU32);

impl PortIo for Echo {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        self.0.load(Ordering::Relaxed) >> (8 * (port & 3))
    }
    fn port_write(&self, port: u16, size: usize, value: u32) {
        let shift = 8 * u32::from(port & 3);
        let mask = match size {
            1 => 0xff,
            2 => 0xffff,
            _ => u32::MAX,
        } << shift;
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
            Some(old & !mask | value << shift & mask)
        });
    }
}

/// The flush ports: accepted, and without effect, as nothing is known of a page that could grow stale.
pub struct Flush;

impl PortIo for Flush {
    fn port_read(&self, _: u16, _: usize) -> u32 {
        u32::MAX
    }
    fn port_write(&self, _: u16, _: usize, _: u32) {}
}

/// One port a line: a write drives it low (0) or high.
pub struct IrqPorts(Box<[Arc<dyn IrqLine>]>);

impl IrqPorts {
    /// Ports for all lines of the machine; there are [`LINES`].
    pub fn new(interrupts: &Arc<Interrupts>) -> Arc<Self> {
        Arc::new(Self((0..LINES).map(|line| interrupts.line(line)).collect()))
    }
}

impl PortIo for IrqPorts {
    fn port_read(&self, _: u16, _: usize) -> u32 {
        u32::MAX
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        if let Some(line) = self.0.get(usize::from(port.wrapping_sub(IRQ_LINES))) {
            line.set(value as u8 != 0);
        }
    }
}

/// As much of QEMU's firmware configuration (its documentation, "fw_cfg") as test kernels ask: a selector, then the
/// bytes of the item, one a read.
pub struct FirmwareConfig {
    memory: u64,
    cpus: u16,
    /// Selected item and the next byte.
    position: Mutex<(u16, usize)>,
}

impl FirmwareConfig {
    /// Items: signature, interface version, bytes of RAM, number of processors, most processors.
    const SIGNATURE: u16 = 0x00;
    const VERSION: u16 = 0x01;
    const RAM_SIZE: u16 = 0x03;
    const CPUS: u16 = 0x05;
    const MAX_CPUS: u16 = 0x0f;

    /// Tells about this much RAM and this many processors.
    pub fn new(memory: u64, cpus: u16) -> Arc<Self> {
        Arc::new(Self { memory, cpus, position: Mutex::default() })
    }

    fn item(&self, key: u16) -> u64 {
        match key {
            Self::SIGNATURE => u32::from_le_bytes(*b"QEMU").into(),
            Self::VERSION => 1,
            Self::RAM_SIZE => self.memory,
            Self::CPUS | Self::MAX_CPUS => self.cpus.into(),
            _ => 0,
        }
    }
}

impl PortIo for FirmwareConfig {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        if port == CONFIG {
            return u32::MAX;
        }
        let mut position = self.position.lock();
        let (key, at) = *position;
        *position = (key, at.saturating_add(1));
        self.item(key).to_le_bytes().get(at).copied().unwrap_or(0).into()
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        if port == CONFIG {
            *self.position.lock() = (value as u16, 0);
        }
    }
}

/// Memory that is reached by MMIO only.
pub struct IoMemory(Mutex<Box<[u8]>>);

impl IoMemory {
    /// [`MEMORY_SIZE`] bytes of zeros.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; MEMORY_SIZE as usize].into_boxed_slice())))
    }
}

impl Mmio for IoMemory {
    fn mmio_read(&self, offset: u64, size: usize) -> u64 {
        let memory = self.0.lock();
        let bytes = memory.iter().skip(offset as usize).take(size).zip(0u32..);
        bytes.fold(0, |value, (&byte, i)| value | u64::from(byte) << (8 * i))
    }
    fn mmio_write(&self, offset: u64, size: usize, value: u64) {
        let mut memory = self.0.lock();
        let places = memory.iter_mut().skip(offset as usize).take(size);
        for (byte, new) in places.zip(value.to_le_bytes()) {
            *byte = new;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Host, Time};
    use crate::host::Clock;
    use crate::timer::TimerHub;

    #[test]
    fn exit_status_is_made_as_qemu_does() {
        let host = Host::new();
        DebugExit(host.clone()).port_write(DEBUG_EXIT, 4, 0);
        DebugExit(host.clone()).port_write(DEBUG_EXIT, 1, 0x10);
        assert_eq!(host.events(), [MachineEvent::TestExit(1), MachineEvent::TestExit(0x21)]);
    }

    #[test]
    fn the_console_reads_its_own_number() {
        let host = Host::new();
        let console = DebugConsole(host.clone());
        console.port_write(DEBUG_CONSOLE, 1, b'!'.into());
        assert_eq!((host.bytes(), console.port_read(DEBUG_CONSOLE, 1)), (vec![b'!'], 0xe9));
    }

    #[test]
    fn echo_keeps_parts() {
        let echo = Echo::default();
        echo.port_write(ECHO, 4, 0x4433_2211);
        echo.port_write(ECHO + 1, 2, 0xbbaa);
        echo.port_write(ECHO + 3, 2, 0x77_55);
        assert_eq!((echo.port_read(ECHO, 4), echo.port_read(ECHO_BYTES + 2, 1) & 0xff), (0x55bb_aa11, 0xbb));
    }

    #[test]
    fn io_memory_keeps_and_ends() {
        let memory = IoMemory::new();
        memory.mmio_write(8, 8, 0x8877_6655_4433_2211);
        assert_eq!((memory.mmio_read(10, 2), memory.mmio_read(MEMORY_SIZE - 1, 4)), (0x4433, 0));
        memory.mmio_write(u64::MAX, 4, 1);
    }

    #[test]
    fn firmware_configuration_items() {
        let config = FirmwareConfig::new(0x2000_0000, 3);
        let read = |key, bytes| {
            config.port_write(CONFIG, 2, key);
            (0..bytes).map(|_| config.port_read(CONFIG + 1, 1) as u8).collect::<alloc::vec::Vec<_>>()
        };
        assert_eq!(read(0, 4), *b"QEMU");
        assert_eq!(read(3, 9), [0, 0, 0, 0x20, 0, 0, 0, 0, 0]);
        assert_eq!((read(5, 2), read(0x19, 2)), (vec![3, 0], vec![0, 0]));
    }

    #[test]
    fn irq_ports_drive_lines() {
        let clock: Arc<dyn Clock> = Time::new();
        let interrupts = Interrupts::new(1, 40, &clock, &TimerHub::new(Host::new()));
        let vcpu = interrupts.vcpu(0).unwrap();
        vcpu.apic().enter_virtual_wire_mode();
        interrupts.set_level_triggered(1 << 4);
        let ports = IrqPorts::new(&interrupts);
        ports.port_write(IRQ_LINES + 4, 1, 1);
        assert!(vcpu.has_event());
        ports.port_write(IRQ_LINES + 4, 1, 0);
        ports.port_write(IRQ_LINES + 100, 1, 1);
        assert!(!vcpu.has_event());
    }
}
