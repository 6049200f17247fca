//! What a machine's devices are backed by, from the program's start to its end: they outlive a reset of the machine.

use std::sync::Arc;

use bivisor_backends::console::{Console, ConsoleEvent, InputSink};
use bivisor_backends::disk;
use bivisor_backends::terminal::message;
use bivisor_backends::vsock::VsockSockets;
use bivisor_machine::block::BlockStore;
use bivisor_machine::memory::GuestMemory;
use bivisor_machine::packet::PacketPort;
use bivisor_machine::virtio::balloon::Balloon;
use bivisor_machine::virtio::block::Block;
use bivisor_machine::virtio::console::Console as VirtioConsole;
use bivisor_machine::virtio::device::VirtioDevice;
use bivisor_machine::virtio::entropy::{Entropy, EntropySource};
use bivisor_machine::virtio::net::Net;
use bivisor_machine::virtio::vsock::Vsock;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::config::VmConfig;
use crate::error::Failure;
use crate::guest::Guest;
use crate::host::memory::Returned;
use crate::vm::counters::{CountedPort, CountedStore, Traffic};

/// The guest's context ID at its socket device, which only it sees.
const GUEST_CID: u32 = 3;

/// An opened disk.
struct Disk {
    store: Arc<dyn BlockStore>,
    traffic: Arc<Traffic>,
    serial: String,
}

/// An opened network interface.
struct Interface {
    port: Arc<dyn PacketPort>,
    traffic: Arc<Traffic>,
    mac: [u8; 6],
    mtu: Option<u16>,
}

/// Everything that was opened for a machine.
pub struct Backends {
    disks: Vec<Disk>,
    interfaces: Vec<Interface>,
    console: Option<Console>,
    sockets: Option<Arc<VsockSockets>>,
    rng: bool,
    balloon: bool,
}

/// The host system's randomness.
struct HostRandom;

impl EntropySource for HostRandom {
    fn fill(&self, to: &mut [u8]) -> usize {
        getrandom(to, GetRandomFlags::empty()).unwrap_or(0)
    }
}

/// The guest's end of the virtio console.
struct ConsoleInput(Arc<VirtioConsole>);

impl InputSink for ConsoleInput {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.0.receive(bytes)
    }
}

/// An Ethernet address of no maker's (the second bit of the first byte), for one interface.
fn random_mac() -> [u8; 6] {
    let mut mac = [0; 6];
    HostRandom.fill(&mut mac);
    mac[0] = mac[0] & !0b11 | 0b10;
    mac
}

impl Backends {
    /// Opens the guest's own disks and what the configuration names.
    ///
    /// # Errors
    /// In a sentence each: a disk that can't be opened, or is in use; a port that is taken.
    pub fn open(config: &VmConfig, guest: &Guest) -> Result<Self, Failure> {
        let disks = guest.disks.iter().chain(&config.disks).map(|spec| {
            let mut spec = spec.clone();
            spec.snapshot |= config.snapshot && !spec.read_only;
            let path = spec.path.display().to_string();
            let events = Arc::new(move |event| message(&format!("bivisor: disk {path}: {event}\n")));
            let inner = disk::open(&spec, events).map_err(Failure::configuration)?;
            let traffic = Arc::<Traffic>::default();
            let store = Arc::new(CountedStore { inner, traffic: traffic.clone() });
            Ok(Disk { store, traffic, serial: spec.serial.clone() })
        });
        let interfaces = config.nets.iter().map(|spec| {
            let inner = spec.open().map_err(Failure::configuration)?;
            let traffic = Arc::<Traffic>::default();
            let port = Arc::new(CountedPort { inner, traffic: traffic.clone() });
            Ok(Interface { port, traffic, mac: spec.mac.unwrap_or_else(random_mac), mtu: spec.mtu() })
        });
        let lost = Arc::new(|event| {
            if let ConsoleEvent::Lost(error) = event {
                message(&format!("bivisor: the virtio console is gone: {error}\n"));
            }
        });
        let console = config.virtio_console.as_ref().map(|spec| Console::open(spec, lost));
        let sockets = config.vsock.as_ref().map(|path| VsockSockets::open(path).map(Arc::new));
        Ok(Self {
            disks: disks.collect::<Result<_, Failure>>()?,
            interfaces: interfaces.collect::<Result<_, Failure>>()?,
            console: console.transpose().map_err(Failure::host)?,
            sockets: sockets.transpose().map_err(Failure::host)?,
            rng: config.rng,
            balloon: config.balloon,
        })
    }

    /// Where the virtio console is, if a user must know it.
    pub fn console_address(&self) -> Option<&str> {
        self.console.as_ref()?.address()
    }

    /// What goes through disks and network interfaces.
    pub fn traffic(&self) -> (Vec<Arc<Traffic>>, Vec<Arc<Traffic>>) {
        let disks = self.disks.iter().map(|disk| disk.traffic.clone());
        let interfaces = self.interfaces.iter().map(|interface| interface.traffic.clone());
        (disks.collect(), interfaces.collect())
    }

    /// New devices for a machine with so many processors, in the order of their slots.
    pub fn devices(&self, cpus: u32, memory: &Arc<GuestMemory>) -> Vec<Arc<dyn VirtioDevice>> {
        let mut devices: Vec<Arc<dyn VirtioDevice>> = Vec::new();
        for Disk { store, serial, .. } in &self.disks {
            // More processors than queues share them.
            devices.push(Block::new(store.clone(), serial, u16::try_from(cpus).unwrap_or(u16::MAX)));
        }
        for Interface { port, mac, mtu, .. } in &self.interfaces {
            devices.push(Net::new(port.clone(), *mac, *mtu));
        }
        if let Some(console) = &self.console {
            let device = VirtioConsole::new(console.line());
            console.input().connect(Arc::new(ConsoleInput(device.clone())));
            devices.push(device);
        }
        if let Some(sockets) = &self.sockets {
            devices.push(Vsock::new(GUEST_CID, sockets.clone()));
        }
        if self.rng {
            devices.push(Entropy::new(Arc::new(HostRandom)));
        }
        if self.balloon {
            devices.push(Balloon::new(Arc::new(Returned(memory.clone()))));
        }
        devices
    }

    /// Lets the devices go that [`Self::devices`] has made, when their machine has ended.
    pub fn disconnect(&self) {
        if let Some(console) = &self.console {
            console.input().disconnect();
        }
    }
}
