//! The whole machine without an engine: what a processor finds at its ports and addresses, and how it lives.

use alloc::sync::Arc;
use alloc::vec::Vec;

use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::env::Event;
use bivisor_x86::state::Activity;

use super::*;
use crate::devices::testing::{Host, Time};
use crate::engine::VcpuBus;
use crate::map::ECAM_BASE;
use crate::virtio::entropy::{Entropy, EntropySource};

const MIB: usize = 1 << 20;

struct Bench {
    machine: Arc<Machine>,
    host: Arc<Host>,
    time: Arc<Time>,
    buses: Vec<Arc<dyn VcpuBus>>,
}

fn config(cpus: u32, testdev: bool) -> MachineConfig {
    MachineConfig { cpus, testdev, packed_rings: true, pv: false }
}

fn parts(host: &Arc<Host>, time: &Arc<Time>) -> HostParts {
    HostParts {
        clock: time.clone(),
        alarm: host.clone(),
        events: host.clone(),
        console: host.clone(),
        devices: Vec::new(),
    }
}

fn bench(cpus: u32, testdev: bool) -> Bench {
    let (host, time) = (Host::new(), Time::new());
    let memory = Arc::new(GuestMemory::on_heap(4 * MIB));
    let model = Arc::new(CpuModel::reference(cpus));
    let machine = Machine::new(config(cpus, testdev), memory, model, parts(&host, &time)).unwrap();
    let buses = (0..cpus).map(|i| machine.vcpu_setup(i).unwrap().bus).collect();
    Bench { machine, host, time, buses }
}

impl Bench {
    fn out(&self, port: u16, value: u8) {
        self.buses[0].port_out(port, 1, value.into());
    }
    fn input(&self, port: u16) -> u8 {
        self.buses[0].port_in(port, 1) as u8
    }
    /// Takes kicks until something else comes.
    fn event(&self, cpu: usize) -> Option<Event> {
        loop {
            match self.buses[cpu].take_event(true, true) {
                Some(Event::Kick) => {}
                other => return other,
            }
        }
    }
}

#[test]
fn impossible_machines_are_refused() {
    let new = |cpus, mib: usize| {
        let memory = Arc::new(GuestMemory::on_heap(mib * MIB));
        let model = Arc::new(CpuModel::reference(1));
        let parts = parts(&Host::new(), &Time::new());
        Machine::new(config(cpus, false), memory, model, parts).err()
    };
    assert_eq!(new(0, 4), Some(MachineError::Cpus(0)));
    assert_eq!(new(65, 4), Some(MachineError::Cpus(65)));
    assert_eq!(new(1, 1), Some(MachineError::Memory(MIB as u64)));
    assert_eq!(new(64, 2), None);
}

/// A reset on Linux makes a new machine.
#[test]
fn a_machine_that_nobody_holds_is_gone_with_its_memory() {
    struct Nothing;
    impl EntropySource for Nothing {
        fn fill(&self, _to: &mut [u8]) -> usize {
            0
        }
    }
    let (host, time) = (Host::new(), Time::new());
    let memory = Arc::new(GuestMemory::on_heap(4 * MIB));
    let device = Entropy::new(Arc::new(Nothing));
    let (left_memory, left_device) = (Arc::downgrade(&memory), Arc::downgrade(&device));
    let parts = HostParts { devices: alloc::vec![device], ..parts(&host, &time) };
    let model = Arc::new(CpuModel::reference(2));
    let machine = Machine::new(MachineConfig { pv: true, ..config(2, true) }, memory, model, parts).unwrap();
    let setup = machine.vcpu_setup(0).unwrap();
    // Its registers answer where firmware has put them.
    setup.bus.mmio_write(ECAM_BASE + (1 << 15) + 4, 2, 6);
    let bar = setup.bus.mmio_read(ECAM_BASE + (1 << 15) + 0x10, 4) & !0xf;
    assert_eq!(setup.bus.mmio_read(bar + 0x12, 2), 1, "a device of one queue");
    machine.stop();
    machine.stop_devices();
    drop((setup, machine));
    assert!(left_memory.upgrade().is_none() && left_device.upgrade().is_none());
}

