//! The registers by which a driver finds out about a device, negotiates features and sets up queues: the common
//! configuration structure of the PCI transport (section 4.1.4.3), as a pure register machine.

use alloc::vec::Vec;

use super::feature::{EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1};
use super::ring::Layout;
use crate::devices::Registers;

/// "No interrupt for this" (section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Device status (section 2.1).
pub mod status {
    /// The driver has accepted the features that it wants.
    pub const FEATURES_OK: u8 = 1 << 3;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 1 << 2;
    /// The device can't go on.
    pub const NEEDS_RESET: u8 = 1 << 6;
}

/// Offsets of registers.
pub mod register {
    /// Which 32 device features are read, 0 or 1.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// Device features.
    pub const DEVICE_FEATURE: u64 = 4;
    /// Which 32 driver features are accessed.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// Driver features.
    pub const DRIVER_FEATURE: u64 = 12;
    /// MSI-X vector of configuration changes.
    pub const CONFIG_VECTOR: u64 = 16;
    /// Number of queues.
    pub const NUM_QUEUES: u64 = 18;
    /// Device status.
    pub const STATUS: u64 = 20;
    /// Changes with the device's configuration.
    pub const CONFIG_GENERATION: u64 = 21;
    /// Which queue the following are of.
    pub const QUEUE_SELECT: u64 = 22;
    /// Its size.
    pub const QUEUE_SIZE: u64 = 24;
    /// Its MSI-X vector.
    pub const QUEUE_VECTOR: u64 = 26;
    /// Whether it is enabled.
    pub const QUEUE_ENABLE: u64 = 28;
    /// Where it is notified, in units of the notification structure.
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    /// Guest-physical addresses of its three parts, 64 bits each.
    pub const QUEUE_ADDRESSES: u64 = 32;
    /// First byte behind all.
    pub const END: u64 = 56;
}

/// ISR status (section 4.1.4.5).
pub mod isr {
    /// A queue has used chains.
    pub const QUEUE: u8 = 1;
    /// The configuration changed.
    pub const CONFIG: u8 = 2;
}

/// One queue's registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueRegisters {
    max_size: u16,
    vector: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Where the driver has put it.
    pub layout: Layout,
}

/// What a write causes outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The device is to be reset, then [`Transport::reset`] to be called.
    Reset,
    /// The driver is ready.
    Activate,
}

/// The register machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transport {
    offered: u64,
    vectors: u16,
    device_select: u32,
    driver_select: u32,
    accepted: u64,
    config_vector: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    isr: u8,
    /// A reset has begun and not yet ended.
    resetting: bool,
}

impl Registers for Transport {
    const VERSION: u32 = 1;

    fn valid(&self) -> bool {
        // Until it says that it has accepted them, a driver may write what it likes.
        let settled = self.status & (status::FEATURES_OK | status::DRIVER_OK) != 0;
        !self.resetting && (!settled || self.accepted & !self.offered == 0)
    }
}

impl Transport {
    /// The registers of a device that offers these features besides those of every device, with queues of these
    /// largest sizes and `vectors` MSI-X vectors.
    pub fn new(features: u64, packed: bool, queue_sizes: &[u16], vectors: u16) -> Self {
        let common = VERSION_1 | INDIRECT_DESC | EVENT_IDX | if packed { RING_PACKED } else { 0 };
        let mut transport = Self {
            offered: features | common,
            vectors,
            device_select: 0,
            driver_select: 0,
            accepted: 0,
            config_vector: NO_VECTOR,
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: Vec::new(),
            isr: 0,
            resetting: false,
        };
        let queue = |&max_size| QueueRegisters {
            max_size,
            vector: NO_VECTOR,
            enabled: false,
            layout: Layout::default(),
        };
        transport.queues = queue_sizes.iter().map(queue).collect();
        transport.reset();
        transport
    }

