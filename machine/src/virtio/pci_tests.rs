//! A virtio function as a guest's PCI and virtio drivers use it: configuration space, BAR, interrupts, reset, saving.

use alloc::string::String;
use alloc::vec;

use bivisor_x86::env::Event;

use super::super::console::Console;
use super::super::feature::{EVENT_IDX, VERSION_1};
use super::super::testing::{Bench, Driver};
use super::super::transport::register::*;
use super::super::transport::status;
use super::*;
use crate::devices::testing::{Host, Time};
use crate::irq::VcpuApic;
use crate::memory::GuestMemory;
use crate::timer::TimerHub;

const BAR: u64 = 0xc001_0000;
const VECTOR: u32 = 0x51;
const COMMAND: usize = 0x04;
const MSIX_ENABLE: u32 = 1 << 15;

struct Machine {
    function: Arc<VirtioFunction>,
    console: Arc<Console>,
    mmio: Arc<MmioMap>,
    host: Arc<Host>,
    cpu: VcpuApic,
    memory: Arc<GuestMemory>,
}

/// A console at a pin of the I/O APIC, and a processor.
fn machine_with(memory: Arc<GuestMemory>) -> Machine {
    let (host, time) = (Host::new(), Time::new());
    let interrupts = Interrupts::new(1, 40, &(time.clone() as Arc<_>), &TimerHub::new(host.clone()));
    let cpu = interrupts.vcpu(0).unwrap();
    assert!(cpu.mmio_write(0xfee0_00f0, 4, 0x1ff));
    let mmio = Arc::new(MmioMap::new());
    let console = Console::new(host.clone());
    let function = VirtioFunction::new(
        console.clone(),
        FunctionParts {
            dma: Dma::new(memory.clone()),
            mmio: mmio.clone(),
            wire: interrupts.line(17),
            interrupts,
            bar_address: BAR,
            log: GuestLog::new(host.clone(), time),
            slot: 1,
            packed: true,
        },
    );
    Machine { function, console, mmio, host, cpu, memory }
}

fn machine() -> (Machine, Bench) {
    let bench = Bench::new(EVENT_IDX);
    (machine_with(bench.memory.clone()), bench)
}

impl Machine {
    fn config(&self, offset: usize, size: usize) -> u32 {
        self.function.config_read(offset, size)
    }
    fn set_config(&self, offset: usize, size: usize, value: u32) {
        self.function.config_write(offset, size, value);
    }
    fn enable(&self) {
        self.set_config(COMMAND, 2, 6);
    }
    /// Offsets of all capabilities of an ID.
    fn capabilities(&self, id: u32) -> Vec<usize> {
        let mut found = Vec::new();
        let mut at = self.config(0x34, 1) as usize;
        while at != 0 && found.len() < 20 {
            if self.config(at, 1) == id {
                found.push(at);
            }
            at = self.config(at + 1, 1) as usize;
        }
        found
    }
    fn common(&self, offset: u64, size: usize) -> u64 {
        self.mmio.read(BAR + offset, size)
    }
    fn set_common(&self, offset: u64, size: usize, value: u64) {
        self.mmio.write(BAR + offset, size, value);
    }
    /// Masks nothing, and sends vector [`VECTOR`] and up by messages.
    fn use_messages(&self) {
        let control = self.capabilities(0x11)[0] + 2;
        self.set_config(control, 2, MSIX_ENABLE);
        for vector in 0..3 {
            let at = BAR + TABLE + 16 * vector;
            self.mmio.write(at, 8, 0xfee0_0000);
            self.mmio.write(at + 8, 8, u64::from(VECTOR) + vector);
        }
        self.set_common(CONFIG_VECTOR, 2, 0);
    }
    /// What a driver does up to DRIVER_OK, with the layouts of its queues.
    fn start(&self, layouts: &[&Driver]) {
        self.set_common(STATUS, 1, 3);
        for (half, features) in [(0, EVENT_IDX), (1, VERSION_1 >> 32)] {
            self.set_common(DRIVER_FEATURE_SELECT, 4, half);
            self.set_common(DRIVER_FEATURE, 4, features);
        }
        self.set_common(STATUS, 1, 11);
        assert_eq!(self.common(STATUS, 1), 11);
        for (driver, index) in layouts.iter().zip(0..) {
            let layout = &driver.layout;
            self.set_common(QUEUE_SELECT, 2, index);
            self.set_common(QUEUE_SIZE, 2, layout.size.into());
            self.set_common(QUEUE_VECTOR, 2, index + 1);
            for (address, at) in [layout.descriptors, layout.driver, layout.device].into_iter().zip(0..) {
                self.set_common(QUEUE_ADDRESSES + 8 * at, 8, address);
            }
            self.set_common(QUEUE_ENABLE, 2, 1);
        }
        self.set_common(STATUS, 1, 15);
    }
    fn notify(&self, queue: u64) {
        self.mmio.write(BAR + NOTIFY + 4 * queue, 2, queue);
    }
    fn interrupt(&self) -> Option<Event> {
        let event = self.cpu.take_event(true, false);
        self.cpu.mmio_write(0xfee0_00b0, 4, 0);
        event
    }
}

