//! The engine `interp`: every instruction by the interpreter of the x86 crate.

use std::sync::{Arc, Mutex, PoisonError};

use bivisor_machine::engine::{DebugControl, Engine, EngineError, Exit, Vcpu, VcpuSetup};
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpu::{Cpu, RunExit};
use bivisor_x86::state::{CpuState, Mode, SegReg};

use crate::code_tracker::CodeTracker;
use crate::env::VcpuEnv;

/// Instructions between two returns from the interpreter to this module.
const BUDGET: u64 = 1 << 20;

/// The interpreter as an engine.
#[derive(Default)]
pub struct InterpEngine {
    /// The record of cached code, made for the first virtual processor's RAM and shared by all.
    code: Mutex<Option<(Arc<GuestMemory>, Arc<CodeTracker>)>>,
}

impl InterpEngine {
    /// The engine for one VM.
    pub fn new() -> Self {
        Self::default()
    }

    fn tracker(&self, memory: &Arc<GuestMemory>) -> Result<Arc<CodeTracker>, EngineError> {
        let mut code = self.code.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, tracker) =
            code.get_or_insert_with(|| (Arc::clone(memory), Arc::new(CodeTracker::new(memory.size()))));
        if !Arc::ptr_eq(first, memory) {
            return Err(EngineError("all virtual processors of an engine must have the same RAM".into()));
        }
        Ok(Arc::clone(tracker))
    }
}

impl Engine for InterpEngine {
    fn name(&self) -> &'static str {
        "interp"
    }

    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError> {
        let tracker = self.tracker(&setup.memory)?;
        let env = VcpuEnv::new(setup.memory, setup.bus, tracker)
            .map_err(|error| EngineError(format!("the host gives no memory for generated code: {error}")))?;
        let mut cpu = Cpu::new(setup.model);
        cpu.apic_id = index;
        Ok(Box::new(InterpVcpu { cpu, env, single_step: false }))
    }
}

/// A virtual processor of the engine `interp`.
struct InterpVcpu {
    cpu: Cpu,
    env: VcpuEnv,
    single_step: bool,
}

impl InterpVcpu {
    /// Linear address of the next instruction.
    fn next_instruction(&self) -> u64 {
        let state = &self.cpu.state;
        match state.mode() {
            Mode::Long64 => state.rip,
            _ => state.seg[SegReg::Cs as usize].base.wrapping_add(state.rip) & 0xffff_ffff,
        }
    }
}

/// The engine's exit for the interpreter's, unless it shall go on.
fn ended(exit: RunExit) -> Option<Exit> {
    match exit {
        RunExit::Budget => None,
        RunExit::Halted | RunExit::WaitForSipi => Some(Exit::Halt),
        RunExit::Shutdown => Some(Exit::Shutdown),
        RunExit::Kicked => Some(Exit::Kicked),
        RunExit::Breakpoint => Some(Exit::Debug),
    }
}

impl Vcpu for InterpVcpu {
    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.cpu.state.clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.cpu.state = state.clone();
        self.cpu.state_changed();
        Ok(())
    }

    fn run(&mut self) -> Result<Exit, EngineError> {
        let budget = if self.single_step { 1 } else { BUDGET };
        loop {
            if let Some(exit) = ended(self.cpu.run(&mut self.env, budget)) {
                return Ok(exit);
            }
            // The interpreter does not look at the first instruction of its next run.
            if self.single_step || self.cpu.breakpoints.contains(&self.next_instruction()) {
                return Ok(Exit::Debug);
            }
        }
    }

    fn set_debug(&mut self, debug: &DebugControl) -> Result<(), EngineError> {
        self.single_step = debug.single_step;
        self.cpu.breakpoints.clone_from(&debug.breakpoints);
        Ok(())
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        self.cpu.translate(&self.env, linear)
    }
}
