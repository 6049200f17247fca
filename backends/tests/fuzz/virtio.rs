//! Virtio devices under a driver that keeps to no rule: registers, configuration space, rings of both formats, requests.
//! Nothing panics or hangs, and a device that is reset then serves a driver that keeps to them.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bivisor_backends::disk::{self, DiskSpec};
use bivisor_backends::vsock::VsockSockets;
use bivisor_machine::block::BlockStore;
use bivisor_machine::engine::VcpuBus;
use bivisor_machine::host::{Alarm, ByteStream, Clock, EventSink, MachineEvent, Nanos};
use bivisor_machine::machine::{HostParts, Machine, MachineConfig};
use bivisor_machine::map::{ECAM_BASE, PCI_MEMORY_START};
use bivisor_machine::memory::GuestMemory;
use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use bivisor_machine::virtio::balloon::{Balloon, MemoryHost};
use bivisor_machine::virtio::block::Block;
use bivisor_machine::virtio::console::Console;
use bivisor_machine::virtio::device::VirtioDevice;
use bivisor_machine::virtio::entropy::{Entropy, EntropySource};
use bivisor_machine::virtio::feature::{EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1};
use bivisor_machine::virtio::net::Net;
use bivisor_machine::virtio::pci::BAR_SIZE;
use bivisor_machine::virtio::transport::register;
use bivisor_machine::virtio::vsock::Vsock;
use bivisor_x86::cpuid::CpuModel;
use fastrand::Rng;

use crate::budget::rounds;

const RAM: usize = 16 << 20;
/// Rings and buffers of a queue: descriptors, what the driver writes, what the device writes, buffers.
const REGION: u64 = 64 << 10;
const REGIONS: u64 = 2 << 20;
const DRIVER: u64 = 0x4000;
const DEVICE: u64 = 0x6000;
const BUFFERS: u64 = 0x8000;
/// Queues of a device that are used here.
const QUEUES: u16 = 4;
/// Entries of a queue.
const SIZES: [u16; 5] = [1, 2, 8, 64, 256];

/// Slots of the devices; the console and the source of entropy have those between.
const BLOCK: u64 = 1;
const NET: u64 = 2;
const VSOCK: u64 = 4;
const BALLOON: u64 = 6;

struct Host;

impl Clock for Host {
    fn now(&self) -> Nanos {
        1
    }
    fn wall_seconds(&self) -> u64 {
        1
    }
    fn tsc(&self) -> u64 {
        1
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
}

impl Alarm for Host {
    fn set(&self, _: Option<Nanos>) {}
}

impl EventSink for Host {
    fn event(&self, _: MachineEvent) {}
    fn log(&self, _: std::fmt::Arguments<'_>) {}
}

impl ByteStream for Host {
    fn write(&self, _: &[u8]) {}
}

impl EntropySource for Host {
    fn fill(&self, to: &mut [u8]) -> usize {
        to.fill(7);
        to.len()
    }
}

/// What the balloon gives back must lie in RAM.
struct Pages;

impl MemoryHost for Pages {
    fn discard(&self, offset: u64, length: u64) {
        assert!(offset.checked_add(length).is_some_and(|end| end <= RAM as u64), "{offset:x} {length:x}");
    }
}

/// A network that sends nothing on.
#[derive(Default)]
struct Port(Mutex<Option<Arc<dyn PacketReceiver>>>);

impl PacketPort for Port {
    fn features(&self) -> PortFeatures {
        PortFeatures { checksum: true, segments: true, gives_partial_checksums: true, gives_segments: true }
    }
    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, _: PortFeatures) {
        *self.0.lock().unwrap() = receiver;
    }
    fn send(&self, frame: &[u8], _: &Offload) {
        std::hint::black_box(frame);
    }
}

/// Where the driver believes a queue to be.
#[derive(Clone, Copy)]
struct Queue {
    size: u16,
    packed: bool,
    /// The next entry of a packed ring, and its wrap counter; or the split ring's index.
    next: u16,
    wrap: bool,
}

struct Rig {
    machine: Arc<Machine>,
    bus: Arc<dyn VcpuBus>,
    memory: Arc<GuestMemory>,
    console: Arc<Console>,
    balloon: Arc<Balloon>,
    port: Arc<Port>,
    sockets: PathBuf,
    queues: Vec<[Option<Queue>; QUEUES as usize]>,
    clients: Vec<UnixStream>,
}

fn rig(folder: &Path) -> Rig {
    let disk = folder.join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let store: Arc<dyn BlockStore> = disk::open(&DiskSpec::new(&disk), Arc::new(|_| {})).unwrap();
    let sockets = folder.join("vsock");
    let vsock = Arc::new(VsockSockets::open(&sockets).unwrap());
    let port = Arc::new(Port::default());
    let host = Arc::new(Host);
    let (console, balloon) = (Console::new(host.clone()), Balloon::new(Arc::new(Pages)));
    // In the order of the slots.
    let devices: Vec<Arc<dyn VirtioDevice>> = vec![
        Block::new(store, "fuzz", 2),
        Net::new(port.clone(), [2, 0, 0, 0, 0, 1], Some(1500)),
        console.clone(),
        Vsock::new(3, vsock),
        Entropy::new(host.clone()),
        balloon.clone(),
    ];
    let memory = Arc::new(GuestMemory::on_heap(RAM));
    let model = CpuModel::from_host(|_, _| [0; 4], 1, 1_000_000_000);
    let machine = Machine::new(
        MachineConfig { cpus: 1, testdev: false, packed_rings: true, pv: false },
        memory.clone(),
        Arc::new(model),
        HostParts { clock: host.clone(), alarm: host.clone(), events: host.clone(), console: host, devices },
    )
    .unwrap();
    machine.start().unwrap();
    let bus = machine.vcpu_setup(0).unwrap().bus;
    let queues = vec![[None; QUEUES as usize]; BALLOON as usize + 1];
    Rig { machine, bus, memory, console, balloon, port, sockets, queues, clients: Vec::new() }
}

fn region(slot: u64, queue: u16) -> u64 {
    REGIONS + (slot * u64::from(QUEUES) + u64::from(queue)) * REGION
}

fn config(slot: u64, offset: u64) -> u64 {
    ECAM_BASE + (slot << 15) + offset
}

fn bar(slot: u64) -> u64 {
    PCI_MEMORY_START + slot * BAR_SIZE
}

impl Rig {
    fn common(&self, slot: u64, register: u64, size: usize, value: u64) {
        self.bus.mmio_write(bar(slot) + register, size, value);
    }

