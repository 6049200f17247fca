//! The machine as one processor sees it.

use alloc::sync::Arc;

use bivisor_x86::env::Event;
use bivisor_x86::registers::gpr::RAX;
use bivisor_x86::state::CpuState;

use crate::bus::{MmioMap, PortMap};
use crate::engine::VcpuBus;
use crate::exits::{Exits, Kind};
use crate::host::Waker;
use crate::irq::VcpuApic;
use crate::pv;
use crate::pv::hypercall::{Caller, hypercall};

/// The machine's buses, and the processor's own local APIC in front of them.
pub struct ProcessorBus {
    /// Ports.
    pub ports: Arc<PortMap>,
    /// Device registers in memory space.
    pub mmio: Arc<MmioMap>,
    /// Local APIC and interrupts.
    pub apic: VcpuApic,
    /// The paravirtual interface, if the machine offers it.
    pub pv: Option<Arc<pv::Processor>>,
    /// Counts what the processor asks for.
    pub exits: Arc<Exits>,
    /// The guest may make hypercalls even if the machine does not.
    pub hypercalls: bool,
}

impl VcpuBus for ProcessorBus {
    fn mmio_read(&self, gpa: u64, size: usize) -> u64 {
        self.exits.count(Kind::Mmio);
        self.apic.mmio_read(gpa, size).unwrap_or_else(|| self.mmio.read(gpa, size))
    }
    fn mmio_write(&self, gpa: u64, size: usize, value: u64) {
        self.exits.count(Kind::Mmio);
        if !self.apic.mmio_write(gpa, size, value) {
            self.mmio.write(gpa, size, value);
        }
    }
    fn port_in(&self, port: u16, size: usize) -> u32 {
        self.exits.count(Kind::Port);
        self.ports.read(port, size)
    }
    fn port_out(&self, port: u16, size: usize, value: u32) {
        self.exits.count(Kind::Port);
        self.ports.write(port, size, value);
    }
    fn has_event(&self) -> bool {
        self.apic.has_event()
    }
    fn set_observer(&self, observer: Arc<dyn Waker>) {
        self.apic.apic().set_observer(observer);
    }
    fn take_event(&self, interrupts: bool, nmis: bool) -> Option<Event> {
        let event = self.apic.take_event(interrupts, nmis);
        match event {
            Some(Event::Interrupt(_)) => {
                self.exits.count(Kind::Interrupt);
                if let Some(pv) = &self.pv {
                    pv.account();
                }
            }
            Some(Event::Nmi) => self.exits.count(Kind::Nmi),
            _ => {}
        }
        event
    }
    fn cr8(&self) -> u8 {
        self.apic.cr8()
    }
    fn set_cr8(&self, value: u8) {
        self.apic.set_cr8(value);
    }
    fn read_msr(&self, msr: u32) -> Option<u64> {
        self.exits.count(Kind::Msr);
        if VcpuApic::has_msr(msr) { self.apic.read_msr(msr) } else { self.pv.as_ref()?.read_msr(msr) }
    }
    fn write_msr(&self, msr: u32, value: u64) -> bool {
        self.exits.count(Kind::Msr);
        if VcpuApic::has_msr(msr) {
            return self.apic.write_msr(msr, value);
        }
        self.apic.settle();
        self.pv.as_ref().is_some_and(|pv| pv.write_msr(msr, value))
    }
    fn on_init(&self) {
        self.apic.on_init();
        if let Some(pv) = &self.pv {
            pv.reset();
        }
    }
    fn tsc_offset(&self) -> u64 {
        self.apic.apic().tsc_offset()
    }
    fn set_tsc(&self, value: u64) {
        self.apic.apic().set_tsc(value);
        if let Some(pv) = &self.pv {
            pv.counter_changed();
        }
    }
    fn hypercall(&self, state: &CpuState) -> Option<u64> {
        self.exits.count_hypercall(state.gpr[RAX]);
        let caller = Caller { interrupts: self.apic.interrupts(), pv: self.pv.as_deref() };
        (self.hypercalls || self.pv.is_some()).then(|| hypercall(state, &caller))
    }
    fn count(&self, kind: Kind) {
        self.exits.count(kind);
    }
    fn parked(&self) {
        if let Some(pv) = &self.pv {
            pv.parked();
        }
    }
    fn unparked(&self) {
        if let Some(pv) = &self.pv {
            pv.unparked();
        }
    }
    fn host_polls(&self) -> bool {
        self.pv.as_ref().is_none_or(|pv| pv.host_polls())
    }
}
