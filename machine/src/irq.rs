//! How interrupts reach the processors: lines to the PIC and the I/O APIC, messages to the local APICs.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use bivisor_x86::env::Event;

use crate::device::{IrqLine, Mmio, PortIo};
use crate::devices::ioapic::{IoApic, PINS};
use crate::devices::lapic::{Effect, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, Target};
use crate::devices::local_apic::{LocalApic, Taken};
use crate::devices::message::{Delivery, Message};
use crate::devices::pic::{self, Pic};
use crate::devices::{Registers, RestoreError, Saved};
use crate::host::Clock;
use crate::sync::Mutex;
use crate::timer::TimerHub;

/// Interrupt lines: ISA IRQs 0 to 15, which reach the PIC too, and 16 to 23, which only the I/O APIC has.
pub const LINES: usize = PINS;
/// The I/O APIC's pin of ISA IRQ 0; the others have the pin of their own number.
pub const TIMER_PIN: usize = 2;

/// PIC, I/O APIC and the wires into them.
#[derive(Clone)]
struct Controllers {
    pic: Pic,
    ioapic: IoApic,
    /// How many devices assert each line: a wired OR.
    asserting: [u32; LINES],
    /// What the PIC's output was last.
    pic_output: bool,
}

/// All interrupt controllers of a machine.
pub struct Interrupts {
    controllers: Mutex<Controllers>,
    apics: Box<[Arc<LocalApic>]>,
    /// Where the arbitration of lowest priority goes on among equals.
    next: AtomicU32,
}

/// What [`Interrupts::save`] gives, without the local APICs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedInterrupts {
    /// The PIC.
    pub pic: Saved<Pic>,
    /// The I/O APIC.
    pub ioapic: Saved<IoApic>,
}

impl Interrupts {
    /// The controllers of a machine with `cpus` processors, whose APIC IDs are 0 and up; the first is the bootstrap
    /// processor. `physical_bits`: size of a physical address.
    pub fn new(cpus: u32, physical_bits: u32, clock: &Arc<dyn Clock>, timers: &Arc<TimerHub>) -> Arc<Self> {
        let controllers = Controllers {
            pic: Pic::default(),
            ioapic: IoApic::default(),
            asserting: [0; LINES],
            pic_output: false,
        };
        let apics = (0..cpus)
            .map(|id| LocalApic::new(id, id == 0, physical_bits, clock.clone(), timers))
            .collect::<Vec<_>>();
        Arc::new(Self {
            controllers: Mutex::new(controllers),
            apics: apics.into_boxed_slice(),
            next: AtomicU32::new(0),
        })
    }

    /// The local APICs by processor index.
    pub fn apics(&self) -> &[Arc<LocalApic>] {
        &self.apics
    }

    /// What the engine's bus needs of this processor's interrupts; `None` if there is no such processor.
    pub fn vcpu(self: &Arc<Self>, index: usize) -> Option<VcpuApic> {
        Some(VcpuApic { interrupts: self.clone(), apic: self.apics.get(index)?.clone(), index })
    }

    /// A wire for a device to this line (0 to 23); the line is asserted while any of its wires is. Wires to
    /// other lines lead nowhere.
    pub fn line(self: &Arc<Self>, line: usize) -> Arc<dyn IrqLine> {
        Arc::new(Wire { interrupts: self.clone(), line, high: Mutex::new(false) })
    }

    /// Changes PIC or I/O APIC, then lets the PIC's output follow.
    fn update<R>(&self, change: impl FnOnce(&mut Controllers, &mut dyn FnMut(Message)) -> R) -> R {
        let mut controllers = self.controllers.lock();
        let result = change(&mut controllers, &mut |message| self.send(&message));
        let output = controllers.pic.output();
        if output != controllers.pic_output {
            controllers.pic_output = output;
            for apic in &self.apics {
                apic.set_lint0(output);
            }
        }
        result
    }

