//! A virtio device as a PCI function (section 4.1): one BAR with the common configuration, ISR, device configuration,
//! notifications, and MSI-X.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt::Display;

use super::chain::RingError;
use super::device::{SavedDevice, VirtioDevice};
use super::queue::{Shared, Signal, Virtqueue};
use super::ring::Position;
use super::transport::{Effect, NO_VECTOR, Transport, isr, register};
use crate::bus::MmioMap;
use crate::device::{IrqLine, Mmio};
use crate::devices::log::GuestLog;
use crate::devices::pci::endpoint::{Endpoint, EndpointParts, SavedEndpoint, table_size};
use crate::devices::pci::{ConfigSpace, PciFunction, register as header};
use crate::devices::{Registers, RestoreError, Saved};
use crate::dma::Dma;
use crate::irq::Interrupts;
use crate::sync::Mutex;

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x8000;

const VENDOR: u16 = 0x1af4;
/// Device ID of virtio device 0 (section 4.1.2).
const FIRST_DEVICE: u16 = 0x1040;
/// Transitional devices have revision 0.
const REVISION: u8 = 1;
/// As QEMU's: any from 40h on says that it is no transitional device.
const SUBSYSTEM: u16 = 0x1100;

/// Where the structures are in the BAR: a page each, so that a guest may map them apart.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x6000;
const PAGE: u64 = 0x1000;
/// Bytes between the notification registers of two queues.
const NOTIFY_STRIDE: u64 = 4;

/// Vendor-specific capability, and the types of structures that it tells of (section 4.1.4).
const VENDOR_CAPABILITY: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI_ACCESS: u8 = 5;
/// Offsets in a capability of BAR, offset, length, and what follows.
const CAPABILITY_BAR: usize = 4;
const CAPABILITY_OFFSET: usize = 8;
const CAPABILITY_LENGTH: usize = 12;
const CAPABILITY_MORE: usize = 16;

/// A capability without the two bytes in front.
fn capability(kind: u8, offset: u64, length: u64, more: &[u8]) -> Vec<u8> {
    let mut body = alloc::vec![(CAPABILITY_MORE + more.len()) as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(more);
    body
}

/// What the function is made with, besides its device.
pub struct FunctionParts {
    /// Access to RAM.
    pub dma: Dma,
    /// Where its registers answer.
    pub mmio: Arc<MmioMap>,
    /// Where its messages go.
    pub interrupts: Arc<Interrupts>,
    /// Its interrupt pin.
    pub wire: Arc<dyn IrqLine>,
    /// Where firmware has put its BAR.
    pub bar_address: u64,
    /// What it complains to.
    pub log: Arc<GuestLog>,
    /// Its name in complaints: the slot.
    pub slot: u8,
    /// With the packed ring.
    pub packed: bool,
}

/// The side of the function that devices may call at any time.
struct Line {
    endpoint: Endpoint,
    transport: Mutex<Transport>,
    log: Arc<GuestLog>,
    name: &'static str,
    slot: u8,
}

impl Line {
    /// Interrupts by the message of a vector, or by the pin and a bit of the ISR status.
    fn interrupt(&self, bit: u8, vector: impl FnOnce(&Transport) -> u16) {
        let mut transport = self.transport.lock();
        if self.endpoint.uses_messages() {
            let vector = vector(&transport);
            drop(transport);
            if vector != NO_VECTOR {
                self.endpoint.trigger(vector);
            }
        } else {
            transport.raise(bit);
            self.endpoint.set_pin(true);
        }
    }
}

impl Signal for Line {
    fn used(&self, queue: u16) {
        self.interrupt(isr::QUEUE, |transport| transport.queue_vector(queue));
    }
    fn config_changed(&self) {
        self.transport.lock().config_changed();
        self.interrupt(isr::CONFIG, Transport::config_vector);
    }
    fn broken(&self, why: &dyn Display) {
        if self.transport.lock().set_needs_reset() {
            self.log.log(format_args!("{} device 00:{:02x}.0 stops: {why}", self.name, self.slot));
            self.interrupt(isr::CONFIG, Transport::config_vector);
        }
    }
}

/// The function.
pub struct VirtioFunction {
    line: Arc<Line>,
    device: Arc<dyn VirtioDevice>,
    dma: Dma,
    /// Queues that the driver has enabled, while it is ready.
    queues: Mutex<Vec<Option<Arc<Virtqueue>>>>,
    /// Held while the driver becomes ready or resets the device: two processors may try at once.
    changing: Mutex<()>,
    /// Offset of the capability for access by configuration space.
    window: usize,
}

/// What [`VirtioFunction::save`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedFunction {
    /// Configuration space and MSI-X.
    pub endpoint: SavedEndpoint,
    /// What was negotiated.
    pub transport: Saved<Transport>,
    /// How far each queue has got.
    pub queues: Vec<Option<Position>>,
    /// What the device keeps.
    pub device: SavedDevice,
}