    fn notify(&self, slot: u64, queue: u16) {
        self.bus.mmio_write(bar(slot) + 0x3000 + u64::from(queue) * 4, 2, queue.into());
    }

    /// Sets a device up as a driver does. Whether it is ready.
    fn set_up(&mut self, slot: u64, features: u64, size: u16) -> bool {
        self.bus.mmio_write(config(slot, 0x10), 4, bar(slot));
        self.bus.mmio_write(config(slot, 0x14), 4, 0);
        self.bus.mmio_write(config(slot, 0x04), 2, 6);
        self.common(slot, register::STATUS, 1, 0);
        for status in [1, 3] {
            self.common(slot, register::STATUS, 1, status);
        }
        let mut accepted = 0;
        for half in 0..2 {
            self.common(slot, register::DEVICE_FEATURE_SELECT, 4, half);
            let offered = self.bus.mmio_read(bar(slot) + register::DEVICE_FEATURE, 4) & 0xffff_ffff;
            accepted |= (offered << (32 * half)) & features;
            self.common(slot, register::DRIVER_FEATURE_SELECT, 4, half);
            self.common(slot, register::DRIVER_FEATURE, 4, accepted >> (32 * half) & 0xffff_ffff);
        }
        self.common(slot, register::STATUS, 1, 11);
        let packed = accepted & RING_PACKED != 0;
        for queue in 0..QUEUES {
            let at = region(slot, queue);
            self.memory.fill(at, REGION, 0).unwrap();
            self.common(slot, register::QUEUE_SELECT, 2, queue.into());
            self.common(slot, register::QUEUE_SIZE, 2, size.into());
            for (index, address) in [at, at + DRIVER, at + DEVICE].into_iter().enumerate() {
                let low = register::QUEUE_ADDRESSES + 8 * index as u64;
                self.common(slot, low, 4, address);
                self.common(slot, low + 4, 4, 0);
            }
            self.common(slot, register::QUEUE_ENABLE, 2, 1);
            self.queues[slot as usize][usize::from(queue)] =
                Some(Queue { size, packed, next: 0, wrap: true });
        }
        self.common(slot, register::STATUS, 1, 15);
        self.bus.mmio_read(bar(slot) + register::STATUS, 1) & 0xff == 15
    }

