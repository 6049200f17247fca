//! A guest that executes one test in user mode, until HLT, which is not allowed there.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use bivisor_dbt::SoftwareEngine;
use bivisor_machine::engine::{EmptyBus, Engine, Exit, VcpuSetup};
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::registers::{Cr4, Rflags, gpr};
use bivisor_x86::state::{CpuState, SegReg, Segment};

use super::Verdict;
use super::config::Config;
use crate::layout::{PAGE, USER_CS_32BIT, USER_SS};
use crate::system::{self, KERNEL_CS, PageTables, SYSTEM_PAGE, USER, WITH_ERROR_CODE, WRITABLE, pages};

/// Linear address of the code.
const CODE: u64 = 0x1_0000;
/// Memory that every test has: address and size.
const REGIONS: [(u64, u64); 2] = [(0xe000_0000, 10 * PAGE), (0xe800_0000 - PAGE, 2 * PAGE)];
/// The stack of 32-bit tests.
const STACK_32BIT: (u64, u64) = (0xc000_0000, PAGE);
/// Bytes of memory at most.
const LIMIT: u64 = 64 << 20;
/// Physical addresses.
const TABLES: u64 = 0x1000;
const SYSTEM: u64 = 0x10_0000;
const KERNEL_STACK_END: u64 = SYSTEM + 3 * PAGE;
const FIRST_PAGE: u64 = 0x20_0000;
/// Linear addresses.
const HANDLERS: u64 = SYSTEM_PAGE + PAGE;
const STACK_END: u64 = SYSTEM_PAGE + 3 * PAGE;
/// Offset of the local descriptor table in the system page.
const LDT: u64 = 0x600;
/// How long a test may take.
const PATIENCE: Duration = Duration::from_secs(30);
const HLT: u8 = 0xf4;
/// Error code of INT 80h, for which there is no gate.
const INT_80H: u64 = 0x80 << 3 | 2;
/// Number of the handler that SYSCALL leads to.
const SYSTEM_CALL: u64 = 40;

/// Executes a test's code on an engine. Returns the state at its HLT, or why there is none.
///
/// # Errors
/// What happened instead.
pub fn execute(
    engine: &SoftwareEngine,
    model: &Arc<CpuModel>,
    config: &Config,
    code: &[u8],
) -> Result<CpuState, Verdict> {
    let (memory, state) = guest(config, code).map_err(Verdict::Skipped)?;
    let bus = Arc::new(EmptyBus::default());
    let setup = VcpuSetup {
        memory: Arc::clone(&memory),
        bus: Arc::<EmptyBus>::clone(&bus),
        model: Arc::clone(model),
    };
    let mut vcpu = engine.create_vcpu(0, setup).map_err(failed)?;
    vcpu.set_state(&state).map_err(failed)?;
    let (done, is_done) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        if is_done.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            bus.kick();
        }
    });
    let ran = catch_unwind(AssertUnwindSafe(|| vcpu.run()));
    drop(done);
    let _ = watch.join();
    match ran {
        Ok(Ok(Exit::Halt)) => {}
        Ok(Ok(Exit::Kicked)) => return Err(failed(format!("it did not end within {PATIENCE:?}"))),
        Ok(Ok(exit)) => return Err(failed(format!("the engine ended with {exit:?}"))),
        Ok(Err(error)) => return Err(failed(format!("the engine gave up: {error}"))),
        Err(_) => return Err(failed("the engine panicked")),
    }
    let mut state = vcpu.state().map_err(failed)?;
    before_exception(&memory, &mut state)?;
    let mut last = [0];
    let is_read = vcpu.translate(state.rip).is_some_and(|place| memory.read(place, &mut last).is_ok());
    if !is_read || last != [HLT] {
        return Err(failed(format!("exception 13, RIP {:#x}", state.rip)));
    }
    Ok(state)
}

fn failed(what: impl std::fmt::Display) -> Verdict {
    Verdict::Failed(what.to_string())
}

