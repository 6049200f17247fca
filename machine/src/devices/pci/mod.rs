//! The PCI root: configuration space by ports (mechanism #1, PCI Local Bus Specification 3.0, section 3.2.2.3.2)
//! and by memory (ECAM, PCI Express Base Specification, section 7.2.2).

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

pub mod endpoint;
pub mod msix;

use super::reset::{RESET_CONTROL, ResetControl};
use crate::device::{Mmio, PortIo};
use crate::sync::Mutex;

/// Address port of mechanism #1; data ports follow.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// First data port.
pub const CONFIG_DATA: u16 = 0xcfc;
/// Address and data ports together.
pub const PORTS: u32 = 8;
/// Bytes of configuration space in memory for one bus.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;
/// Bytes of one function's configuration space.
pub const CONFIG_SIZE: usize = 4096;

const ADDRESS_ENABLED: u32 = 1 << 31;

/// Where a function is on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bdf {
    /// Bus number.
    pub bus: u8,
    /// Device on the bus, 0 to 31.
    pub device: u8,
    /// Function of the device, 0 to 7.
    pub function: u8,
}

impl Bdf {
    const fn from_bits(bits: u32) -> Self {
        Self { bus: (bits >> 8) as u8, device: (bits >> 3 & 31) as u8, function: (bits & 7) as u8 }
    }
}

/// One PCI function's configuration space. Accesses are naturally aligned and inside the 4 KiB.
pub trait PciFunction: Send + Sync {
    /// Reads `size` (1, 2, 4) bytes.
    fn config_read(&self, offset: usize, size: usize) -> u32;
    /// Writes `size` bytes.
    fn config_write(&self, offset: usize, size: usize, value: u32);
}

/// Another function is at this place already, or there is no such place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PCI address {:02x}:{:02x}.{} is taken or does not exist", .0.bus, .0.device, .0.function)]
pub struct NoSuchSlot(pub Bdf);

/// All functions of the machine.
#[derive(Default)]
pub struct PciRoot {
    functions: Mutex<BTreeMap<Bdf, Arc<dyn PciFunction>>>,
}

impl PciRoot {
    /// A root with its host bridge at 00:00.0.
    pub fn new() -> Arc<Self> {
        let root = Self::default();
        root.functions.lock().insert(Bdf::from_bits(0), Arc::new(HostBridge::new()));
        Arc::new(root)
    }

    /// Plugs in a function.
    pub fn add(&self, at: Bdf, function: Arc<dyn PciFunction>) -> Result<(), NoSuchSlot> {
        let mut functions = self.functions.lock();
        if at.device > 31 || at.function > 7 || functions.contains_key(&at) {
            return Err(NoSuchSlot(at));
        }
        functions.insert(at, function);
        Ok(())
    }

    fn function(&self, at: Bdf) -> Option<Arc<dyn PciFunction>> {
        self.functions.lock().get(&at).cloned()
    }
    fn read(&self, at: Bdf, offset: usize, size: usize) -> u32 {
        self.function(at).map_or(u32::MAX, |f| f.config_read(offset, size))
    }
    fn write(&self, at: Bdf, offset: usize, size: usize, value: u32) {
        if let Some(function) = self.function(at) {
            function.config_write(offset, size, value);
        }
    }
}

/// Registers of a type 0 header.
pub mod register {
    /// Command: what the function may do.
    pub const COMMAND: usize = 0x04;
    /// Status.
    pub const STATUS: usize = 0x06;
    /// First base address register.
    pub const BAR0: usize = 0x10;
    /// Subsystem vendor; the subsystem follows.
    pub const SUBSYSTEM: usize = 0x2c;
    /// Offset of the first capability.
    pub const CAPABILITIES: usize = 0x34;
    /// Interrupt line: only a note of software's to itself.
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// Interrupt pin: 1 is INTA#.
    pub const INTERRUPT_PIN: usize = 0x3d;
}