#[test]
fn a_processor_sees_the_devices_of_a_pc() {
    let b = bench(1, false);
    b.out(0x3f8, b'x');
    assert_eq!(b.host.bytes(), b"x");
    // The host bridge by both ways into configuration space.
    b.buses[0].port_out(0xcf8, 4, 0x8000_0000);
    assert_eq!(b.buses[0].port_in(0xcfc, 4), 0x0008_1b36);
    assert_eq!(b.buses[0].mmio_read(ECAM_BASE, 4), 0x0008_1b36);
    assert_eq!(b.buses[0].mmio_read(ECAM_BASE + 0x1000, 4), 0xffff_ffff);
    // Local APIC and I/O APIC versions.
    assert_eq!(b.buses[0].mmio_read(0xfee0_0030, 4) & 0xff, 0x14);
    b.buses[0].mmio_write(0xfec0_0000, 4, 1);
    assert_eq!(b.buses[0].mmio_read(0xfec0_0010, 4) & 0xff, 0x20);
    // CMOS: 4 MiB are 3 MiB above the first.
    b.out(0x70, 0x18);
    assert_eq!(b.input(0x71), (3 * 1024 / 256) as u8);
    assert_eq!(b.input(0xf4), 0xff);
    assert_eq!(b.buses[0].mmio_read(0xd000_0000, 8), u64::MAX);
}

#[test]
fn each_processor_has_its_own_local_apic() {
    let b = bench(2, false);
    assert_eq!(b.buses[0].read_msr(0x1b), Some(0xfee0_0900));
    assert_eq!(b.buses[1].read_msr(0x1b), Some(0xfee0_0800));
    assert_eq!(b.buses[1].mmio_read(0xfee0_0020, 4), 1 << 24);
    assert_eq!(b.buses[0].read_msr(0x4b56_4d00), None);
    assert!(!b.buses[0].write_msr(0x4b56_4d00, 0));
    // INIT and start-up from the first to the second.
    b.buses[0].mmio_write(0xfee0_0310, 4, 1 << 24);
    b.buses[0].mmio_write(0xfee0_0300, 4, 0x4500);
    assert_eq!(b.event(1), Some(Event::Init));
    b.buses[0].mmio_write(0xfee0_0300, 4, 0x4608);
    assert_eq!(b.event(1), Some(Event::Sipi(8)));
    assert!(!b.buses[0].has_event());
}

#[test]
fn the_timer_interrupts_through_the_pic_as_firmware_leaves_it() {
    let b = bench(1, false);
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        b.out(port, value);
    }
    for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0x10)] {
        b.out(port, value);
    }
    assert!(!b.buses[0].has_event());
    b.time.advance(10_000_000);
    b.machine.expired(b.time.now());
    assert_eq!(b.event(0), Some(Event::Interrupt(0x20)));
}

#[test]
fn the_power_button_raises_the_system_control_interrupt() {
    let b = bench(1, false);
    b.out(0xa1, 0xff);
    // Pin 9 of the I/O APIC: vector 31h, level triggered, to APIC 0.
    for (register, value) in [(0x22, 0x8031), (0x23, 0)] {
        b.buses[0].mmio_write(0xfec0_0000, 4, register);
        b.buses[0].mmio_write(0xfec0_0010, 4, value);
    }
    b.buses[0].port_out(0x602, 2, 1 << 8);
    b.machine.power_button();
    assert_eq!(b.event(0), Some(Event::Interrupt(0x31)));
    b.buses[0].port_out(0x604, 2, 5 << 10 | 1 << 13);
    assert_eq!(b.host.events(), [MachineEvent::PowerOff]);
    assert_eq!(b.buses[0].take_event(false, false), Some(Event::Kick));
}

#[test]
fn test_devices_are_there_when_asked_for() {
    let b = bench(1, true);
    b.buses[0].port_out(0xf4, 4, 5);
    assert_eq!(b.host.events(), [MachineEvent::TestExit(11)]);
    b.buses[0].port_out(0xe0, 4, 0x1234_5678);
    assert_eq!(b.buses[0].port_in(0xe0, 4), 0x1234_5678);
    b.buses[0].mmio_write(0xff00_0010, 8, 7);
    assert_eq!(b.buses[0].mmio_read(0xff00_0010, 8), 7);
}

