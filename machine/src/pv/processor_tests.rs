use super::*;
use crate::devices::testing::{Host, Time};
use crate::irq::{Interrupts, VcpuApic};
use crate::memory::GuestMemory;
use crate::timer::TimerHub;
use bivisor_x86::env::Event;

const RAM: u64 = 0x4000;

struct Bench {
    pv: Processor,
    apic: VcpuApic,
    interrupts: Arc<Interrupts>,
    memory: Arc<GuestMemory>,
    time: Arc<Time>,
    host: Arc<Host>,
}

fn bench() -> Bench {
    let (host, time) = (Host::new(), Time::new());
    let clock: Arc<dyn Clock> = time.clone();
    let interrupts = Interrupts::new(1, 40, &clock, &TimerHub::new(host.clone()));
    let apic = interrupts.vcpu(0).unwrap();
    apic.apic().set_waker(host.clone());
    apic.mmio_write(0xfee0_00f0, 4, 0x1ff);
    let memory = Arc::new(GuestMemory::on_heap(RAM as usize));
    memory.fill(0, RAM, 0).unwrap();
    let pv = Processor::new(Paravirt::new(Dma::new(memory.clone()), clock), apic.apic().clone());
    Bench { pv, apic, interrupts, memory, time, host }
}

impl Bench {
    fn untouched(&self) -> bool {
        let mut bytes = [0; RAM as usize];
        self.memory.read(0, &mut bytes).unwrap();
        bytes == [0; RAM as usize]
    }
    fn interrupt(&self, vector: u32) {
        assert!(self.interrupts.send_msi(0xfee0_0000, vector));
    }
    fn take(&self) -> Option<Event> {
        self.apic.take_event(true, true)
    }
    /// What a guest does at an interrupt's end; whether that took no exit.
    fn end_of_interrupt(&self, flag: u64) -> bool {
        let quiet = self.memory.load8(flag) & 1 != 0;
        self.memory.store8(flag, self.memory.load8(flag) & !1);
        if !quiet {
            self.apic.mmio_write(0xfee0_00b0, 4, 0);
        }
        quiet
    }
}

#[test]
fn both_pairs_of_clock_registers_lead_to_the_same() {
    for (wall, system) in [(msr::WALL_CLOCK, msr::SYSTEM_TIME), (msr::WALL_CLOCK_OLD, msr::SYSTEM_TIME_OLD)] {
        let b = bench();
        b.time.advance(5_000_000_000);
        assert!(b.pv.write_msr(wall, 0x100) && b.pv.write_msr(system, 0x201));
        assert_eq!((b.memory.load32(0x104), b.memory.load32(0x108)), (999_999_995, 0));
        assert_eq!((b.memory.load32(0x200), b.memory.load8(0x21d)), (2, 1));
        assert_eq!(
            (b.pv.read_msr(msr::WALL_CLOCK), b.pv.read_msr(msr::SYSTEM_TIME)),
            (Some(0x100), Some(0x201))
        );
    }
}

#[test]
fn a_counter_that_the_guest_sets_is_followed_while_the_clock_is_wanted() {
    let b = bench();
    b.pv.write_msr(msr::SYSTEM_TIME, 0x201);
    let before = b.memory.load64(0x208);
    b.apic.apic().set_tsc(b.time.tsc() + 1000);
    b.pv.counter_changed();
    assert_eq!(b.memory.load64(0x208), before + 1000);
    b.pv.write_msr(msr::SYSTEM_TIME, 0x200);
    b.apic.apic().set_tsc(0);
    b.pv.counter_changed();
    assert_eq!(b.memory.load64(0x208), before + 1000);
}

#[test]
fn wild_addresses_reach_nothing() {
    let b = bench();
    let wild = [RAM - 8, RAM, RAM - 64 + 2, 0xfee0_0000, 0xffff_ffff, 1 << 32, u64::MAX - 63];
    for gpa in wild.map(|gpa| gpa & !1) {
        assert!(b.pv.write_msr(msr::WALL_CLOCK, gpa | 1));
        assert!(b.pv.write_msr(msr::SYSTEM_TIME, gpa | 1));
        let steal = gpa & !63;
        assert!(b.pv.write_msr(msr::STEAL_TIME, steal | 1));
        if steal < RAM {
            continue;
        }
        b.pv.parked();
        b.pv.unparked();
        b.pv.account();
        b.pv.counter_changed();
        b.pv.stopped();
    }
    for gpa in [RAM, RAM + 4, 0xfee0_0000, !3] {
        assert!(!b.pv.write_msr(msr::PV_EOI, gpa | 1), "#GP");
        assert!(b.pv.write_msr(msr::PV_EOI, gpa), "not enabled, so not followed");
        b.interrupt(0x40);
        assert_eq!(b.take(), Some(Event::Interrupt(0x40)));
        assert!(!b.end_of_interrupt(0));
    }
    assert!(b.untouched());
}

#[test]
fn reserved_bits_are_refused() {
    let b = bench();
    for bit in 1..6 {
        assert!(!b.pv.write_msr(msr::STEAL_TIME, 0x1000 | 1 << bit));
    }
    assert!(!b.pv.write_msr(msr::PV_EOI, 0x1003));
    assert!(!b.pv.write_msr(msr::POLL_CONTROL, 2));
    for number in [0x4b56_4d02, 0x4b56_4d06, 0x4b56_4d07, 0x13] {
        assert!(!b.pv.write_msr(number, 0));
        assert_eq!(b.pv.read_msr(number), None);
    }
    assert!(b.untouched());
}