    /// Ends a reset: all registers are as in the beginning.
    pub fn reset(&mut self) {
        (self.device_select, self.driver_select, self.accepted) = (0, 0, 0);
        (self.config_vector, self.status, self.queue_select) = (NO_VECTOR, 0, 0);
        (self.isr, self.resetting) = (0, false);
        for queue in &mut self.queues {
            queue.vector = NO_VECTOR;
            queue.enabled = false;
            queue.layout = Layout { size: queue.max_size, ..Layout::default() };
        }
    }

    /// The features that both sides have agreed on.
    pub fn features(&self) -> u64 {
        self.accepted
    }
    /// Whether the driver is ready, and nothing is wrong.
    pub fn is_active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK && !self.resetting
    }
    /// Whether the same device could have saved these registers.
    pub fn is_like(&self, other: &Self) -> bool {
        let sizes = |of: &Self| of.queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>();
        (self.offered, self.vectors, sizes(self)) == (other.offered, other.vectors, sizes(other))
    }
    /// All queues.
    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }
    /// The MSI-X vector of a queue.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queues.get(usize::from(queue)).map_or(NO_VECTOR, |queue| queue.vector)
    }
    /// The MSI-X vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The device's configuration changed.
    pub fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }
    /// The device can't go on. False: the driver knows already, or has not begun.
    pub fn set_needs_reset(&mut self) -> bool {
        let is_new = self.is_active();
        self.status |= status::NEEDS_RESET;
        is_new
    }

    /// Sets bits of the ISR status.
    pub fn raise(&mut self, bits: u8) {
        self.isr |= bits;
    }
    /// Reads the ISR status, which clears it.
    pub fn take_isr(&mut self) -> u8 {
        core::mem::take(&mut self.isr)
    }
    /// The ISR status.
    pub fn isr(&self) -> u8 {
        self.isr
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Reads `size` bytes. Fields are read as a whole, those of 64 bits also by halves (section 4.1.3.1).
    pub fn read(&self, offset: u64, size: usize) -> u64 {
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let queue = |get: fn(&QueueRegisters) -> u64| self.queue().map_or(0, get);
        match (offset, size) {
            (register::DEVICE_FEATURE_SELECT, 4) => self.device_select.into(),
            (register::DEVICE_FEATURE, 4) => half(self.offered, self.device_select),
            (register::DRIVER_FEATURE_SELECT, 4) => self.driver_select.into(),
            (register::DRIVER_FEATURE, 4) => half(self.accepted, self.driver_select),
            (register::CONFIG_VECTOR, 2) => self.config_vector.into(),
            (register::NUM_QUEUES, 2) => self.queues.len() as u64,
            (register::STATUS, 1) => self.status.into(),
            (register::CONFIG_GENERATION, 1) => self.generation.into(),
            (register::QUEUE_SELECT, 2) => self.queue_select.into(),
            // No such queue: size 0.
            (register::QUEUE_SIZE, 2) => queue(|queue| queue.layout.size.into()),
            (register::QUEUE_VECTOR, 2) => queue(|queue| queue.vector.into()),
            (register::QUEUE_ENABLE, 2) => queue(|queue| queue.enabled.into()),
            (register::QUEUE_NOTIFY_OFFSET, 2) => self.queue_select.into(),
            (register::QUEUE_ADDRESSES..register::END, 4 | 8) if offset.is_multiple_of(size as u64) => {
                let Some(queue) = self.queue() else { return 0 };
                let layout = &queue.layout;
                let addresses = [layout.descriptors, layout.driver, layout.device];
                let value = addresses[(offset - register::QUEUE_ADDRESSES) as usize / 8];
                if size == 8 { value } else { value >> (8 * (offset % 8)) & 0xffff_ffff }
            }
            _ => 0,
        }
    }

    /// Writes `size` bytes.
    pub fn write(&mut self, offset: u64, size: usize, value: u64) -> Effect {
        match (offset, size) {
            (register::STATUS, 1) => return self.set_status(value as u8),
            _ if self.resetting => {}
            (register::DEVICE_FEATURE_SELECT, 4) => self.device_select = value as u32,
            (register::DRIVER_FEATURE_SELECT, 4) => self.driver_select = value as u32,
            (register::DRIVER_FEATURE, 4) if self.status & status::FEATURES_OK == 0 => {
                match self.driver_select {
                    0 => self.accepted = self.accepted & !0xffff_ffff | value & 0xffff_ffff,
                    1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            (register::CONFIG_VECTOR, 2) => self.config_vector = self.vector(value),
            (register::QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (register::QUEUE_SIZE..register::END, _) => self.write_queue(offset, size, value),
            _ => {}
        }
        Effect::None
    }

    /// A vector that there is, or none: so the driver sees that it can't have it.
    fn vector(&self, value: u64) -> u16 {
        if value < u64::from(self.vectors) { value as u16 } else { NO_VECTOR }
    }

    fn set_status(&mut self, value: u8) -> Effect {
        if self.resetting {
            return Effect::None;
        }
        if value == 0 {
            self.resetting = true;
            return Effect::Reset;
        }
        let before = self.status;
        // Bits are only set, never cleared, but by a reset; DEVICE_NEEDS_RESET is the device's.
        self.status |= value & !status::NEEDS_RESET;
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        if before & status::FEATURES_OK == 0 && !acceptable {
            self.status &= !status::FEATURES_OK;
        }
        let both = status::FEATURES_OK | status::DRIVER_OK;
        if before & status::DRIVER_OK == 0 && self.status & both == both {
            return Effect::Activate;
        }
        self.status = self.status & !status::DRIVER_OK | before & status::DRIVER_OK;
        Effect::None
    }

    fn write_queue(&mut self, offset: u64, size: usize, value: u64) {
        let vector = self.vector(value);
        let ready = self.status & status::DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        match (offset, size) {
            (register::QUEUE_VECTOR, 2) => queue.vector = vector,
            // The rest stands once the queue is enabled.
            _ if ready || queue.enabled => {}
            (register::QUEUE_SIZE, 2) if value <= u64::from(queue.max_size) => {
                queue.layout.size = value as u16;
            }
            (register::QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (register::QUEUE_ADDRESSES.., 4 | 8) if offset.is_multiple_of(size as u64) => {
                let layout = &mut queue.layout;
                let address = match (offset - register::QUEUE_ADDRESSES) / 8 {
                    0 => &mut layout.descriptors,
                    1 => &mut layout.driver,
                    _ => &mut layout.device,
                };
                let shift = 8 * (offset % 8);
                let mask = if size == 8 { u64::MAX } else { 0xffff_ffff << shift };
                *address = *address & !mask | value << shift & mask;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::register::*;
    use super::*;
    use crate::devices::RestoreError;

    const ACKNOWLEDGED: u64 = 3;

    fn transport() -> Transport {
        Transport::new(1 << 5, true, &[256, 64], 3)
    }

    fn accept(transport: &mut Transport, features: u64) {
        for half in 0..2 {
            transport.write(DRIVER_FEATURE_SELECT, 4, half);
            transport.write(DRIVER_FEATURE, 4, features >> (32 * half) & 0xffff_ffff);
        }
    }

    #[test]
    fn features_are_offered_by_halves_and_accepted_only_as_offered() {
        let mut t = transport();
        let mut offered = 0;
        for half in 0..3 {
            t.write(DEVICE_FEATURE_SELECT, 4, half);
            offered |= t.read(DEVICE_FEATURE, 4) << (32 * (half & 1));
        }
        assert_eq!(offered, 1 << 5 | INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED);
        for wrong in [0, 1 << 5, VERSION_1 | 1] {
            accept(&mut t, wrong);
            t.write(STATUS, 1, ACKNOWLEDGED | 8);
            assert_eq!(t.read(STATUS, 1), ACKNOWLEDGED, "{wrong:#x}");
            assert_eq!(t.write(STATUS, 1, ACKNOWLEDGED | 4), Effect::None);
            assert!(!t.is_active());
        }
        accept(&mut t, VERSION_1 | 1 << 5);
        t.write(STATUS, 1, ACKNOWLEDGED | 8);
        accept(&mut t, 0);
        assert_eq!((t.read(STATUS, 1), t.features()), (ACKNOWLEDGED | 8, VERSION_1 | 1 << 5));
        assert_eq!(t.write(STATUS, 1, ACKNOWLEDGED | 12), Effect::Activate);
        assert_eq!(t.write(STATUS, 1, ACKNOWLEDGED | 12), Effect::None);
        assert!(t.is_active());
    }

    #[test]
    fn a_queue_is_set_up_and_then_stands() {
        let mut t = transport();
        t.write(QUEUE_SELECT, 2, 1);
        assert_eq!((t.read(QUEUE_SIZE, 2), t.read(QUEUE_NOTIFY_OFFSET, 2)), (64, 1));
        for (offset, size, value) in [
            (QUEUE_SIZE, 2, 128),
            (QUEUE_SIZE, 2, 32),
            (QUEUE_VECTOR, 2, 2),
            (QUEUE_ADDRESSES, 4, 0x1000),
            (QUEUE_ADDRESSES + 4, 4, 1),
            (QUEUE_ADDRESSES + 8, 8, 0x2000),
            (QUEUE_ADDRESSES + 20, 8, u64::MAX),
            (QUEUE_ADDRESSES + 16, 4, 0x3000),
            (QUEUE_ENABLE, 2, 1),
            (QUEUE_ADDRESSES, 4, 0x9000),
            (QUEUE_SIZE, 2, 16),
        ] {
            t.write(offset, size, value);
        }
        let layout = Layout { size: 32, descriptors: 0x1_0000_1000, driver: 0x2000, device: 0x3000 };
        assert_eq!((t.queues()[1].enabled, t.queues()[1].layout), (true, layout));
        assert_eq!(t.read(QUEUE_ADDRESSES + 4, 4), 1);
        assert_eq!((t.queue_vector(1), t.queue_vector(0), t.queue_vector(9)), (2, NO_VECTOR, NO_VECTOR));
        t.write(QUEUE_VECTOR, 2, 3);
        assert_eq!(t.read(QUEUE_VECTOR, 2), 0xffff);
        t.write(QUEUE_SELECT, 2, 2);
        t.write(QUEUE_ENABLE, 2, 1);
        assert_eq!((t.read(QUEUE_SIZE, 2), t.read(QUEUE_ENABLE, 2)), (0, 0));
    }

    #[test]
    fn a_reset_takes_until_the_device_has_done_it() {
        let mut t = transport();
        accept(&mut t, VERSION_1);
        t.write(STATUS, 1, 15);
        t.raise(isr::QUEUE);
        assert_eq!(t.write(STATUS, 1, 0), Effect::Reset);
        assert_eq!((t.read(STATUS, 1), t.is_active()), (15, false));
        assert_eq!((t.write(STATUS, 1, 0), t.write(STATUS, 1, 15)), (Effect::None, Effect::None));
        t.reset();
        assert_eq!(t, transport());
    }

    #[test]
    fn what_any_driver_may_have_written_can_be_restored() {
        let mut t = transport();
        accept(&mut t, u64::MAX);
        assert!(transport().restore(&t.save()).is_ok());
        let mut impossible = t.save();
        impossible.registers.status = status::FEATURES_OK;
        assert_eq!(transport().restore(&impossible), Err(RestoreError::Invalid));
    }

    #[test]
    fn only_a_reset_ends_needs_reset() {
        let mut t = transport();
        accept(&mut t, VERSION_1);
        t.write(STATUS, 1, 15);
        assert!(t.set_needs_reset() && !t.set_needs_reset());
        t.write(STATUS, 1, 15);
        assert_eq!(t.read(STATUS, 1), 0x4f);
        assert!(!t.is_active());
    }

    #[test]
    fn odd_accesses_read_zero_and_change_nothing() {
        let mut t = transport();
        for offset in 0..70 {
            for size in [1, 2, 4, 8] {
                if !(offset == STATUS && size == 1) && size != 4 && size != 2 && offset < QUEUE_ADDRESSES {
                    t.write(offset, size, 1);
                }
                t.read(offset, size);
            }
        }
        assert_eq!(t, transport());
        assert_eq!((t.read(DEVICE_FEATURE, 2), t.read(QUEUE_ADDRESSES + 4, 8)), (0, 0));
    }
}
