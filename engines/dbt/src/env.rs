//! What lies around a virtual processor: guest memory, the machine's bus, and the host's vector units.

use std::cell::Cell;
use std::sync::Arc;

use bivisor_machine::engine::VcpuBus;
use bivisor_machine::exits::Kind;
use bivisor_machine::host::Waker;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::env::{Compared, Env, Event, HostExecution, HostInstruction};
use bivisor_x86::state::CpuState;

use crate::code_tracker::{CodeTracker, CodeWrite};
use crate::host_cpu;
use crate::host_unit::HostUnit;
use crate::peers::{Peer, Peers};

/// The surroundings of one virtual processor.
pub struct VcpuEnv {
    memory: Arc<GuestMemory>,
    bus: Arc<dyn VcpuBus>,
    code: Arc<CodeTracker>,
    peers: Arc<Peers>,
    index: u32,
    host_unit: HostUnit,
    /// Pages that this processor was the first to cache instructions of, until somebody asks.
    newly_marked: Cell<Vec<u64>>,
    /// How often the machine was asked for something.
    asked: u64,
}

impl VcpuEnv {
    /// The surroundings of the virtual processor of this number, with this RAM and bus.
    ///
    /// # Errors
    /// The host gives no memory for executing vector instructions.
    pub fn new(
        memory: Arc<GuestMemory>,
        bus: Arc<dyn VcpuBus>,
        code: Arc<CodeTracker>,
        peers: Arc<Peers>,
        index: u32,
    ) -> std::io::Result<Self> {
        Ok(Self {
            memory,
            bus,
            code,
            peers,
            index,
            host_unit: HostUnit::new()?,
            newly_marked: Cell::default(),
            asked: 0,
        })
    }

    /// What to add to the host's time-stamp counter to get the guest's.
    pub fn tsc_offset(&self) -> u64 {
        self.bus.tsc_offset()
    }

    /// How often the machine was asked for something that it counts itself: ports, device registers, MSRs, hypercalls.
    pub fn asked(&self) -> u64 {
        self.asked
    }

    /// Counts why translated code was left.
    pub fn count(&self, kind: Kind) {
        self.bus.count(kind);
    }

    /// Has `observer` called when another thread raises an event.
    pub fn set_observer(&self, observer: Arc<dyn Waker>) {
        self.bus.set_observer(observer);
    }

    /// Pages that came to hold cached code since the last call: an engine whose stores don't pass here must see
    /// that those to these pages do.
    pub fn take_newly_marked(&self) -> Vec<u64> {
        self.newly_marked.take()
    }

    /// Writes to cached code after an epoch, see [`CodeTracker::written_since`].
    pub fn written_since(&self, epoch: u64) -> (u64, Option<Vec<CodeWrite>>) {
        self.code.written_since(epoch)
    }

    /// Announces the processor to the others of its machine.
    pub fn add_peer(&self, peer: Arc<dyn Peer>) {
        self.peers.add(self.index, peer);
    }

    /// Whether the host lets another processor of the machine wait that has something to execute.
    pub fn others_starve(&self) -> bool {
        self.peers.others_starve(self.index)
    }

    /// Tells the record of cached code, and whoever may have cached it, of a store.
    #[inline]
    fn written(&self, offset: u64, length: u64) {
        if self.code.written(offset, length) {
            self.peers.wake(self.index);
        }
    }

    /// Nothing of the page at this offset in RAM is to be cached any more.
    pub fn release_code(&self, offset: u64) {
        if self.code.release(offset) {
            self.peers.wake(self.index);
        }
    }

    /// Whether instructions of the page at this offset in RAM are cached somewhere.
    pub fn is_code(&self, offset: u64) -> bool {
        self.code.is_cached(offset)
    }
}

/// Stores, and tells the record of cached code.
macro_rules! store {
    ($name:ident, $ty:ty) => {
        #[inline]
        fn $name(&self, offset: u64, value: $ty) {
            self.memory.$name(offset, value);
            self.written(offset, size_of::<$ty>() as u64);
        }
    };
}

