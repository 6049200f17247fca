//! The virtual processor above a guest that only pretends to be hardware.

use super::*;
use crate::guest::PortAccess;
use alloc::sync::Arc;
use alloc::vec;
use bivisor_machine::engine::VcpuBus;
use bivisor_machine::host::Waker;
use bivisor_machine::memory::GuestMemory;
use bivisor_machine::sync::Mutex;
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::exception::Exception;
use bivisor_x86::registers::gpr;
use bivisor_x86::state::{SegReg, Segment};

/// Leaves for the causes it was given, the last one first, and notes how it was entered.
struct Script {
    lefts: Vec<Left>,
    entries: Arc<Mutex<Vec<Entry>>>,
}

impl HardwareGuest for Script {
    const KEEPS_PDPTES: bool = false;
    fn run(&mut self, _: &mut CpuState, entry: &Entry) -> Result<Left, EngineError> {
        self.entries.lock().push(*entry);
        Ok(self.lefts.pop().unwrap_or(Left { cause: Cause::Host, delivering: None }))
    }
}

/// Events to be taken in order, and what was written to ports.
#[derive(Default)]
struct Bus {
    events: Mutex<Vec<Event>>,
    ports: Mutex<Vec<(u16, u32)>>,
    devices: Mutex<Vec<(u64, u64)>>,
}

impl VcpuBus for Bus {
    fn mmio_read(&self, _: u64, _: usize) -> u64 {
        0x1234_5678
    }
    fn mmio_write(&self, gpa: u64, _: usize, value: u64) {
        self.devices.lock().push((gpa, value));
    }
    fn port_in(&self, _: u16, _: usize) -> u32 {
        0x5a
    }
    fn port_out(&self, port: u16, _: usize, value: u32) {
        self.ports.lock().push((port, value));
    }
    fn has_event(&self) -> bool {
        !self.events.lock().is_empty()
    }
    fn set_observer(&self, _: Arc<dyn Waker>) {}
    fn take_event(&self, interrupts: bool, nmis: bool) -> Option<Event> {
        let mut events = self.events.lock();
        let at = events.iter().position(|event| match event {
            Event::Interrupt(_) => interrupts,
            Event::Nmi => nmis,
            _ => true,
        })?;
        Some(events.remove(at))
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _: u32, _: u64) -> bool {
        false
    }
    fn on_init(&self) {}
    fn tsc_offset(&self) -> u64 {
        7
    }
    fn set_tsc(&self, _: u64) {}
    fn hypercall(&self, _: &CpuState) -> Option<u64> {
        None
    }
}

struct Rig {
    vcpu: HvmVcpu<Script>,
    bus: Arc<Bus>,
    entries: Arc<Mutex<Vec<Entry>>>,
}

/// In flat 32-bit mode at 1000h, where `code` is, to be left for these causes in this order.
fn rig(code: &[u8], causes: &[Cause]) -> Rig {
    let memory = Arc::new(GuestMemory::on_heap(1 << 20));
    memory.write(0x1000, code).unwrap();
    let bus = Arc::new(Bus::default());
    let entries = Arc::new(Mutex::new(vec![]));
    let lefts = causes.iter().rev().map(|cause| Left { cause: *cause, delivering: None }).collect();
    let setup = VcpuSetup { memory, bus: bus.clone(), model: Arc::new(CpuModel::reference(1)) };
    let mut vcpu = HvmVcpu::new(Script { lefts, entries: entries.clone() }, 0, setup);
    let mut state = CpuState { cr0: 0x11, rip: 0x1000, ..CpuState::default() };
    let flat = |attributes| Segment { base: 0, limit: u32::MAX, selector: 8, attributes };
    state.seg = [flat(0xc093); 6];
    state.seg[SegReg::Cs as usize] = flat(0xc09b);
    state.gpr[gpr::RSP] = 0x8000;
    vcpu.set_state(&state).unwrap();
    Rig { vcpu, bus, entries }
}

/// OUT of a string, or whatever stands there.
const PORT: Cause = Cause::Instruction(Kind::PortString);

const fn access(input: bool, size: usize, next_rip: u64) -> Cause {
    Cause::Port(PortAccess { port: 0x80, size, input, next_rip })
}

#[test]
fn an_instruction_of_a_port_is_executed_by_the_interpreter() {
    // out 0x80, al; in al, 0x60
    let mut rig = rig(&[0xe6, 0x80, 0xe4, 0x60], &[PORT, PORT]);
    rig.vcpu.cpu.state.gpr[gpr::RAX] = 0x77;
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(*rig.bus.ports.lock(), [(0x80, 0x77)]);
    let state = rig.vcpu.state().unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (0x1004, 0x5a));
    let entries = rig.entries.lock();
    assert_eq!(entries.len(), 3);
    assert!(entries[0].flush && !entries[1].flush && entries[0].tsc_offset == 7);
}

#[test]
fn what_the_processor_has_decoded_is_not_decoded_again() {
    // Nothing is there to be executed by the interpreter.
    let mut rig = rig(&[], &[access(false, 2, 0x1001), access(true, 1, 0x1003), access(true, 4, 0x1005)]);
    rig.vcpu.cpu.state.gpr[gpr::RAX] = 0x1111_2222_3333_4444;
    rig.vcpu.cpu.state.interrupt_shadow = true;
    rig.vcpu.run().unwrap();
    assert_eq!(*rig.bus.ports.lock(), [(0x80, 0x4444)]);
    let state = rig.vcpu.state().unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RAX], state.interrupt_shadow), (0x1005, 0x5a, false));
    let mut rig = self::rig(&[0xe4, 0x80], &[access(true, 1, 0x1002)]);
    rig.vcpu.cpu.state.gpr[gpr::RAX] = 0x1111_2222_3333_4444;
    // A single-stepped one is the interpreter's, for its trap; here there is no handler, and no machine any more.
    rig.vcpu.cpu.state.rflags |= Rflags::TF.bits();
    rig.vcpu.cpu.state.idtr.limit = 0;
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Shutdown);
    assert_eq!(rig.vcpu.state().unwrap().gpr[gpr::RAX], 0x1111_2222_3333_445a);
}

