//! The software engines, as machines see them.

use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use bivisor_machine::dma::WriteObserver;
use bivisor_machine::engine::{Engine, EngineError, Vcpu, VcpuSetup};
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpu::Cpu;

use crate::code_tracker::CodeTracker;
use crate::env::VcpuEnv;
use crate::interp_vcpu::InterpVcpu;
use crate::peers::Peers;
use crate::translator::vcpu::DbtVcpu;

/// How guest instructions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Interpreter,
    Translator,
}

/// A software engine, for one VM.
pub struct SoftwareEngine {
    kind: Kind,
    /// The record of cached code, made for the first virtual processor's RAM and shared by all.
    code: Mutex<Option<(Arc<GuestMemory>, Arc<CodeTracker>)>>,
    peers: Arc<Peers>,
    /// All code of user mode counts as hot.
    hot: bool,
}

impl SoftwareEngine {
    /// The engine `interp`.
    pub fn interpreter() -> Self {
        Self { kind: Kind::Interpreter, code: Mutex::default(), peers: Arc::default(), hot: false }
    }

    /// The engine `dbt`.
    pub fn translator() -> Self {
        Self { kind: Kind::Translator, code: Mutex::default(), peers: Arc::default(), hot: false }
    }

    /// Lets the translator treat all code of user mode as hot, from its first execution on: for tests, which don't wait
    /// until it is found to be.
    pub fn with_hot_code(self) -> Self {
        Self { hot: true, ..self }
    }

    fn tracker(&self, memory: &Arc<GuestMemory>) -> Result<Arc<CodeTracker>, EngineError> {
        let mut code = self.code.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, tracker) = code.get_or_insert_with(|| {
            let tracker = Arc::new(CodeTracker::new(memory.size()));
            let (code, peers) = (Arc::clone(&tracker), Arc::clone(&self.peers));
            memory.set_observer(Arc::new(DeviceWrites { code, peers }));
            (Arc::clone(memory), tracker)
        });
        if !Arc::ptr_eq(first, memory) {
            return Err(EngineError("all virtual processors of an engine must have the same RAM".into()));
        }
        Ok(Arc::clone(tracker))
    }
}

/// Hears of what devices write to RAM.
struct DeviceWrites {
    code: Arc<CodeTracker>,
    peers: Arc<Peers>,
}

impl WriteObserver for DeviceWrites {
    fn written(&self, offset: u64, length: u64) {
        // The one who marks a page does so with a barrier, but makes no other thread have one because of devices.
        fence(Ordering::SeqCst);
        if self.code.written_range(offset, length) {
            self.peers.wake_all();
        }
    }
}

impl Engine for SoftwareEngine {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Interpreter => "interp",
            Kind::Translator => "dbt",
        }
    }

    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError> {
        let tracker = self.tracker(&setup.memory)?;
        if index > 0 {
            tracker.share();
        }
        let ram = NonNull::new(setup.memory.host_base())
            .ok_or_else(|| EngineError("the machine's RAM has no address".into()))?;
        let env = VcpuEnv::new(setup.memory, setup.bus, tracker, Arc::clone(&self.peers), index)
            .map_err(|error| EngineError(format!("the host gives no memory for generated code: {error}")))?;
        let mut cpu = Cpu::new(setup.model);
        cpu.apic_id = index;
        Ok(match self.kind {
            Kind::Interpreter => Box::new(InterpVcpu::new(cpu, env)),
            Kind::Translator => Box::new(DbtVcpu::new(cpu, env, ram, self.hot)?),
        })
    }
}