/// A configuration space held as bytes, with the bits that software can change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SIZE]>,
    writable: Box<[u8; CONFIG_SIZE]>,
    /// Where the last capability says what follows it.
    link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl ConfigSpace {
    /// First byte behind the header.
    const HEADER_END: usize = 0x40;
    /// Status: there are capabilities.
    const HAS_CAPABILITIES: u8 = 1 << 4;

    /// Type 0 header of a function: vendor and device, class code (class, subclass, interface in 24 bits), revision.
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let mut space = Self {
            bytes: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            link: register::CAPABILITIES,
            free: Self::HEADER_END,
        };
        space.set(0x00, &vendor.to_le_bytes());
        space.set(0x02, &device.to_le_bytes());
        space.set(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        space
    }
    /// Sets bytes, whatever software may write. What does not fit is left out.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }
    /// Sets which bits software can write.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(offset).zip(mask) {
            *to = *from;
        }
    }
    /// Appends a capability: its ID and what stands behind its pointer to the next one. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.free;
        self.set(register::STATUS, &[self.read(register::STATUS, 1) as u8 | Self::HAS_CAPABILITIES]);
        self.set(self.link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.link = at + 1;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        debug_assert!(self.free <= 0x100);
        at
    }
    /// Reads `size` (1, 2, 4) bytes; zeros outside.
    pub fn read(&self, offset: usize, size: usize) -> u32 {
        let bytes = self.bytes.iter().skip(offset).take(size.min(4)).zip(0u32..);
        bytes.fold(0, |value, (&byte, i)| value | u32::from(byte) << (8 * i))
    }
    /// Writes the writable bits of `size` bytes.
    pub fn write(&mut self, offset: usize, size: usize, value: u32) {
        let places = self.bytes.iter_mut().zip(self.writable.iter()).skip(offset).take(size);
        for ((byte, mask), new) in places.zip(value.to_le_bytes()) {
            *byte = *byte & !mask | new & mask;
        }
    }
    /// The bits that software can change, as they are: to be saved.
    pub fn changeable(&self) -> Vec<u8> {
        self.bytes.iter().zip(self.writable.iter()).map(|(byte, mask)| byte & mask).collect()
    }
    /// Takes over what [`ConfigSpace::changeable`] gave.
    pub fn set_changeable(&mut self, saved: &[u8]) {
        for ((byte, mask), new) in self.bytes.iter_mut().zip(self.writable.iter()).zip(saved) {
            *byte = *byte & !mask | new & mask;
        }
    }
}

/// The host bridge: only its identity.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// Red Hat's generic PCI Express host bridge, which no driver binds to.
    const VENDOR: u16 = 0x1b36;
    const DEVICE: u16 = 0x0008;
    const CLASS_HOST_BRIDGE: u32 = 0x06_00_00;

    fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(Self::VENDOR, Self::DEVICE, Self::CLASS_HOST_BRIDGE, 0)))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: usize, size: usize) -> u32 {
        self.0.lock().read(offset, size)
    }
    fn config_write(&self, offset: usize, size: usize, value: u32) {
        self.0.lock().write(offset, size, value);
    }
}

/// Ports CF8h to CFFh. Narrower accesses to the address port are not PCI's: the byte CF9h is the chipset's reset
/// control.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    reset: Arc<ResetControl>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The ports of this root.
    pub fn new(root: Arc<PciRoot>, reset: Arc<ResetControl>) -> Arc<Self> {
        Arc::new(Self { root, reset, address: AtomicU32::new(0) })
    }
    /// The address register, to be saved.
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }
    /// Sets the address register as a write of it does.
    pub fn set_address(&self, value: u32) {
        self.address.store(value & 0x8fff_fffc, Ordering::Relaxed);
    }
    fn target(&self, port: u16) -> Option<(Bdf, usize)> {
        let address = self.address();
        // Bits 24 to 27 reach the extended registers, as on AMD processors whose NB_CFG says so.
        let offset = ((address >> 16 & 0xf00) | (address & 0xfc)) as usize + usize::from(port & 3);
        (address & ADDRESS_ENABLED != 0).then(|| (Bdf::from_bits(address >> 8 & 0xffff), offset))
    }
}

impl PortIo for ConfigPorts {
    fn port_read(&self, port: u16, size: usize) -> u32 {
        match (port, size) {
            (CONFIG_ADDRESS, 4) => self.address(),
            (RESET_CONTROL, 1) => self.reset.read().into(),
            (CONFIG_DATA.., _) => {
                self.target(port).map_or(u32::MAX, |(at, offset)| self.root.read(at, offset, size))
            }
            _ => u32::MAX,
        }
    }
    fn port_write(&self, port: u16, size: usize, value: u32) {
        match (port, size) {
            (CONFIG_ADDRESS, 4) => self.set_address(value),
            (RESET_CONTROL, 1) => self.reset.write(value as u8),
            (CONFIG_DATA.., _) => {
                if let Some((at, offset)) = self.target(port) {
                    self.root.write(at, offset, size, value);
                }
            }
            _ => {}
        }
    }
}

