//! What a tracer is told, for both engines.

use bivisor_machine::engine::Tracer;
use bivisor_x86::cpu::{Access, Cpu};
use bivisor_x86::env::Env;
use bivisor_x86::paging::Place;
use bivisor_x86::state::Activity;

use crate::env::VcpuEnv;

/// Bytes of an instruction at most.
const LONGEST: usize = 15;
/// Size of a page.
const PAGE: u64 = 4096;

/// Somebody who hears what a processor executes, or nobody.
#[derive(Default)]
pub struct Trace(Option<Box<dyn Tracer>>);

impl Trace {
    /// Tells this tracer from now on.
    pub fn set(&mut self, tracer: Box<dyn Tracer>) {
        self.0 = Some(tracer);
    }

    /// Whether somebody hears.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The processor is about to execute what stands at its instruction pointer.
    #[inline]
    pub fn note(&mut self, cpu: &mut Cpu, env: &mut VcpuEnv) {
        if let Some(tracer) = &mut self.0
            && cpu.state.activity == Activity::Running
        {
            let mut bytes = [0; LONGEST];
            let length = code(cpu, env, &mut bytes);
            tracer.about_to_execute(&cpu.state, &bytes[..length]);
        }
    }
}

/// Reads the bytes at the instruction pointer as far as they lie in its page; how many these are. The page is looked up
/// as its execution does at once.
fn code(cpu: &mut Cpu, env: &mut VcpuEnv, bytes: &mut [u8; LONGEST]) -> usize {
    let linear = cpu.code_address(cpu.state.rip);
    let Ok(Place::Ram(offset)) = cpu.probe(env, linear, Access::Execute) else { return 0 };
    let length = LONGEST.min((PAGE - offset % PAGE) as usize);
    env.load_bytes(offset, &mut bytes[..length]);
    length
}
