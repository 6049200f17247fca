//! The engine as machines see it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use bivisor_machine::engine::{Engine, EngineError, Vcpu, VcpuSetup};
use bivisor_machine::memory::GuestMemory;
use bivisor_machine::sync::Mutex;

use crate::page::PhysicalMap;
use crate::svm::{NestedTables, SvmGuest, SvmMachine, SvmProcessor};
use crate::vcpu::HvmVcpu;

/// Address space numbers given out, on all processors; 0 is the host's.
static NEXT_ASID: AtomicU32 = AtomicU32::new(1);

/// The engine `svm`, for one VM. Its virtual processors run on the processor that it was made with, and
/// [`Vcpu::run`] must be called with interrupts disabled: where one ends a guest's run, it lets it in for a moment, and returns
/// [`bivisor_machine::engine::Exit::Kicked`].
pub struct SvmEngine {
    processor: Arc<SvmProcessor>,
    map: Arc<dyn PhysicalMap>,
    machine: Mutex<Option<(Arc<GuestMemory>, Arc<SvmMachine>)>>,
}

impl SvmEngine {
    /// An engine on this processor. `map` knows where RAM of guests, and what comes from the global allocator, is in
    /// physical memory.
    pub fn new(processor: Arc<SvmProcessor>, map: Arc<dyn PhysicalMap>) -> Self {
        Self { processor, map, machine: Mutex::new(None) }
    }

    fn machine(&self, memory: &Arc<GuestMemory>) -> Result<Arc<SvmMachine>, EngineError> {
        let mut machine = self.machine.lock();
        let (first, machine) = machine.get_or_insert_with(|| {
            let nested = NestedTables::new(memory, &*self.map);
            (memory.clone(), Arc::new(SvmMachine::new(nested)))
        });
        if !Arc::ptr_eq(first, memory) {
            return Err(EngineError("all virtual processors of an engine must have the same RAM".into()));
        }
        Ok(machine.clone())
    }
}

impl Engine for SvmEngine {
    fn name(&self) -> &'static str {
        "svm"
    }

    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError> {
        let machine = self.machine(&setup.memory)?;
        let asid = NEXT_ASID.fetch_add(1, Ordering::Relaxed);
        if asid >= self.processor.features().asids {
            return Err(EngineError("the processor has no more address space numbers for guests".into()));
        }
        let guest = SvmGuest::new(machine, self.processor.clone(), asid, &*self.map);
        Ok(Box::new(HvmVcpu::new(guest, index, setup)))
    }
}