    fn wire_changed(&self, line: usize, high: bool) {
        self.update(|controllers, send| {
            let Some(count) = controllers.asserting.get_mut(line) else { return };
            let before = *count != 0;
            *count = if high { count.saturating_add(1) } else { count.saturating_sub(1) };
            let after = *count != 0;
            if before == after {
                return;
            }
            controllers.pic.set_input(line, after);
            let pin = if line == 0 { TIMER_PIN } else { line };
            // Two lines share the timer's pin.
            let asserted = after || pin == TIMER_PIN && controllers.asserting[TIMER_PIN - line] != 0;
            controllers.ioapic.set_input(pin, asserted, &mut |message| send(message));
        });
    }

    /// Delivers a message to the local APICs that it names.
    pub fn send(&self, message: &Message) {
        if message.delivery == Delivery::LowestPriority {
            self.send_lowest_priority(message);
            return;
        }
        for apic in self.apics.iter().filter(|apic| apic.matches(message)) {
            apic.accept(message);
        }
    }

    fn send_lowest_priority(&self, message: &Message) {
        let count = self.apics.len();
        let first = self.next.load(Ordering::Relaxed) as usize;
        let order = (0..count).map(|i| (first + i) % count);
        let lowest =
            order.filter(|&i| self.apics[i].matches(message)).min_by_key(|&i| self.apics[i].priority());
        if let Some(index) = lowest {
            self.next.store((index as u32).wrapping_add(1) % count as u32, Ordering::Relaxed);
            self.apics[index].accept(message);
        }
    }

    /// A device writes a message-signalled interrupt. False: the address is none of an interrupt.
    pub fn send_msi(&self, address: u64, data: u32) -> bool {
        match Message::from_msi(address, data) {
            Some(message) => {
                self.send(&message);
                true
            }
            None => false,
        }
    }

    /// Does what a write to a local APIC causes outside of it.
    fn apply(&self, from: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::EndOfInterrupt(vector) => {
                self.update(|controllers, send| controllers.ioapic.end_of_interrupt(vector, &mut |m| send(m)))
            }
            Effect::Send(Target::Destination, message) => self.send(&message),
            Effect::Send(target, message) => {
                for (index, apic) in self.apics.iter().enumerate() {
                    let meant = match target {
                        Target::Myself => index == from,
                        Target::Others => index != from,
                        _ => true,
                    };
                    if meant {
                        apic.accept(&message);
                    }
                }
            }
        }
    }

    /// Sets which ISA interrupts are level triggered at the PIC, as firmware does by the ELCR ports.
    pub fn set_level_triggered(&self, irqs: u16) {
        self.update(|controllers, _| {
            let [low, high] = irqs.to_le_bytes();
            controllers.pic.write(pic::ELCR, low);
            controllers.pic.write(pic::ELCR + 1, high);
        });
    }

    /// A copy of the PIC's and I/O APIC's registers.
    pub fn save(&self) -> SavedInterrupts {
        let controllers = self.controllers.lock();
        SavedInterrupts { pic: controllers.pic.save(), ioapic: controllers.ioapic.save() }
    }

    /// Takes over saved registers; the devices' lines are restored by the devices.
    pub fn restore(&self, saved: &SavedInterrupts) -> Result<(), RestoreError> {
        self.update(|controllers, _| {
            let mut restored = controllers.clone();
            restored.pic.restore(&saved.pic)?;
            restored.ioapic.restore(&saved.ioapic)?;
            *controllers = restored;
            Ok(())
        })
    }
}

/// One device's wire to a line.
struct Wire {
    interrupts: Arc<Interrupts>,
    line: usize,
    high: Mutex<bool>,
}

impl IrqLine for Wire {
    fn set(&self, high: bool) {
        let mut now = self.high.lock();
        if *now != high {
            *now = high;
            self.interrupts.wire_changed(self.line, high);
        }
    }
}

/// The PIC's ports: 20h, 21h, A0h, A1h, 4D0h, 4D1h; byte wide.
pub struct PicPorts(pub Arc<Interrupts>);

