//! The machine as one processor sees it.

use alloc::sync::Arc;

use bivisor_x86::env::Event;
use bivisor_x86::state::CpuState;

use crate::bus::{MmioMap, PortMap};
use crate::engine::VcpuBus;
use crate::host::Waker;
use crate::hypercall::hypercall;
use crate::irq::VcpuApic;

/// The machine's buses, and the processor's own local APIC in front of them.
pub struct ProcessorBus {
    /// Ports.
    pub ports: Arc<PortMap>,
    /// Device registers in memory space.
    pub mmio: Arc<MmioMap>,
    /// Local APIC and interrupts.
    pub apic: VcpuApic,
    /// The guest may make hypercalls.
    pub hypercalls: bool,
}

impl VcpuBus for ProcessorBus {
    fn mmio_read(&self, gpa: u64, size: usize) -> u64 {
        self.apic.mmio_read(gpa, size).unwrap_or_else(|| self.mmio.read(gpa, size))
    }
    fn mmio_write(&self, gpa: u64, size: usize, value: u64) {
        if !self.apic.mmio_write(gpa, size, value) {
            self.mmio.write(gpa, size, value);
        }
    }
    fn port_in(&self, port: u16, size: usize) -> u32 {
        self.ports.read(port, size)
    }
    fn port_out(&self, port: u16, size: usize, value: u32) {
        self.ports.write(port, size, value);
    }
    fn has_event(&self) -> bool {
        self.apic.has_event()
    }
    fn set_observer(&self, observer: Arc<dyn Waker>) {
        self.apic.apic().set_observer(observer);
    }
    fn take_event(&self, interrupts: bool, nmis: bool) -> Option<Event> {
        self.apic.take_event(interrupts, nmis)
    }
    fn cr8(&self) -> u8 {
        self.apic.cr8()
    }
    fn set_cr8(&self, value: u8) {
        self.apic.set_cr8(value);
    }
    fn read_msr(&self, msr: u32) -> Option<u64> {
        if VcpuApic::has_msr(msr) { self.apic.read_msr(msr) } else { None }
    }
    fn write_msr(&self, msr: u32, value: u64) -> bool {
        VcpuApic::has_msr(msr) && self.apic.write_msr(msr, value)
    }
    fn on_init(&self) {
        self.apic.on_init();
    }
    fn tsc_offset(&self) -> u64 {
        self.apic.apic().tsc_offset()
    }
    fn set_tsc(&self, value: u64) {
        self.apic.apic().set_tsc(value);
    }
    fn hypercall(&self, state: &CpuState) -> Option<u64> {
        self.hypercalls.then(|| hypercall(state, self.apic.interrupts()))
    }
}
