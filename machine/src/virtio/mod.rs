//! Virtio 1.x devices (Virtual I/O Device Version 1.2, OASIS): rings in guest memory, the transport over PCI, and the
//! devices. Section numbers in this folder are that document's.
//!
//! From the inside out: [`ring`] is the pure machine of a virtqueue, without locks or interrupts; [`queue`] puts a lock
//! around it and lets it interrupt; [`transport`] is the pure machine of the registers that a driver negotiates by;
//! [`pci`] makes a PCI function of a [`device::VirtioDevice`].
//!
//! A queue is worked off by the thread that notifies it, which is the virtual processor's: whatever takes long is handed to
//! the host's side (block stores, ports, streams), whose calls return at once and whose answers come by threads of its
//! own. So there is no worker to be woken, and a request of the guest costs no switch of threads but the backend's.
//!
//! The guest is not trusted. A ring that breaks the rules stops its device, which then asks for a reset
//! (DEVICE_NEEDS_RESET); the reason goes to the machine's log.
//!
//! Locks: a device's own, then a queue's, then the transport's, then the PCI endpoint's, then the interrupt
//! controllers'. No lock is held while the host's side is called, but a device's own.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod entropy;
pub mod net;
pub mod pci;
pub mod queue;
pub mod ring;
#[cfg(test)]
pub(crate) mod testing;
pub mod transport;
pub mod vsock;

/// Feature bits that belong to no kind of device (section 6).
pub mod feature {
    /// Descriptors may refer to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Each side says at which entry it wants to be told.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows version 1, and no older draft. It implies that requests may be cut into descriptors anyhow
    /// (what drafts called ANY_LAYOUT).
    pub const VERSION_1: u64 = 1 << 32;
    /// The packed ring.
    pub const RING_PACKED: u64 = 1 << 34;
}
