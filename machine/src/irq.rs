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
            let both = after
                || line == 0 && controllers.asserting[TIMER_PIN] != 0
                || line == TIMER_PIN && controllers.asserting[0] != 0;
            controllers.ioapic.set_input(pin, both, &mut |message| send(message));
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
    /// Whether an event may be waiting: one relaxed load.
    pub fn has_event(&self) -> bool {
        self.apic.has_event()
    }
    /// Takes the next event by priority, acknowledging an interrupt at its controller.
    pub fn take_event(&self, interrupts: bool, nmis: bool) -> Option<Event> {
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
        Some(self.apic.mmio_read(offset, size))
    }
    /// Writes a register in memory space; false if this address is none of this local APIC's now.
    pub fn mmio_write(&self, gpa: u64, size: usize, value: u64) -> bool {
        let Some(offset) = self.offset(gpa) else { return false };
        self.interrupts.apply(self.index, self.apic.mmio_write(offset, size, value));
        true
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
        match msr {
            MSR_APIC_BASE => Some(self.apic.base()),
            MSR_TSC_DEADLINE => Some(self.apic.tsc_deadline()),
            _ => self.apic.msr_read(msr).ok(),
        }
    }
    /// Writes an MSR of the local APIC; false: #GP.
    pub fn write_msr(&self, msr: u32, value: u64) -> bool {
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
        self.apic.on_init();
    }
}