/// Takes the state before the exception from the supervisor's stack, if the exception may be that of HLT.
fn before_exception(memory: &GuestMemory, state: &mut CpuState) -> Result<(), Verdict> {
    let vector = state.rip.wrapping_sub(HANDLERS) / 16;
    if vector == SYSTEM_CALL {
        return Err(Verdict::Skipped("it makes system calls".into()));
    }
    let mut stack = state.gpr[gpr::RSP].wrapping_sub(STACK_END) + KERNEL_STACK_END;
    let mut pop = || {
        stack += 8;
        memory.load64(stack - 8)
    };
    let error = if vector < 32 && WITH_ERROR_CODE >> vector & 1 != 0 { pop() } else { 0 };
    (state.rip, _, state.rflags, state.gpr[gpr::RSP]) = (pop(), pop(), pop(), pop());
    if vector == 13 && error == INT_80H {
        return Err(Verdict::Skipped("it makes system calls".into()));
    }
    if vector != 13 || error != 0 {
        let place = if vector == 14 { format!(" at {:#x}", state.cr2) } else { String::new() };
        return Err(failed(format!("exception {vector} ({error:#x}){place}, RIP {:#x}", state.rip)));
    }
    Ok(())
}

/// Memory and first state of the guest for a test.
fn guest(config: &Config, code: &[u8]) -> Result<(Arc<GuestMemory>, CpuState), String> {
    let code_region = (CODE, code.len() as u64);
    let mut regions: Vec<(u64, u64)> = REGIONS.into_iter().chain([code_region]).collect();
    regions.extend(config.is_32bit.then_some(STACK_32BIT));
    regions.extend(&config.regions);
    let total: u64 = regions.iter().fold(0, |total, (_, size)| total.saturating_add(*size));
    if total > LIMIT {
        return Err(format!("it asks for {total:#x} bytes of memory"));
    }
    let linear: BTreeSet<u64> = regions
        .iter()
        .flat_map(|(address, size)| {
            let first = address & !(PAGE - 1);
            (first..address.saturating_add(*size)).step_by(PAGE as usize)
        })
        .collect();
    let memory = Arc::new(GuestMemory::on_heap((FIRST_PAGE + linear.len() as u64 * PAGE) as usize));
    let mut tables = PageTables::new(&memory, TABLES);
    let physical = |address: u64| {
        let number = linear.range(..=address).count() as u64 - 1;
        linear.contains(&(address & !(PAGE - 1))).then_some(FIRST_PAGE + number * PAGE + address % PAGE)
    };
    for (page, place) in linear.iter().zip((FIRST_PAGE..).step_by(PAGE as usize)) {
        tables.map(*page, place, USER | WRITABLE);
    }
    for page in pages(3 * PAGE as usize) {
        tables.map(SYSTEM_PAGE + page, SYSTEM + page, WRITABLE);
    }
    system::write_tables(&memory, SYSTEM, HANDLERS, STACK_END, false);
    write_ldt(&memory);
    for vector in 0..=SYSTEM_CALL {
        memory.store8(SYSTEM + PAGE + 16 * vector, HLT);
    }
    let contents = config.memory.iter().map(|(address, bytes)| (*address, &bytes[..])).chain([(CODE, code)]);
    for (address, bytes) in contents {
        for (at, byte) in (address..).zip(bytes) {
            let place = physical(at).ok_or_else(|| format!("it fills memory at {at:#x}, where none is"))?;
            memory.store8(place, *byte);
        }
    }
    Ok((memory, first_state(config.is_32bit)))
}

/// Flat 32-bit segments of user mode, for code, data and the stack, where the tests of FEX expect them.
fn write_ldt(memory: &GuestMemory) {
    for (entry, access) in [(1, 0xfb), (2, 0xf3), (3, 0xf3)] {
        memory.store64(SYSTEM + LDT + 8 * entry, system::descriptor(access, false));
    }
}

fn first_state(is_32bit: bool) -> CpuState {
    let mut state = system::initial_state(TABLES);
    state.rip = CODE;
    state.rflags = (Rflags::IF | Rflags::FIXED).bits();
    state.seg[SegReg::Fs as usize].base = 0;
    state.seg[SegReg::Gs as usize].base = 0;
    (state.msr.star, state.msr.lstar) = (KERNEL_CS << 32, HANDLERS + 16 * SYSTEM_CALL);
    // Linux emulates what UMIP forbids.
    state.cr4 &= !Cr4::UMIP.bits();
    state.ldtr = Segment { base: SYSTEM_PAGE + LDT, limit: 0x1f, selector: 0x48, attributes: 0x82 };
    if is_32bit {
        let flat = |selector, attributes| Segment { base: 0, limit: u32::MAX, selector, attributes };
        state.seg[SegReg::Cs as usize] = flat(USER_CS_32BIT, 0xc0fb);
        for register in [SegReg::Ds, SegReg::Es, SegReg::Ss] {
            state.seg[register as usize] = flat(USER_SS, 0xc0f3);
        }
    }
    state
}