    /// Offers a chain of pieces: address, length, flags.
    fn offer(&mut self, slot: u64, queue: u16, pieces: &[(u64, u32, u16)], random: &mut Rng) {
        let at = region(slot, queue);
        let Some(mut state) = self.queues[slot as usize][usize::from(queue)] else { return };
        let mut head = 0;
        for (index, &(address, length, flags)) in pieces.iter().enumerate() {
            let more = u16::from(index + 1 < pieces.len());
            let (place, flags, last) = if state.packed {
                let available = if state.wrap { 1 << 7 } else { 1 << 15 };
                let place = state.next;
                state.next += 1;
                if state.next >= state.size {
                    (state.next, state.wrap) = (0, !state.wrap);
                }
                (place, flags | available | more, place)
            } else {
                let place = state.next.wrapping_add(index as u16) % state.size;
                (place, flags | more, (place + 1) % state.size)
            };
            head = if index == 0 { place } else { head };
            let entry = at + 16 * u64::from(place);
            self.memory.store64(entry, address);
            self.memory.store32(entry + 8, length);
            let (first, second) = if state.packed { (place, flags) } else { (flags, last) };
            self.memory.store16(entry + 12, first);
            self.memory.store16(entry + 14, second);
        }
        if !state.packed {
            self.memory.store16(at + DRIVER + 4 + 2 * u64::from(state.next % state.size), head);
            let jump = if random.u8(..32) == 0 { random.u16(..) } else { 1 };
            state.next = state.next.wrapping_add(jump);
            self.memory.store16(at + DRIVER + 2, state.next);
        }
        self.queues[slot as usize][usize::from(queue)] = Some(state);
    }

    /// A request that the device of this slot might be given, and some that it should not.
    fn request(&mut self, random: &mut Rng) {
        let slot = random.u64(BLOCK..=BALLOON);
        let queue = random.u16(..QUEUES);
        let base = region(slot, queue) + BUFFERS;
        let header = self.header(slot, base, random);
        let mut pieces = vec![(base, header, 0)];
        for piece in 1..random.u64(1..6) {
            let length = [1, 12, 512, 4096, 1526, 0x7000][random.usize(..6)];
            pieces.push((base + piece * 0x1000, length, random.u16(..2) * 2));
        }
        if slot == BLOCK || random.bool() {
            pieces.push((base + 0x7000, 1, 2));
        }
        for piece in &mut pieces {
            match random.u8(..40) {
                0 => piece.0 = random.u64(..),
                1 => piece.0 = RAM as u64 - random.u64(..0x2000),
                2 => piece.1 = [0, u32::MAX, 1 << 31, RAM as u32][random.usize(..4)],
                3 => piece.2 = random.u16(..),
                // A table of descriptors: what lies there.
                4 => (piece.1, piece.2) = (16 * random.u32(..9), 4),
                _ => {}
            }
        }
        if random.u8(..8) == 0 {
            random.shuffle(&mut pieces);
        }
        self.offer(slot, queue, &pieces, random);
        if random.u8(..4) != 0 {
            self.notify(slot, queue);
        }
    }

    /// Writes what a request begins with; returns its length.
    fn header(&self, slot: u64, at: u64, random: &mut Rng) -> u32 {
        let hostile = random.u8(..8) == 0;
        let wild = random.u64(..);
        match slot {
            BLOCK => {
                let kinds = [0, 1, 4, 8, 11, 13, 5, 99];
                self.memory.store32(at, kinds[random.usize(..8)]);
                self.memory.store64(at + 8, if hostile { wild } else { random.u64(..2100) });
                16
            }
            VSOCK => {
                // Source and destination, ports, length, kind, operation, flags, buffer, count.
                for (offset, value) in [(0, 3), (8, 2), (28, 1)] {
                    self.memory.store64(at + offset, if hostile { wild } else { value });
                }
                self.memory.store32(at + 16, random.u32(1..4));
                self.memory.store32(at + 20, 1024 + random.u32(..3));
                self.memory.store32(at + 24, if hostile { wild as u32 } else { random.u32(..5000) });
                self.memory.store16(at + 28, 1);
                self.memory.store16(at + 30, random.u16(..9));
                self.memory.store32(at + 36, if hostile { wild as u32 } else { 65536 });
                self.memory.store32(at + 40, random.u32(..4) * 1000);
                44
            }
            NET => {
                let flags = random.u64(..4) | random.u64(..6) << 8 | 54 << 16 | 1448 << 32 | 34 << 48;
                self.memory.store64(at, if hostile { wild } else { flags });
                self.memory.store32(at + 8, if hostile { wild as u32 } else { 16 });
                12
            }
            BALLOON => {
                for index in 0..8 {
                    self.memory
                        .store32(at + 4 * index, if hostile { wild as u32 } else { random.u32(..5000) });
                }
                32
            }
            _ => random.u32(1..5000),
        }
    }

    /// What the host's side has for the guest.
    fn host(&mut self, random: &mut Rng) {
        match random.u8(..5) {
            0 => {
                let receiver = self.port.0.lock().unwrap().clone();
                if let Some(receiver) = receiver {
                    receiver.receive(&vec![random.u8(..); random.usize(..9000)], &Offload::default());
                }
            }
            1 => drop(self.console.receive(&vec![b'x'; random.usize(..3000)])),
            2 => self.balloon.set_target(random.u32(..)),
            3 if self.clients.len() < 8 => {
                if let Ok(mut client) = UnixStream::connect(&self.sockets) {
                    let _ = client.set_nonblocking(true);
                    let _ = write!(client, "CONNECT {}\nsome bytes for the guest", random.u32(1..4));
                    self.clients.push(client);
                }
            }
            _ => {
                if !self.clients.is_empty() {
                    let index = random.usize(..self.clients.len());
                    drop(self.clients.swap_remove(index));
                }
            }
        }
    }