impl PortIo for PicPorts {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        self.0.update(|controllers, _| controllers.pic.read(port)).into()
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        self.0.update(|controllers, _| controllers.pic.write(port, value as u8));
    }
}

/// The I/O APIC's page.
pub struct IoApicMmio(pub Arc<Interrupts>);

impl Mmio for IoApicMmio {
    fn mmio_read(&self, offset: u64, size: usize) -> u64 {
        self.0.controllers.lock().ioapic.read(offset, size).into()
    }
    fn mmio_write(&self, offset: u64, size: usize, value: u64) {
        self.0.update(|controllers, send| {
            controllers.ioapic.write(offset, size, value as u32, &mut |m| send(m));
        });
    }
}

/// One processor's view of the interrupt controllers: what its [`crate::engine::VcpuBus`] forwards to. All
/// methods are for the vCPU's own thread.
pub struct VcpuApic {
    interrupts: Arc<Interrupts>,
    apic: Arc<LocalApic>,
    index: usize,
}

impl VcpuApic {
    /// The shared block, for waking and for time.
    pub fn apic(&self) -> &Arc<LocalApic> {
        &self.apic
    }
    /// All interrupt controllers of the machine.
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }
    /// Whether an event may be waiting: one relaxed load.
    pub fn has_event(&self) -> bool {
        self.apic.has_event()
    }
    /// Takes the next event by priority, acknowledging an interrupt at its controller.
    pub fn take_event(&self, interrupts: bool, nmis: bool) -> Option<Event> {
        self.settle();
        match self.apic.take_event(interrupts, nmis)? {
            Taken::Event(event) => Some(event),
            Taken::FromPic => {
                Some(Event::Interrupt(self.interrupts.update(|controllers, _| controllers.pic.acknowledge())))
            }
        }
    }
    /// Reads a register in memory space; `None` if this address is none of this local APIC's now.
    pub fn mmio_read(&self, gpa: u64, size: usize) -> Option<u64> {
        let offset = self.offset(gpa)?;
        self.settle();
        Some(self.apic.mmio_read(offset, size))
    }
    /// Writes a register in memory space; false if this address is none of this local APIC's now.
    pub fn mmio_write(&self, gpa: u64, size: usize, value: u64) -> bool {
        let Some(offset) = self.offset(gpa) else { return false };
        self.settle();
        self.interrupts.apply(self.index, self.apic.mmio_write(offset, size, value));
        true
    }
    /// Brings the local APIC in line with what the guest has done without an exit.
    pub fn settle(&self) {
        if self.apic.eoi_is_set() {
            self.interrupts.apply(self.index, self.apic.settle_eoi());
        }
    }
    fn offset(&self, gpa: u64) -> Option<u64> {
        let offset = gpa.wrapping_sub(self.apic.mmio_base());
        (offset < 0x1000).then_some(offset)
    }
    /// Whether this MSR belongs to the local APIC: then [`VcpuApic::read_msr`] and [`VcpuApic::write_msr`]
    /// decide about it.
    pub fn has_msr(msr: u32) -> bool {
        matches!(msr, MSR_APIC_BASE | MSR_TSC_DEADLINE) || msr & !0xff == MSR_X2APIC
    }
    /// Reads an MSR of the local APIC; `None`: #GP.
    pub fn read_msr(&self, msr: u32) -> Option<u64> {
        self.settle();
        match msr {
            MSR_APIC_BASE => Some(self.apic.base()),
            MSR_TSC_DEADLINE => Some(self.apic.tsc_deadline()),
            _ => self.apic.msr_read(msr).ok(),
        }
    }
    /// Writes an MSR of the local APIC; false: #GP.
    pub fn write_msr(&self, msr: u32, value: u64) -> bool {
        self.settle();
        match msr {
            MSR_APIC_BASE => self.apic.set_base(value).is_ok(),
            MSR_TSC_DEADLINE => {
                self.apic.set_tsc_deadline(value);
                true
            }
            _ => match self.apic.msr_write(msr, value) {
                Ok(effect) => {
                    self.interrupts.apply(self.index, effect);
                    true
                }
                Err(_) => false,
            },
        }
    }
    /// CR8.
    pub fn cr8(&self) -> u8 {
        self.apic.cr8()
    }
    /// Sets CR8.
    pub fn set_cr8(&self, value: u8) {
        self.apic.set_cr8(value);
    }
    /// The processor was reset by INIT.
    pub fn on_init(&self) {
        self.settle();
        self.apic.on_init();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Host, Time};

    struct Rig {
        interrupts: Arc<Interrupts>,
        cpus: Vec<VcpuApic>,
    }

    /// Two processors with their local APICs enabled.
    fn rig() -> Rig {
        let clock: Arc<dyn Clock> = Time::new();
        let interrupts = Interrupts::new(2, 40, &clock, &TimerHub::new(Host::new()));
        let cpus: Vec<_> = (0..2).map(|i| interrupts.vcpu(i).unwrap()).collect();
        for cpu in &cpus {
            assert!(cpu.mmio_write(0xfee0_00f0, 4, 0x1ff));
        }
        Rig { interrupts, cpus }
    }
    impl Rig {
        fn set_entry(&self, pin: u64, low: u32, destination: u8) {
            let ioapic = IoApicMmio(self.interrupts.clone());
            for (register, value) in [(0x11 + pin * 2, u32::from(destination) << 24), (0x10 + pin * 2, low)] {
                ioapic.mmio_write(0, 4, register);
                ioapic.mmio_write(0x10, 4, value.into());
            }
        }
        fn take(&self, cpu: usize) -> Option<Event> {
            self.cpus[cpu].take_event(true, true)
        }
        fn eoi(&self, cpu: usize) {
            self.cpus[cpu].mmio_write(0xfee0_00b0, 4, 0);
        }
        fn icr(&self, cpu: usize, destination: u64, low: u64) {
            self.cpus[cpu].mmio_write(0xfee0_0310, 4, destination << 24);
            self.cpus[cpu].mmio_write(0xfee0_0300, 4, low);
        }
    }
    const LEVEL: u32 = 1 << 15;

    #[test]
    fn devices_share_a_level_line() {
        let rig = rig();
        rig.set_entry(17, 0x50 | LEVEL, 1);
        let (a, b) = (rig.interrupts.line(17), rig.interrupts.line(17));
        a.set(true);
        b.set(true);
        assert_eq!((rig.take(0), rig.take(1)), (None, Some(Event::Interrupt(0x50))));
        a.set(false);
        rig.eoi(1);
        assert_eq!(rig.take(1), Some(Event::Interrupt(0x50)));
        b.set(false);
        rig.eoi(1);
        assert_eq!(rig.take(1), None);
    }

    #[test]
    fn the_timer_line_is_pin_2() {
        let rig = rig();
        rig.set_entry(2, 0x30, 0);
        rig.set_entry(0, 0x31, 0);
        rig.interrupts.line(0).set(true);
        assert_eq!((rig.take(0), rig.take(0)), (Some(Event::Interrupt(0x30)), None));
        rig.interrupts.line(2).set(true);
        assert_eq!(rig.take(0), None);
    }

    #[test]
    fn isa_lines_reach_the_pic() {
        let rig = rig();
        rig.cpus[0].apic().enter_virtual_wire_mode();
        let ports = PicPorts(rig.interrupts.clone());
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1)] {
            ports.port_write(port, 1, value);
        }
        let line = rig.interrupts.line(4);
        line.set(true);
        assert_eq!((rig.take(1), rig.take(0), rig.take(0)), (None, Some(Event::Interrupt(0x34)), None));
        ports.port_write(0x20, 1, 0x20);
        rig.interrupts.line(20).set(true);
        assert_eq!(rig.take(0), None);
    }

    #[test]
    fn the_elcr_makes_shared_lines_level_at_the_pic() {
        let rig = rig();
        rig.interrupts.set_level_triggered(1 << 9);
        let ports = PicPorts(rig.interrupts.clone());
        assert_eq!((ports.port_read(0x4d0, 1), ports.port_read(0x4d1, 1)), (0, 2));
    }

    #[test]
    fn messages_go_where_they_are_sent() {
        let rig = rig();
        assert!(rig.interrupts.send_msi(0xfee0_1000, 0x61));
        assert_eq!((rig.take(0), rig.take(1)), (None, Some(Event::Interrupt(0x61))));
        rig.eoi(1);
        assert!(!rig.interrupts.send_msi(0xfed0_0000, 0x61));
        assert!(rig.interrupts.send_msi(0xfeef_f000, 0x62));
        assert_eq!((rig.take(0), rig.take(1)), (Some(Event::Interrupt(0x62)), Some(Event::Interrupt(0x62))));
    }

    #[test]
    fn lowest_priority_takes_turns_and_spares_the_busy() {
        let rig = rig();
        let send = || rig.interrupts.send_msi(0xfeef_f000, 0x170);
        send();
        let first = rig.take(0);
        send();
        assert_eq!((first, rig.take(1)), (Some(Event::Interrupt(0x70)), Some(Event::Interrupt(0x70))));
        rig.eoi(0);
        rig.eoi(1);
        rig.cpus[0].set_cr8(5);
        for _ in 0..2 {
            send();
            assert_eq!((rig.take(0), rig.take(1)), (None, Some(Event::Interrupt(0x70))));
            rig.eoi(1);
        }
    }

    #[test]
    fn shorthands() {
        let rig = rig();
        for (shorthand, expected) in [(1, (true, false)), (2, (true, true)), (3, (false, true))] {
            rig.icr(0, 0, 0x40 | shorthand << 18);
            assert_eq!((rig.take(0).is_some(), rig.take(1).is_some()), expected);
            rig.eoi(0);
            rig.eoi(1);
        }
        rig.icr(0, 1, 0x40);
        assert_eq!((rig.take(0), rig.take(1)), (None, Some(Event::Interrupt(0x40))));
    }

    #[test]
    fn start_up_of_the_other_processor() {
        let rig = rig();
        rig.icr(0, 1, 0x4500);
        rig.icr(0, 1, 0x4699);
        assert_eq!((rig.take(1), rig.take(1)), (Some(Event::Init), Some(Event::Sipi(0x99))));
        rig.cpus[1].on_init();
        assert_eq!(rig.cpus[1].mmio_read(0xfee0_00f0, 4), Some(0xff));
    }

    #[test]
    fn msrs_of_the_local_apic() {
        let rig = rig();
        let cpu = &rig.cpus[1];
        assert!([0x1b, 0x6e0, 0x800, 0x8ff].into_iter().all(VcpuApic::has_msr));
        assert!(![0x10, 0x7ff, 0x900].into_iter().any(VcpuApic::has_msr));
        assert_eq!((cpu.read_msr(0x1b), cpu.read_msr(0x802)), (Some(0xfee0_0800), None));
        assert!(cpu.write_msr(0x1b, 0xfee0_0c00) && !cpu.write_msr(0x1b, 0xfee0_0800));
        assert_eq!((cpu.read_msr(0x802), cpu.mmio_read(0xfee0_0020, 4)), (Some(1), None));
        assert!(cpu.write_msr(0x830, 0x40) && !cpu.write_msr(0x80b, 1));
        assert_eq!(rig.take(0), Some(Event::Interrupt(0x40)));
        assert!(!cpu.mmio_write(0xfee0_00b0, 4, 0));
    }

    #[test]
    fn save_and_restore() {
        let rig = rig();
        rig.set_entry(5, 0x55 | LEVEL | 1 << 16, 0);
        let saved = rig.interrupts.save();
        rig.set_entry(5, 1 << 16, 0);
        rig.interrupts.restore(&saved).unwrap();
        assert_eq!(rig.interrupts.save(), saved);
    }

    #[test]
    fn lines_and_processors_that_do_not_exist_are_harmless() {
        let rig = rig();
        rig.interrupts.line(24).set(true);
        assert!(rig.interrupts.vcpu(2).is_none());
    }
}