fn vector(number: u32) -> Option<Event> {
    Some(Event::Interrupt((VECTOR + number) as u8))
}

#[test]
fn configuration_space_tells_what_it_is_and_where() {
    let (m, _) = machine();
    assert_eq!((m.config(0, 4), m.config(8, 4)), (0x1043_1af4, 0x0780_0001));
    assert_eq!((m.config(0x2c, 4), m.config(0x3d, 1)), (0x1100_1af4, 1));
    // Sizing, with decoding off.
    assert_eq!((m.config(0x10, 4), m.config(0x14, 4)), (BAR as u32 | 4, 0));
    m.set_config(0x10, 4, u32::MAX);
    m.set_config(0x14, 4, u32::MAX);
    assert_eq!((m.config(0x10, 4), m.config(0x14, 4)), (0xffff_8004, u32::MAX));
    m.set_config(0x18, 4, u32::MAX);
    m.set_config(0x30, 4, u32::MAX);
    assert_eq!((m.config(0x18, 4), m.config(0x30, 4)), (0, 0));
    let structures: Vec<_> = m
        .capabilities(9)
        .iter()
        .map(|&at| (m.config(at + 3, 1), m.config(at + 4, 1), m.config(at + 8, 4), m.config(at + 12, 4)))
        .collect();
    assert_eq!(
        structures,
        [(1, 0, 0, 56), (2, 0, 0x3000, 8), (3, 0, 0x1000, 1), (4, 0, 0x2000, 0x1000), (5, 0, 0, 0)]
    );
    let msix = m.capabilities(0x11)[0];
    assert_eq!((m.config(msix + 2, 2), m.config(msix + 4, 4), m.config(msix + 8, 4)), (2, 0x4000, 0x6000));
    assert_eq!(m.config(m.capabilities(9)[1] + 16, 4), 4);
}

#[test]
fn the_bar_answers_where_the_guest_puts_it_and_only_when_enabled() {
    let (m, _) = machine();
    assert_eq!(m.common(NUM_QUEUES, 2), 0xffff);
    m.enable();
    assert_eq!(m.common(NUM_QUEUES, 2), 2);
    let elsewhere = 0x41_0000_0000;
    m.set_config(0x14, 4, (elsewhere >> 32) as u32);
    m.set_config(0x10, 4, elsewhere as u32);
    assert_eq!((m.common(NUM_QUEUES, 2), m.mmio.read(elsewhere + NUM_QUEUES, 2)), (0xffff, 2));
    m.set_config(COMMAND, 2, 0);
    assert_eq!(m.mmio.read(elsewhere + NUM_QUEUES, 2), 0xffff);
    // Over another device it stays silent, until it is moved away.
    let other = machine_with(m.memory.clone());
    m.mmio.insert(BAR, 0x1000, Arc::new(Other)).unwrap();
    m.set_config(0x14, 4, 0);
    m.set_config(0x10, 4, BAR as u32);
    m.enable();
    assert_eq!(m.common(NUM_QUEUES, 2), 0x77);
    m.set_config(0x10, 4, BAR as u32 + 0x8000);
    assert_eq!(m.mmio.read(BAR + 0x8000 + NUM_QUEUES, 2), 2);
    drop(other);
}