    /// Accesses registers: BAR, configuration space, ECAM and ports.
    fn registers(&mut self, random: &mut Rng) {
        let slot = random.u64(BLOCK..=BALLOON);
        let value = if random.bool() { random.u64(..) } else { random.u64(..16) };
        let size = 1 << random.u8(..4);
        match random.u8(..10) {
            0 => self.bus.mmio_write(bar(slot) + random.u64(..BAR_SIZE), size, value),
            1 => drop(self.bus.mmio_read(bar(slot) + random.u64(..BAR_SIZE), size)),
            2 => self.common(slot, random.u64(..register::END), size, value),
            // MSI-X entries.
            3 => self.bus.mmio_write(bar(slot) + 0x4000 + random.u64(..64), size, value),
            4 => self.bus.mmio_write(config(slot, random.u64(..256)), 1 << random.u8(..3), value),
            5 => drop(self.bus.mmio_read(config(slot, random.u64(..4096)), size)),
            6 => {
                self.bus.port_out(0xcf8, 4, 0x8000_0000 | (slot as u32) << 11 | random.u32(..64) << 2);
                self.bus.port_out(0xcfc + random.u16(..4), 1 << random.u8(..3), value as u32);
            }
            7 => self.bus.mmio_write(bar(slot) + 0x2000 + random.u64(..64), size, value),
            8 => self.notify(slot, random.u16(..QUEUES)),
            _ => self.common(slot, register::STATUS, 1, [0, 1, 3, 11, 15, 128][random.usize(..6)]),
        }
    }

    /// Writes into rings and buffers.
    fn scribble(&self, random: &mut Rng) {
        let at = region(random.u64(BLOCK..=BALLOON), random.u16(..QUEUES));
        let place = match random.u8(..4) {
            0 => at + DRIVER + random.u64(..16),
            1 => at + DEVICE + random.u64(..16),
            2 => at + random.u64(..128),
            _ => at + random.u64(..REGION - 8),
        };
        self.memory.store64(place, if random.bool() { random.u64(..) } else { random.u64(..4) });
    }

    /// A disk that is reset and set up by the rules reads a sector.
    fn serves(&mut self, features: u64, random: &mut Rng) {
        // Another function may have been moved to where the disk's registers are.
        for slot in BLOCK..=BALLOON {
            self.bus.mmio_write(config(slot, 0x04), 2, 0);
        }
        assert!(self.set_up(BLOCK, features | VERSION_1, 8), "the disk is not ready after a reset");
        let base = region(BLOCK, 0) + BUFFERS;
        self.memory.store32(base, 0);
        self.memory.store64(base + 8, 3);
        self.memory.store8(base + 0x7000, 0xff);
        self.offer(BLOCK, 0, &[(base, 16, 0), (base + 0x1000, 512, 2), (base + 0x7000, 1, 2)], random);
        self.memory.store16(region(BLOCK, 0) + DRIVER + 2, 1);
        self.notify(BLOCK, 0);
        let start = Instant::now();
        while self.memory.load8(base + 0x7000) != 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "the disk doesn't answer after a reset");
            std::thread::yield_now();
        }
    }
}

fn features(random: &mut Rng) -> u64 {
    let mut features = VERSION_1 | random.u64(..) & (random.u64(..) | 0xffff);
    for feature in [INDIRECT_DESC, EVENT_IDX, RING_PACKED] {
        features = if random.bool() { features | feature } else { features & !feature };
    }
    features
}

#[test]
fn fuzz_virtio_devices() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = rig(folder.path());
    rounds("virtio", |random| {
        let features = features(random);
        for slot in BLOCK..=BALLOON {
            rig.set_up(slot, features, SIZES[random.usize(..SIZES.len())]);
        }
        for _ in 0..400 {
            match random.u8(..16) {
                0..8 => rig.request(random),
                8..10 => rig.host(random),
                10..12 => rig.scribble(random),
                12 => {
                    let slot = random.u64(BLOCK..=BALLOON);
                    rig.set_up(slot, features, SIZES[random.usize(..SIZES.len())]);
                }
                _ => rig.registers(random),
            }
        }
        match random.u8(..8) {
            0 => rig.machine.drain(),
            1 => {
                let saved = rig.machine.save();
                if let Err(error) = rig.machine.restore(&saved) {
                    panic!("what was saved does not come back ({error}): {saved:?}");
                }
            }
            _ => {}
        }
        rig.serves(features & (INDIRECT_DESC | EVENT_IDX), random);
    });
    rig.machine.stop_devices();
}
