//! What a device may offer, as small optional traits. A device is a pure register machine first (no bus, no
//! host, no clock of its own); these traits are implemented by its bus adapter.

use crate::host::Nanos;

/// Registers in port space. The adapter holds the device behind a lock.
pub trait PortIo: Send + Sync {
    /// IN of `size` (1, 2, 4) bytes. `port` is absolute.
    fn port_read(&self, port: u16, size: usize) -> u32;
    /// OUT of `size` bytes.
    fn port_write(&self, port: u16, size: usize, value: u32);
}

/// Registers in memory space.
pub trait Mmio: Send + Sync {
    /// Reads `size` (1, 2, 4, 8) bytes at this offset from the start of the device's range.
    fn mmio_read(&self, offset: u64, size: usize) -> u64;
    /// Writes `size` bytes.
    fn mmio_write(&self, offset: u64, size: usize, value: u64);
}

/// A device that acts by itself as time passes.
pub trait Poll: Send + Sync {
    /// Does what is due at `now`, and says when it wants to be called again.
    fn poll(&self, now: Nanos) -> Option<Nanos>;
}

/// An interrupt line: a level, as on a wire.
pub trait IrqLine: Send + Sync {
    /// Drives the line.
    fn set(&self, high: bool);
}