struct Other;

impl Mmio for Other {
    fn mmio_read(&self, _: u64, _: usize) -> u64 {
        0x77
    }
    fn mmio_write(&self, _: u64, _: usize, _: u64) {}
}

#[test]
fn a_driver_sends_and_is_told_by_a_message() {
    let (m, bench) = machine();
    m.enable();
    m.use_messages();
    let (_, receive) = bench.queue(0, 8);
    let (_, mut send) = bench.queue(1, 8);
    send.offer(&[b"before it was ready"], &[]);
    m.start(&[&receive, &send]);
    assert_eq!(m.host.bytes(), b"before it was ready");
    assert_eq!((m.interrupt(), m.interrupt()), (vector(2), None));
    send.expect();
    send.offer(&[b", and after"], &[]);
    m.notify(1);
    assert_eq!(m.host.bytes(), b"before it was ready, and after");
    // The driver did not ask for an interrupt.
    assert_eq!(m.interrupt(), None);
    // A masked vector is pending.
    send.expect();
    send.ask_for_interrupt();
    m.mmio.write(BAR + TABLE + 2 * 16 + 12, 4, 1);
    send.offer(&[b"."], &[]);
    m.notify(1);
    assert_eq!((m.interrupt(), m.mmio.read(BAR + PENDING, 8)), (None, 4));
    m.mmio.write(BAR + TABLE + 2 * 16 + 12, 4, 0);
    assert_eq!((m.interrupt(), m.mmio.read(BAR + PENDING, 8)), (vector(2), 0));
    // Nothing is behind the last queue's notification.
    m.notify(2);
    m.notify(1023);
}

#[test]
fn without_messages_the_pin_interrupts_until_the_status_is_read() {
    let (m, bench) = machine();
    m.enable();
    let (_, receive) = bench.queue(0, 8);
    let (_, mut send) = bench.queue(1, 8);
    m.start(&[&receive, &send]);
    send.offer(&[b"x"], &[]);
    m.notify(1);
    assert_eq!(m.config(6, 2) & 8, 8);
    assert_eq!(m.mmio.read(BAR + ISR, 1), 1);
    assert_eq!((m.mmio.read(BAR + ISR, 1), m.config(6, 2) & 8), (0, 0));
    send.expect();
    send.ask_for_interrupt();
    send.offer(&[b"y"], &[]);
    m.set_config(COMMAND, 2, 6 | 1 << 10);
    m.notify(1);
    assert_eq!(m.config(6, 2) & 8, 8);
}