/// Configuration space in memory: [`ECAM_BUS_SIZE`] bytes a bus, from bus 0.
pub struct Ecam(pub Arc<PciRoot>);

impl Mmio for Ecam {
    fn mmio_read(&self, offset: u64, size: usize) -> u64 {
        let at = Bdf::from_bits((offset >> 12) as u32 & 0xffff);
        let register = (offset & 0xfff) as usize;
        let low = u64::from(self.0.read(at, register, size.min(4)));
        if size <= 4 {
            return low;
        }
        low | u64::from(self.0.read(at, (register + 4) & 0xfff, 4)) << 32
    }
    fn mmio_write(&self, offset: u64, size: usize, value: u64) {
        let at = Bdf::from_bits((offset >> 12) as u32 & 0xffff);
        let register = (offset & 0xfff) as usize;
        self.0.write(at, register, size.min(4), value as u32);
        if size > 4 {
            self.0.write(at, (register + 4) & 0xfff, 4, (value >> 32) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Host;
    use crate::host::MachineEvent;

    fn ports() -> (Arc<PciRoot>, Arc<ConfigPorts>, Arc<Host>) {
        let (root, host) = (PciRoot::new(), Host::new());
        let ports = ConfigPorts::new(root.clone(), ResetControl::new(host.clone()));
        (root, ports, host)
    }

    #[test]
    fn the_host_bridge_is_found_by_both_mechanisms() {
        let (root, ports, _) = ports();
        ports.port_write(CONFIG_ADDRESS, 4, ADDRESS_ENABLED);
        assert_eq!(ports.port_read(CONFIG_ADDRESS, 4), ADDRESS_ENABLED);
        assert_eq!(ports.port_read(CONFIG_DATA, 4), 0x0008_1b36);
        assert_eq!(ports.port_read(CONFIG_DATA + 2, 2), 0x0008);
        ports.port_write(CONFIG_ADDRESS, 4, ADDRESS_ENABLED | 8);
        assert_eq!(ports.port_read(CONFIG_DATA + 3, 1), 0x06);
        assert_eq!(Ecam(root).mmio_read(8, 8), 0x0600_0000);
    }

    #[test]
    fn empty_slots_and_a_disabled_address_read_ones() {
        let (root, ports, _) = ports();
        assert_eq!(ports.port_read(CONFIG_DATA, 4), u32::MAX);
        ports.port_write(CONFIG_ADDRESS, 4, ADDRESS_ENABLED | 1 << 11);
        assert_eq!(ports.port_read(CONFIG_DATA, 4), u32::MAX);
        assert_eq!(Ecam(root).mmio_read(1 << 15, 4), 0xffff_ffff);
    }

    #[test]
    fn byte_writes_inside_the_address_port_are_the_reset_control() {
        let (_, ports, host) = ports();
        ports.port_write(CONFIG_ADDRESS, 4, 0x8000_0800);
        ports.port_write(RESET_CONTROL, 1, 0x02);
        assert_eq!(ports.port_read(CONFIG_ADDRESS, 4), 0x8000_0800);
        assert!(host.events().is_empty());
        ports.port_write(RESET_CONTROL, 1, 0x06);
        assert_eq!(host.events(), [MachineEvent::Reset]);
    }

    #[test]
    fn a_function_is_plugged_in_once() {
        let (root, ports, _) = ports();
        let at = Bdf { bus: 0, device: 3, function: 1 };
        root.add(at, Arc::new(HostBridge::new())).unwrap();
        assert_eq!(root.add(at, Arc::new(HostBridge::new())), Err(NoSuchSlot(at)));
        assert!(root.add(Bdf { device: 32, ..at }, Arc::new(HostBridge::new())).is_err());
        ports.port_write(CONFIG_ADDRESS, 4, ADDRESS_ENABLED | 3 << 11 | 1 << 8);
        assert_eq!(ports.port_read(CONFIG_DATA, 2), 0x1b36);
    }

    #[test]
    fn only_writable_bits_change() {
        let mut space = ConfigSpace::new(1, 2, 0x010203, 4);
        space.set_writable(4, &[0x07, 0x04]);
        space.write(4, 4, 0xffff_ffff);
        space.write(0, 4, 0);
        assert_eq!((space.read(0, 4), space.read(4, 4)), (0x0002_0001, 0x0407));
        assert_eq!(space.read(8, 4), 0x0102_0304);
        assert_eq!(space.read(4094, 4), 0);
        space.write(4095, 4, 1);
    }
}