impl VirtioFunction {
    /// The function of a device.
    pub fn new(device: Arc<dyn VirtioDevice>, parts: FunctionParts) -> Arc<Self> {
        let kind = device.kind();
        let sizes = device.queue_sizes();
        // A vector for each queue, and one for changes of the configuration.
        let vectors = (sizes.len() + 1) as u16;
        debug_assert!(table_size(vectors) <= PENDING - TABLE && sizes.len() as u64 * NOTIFY_STRIDE <= PAGE);
        let mut config = ConfigSpace::new(VENDOR, FIRST_DEVICE + kind.id, kind.class, REVISION);
        config.set(header::SUBSYSTEM, &VENDOR.to_le_bytes());
        config.set(header::SUBSYSTEM + 2, &SUBSYSTEM.to_le_bytes());
        let stride = (NOTIFY_STRIDE as u32).to_le_bytes();
        for body in [
            capability(TYPE_COMMON, COMMON, register::END, &[]),
            capability(TYPE_NOTIFY, NOTIFY, sizes.len() as u64 * NOTIFY_STRIDE, &stride),
            capability(TYPE_ISR, ISR, 1, &[]),
            capability(TYPE_DEVICE, DEVICE, PAGE, &[]),
        ] {
            config.add_capability(VENDOR_CAPABILITY, &body);
        }
        let window = config.add_capability(VENDOR_CAPABILITY, &capability(TYPE_PCI_ACCESS, 0, 0, &[0; 4]));
        config.set_writable(window + CAPABILITY_BAR, &[0xff]);
        config.set_writable(window + CAPABILITY_OFFSET, &[0xff; 8]);
        let transport = Transport::new(device.features(), parts.packed, &sizes, vectors);
        Arc::new_cyclic(|this: &Weak<Self>| {
            let endpoint = Endpoint::new(EndpointParts {
                config,
                registers: this.clone(),
                mmio: parts.mmio,
                interrupts: parts.interrupts,
                wire: parts.wire,
                vectors,
                bar_size: BAR_SIZE,
                bar_address: parts.bar_address,
                table: TABLE as u32,
                pending: PENDING as u32,
            });
            let line = Arc::new(Line {
                endpoint,
                transport: Mutex::new(transport),
                log: parts.log,
                name: kind.name,
                slot: parts.slot,
            });
            device.attach(line.clone());
            Self {
                line,
                device,
                dma: parts.dma,
                queues: Mutex::new(Vec::new()),
                changing: Mutex::new(()),
                window,
            }
        })
    }

    fn common_write(&self, offset: u64, size: usize, value: u64) {
        let effect = self.line.transport.lock().write(offset, size, value);
        match effect {
            Effect::None => {}
            Effect::Reset => self.reset(),
            Effect::Activate => self.activate(),
        }
    }

    /// Makes the queues that the driver has set up.
    fn activate(&self) {
        let _changing = self.changing.lock();
        let transport = self.line.transport.lock().clone();
        if !transport.is_active() {
            return;
        }
        let enabled = transport.queues().iter().map(|queue| queue.enabled.then(Position::default));
        match self.make_queues(&transport, &enabled.collect::<Vec<_>>(), false) {
            // The driver may have filled queues before it was ready.
            Ok(()) => self.notify_all(),
            Err(why) => self.line.broken(&why),
        }
    }

    /// Makes queues where there is a position; `resume`: they go on from there. Then the device begins.
    fn make_queues(
        &self,
        transport: &Transport,
        positions: &[Option<Position>],
        resume: bool,
    ) -> Result<(), RingError> {
        let shared = Shared::new(transport.features(), self.dma.clone(), self.line.clone());
        let mut made = Vec::new();
        for ((registers, position), index) in transport.queues().iter().zip(positions).zip(0..) {
            let Some(position) = position else {
                made.push(None);
                continue;
            };
            let queue = Virtqueue::new(index, &registers.layout, &shared)?;
            if resume && !queue.set_position(*position) {
                return Err(RingError::Layout(registers.layout.size));
            }
            made.push(Some(queue));
        }
        self.device.activate(transport.features(), &made);
        *self.queues.lock() = made;
        Ok(())
    }

    fn notify_all(&self) {
        let queues = self.queues.lock().clone();
        for queue in queues.iter().flatten() {
            self.notify(queue);
        }
    }

    fn notify(&self, queue: &Arc<Virtqueue>) {
        if self.line.endpoint.is_bus_master() {
            self.device.notify(queue);
        }
    }

    fn notify_number(&self, number: u64) {
        let queue = self.queues.lock().get(number as usize).cloned().flatten();
        if let Some(queue) = queue {
            self.notify(&queue);
        }
    }

