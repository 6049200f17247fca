//! A flat-RAM environment for the tests of this crate.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use crate::cpu::Cpu;
use crate::cpuid::{CpuModel, Vendor, read_reference};
use crate::env::{Compared, Env, Event, HostExecution, HostInstruction, OPEN_BUS};
use crate::exception::Exception;
use crate::interp::flags;
use crate::interp::op::Op;
use crate::registers::{Cr0, Cr4, Efer, gpr};
use crate::segment::Descriptor;
use crate::state::{CpuState, SegReg, TableRegister};
use iced_x86::{Decoder, DecoderOptions};

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
    /// What the host's units say to every instruction.
    pub host_execution: HostExecution,
    /// Generation of each page, counted from the first write after `mark_code`.
    pub generations: RefCell<BTreeMap<u64, u32>>,
    pub epoch: Cell<u64>,
    /// Runs of elements handled at once.
    pub runs: Cell<usize>,
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
            host_execution: HostExecution::Undefined,
            generations: RefCell::default(),
            epoch: Cell::new(0),
            runs: Cell::new(0),
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
    fn element(&self, offset: u64, size: u64) -> u64 {
        let mut bytes = [0; 8];
        self.load_bytes(offset, &mut bytes[..size as usize]);
        u64::from_le_bytes(bytes)
    }
    fn compare_pairs(
        &self,
        pair: impl Fn(u64) -> (u64, u64),
        count: u64,
        size: u64,
        equal: bool,
    ) -> Option<Compared> {
        self.runs.set(self.runs.get() + 1);
        let stop = (0..count).find(|&index| (pair(index).0 == pair(index).1) != equal);
        let last = stop.unwrap_or(count - 1);
        let (left, right) = pair(last);
        Some(Compared { count: last + 1, flags: flags::subtract(left, right, 0, size as usize).1 })
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

/// Where [`Machine`] keeps its tables.
pub mod at {
    pub const GDT: u64 = 0x1000;
    pub const IDT: u64 = 0x2000;
    pub const TSS: u64 = 0x3000;
    /// Top of the stack of privilege level 0.
    pub const STACK0: u64 = 0x8000;
    /// Page tables: 4 levels, or whatever a test builds.
    pub const PAGES: u64 = 0x1_0000;
}

/// Selectors of [`Machine`]'s GDT.
pub mod sel {
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE: u16 = 0x1b;
    pub const USER_DATA: u16 = 0x23;
    pub const TSS: u16 = 0x28;
    pub const CODE64: u16 = 0x38;
    pub const USER_CODE64: u16 = 0x43;
    pub const CONFORMING: u16 = 0x48;
    /// The first free entry.
    pub const FREE: u16 = 0x60;
}

/// A processor in protected or 64-bit mode, with tables.
pub struct Machine {
    pub cpu: Cpu,
    pub env: TestEnv,
}

impl Machine {
    /// Flat 32-bit protected mode at privilege level 0, without paging.
    pub fn protected() -> Self {
        let mut machine = Self { cpu: test_cpu(Vendor::Intel), env: TestEnv::new(0x4_0000) };
        let tss = 0x0000_8900_0000_0067 | at::TSS << 16;
        let entries = [
            (sel::CODE, 0x00cf_9b00_0000_ffff),
            (sel::DATA, 0x00cf_9300_0000_ffff),
            (sel::USER_CODE, 0x00cf_fb00_0000_ffff),
            (sel::USER_DATA, 0x00cf_f300_0000_ffff),
            (sel::TSS, tss),
            (sel::CODE64, 0x00af_9b00_0000_ffff),
            (sel::USER_CODE64, 0x00af_fb00_0000_ffff),
            (sel::CONFORMING, 0x00cf_9f00_0000_ffff),
        ];
        for (selector, descriptor) in entries {
            machine.descriptor(selector, descriptor);
        }
        let state = &mut machine.cpu.state;
        state.gdtr = TableRegister { base: at::GDT, limit: 0xff };
        state.idtr = TableRegister { base: at::IDT, limit: 0xfff };
        state.cr0 |= Cr0::PE.bits();
        state.gpr[gpr::RSP] = 0x7000;
        state.rip = 0x5000;
        machine.env.put(at::TSS + 4, &(at::STACK0 as u32).to_le_bytes());
        machine.env.put(at::TSS + 8, &u32::from(sel::DATA).to_le_bytes());
        machine.ring(sel::CODE, sel::DATA);
        machine.cpu.load_tr(&mut machine.env, sel::TSS).unwrap();
        machine
    }

    /// 64-bit mode at privilege level 0, the first GiB mapped to itself for all.
    pub fn long() -> Self {
        let mut machine = Self::protected();
        machine.env.store64(at::PAGES, at::PAGES + 0x1000 | 7);
        machine.env.store64(at::PAGES + 0x1000, 0x87);
        machine.env.put(at::TSS + 4, &at::STACK0.to_le_bytes());
        let state = &mut machine.cpu.state;
        state.cr3 = at::PAGES;
        state.cr4 = Cr4::PAE.bits();
        state.cr0 |= (Cr0::PG | Cr0::WP).bits();
        state.msr.efer = (Efer::LME | Efer::LMA | Efer::NXE | Efer::SCE).bits();
        machine.cpu.state_changed();
        machine.ring(sel::CODE64, sel::DATA);
        machine
    }

    /// Writes an entry of the GDT.
    pub fn descriptor(&mut self, selector: u16, descriptor: u64) {
        self.env.store64(at::GDT + u64::from(selector & !7), descriptor);
    }

    /// Puts code and all data segments in place without any check, and the privilege level of `code`.
    pub fn ring(&mut self, code: u16, data: u16) {
        let segment = |selector: u16| {
            let low = self.env.load64(at::GDT + u64::from(selector & !7));
            Descriptor { low, high: 0 }.segment(selector)
        };
        let (code, data) = (segment(code), segment(data));
        self.cpu.state.seg = [data, code, data, data, data, data];
        self.cpu.state.cpl = (code.selector & 3) as u8;
    }

    /// Puts one data segment in place without any check.
    pub fn ring_data(&mut self, seg: SegReg, selector: u16) {
        let low = self.env.load64(at::GDT + u64::from(selector & !7));
        self.cpu.state.seg[seg as usize] = Descriptor { low, high: 0 }.segment(selector);
    }

    /// Writes a gate of the IDT: type and rights as in bits 40 to 47.
    pub fn gate(&mut self, number: u8, selector: u16, offset: u64, rights: u8, ist: u8) {
        let low = offset & 0xffff
            | u64::from(selector) << 16
            | u64::from(ist) << 32
            | u64::from(rights) << 40
            | (offset >> 16 & 0xffff) << 48;
        if self.cpu.in_long_mode() {
            self.env.store64(at::IDT + u64::from(number) * 16, low);
            self.env.store64(at::IDT + u64::from(number) * 16 + 8, offset >> 32);
        } else {
            self.env.store64(at::IDT + u64::from(number) * 8, low);
        }
    }

    /// Decodes an instruction and executes it, as the run loop does, if it is one of
    /// [`Cpu::exec_segment_op`]'s.
    pub fn exec(&mut self, code: &[u8]) -> Result<(), Exception> {
        let bits = self.cpu.state.code_bits();
        let rip = self.cpu.state.rip;
        let instruction = Decoder::with_ip(bits, code, rip, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid(), "{code:02x?}");
        let mut bytes = [0; 15];
        bytes[..code.len()].copy_from_slice(code);
        self.cpu.next_rip = rip + instruction.len() as u64;
        assert!(self.cpu.exec_segment_op(&mut self.env, &Op::new(instruction, bytes))?, "{code:02x?}");
        self.cpu.state.rip = self.cpu.next_rip;
        Ok(())
    }

    /// Values of `N` bytes on the stack, from the top on.
    pub fn stack<const N: usize>(&self, size: u64) -> [u64; N] {
        let cpu = &self.cpu;
        let top = cpu.state.seg[2].base + (cpu.state.gpr[gpr::RSP] & cpu.stack_mask());
        core::array::from_fn(|index| {
            let mut bytes = [0; 8];
            self.env.load_bytes(top + size * index as u64, &mut bytes[..size as usize]);
            u64::from_le_bytes(bytes)
        })
    }
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
    fn copy_elements(&self, from: u64, to: u64, count: u64, size: u64, down: bool) {
        self.runs.set(self.runs.get() + 1);
        for index in 0..count {
            let at = size * if down { count - 1 - index } else { index };
            let value = self.element(from + at, size);
            self.store_bytes(to + at, &value.to_le_bytes()[..size as usize]);
        }
    }
    fn fill_elements(&self, to: u64, value: u64, count: u64, size: u64) {
        self.runs.set(self.runs.get() + 1);
        for index in 0..count {
            self.store_bytes(to + index * size, &value.to_le_bytes()[..size as usize]);
        }
    }
    fn compare_elements(
        &self,
        left: u64,
        right: u64,
        count: u64,
        size: u64,
        equal: bool,
    ) -> Option<Compared> {
        let pair =
            |index| (self.element(left + index * size, size), self.element(right + index * size, size));
        self.compare_pairs(pair, count, size, equal)
    }
    fn scan_elements(&self, value: u64, right: u64, count: u64, size: u64, equal: bool) -> Option<Compared> {
        self.compare_pairs(|index| (value, self.element(right + index * size, size)), count, size, equal)
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
        self.host_execution
    }
}
