//! What lies around a virtual processor while the interpreter executes an instruction for it.
#![allow(unsafe_code)]

use alloc::sync::Arc;

use bivisor_machine::engine::VcpuBus;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::env::{Compared, Env, Event, HostExecution, HostInstruction};
use bivisor_x86::state::CpuState;

/// The surroundings of one virtual processor. Nothing is cached of code here, so nothing is recorded of stores.
pub(crate) struct VcpuEnv {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) bus: Arc<dyn VcpuBus>,
}

/// The host's time-stamp counter.
fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and an engine that executes it with CR4.TSD set does so at level 0.
    unsafe { core::arch::x86_64::_rdtsc() }
}

macro_rules! forward {
    ($load:ident, $store:ident, $ty:ty) => {
        fn $load(&self, offset: u64) -> $ty {
            self.memory.$load(offset)
        }
        fn $store(&self, offset: u64, value: $ty) {
            self.memory.$store(offset, value);
        }
    };
}

impl Env for VcpuEnv {
    fn ram_page(&self, gpa: u64) -> Option<u64> {
        self.memory.offset(gpa & !0xfff)
    }
    forward!(load8, store8, u8);
    forward!(load16, store16, u16);
    forward!(load32, store32, u32);
    forward!(load64, store64, u64);
    fn load_bytes(&self, offset: u64, to: &mut [u8]) {
        self.memory.load_bytes(offset, to);
    }
    fn store_bytes(&self, offset: u64, from: &[u8]) {
        self.memory.store_bytes(offset, from);
    }
    fn copy_elements(&self, from: u64, to: u64, count: u64, size: u64, down: bool) {
        self.memory.copy_elements(from, to, count, size, down);
    }
    fn fill_elements(&self, to: u64, value: u64, count: u64, size: u64) {
        self.memory.fill_elements(to, value, count, size);
    }
    fn compare_elements(
        &self,
        left: u64,
        right: u64,
        count: u64,
        size: u64,
        equal: bool,
    ) -> Option<Compared> {
        self.memory.compare_elements(left, right, count, size, equal)
    }
    fn scan_elements(&self, value: u64, right: u64, count: u64, size: u64, equal: bool) -> Option<Compared> {
        self.memory.scan_elements(value, right, count, size, equal)
    }
    fn compare_exchange(&self, offset: u64, size: usize, expected: u64, new: u64) -> u64 {
        self.memory.compare_exchange(offset, size, expected, new)
    }
    fn compare_exchange128(&self, offset: u64, expected: u128, new: u128) -> u128 {
        self.memory.compare_exchange128(offset, expected, new)
    }

    fn mark_code(&self, _offset: u64) -> u32 {
        0
    }
    fn code_generation(&self, _offset: u64) -> u32 {
        0
    }
    fn code_epoch(&self) -> u64 {
        0
    }

    fn mmio_read(&mut self, gpa: u64, size: usize) -> u64 {
        self.bus.mmio_read(gpa, size)
    }
    fn mmio_write(&mut self, gpa: u64, size: usize, value: u64) {
        self.bus.mmio_write(gpa, size, value);
    }
    fn port_in(&mut self, port: u16, size: usize) -> u32 {
        self.bus.port_in(port, size)
    }
    fn port_out(&mut self, port: u16, size: usize, value: u32) {
        self.bus.port_out(port, size, value);
    }

    fn has_event(&self) -> bool {
        self.bus.has_event()
    }
    fn take_event(&mut self, interrupts: bool, nmis: bool) -> Option<Event> {
        self.bus.take_event(interrupts, nmis)
    }

    fn tsc(&self) -> u64 {
        host_tsc().wrapping_add(self.bus.tsc_offset())
    }
    fn set_tsc(&mut self, value: u64) {
        self.bus.set_tsc(value);
    }
    fn cr8(&self) -> u8 {
        self.bus.cr8()
    }
    fn set_cr8(&mut self, value: u8) {
        self.bus.set_cr8(value);
    }
    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        self.bus.read_msr(msr)
    }
    fn write_msr(&mut self, msr: u32, value: u64) -> bool {
        self.bus.write_msr(msr, value)
    }
    fn on_init(&mut self) {
        self.bus.on_init();
    }
    /// RDRAND and RDSEED have no memory operand and are not intercepted, so nothing of a guest comes here; the counter's
    /// low bits are what there is without asking whether the processor has more.
    fn random(&mut self) -> u64 {
        host_tsc().wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
    fn hypercall(&mut self, state: &CpuState) -> Option<u64> {
        self.bus.hypercall(state)
    }

    /// Vector instructions come here only where their operand is a device's register, which no driver does; they are
    /// refused.
    fn execute_on_host(
        &mut self,
        _instruction: &HostInstruction<'_>,
        _state: &mut CpuState,
        _memory: &mut [u8; 64],
    ) -> HostExecution {
        HostExecution::Undefined
    }
}
