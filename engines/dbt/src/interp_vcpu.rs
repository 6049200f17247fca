//! A virtual processor of the engine `interp`: every instruction by the interpreter of the x86 crate.

use bivisor_machine::engine::{DebugControl, EngineError, Exit, Tracer, Vcpu};
use bivisor_x86::cpu::{Cpu, RunExit};
use bivisor_x86::state::CpuState;

use crate::env::VcpuEnv;
use crate::trace::Trace;

/// Instructions between two returns from the interpreter to this module.
const BUDGET: u64 = 1 << 20;

/// A virtual processor of the engine `interp`.
pub struct InterpVcpu {
    cpu: Cpu,
    env: VcpuEnv,
    single_step: bool,
    trace: Trace,
}

impl InterpVcpu {
    /// A processor over `cpu` and its surroundings.
    pub fn new(cpu: Cpu, env: VcpuEnv) -> Self {
        Self { cpu, env, single_step: false, trace: Trace::default() }
    }
}

/// Interprets until something ends it; for a debugger, at most one instruction, or to a breakpoint.
pub(crate) fn run(cpu: &mut Cpu, env: &mut VcpuEnv, single_step: bool, trace: &mut Trace) -> Exit {
    let budget = if single_step || trace.is_on() { 1 } else { BUDGET };
    loop {
        if trace.is_on() {
            // An event comes first: what it interrupts is not executed yet.
            if let Some(exit) = ended(cpu.run(env, 0)) {
                return exit;
            }
            trace.note(cpu, env);
        }
        let exit = cpu.run(env, budget);
        // All stores pass by the record here.
        env.take_newly_marked();
        if let Some(exit) = ended(exit) {
            return exit;
        }
        // The interpreter does not look at the first instruction of its next run.
        if single_step || cpu.breakpoints.contains(&cpu.code_address(cpu.state.rip)) {
            return Exit::Debug;
        }
    }
}

/// The engine's exit for the interpreter's, unless it shall go on.
pub(crate) fn ended(exit: RunExit) -> Option<Exit> {
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
        Ok(run(&mut self.cpu, &mut self.env, self.single_step, &mut self.trace))
    }

    fn set_debug(&mut self, debug: &DebugControl) -> Result<(), EngineError> {
        self.single_step = debug.single_step;
        self.cpu.breakpoints.clone_from(&debug.breakpoints);
        Ok(())
    }

    fn set_tracer(&mut self, tracer: Box<dyn Tracer>) {
        self.trace.set(tracer);
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        self.cpu.translate(&self.env, linear)
    }
}
