//! Devices write code that virtual processors have executed, as a disk does that reads a program into the page cache.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use bivisor_dbt::SoftwareEngine;
use bivisor_machine::boot::{self, BootImage};
use bivisor_machine::dma::Dma;
use bivisor_machine::engine::{Engine, Exit, VcpuBus, VcpuSetup};
use bivisor_machine::host::Waker;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::env::Event;
use bivisor_x86::state::CpuState;

const LOAD: u32 = 0x10_0000;
/// Where the code lies that the device overwrites.
const PAGE: u64 = 0x10_1000;

/// mov eax, value; ret
fn returns(value: u8) -> [u8; 6] {
    [0xb8, value, 0, 0, 0, 0xc3]
}

/// Calls the page often, tells what it returned by port 80h, calls it again and tells again.
const TELL_TWICE: &[u8] = &[
    0xbc, 0x00, 0x00, 0x20, 0x00, // mov esp, 200000h
    0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
    0xe8, 0xd1, 0x0f, 0x00, 0x00, // again: call 101000h
    0xe2, 0xf9, // loop again
    0xe6, 0x80, // out 80h, al
    0xe8, 0xc8, 0x0f, 0x00, 0x00, // call 101000h
    0xe6, 0x80, // out 80h, al
    0xf4, // hlt
];
/// Calls the page until it returns 2, or for some seconds; tells what it returned last.
const WAIT: &[u8] = &[
    0xbc, 0x00, 0x00, 0x20, 0x00, // mov esp, 200000h
    0xb9, 0x00, 0x00, 0x00, 0x20, // mov ecx, 20000000h
    0xe8, 0xd1, 0x0f, 0x00, 0x00, // again: call 101000h
    0x3c, 0x02, // cmp al, 2
    0x74, 0x02, // je end
    0xe2, 0xf5, // loop again
    0xe6, 0x80, // end: out 80h, al
    0xf4, // hlt
];

/// A device at port 80h: it notes what it is told, and at the first time writes the page.
struct Device {
    dma: Dma,
    told: Mutex<Vec<u8>>,
    writes: bool,
}

impl VcpuBus for Device {
    fn port_out(&self, _: u16, _: usize, value: u32) {
        let mut told = self.told.lock().unwrap();
        told.push(value as u8);
        if self.writes && told.len() == 1 {
            // With what stands in front, as a whole sector.
            let mut sector = [0x90; 512];
            sector[506..].copy_from_slice(&returns(2));
            self.dma.store_bytes(PAGE - 506, &sector);
        }
    }
    fn mmio_read(&self, _: u64, _: usize) -> u64 {
        u64::MAX
    }
    fn mmio_write(&self, _: u64, _: usize, _: u64) {}
    fn port_in(&self, _: u16, _: usize) -> u32 {
        u32::MAX
    }
    fn has_event(&self) -> bool {
        false
    }
    fn set_observer(&self, _: Arc<dyn Waker>) {}
    fn take_event(&self, _: bool, _: bool) -> Option<Event> {
        None
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _: u32, _: u64) -> bool {
        false
    }
    fn on_init(&self) {}
    fn tsc_offset(&self) -> u64 {
        0
    }
    fn set_tsc(&self, _: u64) {}
    fn hypercall(&self, _: &CpuState) -> Option<u64> {
        None
    }
}

/// A Multiboot kernel of this code, in flat 32-bit mode.
fn kernel(code: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const ADDRESSES: u32 = 1 << 16;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES);
    let header = [MAGIC, ADDRESSES, checksum, LOAD, LOAD, 0, 0, LOAD + 32];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(code);
    bytes
}

struct Guest {
    engine: SoftwareEngine,
    memory: Arc<GuestMemory>,
    state: CpuState,
    model: Arc<CpuModel>,
}

impl Guest {
    fn new(engine: SoftwareEngine, code: &[u8]) -> Self {
        let memory = Arc::new(GuestMemory::on_heap(4 << 20));
        let kernel = kernel(code);
        let image =
            BootImage { kernel: &kernel, name: "kernel", initrd: None, command_line: "", unpack: true };
        let state = boot::load(&image, &memory, 0).unwrap().state;
        memory.write(PAGE, &returns(1)).unwrap();
        Self { engine, memory, state, model: Arc::new(CpuModel::reference(2)) }
    }

    /// Runs a virtual processor until it halts; what it told.
    fn run(&self, index: u32, writes: bool) -> Vec<u8> {
        let dma = Dma::new(self.memory.clone());
        let device = Arc::new(Device { dma, told: Mutex::default(), writes });
        let (memory, model) = (self.memory.clone(), self.model.clone());
        let setup = VcpuSetup { memory, bus: device.clone(), model };
        let mut vcpu = self.engine.create_vcpu(index, setup).unwrap();
        vcpu.set_state(&self.state).unwrap();
        while vcpu.run().unwrap() != Exit::Halt {}
        device.told.lock().unwrap().clone()
    }
}

fn engines() -> [SoftwareEngine; 3] {
    [
        SoftwareEngine::interpreter(),
        SoftwareEngine::translator(),
        SoftwareEngine::translator().with_hot_code(),
    ]
}

#[test]
fn what_a_device_wrote_at_a_processors_order_is_what_it_executes_next() {
    for engine in engines() {
        assert_eq!(Guest::new(engine, TELL_TWICE).run(0, true), [1, 2]);
    }
}

#[test]
fn what_a_device_writes_while_it_is_executed_is_soon_executed() {
    for engine in engines() {
        let guest = Guest::new(engine, WAIT);
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(guest.run(0, false), [2]);
                ended.store(true, Ordering::SeqCst);
            });
            thread::sleep(Duration::from_millis(100));
            assert!(!ended.load(Ordering::SeqCst));
            Dma::new(guest.memory.clone()).store_bytes(PAGE, &returns(2));
        });
    }
}