#[test]
fn an_interrupt_ends_without_an_exit() {
    let b = bench();
    assert!(b.pv.write_msr(msr::PV_EOI, 0x1001));
    for _ in 0..3 {
        b.interrupt(0x40);
        assert_eq!(b.take(), Some(Event::Interrupt(0x40)));
        assert!(b.end_of_interrupt(0x1000));
        assert!(!b.apic.has_event());
    }
    // One that comes between the end and the next look is delivered, although the registers have one in service.
    b.interrupt(0x40);
    assert_eq!(b.take(), Some(Event::Interrupt(0x40)));
    assert!(b.end_of_interrupt(0x1000));
    let wakes = b.host.wakes();
    b.interrupt(0x31);
    assert_eq!((b.apic.has_event(), b.host.wakes()), (true, wakes + 1));
    assert_eq!(b.take(), Some(Event::Interrupt(0x31)));
}

#[test]
fn what_waits_is_delivered_at_the_end() {
    let b = bench();
    b.pv.write_msr(msr::PV_EOI, 0x1001);
    // A lower one is already there: the end must be heard of.
    b.interrupt(0x40);
    b.interrupt(0x31);
    assert_eq!(b.take(), Some(Event::Interrupt(0x40)));
    assert!(!b.end_of_interrupt(0x1000));
    assert_eq!(b.take(), Some(Event::Interrupt(0x31)));
    // A lower one comes during the handler.
    b.interrupt(0x22);
    assert_eq!(b.take(), None);
    assert!(!b.end_of_interrupt(0x1000));
    assert_eq!(b.take(), Some(Event::Interrupt(0x22)));
    assert!(b.end_of_interrupt(0x1000));
}

#[test]
fn nested_interrupts_end_in_their_order() {
    let b = bench();
    b.pv.write_msr(msr::PV_EOI, 0x1001);
    b.interrupt(0x40);
    assert_eq!(b.take(), Some(Event::Interrupt(0x40)));
    b.interrupt(0x60);
    assert_eq!(b.take(), Some(Event::Interrupt(0x60)));
    assert!(b.end_of_interrupt(0x1000));
    assert!(!b.end_of_interrupt(0x1000));
    // Nothing is in service any more.
    b.interrupt(0x22);
    assert_eq!(b.take(), Some(Event::Interrupt(0x22)));
}

#[test]
fn levels_end_at_the_io_apic() {
    let b = bench();
    b.pv.write_msr(msr::PV_EOI, 0x1001);
    let ioapic = crate::irq::IoApicMmio(b.interrupts.clone());
    for (register, value) in [(0x1e, 0x8055), (0x1f, 0)] {
        crate::device::Mmio::mmio_write(&ioapic, 0, 4, register);
        crate::device::Mmio::mmio_write(&ioapic, 0x10, 4, value);
    }
    let line = b.interrupts.line(7);
    line.set(true);
    for _ in 0..2 {
        assert_eq!(b.take(), Some(Event::Interrupt(0x55)));
        assert!(!b.end_of_interrupt(0x1000));
    }
    line.set(false);
}

#[test]
fn switching_the_flag_off_and_reset_leave_ram_alone() {
    let b = bench();
    b.pv.write_msr(msr::PV_EOI, 0x1001);
    b.pv.write_msr(msr::STEAL_TIME, 0x2001);
    b.pv.write_msr(msr::SYSTEM_TIME, 0x3001);
    b.pv.reset();
    b.memory.fill(0, RAM, 0).unwrap();
    b.interrupt(0x40);
    assert_eq!(b.take(), Some(Event::Interrupt(0x40)));
    b.pv.parked();
    b.pv.unparked();
    b.pv.counter_changed();
    assert!(b.untouched());
    assert_eq!(b.pv.save(), SavedProcessor::default());
}

#[test]
fn a_flush_asked_for_while_the_processor_slept_comes_first() {
    let b = bench();
    b.pv.write_msr(msr::STEAL_TIME, 0x2001);
    b.pv.parked();
    assert_eq!(b.memory.load8(0x2010), 1);
    b.memory.store8(0x2010, 3);
    b.interrupt(0x40);
    b.pv.unparked();
    assert_eq!((b.take(), b.take()), (Some(Event::FlushTlb), Some(Event::Interrupt(0x40))));
    b.pv.parked();
    b.pv.unparked();
    assert_eq!(b.take(), None);
}

#[test]
fn the_guest_may_poll_instead_of_the_host() {
    let b = bench();
    assert!(b.pv.host_polls());
    assert!(b.pv.write_msr(msr::POLL_CONTROL, 0));
    assert!(!b.pv.host_polls());
}

#[test]
fn saved_registers_lead_to_the_same_places() {
    let b = bench();
    b.pv.write_msr(msr::PV_EOI, 0x1001);
    b.pv.write_msr(msr::STEAL_TIME, 0x2001);
    b.pv.write_msr(msr::SYSTEM_TIME, 0x3001);
    b.pv.write_msr(msr::POLL_CONTROL, 0);
    let saved = b.pv.save();
    let other = bench();
    other.pv.restore(&saved);
    assert_eq!(other.pv.save(), saved);
    other.pv.parked();
    assert_eq!((other.memory.load8(0x2010), other.memory.load32(0x3000)), (1, 2));
    let hostile = SavedProcessor { steal_time: 0x3f, eoi: u64::MAX, poll_control: 9, ..saved };
    other.pv.restore(&hostile);
    assert_eq!(other.pv.save(), SavedProcessor { system_time: saved.system_time, ..Default::default() });
}
