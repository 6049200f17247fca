//! A flat-RAM environment for the tests of this crate.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use crate::cpu::Cpu;
use crate::cpuid::{CpuModel, Vendor, read_reference};
use crate::env::{Env, Event, HostExecution, HostInstruction, OPEN_BUS};
use crate::state::CpuState;

/// RAM from guest-physical 0, with the offset equal to the address; everything else is told in `log`.
pub struct TestEnv {
    pub ram: RefCell<Vec<u8>>,
    /// Writes to devices: address, size, value.
    pub mmio_writes: Vec<(u64, usize, u64)>,
    /// What MMIO reads answer; [`OPEN_BUS`] where nothing is set.
    pub mmio: BTreeMap<u64, u64>,
    /// OUTs: port, size, value.
    pub port_writes: Vec<(u16, usize, u32)>,
    /// What INs answer.
    pub ports: BTreeMap<u16, u32>,
    pub events: VecDeque<Event>,
    pub msrs: BTreeMap<u32, u64>,
    pub tsc: Cell<u64>,
    pub cr8: u8,
    pub inits: usize,
    /// Generation of each page, counted from the first write after `mark_code`.
    pub generations: RefCell<BTreeMap<u64, u32>>,
    pub epoch: Cell<u64>,
}

impl TestEnv {
    /// With this much RAM.
    pub fn new(bytes: usize) -> Self {
        Self {
            ram: RefCell::new(vec![0; bytes]),
            mmio_writes: Vec::new(),
            mmio: BTreeMap::new(),
            port_writes: Vec::new(),
            ports: BTreeMap::new(),
            events: VecDeque::new(),
            msrs: BTreeMap::new(),
            tsc: Cell::new(0),
            cr8: 0,
            inits: 0,
            generations: RefCell::default(),
            epoch: Cell::new(0),
        }
    }
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.store_bytes(address, bytes);
    }
    pub fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.load_bytes(address, &mut bytes);
        bytes
    }
    fn written(&self, offset: u64) {
        if let Some(generation) = self.generations.borrow_mut().get_mut(&(offset & !0xfff)) {
            *generation += 1;
            self.epoch.set(self.epoch.get() + 1);
        }
    }
}

/// A processor of the reference model, or of what it were if Intel had made the host.
pub fn test_cpu(vendor: Vendor) -> Cpu {
    let read = |function, index| {
        let mut registers = read_reference(function, index);
        if function == 0 && vendor == Vendor::Intel {
            let name = |part: &[u8; 4]| u32::from_le_bytes(*part);
            registers = [0x16, name(b"Genu"), name(b"ntel"), name(b"ineI")];
        }
        registers
    };
    Cpu::new(Arc::new(CpuModel::from_host(read, 1, 2_000_000_000)))
}

impl Env for TestEnv {
    fn ram_page(&self, gpa: u64) -> Option<u64> {
        (gpa < self.ram.borrow().len() as u64).then_some(gpa & !0xfff)
    }
    fn load8(&self, offset: u64) -> u8 {
        self.get::<1>(offset)[0]
    }
    fn load16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.get(offset))
    }
    fn load32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }
    fn load64(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.get(offset))
    }
    fn load_bytes(&self, offset: u64, to: &mut [u8]) {
        let offset = offset as usize;
        to.copy_from_slice(&self.ram.borrow()[offset..offset + to.len()]);
    }
    fn store8(&self, offset: u64, value: u8) {
        self.store_bytes(offset, &value.to_le_bytes());
    }
    fn store16(&self, offset: u64, value: u16) {
        self.store_bytes(offset, &value.to_le_bytes());
    }
    fn store32(&self, offset: u64, value: u32) {
        self.store_bytes(offset, &value.to_le_bytes());
    }
    fn store64(&self, offset: u64, value: u64) {
        self.store_bytes(offset, &value.to_le_bytes());
    }
    fn store_bytes(&self, offset: u64, from: &[u8]) {
        self.written(offset);
        let offset = offset as usize;
        self.ram.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
    }
    fn compare_exchange(&self, offset: u64, size: usize, expected: u64, new: u64) -> u64 {
        let mut old = [0; 8];
        self.load_bytes(offset, &mut old[..size]);
        let old = u64::from_le_bytes(old);
        if old == expected {
            self.store_bytes(offset, &new.to_le_bytes()[..size]);
        }
        old
    }
    fn compare_exchange128(&self, offset: u64, expected: u128, new: u128) -> u128 {
        let old = u128::from_le_bytes(self.get(offset));
        if old == expected {
            self.store_bytes(offset, &new.to_le_bytes());
        }
        old
    }
    fn mark_code(&self, offset: u64) -> u32 {
        *self.generations.borrow_mut().entry(offset & !0xfff).or_insert(0)
    }
    fn code_generation(&self, offset: u64) -> u32 {
        self.generations.borrow().get(&(offset & !0xfff)).copied().unwrap_or(0)
    }
    fn code_epoch(&self) -> u64 {
        self.epoch.get()
    }
    fn mmio_read(&mut self, gpa: u64, size: usize) -> u64 {
        let value = self.mmio.get(&gpa).copied().unwrap_or(OPEN_BUS);
        if size < 8 { value & ((1 << (8 * size)) - 1) } else { value }
    }
    fn mmio_write(&mut self, gpa: u64, size: usize, value: u64) {
        self.mmio_writes.push((gpa, size, value));
    }
    fn port_in(&mut self, port: u16, size: usize) -> u32 {
        let value = self.ports.get(&port).copied().unwrap_or(u32::MAX);
        if size < 4 { value & ((1 << (8 * size)) - 1) } else { value }
    }
    fn port_out(&mut self, port: u16, size: usize, value: u32) {
        self.port_writes.push((port, size, value));
    }
    fn has_event(&self) -> bool {
        !self.events.is_empty()
    }
    fn take_event(&mut self, interrupts: bool, nmis: bool) -> Option<Event> {
        let allowed = |event: &Event| match event {
            Event::Interrupt(_) => interrupts,
            Event::Nmi => nmis,
            _ => true,
        };
        let index = self.events.iter().position(allowed)?;
        self.events.remove(index)
    }
    fn tsc(&self) -> u64 {
        self.tsc.set(self.tsc.get() + 1);
        self.tsc.get()
    }
    fn set_tsc(&mut self, value: u64) {
        self.tsc.set(value);
    }
    fn cr8(&self) -> u8 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u8) {
        self.cr8 = value;
    }
    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        self.msrs.get(&msr).copied()
    }
    fn write_msr(&mut self, msr: u32, value: u64) -> bool {
        self.msrs.get_mut(&msr).map(|slot| *slot = value).is_some()
    }
    fn on_init(&mut self) {
        self.inits += 1;
    }
    fn random(&mut self) -> u64 {
        4
    }
    fn hypercall(&mut self, _state: &CpuState) -> Option<u64> {
        None
    }
    fn execute_on_host(
        &mut self,
        _instruction: &HostInstruction<'_>,
        _state: &mut CpuState,
        _memory: &mut [u8; 64],
    ) -> HostExecution {
        HostExecution::Undefined
    }
}