#[test]
fn time_stamp_counters_start_at_zero_and_agree() {
    let b = bench(2, false);
    for bus in &b.buses {
        assert_eq!(b.time.tsc().wrapping_add(bus.tsc_offset()), 0);
    }
}

#[test]
fn what_is_saved_is_what_another_machine_goes_on_with() {
    let a = bench(2, false);
    a.out(0x3ff, 0x5a);
    a.out(0x21, 0x12);
    a.buses[1].set_cr8(9);
    a.buses[0].port_out(0xcf8, 4, 0x8000_0008);
    a.machine.nmi();
    a.buses[0].mmio_write(0xfee0_0310, 4, 1 << 24);
    a.buses[0].mmio_write(0xfee0_0300, 4, 0x4500);
    a.machine.start().unwrap();
    a.machine.pause().unwrap();
    a.time.advance(1_000_000);
    let saved = a.machine.save();

    let b = bench(2, false);
    assert_eq!(b.time.now(), 1_000_000_000);
    b.machine.restore(&saved).unwrap();
    assert_eq!((b.input(0x3ff), b.input(0x21), b.buses[1].cr8()), (0x5a, 0x12, 9));
    assert_eq!(b.buses[0].port_in(0xcf8, 4), 0x8000_0008);
    assert_eq!(b.time.tsc().wrapping_add(b.buses[1].tsc_offset()), 2_000_000);
    assert_eq!(b.machine.save(), saved);
    assert_eq!(b.buses[0].take_event(false, true), Some(Event::Nmi));
    assert_eq!(b.buses[1].take_event(false, true), Some(Event::Init));
    assert!(!b.buses[0].has_event() && !b.buses[1].has_event());
}

#[test]
fn foreign_states_are_refused() {
    let b = bench(2, false);
    let mut saved = b.machine.save();
    saved.version += 1;
    assert!(matches!(b.machine.restore(&saved), Err(RestoreError::Version { .. })));
    assert_eq!(bench(1, false).machine.restore(&b.machine.save()), Err(RestoreError::Invalid));
}

#[test]
fn a_reset_machine_is_as_after_power_up() {
    let b = bench(1, false);
    let before = b.machine.save();
    b.machine.start().unwrap();
    b.out(0x3ff, 1);
    b.out(0x21, 0xff);
    b.buses[0].port_out(0xcf8, 4, 0x8000_0008);
    b.buses[0].mmio_write(0xfee0_0080, 4, 0xf0);
    b.time.advance(5_000);
    assert!(b.machine.reset().is_err());
    b.machine.pause().unwrap();
    b.machine.reset().unwrap();
    assert_eq!(b.machine.lifecycle(), Lifecycle::Created);
    assert_eq!(b.machine.save(), before);
    assert!(!b.buses[0].has_event());
}

#[test]
fn pausing_and_stopping_kick_every_processor() {
    let b = bench(2, false);
    b.machine.start().unwrap();
    b.machine.pause().unwrap();
    for bus in &b.buses {
        assert_eq!(bus.take_event(false, false), Some(Event::Kick));
    }
    b.machine.resume().unwrap();
    b.machine.stop();
    assert!(b.buses.iter().all(|bus| bus.has_event()));
    assert_eq!(b.machine.lifecycle(), Lifecycle::Stopped);
}

#[test]
fn the_other_processors_wait_with_the_same_memory_types() {
    let b = bench(2, false);
    let mut kernel = alloc::vec![0; 0x2000];
    for (at, word) in [0x1bad_b002u32, 0x1_0000, 0u32.wrapping_sub(0x1bad_b002 + 0x1_0000)]
        .into_iter()
        .chain([0x10_0000, 0x10_0000, 0, 0, 0x10_0020])
        .enumerate()
    {
        kernel[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
    let image = BootImage { kernel: &kernel, name: "kernel", initrd: None, command_line: "", unpack: true };
    let boot = b.machine.load(&image).unwrap().state;
    let waiting = b.machine.waiting_state();
    assert_eq!(boot.rip, 0x10_0020);
    assert_eq!((boot.activity, waiting.activity), (Activity::Running, Activity::WaitForSipi));
    assert_eq!(boot.msr, waiting.msr);
    let mut root = [0; 8];
    b.machine.memory().read(crate::map::BIOS_START, &mut root).unwrap();
    assert_eq!(&root, b"RSD PTR ");
}