    fn reset(&self) {
        let _changing = self.changing.lock();
        let queues = core::mem::take(&mut *self.queues.lock());
        for queue in queues.iter().flatten() {
            queue.close();
        }
        self.device.reset();
        let mut transport = self.line.transport.lock();
        transport.reset();
        self.line.endpoint.set_pin(false);
    }

    fn isr_read(&self) -> u64 {
        let mut transport = self.line.transport.lock();
        let bits = transport.take_isr();
        self.line.endpoint.set_pin(false);
        bits.into()
    }

    /// The place in the BAR that the capability for access by configuration space points to, and how many bytes; `None`
    /// where it points to none, or to none that may be accessed so.
    fn window_target(&self) -> Option<(u64, usize)> {
        let field = |offset, size| self.line.endpoint.config_read(self.window + offset, size);
        let (offset, length) = (field(CAPABILITY_OFFSET, 4), field(CAPABILITY_LENGTH, 4));
        let fits = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        (field(CAPABILITY_BAR, 1) == 0 && fits && u64::from(offset) < BAR_SIZE)
            .then_some((offset.into(), length as usize))
    }

    /// See [`VirtioDevice::drain`].
    pub fn drain(&self) {
        self.device.drain();
    }
    /// See [`VirtioDevice::resume`].
    pub fn resume(&self) {
        self.device.resume();
    }

    /// Ends what the device does, and lets its host's side go. The processors must have stopped for good.
    pub fn stop(&self) {
        self.reset();
    }

    /// Everything that the function holds. The processors must stand still.
    pub fn save(&self) -> SavedFunction {
        self.drain();
        let queues = self.queues.lock().iter().map(|q| q.as_ref().map(|q| q.position())).collect();
        SavedFunction {
            endpoint: self.line.endpoint.save(),
            transport: self.line.transport.lock().save(),
            queues,
            device: self.device.save(),
        }
    }

    /// Takes over what [`VirtioFunction::save`] gave. The processors must stand still.
    pub fn restore(&self, saved: &SavedFunction) -> Result<(), RestoreError> {
        self.reset();
        let mut transport = self.line.transport.lock();
        if !transport.is_like(&saved.transport.registers) {
            return Err(RestoreError::Invalid);
        }
        transport.restore(&saved.transport)?;
        let (active, pin) = (transport.is_active(), transport.isr() != 0);
        drop(transport);
        self.line.endpoint.restore(&saved.endpoint)?;
        self.line.endpoint.set_pin(pin);
        if active {
            let transport = self.line.transport.lock().clone();
            if transport.queues().len() != saved.queues.len() {
                return Err(RestoreError::Invalid);
            }
            self.make_queues(&transport, &saved.queues, true).map_err(|_| RestoreError::Invalid)?;
        }
        if self.device.restore(&saved.device) { Ok(()) } else { Err(RestoreError::Invalid) }
    }
}

impl PciFunction for VirtioFunction {
    fn config_read(&self, offset: usize, size: usize) -> u32 {
        if offset == self.window + CAPABILITY_MORE
            && let Some((at, length)) = self.window_target()
        {
            return self.mmio_read(at, length.min(size)) as u32;
        }
        self.line.endpoint.config_read(offset, size)
    }
    fn config_write(&self, offset: usize, size: usize, value: u32) {
        if offset == self.window + CAPABILITY_MORE {
            if let Some((at, length)) = self.window_target() {
                self.mmio_write(at, length.min(size), value.into());
            }
        } else if self.line.endpoint.config_write(offset, size, value) {
            self.notify_all();
        }
    }
}

impl Mmio for VirtioFunction {
    fn mmio_read(&self, offset: u64, size: usize) -> u64 {
        match offset & !(PAGE - 1) {
            COMMON => self.line.transport.lock().read(offset, size),
            ISR if offset == ISR => self.isr_read(),
            DEVICE => {
                let mut bytes = [0; 8];
                if let Some(bytes) = bytes.get_mut(..size) {
                    self.device.config_read((offset - DEVICE) as usize, bytes);
                }
                u64::from_le_bytes(bytes)
            }
            TABLE..PENDING => self.line.endpoint.table_read(offset - TABLE, size),
            PENDING => self.line.endpoint.pending_read(offset - PENDING, size),
            _ => 0,
        }
    }
    fn mmio_write(&self, offset: u64, size: usize, value: u64) {
        match offset & !(PAGE - 1) {
            COMMON => self.common_write(offset, size, value),
            DEVICE => {
                if let Some(bytes) = value.to_le_bytes().get(..size) {
                    self.device.config_write((offset - DEVICE) as usize, bytes);
                }
            }
            // The value is the queue's number once more.
            NOTIFY => self.notify_number((offset - NOTIFY) / NOTIFY_STRIDE),
            TABLE..PENDING => self.line.endpoint.table_write(offset - TABLE, size, value),
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
