//! What a machine's devices are backed by, from the program's start to its end: they outlive a reset of the machine.

use std::sync::Arc;

use bivisor_backends::disk;
use bivisor_backends::terminal::message;
use bivisor_machine::block::BlockStore;
use bivisor_machine::virtio::block::Block;
use bivisor_machine::virtio::device::VirtioDevice;

use crate::config::VmConfig;
use crate::error::Failure;
use crate::guest::Guest;

/// An opened disk.
struct Disk {
    store: Arc<dyn BlockStore>,
    serial: String,
}

/// Everything that was opened for a machine.
pub struct Backends {
    disks: Vec<Disk>,
}

impl Backends {
    /// Opens the guest's own disks and what the configuration names.
    ///
    /// # Errors
    /// In a sentence each: a disk that can't be opened, or is in use.
    pub fn open(config: &VmConfig, guest: &Guest) -> Result<Self, Failure> {
        let disks = guest.disks.iter().chain(&config.disks).map(|spec| {
            let mut spec = spec.clone();
            spec.snapshot |= config.snapshot && !spec.read_only;
            let path = spec.path.display().to_string();
            let events = Arc::new(move |event| message(&format!("bivisor: disk {path}: {event}\n")));
            let store = disk::open(&spec, events).map_err(Failure::configuration)?;
            Ok(Disk { store, serial: spec.serial.clone() })
        });
        Ok(Self { disks: disks.collect::<Result<_, Failure>>()? })
    }

    /// New devices for a machine with so many processors, in the order of their slots.
    pub fn devices(&self, cpus: u32) -> Vec<Arc<dyn VirtioDevice>> {
        // More processors than queues share them.
        let queues = u16::try_from(cpus).unwrap_or(u16::MAX);
        let disk =
            |disk: &Disk| Block::new(disk.store.clone(), &disk.serial, queues) as Arc<dyn VirtioDevice>;
        self.disks.iter().map(disk).collect()
    }
}