#[test]
fn configuration_space_is_a_way_to_the_registers() {
    let (m, _) = machine();
    let window = m.capabilities(9)[4];
    m.set_config(window + 8, 4, NUM_QUEUES as u32);
    m.set_config(window + 12, 4, 2);
    assert_eq!(m.config(window + 16, 4), 2);
    m.set_config(window + 8, 4, QUEUE_SELECT as u32);
    m.set_config(window + 16, 4, 1);
    m.set_config(window + 8, 4, QUEUE_NOTIFY_OFFSET as u32);
    assert_eq!(m.config(window + 16, 2), 1);
    // Another BAR, an odd length, a place outside.
    for (offset, size, value) in [(4, 1, 1), (12, 4, 3), (8, 4, 0x8000), (8, 4, 0xffff_ffff)] {
        let before = m.config(window + offset, size);
        m.set_config(window + offset, size, value);
        assert_eq!(m.config(window + 16, 4), 0);
        m.set_config(window + offset, size, before);
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let (m, bench) = machine();
    m.enable();
    m.use_messages();
    let (_, receive) = bench.queue(0, 8);
    let (_, mut send) = bench.queue(1, 8);
    m.start(&[&receive, &send]);
    send.offer_raw(&[(u64::MAX, 9, 0)]);
    m.notify(1);
    assert_eq!(m.common(STATUS, 1), 0x4f);
    assert_eq!(m.interrupt(), vector(0));
    let lines = m.host.lines();
    assert_eq!(
        lines,
        [String::from(
            "console device 00:01.0 stops: queue 1: 9 bytes at guest-physical address 0xffffffffffffffff are not all RAM"
        )]
    );
    assert_eq!(m.console.receive(b"x"), 0);
    m.set_common(STATUS, 1, 0);
    assert_eq!((m.common(STATUS, 1), m.common(QUEUE_ENABLE, 2)), (0, 0));
    let (_, mut send) = bench.queue(1, 8);
    bench.memory.fill(0x10_0000, 0x4_0000, 0).unwrap();
    m.start(&[&receive, &send]);
    send.offer(&[b"again"], &[]);
    m.notify(1);
    assert_eq!((m.host.bytes(), m.common(STATUS, 1)), (b"again".to_vec(), 15));
}

#[test]
fn a_queue_that_is_not_in_ram_stops_the_device() {
    let (m, bench) = machine();
    m.enable();
    let (_, receive) = bench.queue(0, 8);
    let (_, mut send) = bench.queue(1, 8);
    send.layout.device = 1 << 40;
    m.start(&[&receive, &send]);
    assert_eq!(m.common(STATUS, 1) as u8, 15 | status::NEEDS_RESET);
    assert!(m.host.lines()[0].contains("stops"));
    m.notify(0);
}

#[test]
fn without_bus_mastering_nothing_is_accessed() {
    let (m, bench) = machine();
    m.set_config(COMMAND, 2, 2);
    let (_, receive) = bench.queue(0, 8);
    let (_, mut send) = bench.queue(1, 8);
    m.start(&[&receive, &send]);
    send.offer(&[b"x"], &[]);
    m.notify(1);
    assert!(m.host.bytes().is_empty());
    m.enable();
    assert_eq!(m.host.bytes(), b"x");
}

#[test]
fn another_machine_goes_on_where_this_one_was_saved() {
    let (m, bench) = machine();
    m.enable();
    m.use_messages();
    let (_, mut receive) = bench.queue(0, 8);
    let (_, mut send) = bench.queue(1, 8);
    m.start(&[&receive, &send]);
    for text in [b"one", b"two"] {
        send.offer(&[text], &[]);
        m.notify(1);
        send.expect();
        send.ask_for_interrupt();
    }
    let saved = m.function.save();
    assert_eq!(m.console.receive(b"not while it is saved"), 0);
    let other = machine_with(bench.memory.clone());
    other.function.restore(&saved).unwrap();
    assert_eq!(other.function.save(), saved);
    other.function.resume();
    send.offer(&[b"three"], &[]);
    other.notify(1);
    assert_eq!((other.host.bytes(), other.interrupt()), (b"three".to_vec(), vector(2)));
    send.expect();
    receive.offer(&[], &[10]);
    assert_eq!(other.console.receive(b"in"), 2);
    assert_eq!((receive.expect().written, other.interrupt()), (2, vector(1)));

    for spoil in [
        (|saved: &mut SavedFunction| saved.transport.version += 1) as fn(&mut SavedFunction),
        |saved| saved.endpoint.msix.version += 1,
        |saved| saved.endpoint.msix.registers = crate::devices::pci::msix::Msix::new(1),
        |saved| saved.transport.registers = Transport::new(0, true, &[64], 3),
        |saved| saved.queues = vec![None],
        |saved| saved.device.version = 9,
    ] {
        let mut spoiled = saved.clone();
        spoil(&mut spoiled);
        assert!(machine_with(bench.memory.clone()).function.restore(&spoiled).is_err());
    }
}

#[test]
fn a_device_that_was_stopped_does_nothing_more() {
    let (m, bench) = machine();
    m.enable();
    let (_, mut receive) = bench.queue(0, 8);
    let (_, mut send) = bench.queue(1, 8);
    m.start(&[&receive, &send]);
    receive.offer(&[], &[9]);
    m.function.stop();
    assert_eq!((m.console.receive(b"x"), m.common(STATUS, 1)), (0, 0));
    send.offer(&[b"x"], &[]);
    m.notify(1);
    assert!(m.host.bytes().is_empty());
}