#[test]
fn a_device_in_memory_is_written() {
    // mov [0xfee000b0], eax
    let mut rig = rig(&[0xa3, 0xb0, 0, 0xe0, 0xfe], &[Cause::Unmapped(0xfee0_00b0)]);
    rig.vcpu.cpu.state.gpr[gpr::RAX] = 9;
    rig.vcpu.run().unwrap();
    assert_eq!(*rig.bus.devices.lock(), [(0xfee0_00b0, 9)]);
    assert_eq!(rig.vcpu.state().unwrap().rip, 0x1005);
}

#[test]
fn a_change_of_control_registers_flushes_the_translations() {
    // mov cr0, eax
    let mut rig = rig(&[0x0f, 0x22, 0xc0], &[Cause::Instruction(Kind::ControlRegister)]);
    rig.vcpu.cpu.state.gpr[gpr::RAX] = 0x1_0011;
    rig.vcpu.run().unwrap();
    assert_eq!(rig.vcpu.state().unwrap().cr0, 0x1_0011);
    assert!(rig.entries.lock()[1].flush);
}

#[test]
fn an_interrupt_waits_for_its_window() {
    let mut rig = rig(&[0x90], &[]);
    rig.bus.events.lock().push(Event::Interrupt(0x40));
    rig.vcpu.run().unwrap();
    let first = rig.entries.lock()[0];
    assert_eq!((first.injection, first.interrupt_window), (None, true));
    rig.vcpu.cpu.state.rflags |= Rflags::IF.bits();
    rig.vcpu.run().unwrap();
    let second = rig.entries.lock()[1];
    assert_eq!((second.injection, second.interrupt_window), (Some(Injection::Interrupt(0x40)), false));
}

#[test]
fn an_nmi_waits_for_the_end_of_the_last_one_and_opens_no_window() {
    let mut rig = rig(&[0x90], &[]);
    rig.vcpu.cpu.state.rflags |= Rflags::IF.bits();
    rig.bus.events.lock().extend([Event::Nmi, Event::Nmi]);
    rig.vcpu.run().unwrap();
    rig.vcpu.run().unwrap();
    let entries = rig.entries.lock();
    assert_eq!((entries[0].injection, entries[1].injection), (Some(Injection::Nmi), None));
    assert!(!entries[1].interrupt_window && rig.vcpu.cpu.state.nmi_blocked);
}

#[test]
fn halted_until_an_event() {
    let mut rig = rig(&[0xfb, 0xf4], &[Cause::Instruction(Kind::Other), Cause::Instruction(Kind::Halt)]);
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Halt);
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Halt);
    assert_eq!(rig.entries.lock().len(), 2);
    rig.bus.events.lock().push(Event::Interrupt(0x41));
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(rig.entries.lock()[2].injection, Some(Injection::Interrupt(0x41)));
}

#[test]
fn what_did_not_arrive_is_injected_again() {
    let mut rig = rig(&[0x90], &[]);
    rig.vcpu.guest.lefts = vec![Left { cause: Cause::Host, delivering: Some(Injection::Interrupt(0x42)) }];
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Kicked);
    rig.vcpu.run().unwrap();
    assert_eq!(rig.entries.lock()[1].injection, Some(Injection::Interrupt(0x42)));
}

#[test]
fn a_delivery_that_meets_a_device_is_made_in_software() {
    let mut rig = rig(&[0x90], &[]);
    // No IDT: the delivery ends in a triple fault, as on the hardware.
    rig.vcpu.cpu.state.idtr.limit = 0;
    rig.vcpu.guest.lefts =
        vec![Left { cause: Cause::Unmapped(0xd000_0000), delivering: Some(Injection::Interrupt(0x42)) }];
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Shutdown);
}

#[test]
fn intercepted_exceptions_reach_the_guest() {
    let mut rig = rig(&[0x90], &[Cause::Exception(Exception::AC0), Cause::Shutdown]);
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Shutdown);
    assert_eq!(rig.entries.lock()[1].injection, Some(Injection::Exception(Exception::AC0)));
}

#[test]
fn exits_are_counted_by_kind() {
    let mut rig = rig(&[0xe6, 0x80, 0xe6, 0x80], &[PORT, PORT]);
    rig.vcpu.run().unwrap();
    let statistics = rig.vcpu.statistics();
    let count = |words: &str| statistics.iter().find(|(name, _)| name == words).map(|(_, count)| *count);
    assert_eq!(count("exits for strings of ports"), Some(2));
    assert_eq!(count("exits for interrupts of the host"), Some(1));
    assert_eq!(count("exits for CPUID"), Some(0));
}

#[test]
fn a_run_without_an_interrupt_of_the_host_ends_all_the_same() {
    let mut rig = rig(&[], &vec![access(true, 1, 0x1000); 2 * MAX_EXITS as usize]);
    assert_eq!(rig.vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(rig.entries.lock().len(), MAX_EXITS as usize);
}
