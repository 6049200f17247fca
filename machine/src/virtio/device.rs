//! What a virtio device is, whatever bus it is on.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::queue::{Signal, Virtqueue};

/// What a device is to its driver (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Virtio device ID.
    pub id: u16,
    /// PCI class code: class, subclass, interface in 24 bits.
    pub class: u32,
    /// Name for messages.
    pub name: &'static str,
}

/// What a device keeps besides its rings, as plain words that only it understands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedDevice {
    /// Version of the layout of `words`.
    pub version: u32,
    /// The state.
    pub words: Vec<u64>,
}

/// A device. Its methods are called by virtual processors' threads; never by two of them at once, but for
/// [`VirtioDevice::config_read`], [`VirtioDevice::config_write`] and [`VirtioDevice::notify`].
pub trait VirtioDevice: Send + Sync {
    /// What it is.
    fn kind(&self) -> Kind;
    /// The features that it offers, without those of every device.
    fn features(&self) -> u64;
    /// The largest size of each of its queues: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads its configuration from an offset on; what is not there is left alone.
    fn config_read(&self, offset: usize, to: &mut [u8]);
    /// Writes its configuration.
    fn config_write(&self, _offset: usize, _bytes: &[u8]) {}
    /// Called once before all else: how to tell the driver of something.
    fn attach(&self, _signal: Arc<dyn Signal>) {}
    /// The driver is ready. `features` were negotiated; queues that it did not enable are `None`.
    fn activate(&self, _features: u64, _queues: &[Option<Arc<Virtqueue>>]) {}
    /// The driver has put something into a queue.
    fn notify(&self, queue: &Arc<Virtqueue>);
    /// Back to the state before [`VirtioDevice::activate`]. All queues are closed already; returns when nothing that the
    /// driver asked for is still going on.
    fn reset(&self) {}
    /// Returns when nothing that the driver asked for is still going on; nothing of the host's side comes into RAM either
    /// from then on, until [`VirtioDevice::resume`]. The processors stand still.
    fn drain(&self) {}
    /// The processors are about to go on.
    fn resume(&self) {}
    /// What it keeps besides its rings. Called after [`VirtioDevice::drain`].
    fn save(&self) -> SavedDevice {
        SavedDevice::default()
    }
    /// Takes over what [`VirtioDevice::save`] gave; after [`VirtioDevice::activate`], where the driver was ready. False:
    /// it makes no sense.
    fn restore(&self, saved: &SavedDevice) -> bool {
        *saved == SavedDevice::default()
    }
}

/// Copies the part of a configuration that is asked for.
pub fn read_config(config: &[u8], offset: usize, to: &mut [u8]) {
    for (to, from) in to.iter_mut().zip(config.iter().skip(offset)) {
        *to = *from;
    }
}
