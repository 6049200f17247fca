//! The engines as machines see them.
#![allow(unsafe_code)]

use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use bivisor_machine::engine::{Engine, EngineError, Vcpu, VcpuSetup};
use bivisor_machine::memory::GuestMemory;
use bivisor_machine::sync::Mutex;

use crate::guest::HardwareGuest;
use crate::page::PhysicalMap;
use crate::svm::{SvmGuest, SvmMachine, SvmProcessor};
use crate::vcpu::HvmVcpu;
use crate::vmx::{VmxGuest, VmxMachine, VmxProcessor};

/// Address space numbers given out, on all processors; 0 is the host's.
static NEXT_NUMBER: AtomicU32 = AtomicU32::new(1);

/// A processor of the host that is ready to enter guests.
#[derive(Clone)]
pub enum Hardware {
    /// AMD's.
    Svm(Arc<SvmProcessor>),
    /// Intel's.
    Vmx(Arc<VmxProcessor>),
}

impl Hardware {
    /// Switches the virtualization of the current processor on, for good, whichever it has.
    ///
    /// # Errors
    /// It has none, lacks what guests can't do without, or its firmware has forbidden it.
    ///
    /// # Safety
    /// At privilege level 0 in 64-bit mode, on behalf of whoever owns the processor, whose segments, tables and page tables stay
    /// as they are from now on, with a task register that the global descriptor table describes.
    /// Engines of it, and what they make, are used and dropped on this processor only, with interrupts disabled.
    pub unsafe fn enable(map: &dyn PhysicalMap) -> Result<Self, EngineError> {
        // SAFETY: the caller's promises; engines keep the processor as long as there are guests.
        let (amd, intel) = unsafe {
            match SvmProcessor::enable(map) {
                Ok(processor) => return Ok(Self::Svm(Arc::new(processor))),
                Err(amd) => match VmxProcessor::enable(map) {
                    Ok(processor) => return Ok(Self::Vmx(Arc::new(processor))),
                    Err(intel) => (amd, intel),
                },
            }
        };
        Err(EngineError(format!("no virtual machine can run: {amd}; {intel}")))
    }

    /// Its name, as those who choose engines know it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Svm(_) => SvmProcessor::NAME,
            Self::Vmx(_) => VmxProcessor::NAME,
        }
    }

    /// An engine on this processor, for one VM. `map` knows where RAM of guests, and what comes from the global allocator, is
    /// in physical memory. [`Vcpu::run`] must be called with interrupts disabled: where one ends a guest's run, it lets it in
    /// for a moment, and returns [`bivisor_machine::engine::Exit::Kicked`].
    pub fn engine(&self, map: Arc<dyn PhysicalMap>) -> Box<dyn Engine> {
        match self {
            Self::Svm(processor) => Box::new(HvmEngine::new(processor.clone(), map)),
            Self::Vmx(processor) => Box::new(HvmEngine::new(processor.clone(), map)),
        }
    }
}

/// What an engine needs of a maker's processor.
trait HardwareProcessor: Send + Sync + 'static {
    /// What all virtual processors of a machine share.
    type Machine: Send + Sync;
    /// A virtual processor.
    type Guest: HardwareGuest + 'static;
    /// The engine's name.
    const NAME: &'static str;

    fn machine(&self, memory: &GuestMemory, map: &dyn PhysicalMap) -> Self::Machine;

    /// A virtual processor whose address space has this number; nothing if the processor has no such number.
    fn guest(
        self: &Arc<Self>,
        machine: Arc<Self::Machine>,
        number: u32,
        map: &dyn PhysicalMap,
    ) -> Result<Option<Self::Guest>, EngineError>;
}

impl HardwareProcessor for SvmProcessor {
    type Machine = SvmMachine;
    type Guest = SvmGuest;
    const NAME: &'static str = "svm";

    fn machine(&self, memory: &GuestMemory, map: &dyn PhysicalMap) -> SvmMachine {
        SvmMachine::new(memory, map)
    }

    fn guest(
        self: &Arc<Self>,
        machine: Arc<SvmMachine>,
        number: u32,
        map: &dyn PhysicalMap,
    ) -> Result<Option<SvmGuest>, EngineError> {
        let exists = number < self.features().asids;
        Ok(exists.then(|| SvmGuest::new(machine, self.clone(), number, map)))
    }
}

impl HardwareProcessor for VmxProcessor {
    type Machine = VmxMachine;
    type Guest = VmxGuest;
    const NAME: &'static str = "vmx";

    fn machine(&self, memory: &GuestMemory, map: &dyn PhysicalMap) -> VmxMachine {
        VmxMachine::new(memory, self, map)
    }

    fn guest(
        self: &Arc<Self>,
        machine: Arc<VmxMachine>,
        number: u32,
        map: &dyn PhysicalMap,
    ) -> Result<Option<VmxGuest>, EngineError> {
        let Ok(number) = u16::try_from(number) else { return Ok(None) };
        // SAFETY: the promise of `Hardware::enable`.
        unsafe { VmxGuest::new(machine, self.clone(), number, map) }.map(Some)
    }
}

/// The RAM of a VM, and what all its virtual processors share.
type Shared<P> = (Arc<GuestMemory>, Arc<<P as HardwareProcessor>::Machine>);

/// An engine for one VM.
struct HvmEngine<P: HardwareProcessor> {
    processor: Arc<P>,
    map: Arc<dyn PhysicalMap>,
    machine: Mutex<Option<Shared<P>>>,
}

impl<P: HardwareProcessor> HvmEngine<P> {
    fn new(processor: Arc<P>, map: Arc<dyn PhysicalMap>) -> Self {
        Self { processor, map, machine: Mutex::new(None) }
    }

    fn machine(&self, memory: &Arc<GuestMemory>) -> Result<Arc<P::Machine>, EngineError> {
        let mut machine = self.machine.lock();
        let (first, machine) = machine
            .get_or_insert_with(|| (memory.clone(), Arc::new(self.processor.machine(memory, &*self.map))));
        if !Arc::ptr_eq(first, memory) {
            return Err(EngineError("all virtual processors of an engine must have the same RAM".into()));
        }
        Ok(machine.clone())
    }
}

impl<P: HardwareProcessor> Engine for HvmEngine<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError> {
        let machine = self.machine(&setup.memory)?;
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let guest = self.processor.guest(machine, number, &*self.map)?.ok_or_else(|| {
            EngineError("the processor has no more address space numbers for guests".into())
        })?;
        Ok(Box::new(HvmVcpu::new(guest, index, setup)))
    }
}