/// Loads.
macro_rules! load {
    ($name:ident, $ty:ty) => {
        #[inline]
        fn $name(&self, offset: u64) -> $ty {
            self.memory.$name(offset)
        }
    };
}

impl Env for VcpuEnv {
    fn ram_page(&self, gpa: u64) -> Option<u64> {
        self.memory.offset(gpa & !0xfff)
    }
    load!(load8, u8);
    load!(load16, u16);
    load!(load32, u32);
    load!(load64, u64);
    fn load_bytes(&self, offset: u64, to: &mut [u8]) {
        self.memory.load_bytes(offset, to);
    }
    store!(store8, u8);
    store!(store16, u16);
    store!(store32, u32);
    store!(store64, u64);
    fn store_bytes(&self, offset: u64, from: &[u8]) {
        self.memory.store_bytes(offset, from);
        self.written(offset, from.len() as u64);
    }
    fn copy_elements(&self, from: u64, to: u64, count: u64, size: u64, down: bool) {
        self.memory.copy_elements(from, to, count, size, down);
        let length = count.saturating_mul(size);
        let first = if down { to.wrapping_add(size).wrapping_sub(length) } else { to };
        self.written(first, length);
    }
    fn fill_elements(&self, to: u64, value: u64, count: u64, size: u64) {
        self.memory.fill_elements(to, value, count, size);
        self.written(to, count.saturating_mul(size));
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
        let old = self.memory.compare_exchange(offset, size, expected, new);
        self.written(offset, size as u64);
        old
    }
    fn compare_exchange128(&self, offset: u64, expected: u128, new: u128) -> u128 {
        let old = self.memory.compare_exchange128(offset, expected, new);
        self.written(offset, 16);
        old
    }

    fn mark_code(&self, offset: u64) -> u32 {
        let (generation, is_new) = self.code.mark(offset);
        if is_new {
            self.peers.forget_writes(self.index, offset & !0xfff);
            let mut marked = self.newly_marked.take();
            marked.push(offset & !0xfff);
            self.newly_marked.set(marked);
        }
        generation
    }
    fn code_generation(&self, offset: u64) -> u32 {
        self.code.generation(offset)
    }
    fn code_epoch(&self) -> u64 {
        self.code.epoch()
    }

    fn mmio_read(&mut self, gpa: u64, size: usize) -> u64 {
        self.asked += 1;
        self.bus.mmio_read(gpa, size)
    }
    fn mmio_write(&mut self, gpa: u64, size: usize, value: u64) {
        self.asked += 1;
        self.bus.mmio_write(gpa, size, value);
    }
    fn port_in(&mut self, port: u16, size: usize) -> u32 {
        self.asked += 1;
        self.bus.port_in(port, size)
    }
    fn port_out(&mut self, port: u16, size: usize, value: u32) {
        self.asked += 1;
        self.bus.port_out(port, size, value);
    }

    fn has_event(&self) -> bool {
        self.bus.has_event()
    }
    fn take_event(&mut self, interrupts: bool, nmis: bool) -> Option<Event> {
        self.bus.take_event(interrupts, nmis)
    }

    fn tsc(&self) -> u64 {
        host_cpu::tsc().wrapping_add(self.bus.tsc_offset())
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
        self.asked += 1;
        self.bus.read_msr(msr)
    }
    fn write_msr(&mut self, msr: u32, value: u64) -> bool {
        self.asked += 1;
        self.bus.write_msr(msr, value)
    }
    fn on_init(&mut self) {
        self.bus.on_init();
    }
    fn random(&mut self) -> u64 {
        host_cpu::random()
    }
    fn hypercall(&mut self, state: &CpuState) -> Option<u64> {
        self.asked += 1;
        self.bus.hypercall(state)
    }

    fn execute_on_host(
        &mut self,
        instruction: &HostInstruction<'_>,
        state: &mut CpuState,
        memory: &mut [u8; 64],
    ) -> HostExecution {
        self.host_unit.execute(instruction, state, memory)
    }
}
