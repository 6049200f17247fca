//! The virtual machine in KVM: its memory, and what all vCPUs have in common.
#![allow(unsafe_code)]

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use bivisor_machine::engine::{Engine, EngineError, Vcpu, VcpuSetup};
use bivisor_machine::memory::{GuestMemory, HIGH_RAM_START, LOW_RAM_END};
use bivisor_x86::cpuid::Vendor;
use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Kvm, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};

use crate::msrs;
use crate::probe::Device;
use crate::vcpu::KvmVcpu;

/// Where KVM may put what it needs for real mode on Intel's processors: three pages of task state and one of page tables,
/// below the firmware's place, where the machine has nothing.
const TASK_STATE: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// What KVM did not do, in words that go on after "KVM".
pub(crate) fn failed<E: Display>(what: &str) -> impl Fn(E) -> EngineError + '_ {
    move |error| EngineError(format!("KVM {what}: {error}"))
}

/// One VM in KVM.
pub struct Vm {
    fd: VmFd,
    /// What KVM executes of CPUID's features.
    pub supported: Vec<kvm_cpuid_entry2>,
    /// KVM's memory slots lead here, so it goes last.
    memory: Arc<GuestMemory>,
}

impl Vm {
    /// A VM with this RAM.
    fn new(kvm: &Kvm, memory: Arc<GuestMemory>, vendor: Vendor) -> Result<Self, EngineError> {
        let fd = kvm.create_vm().map_err(failed("makes no virtual machine"))?;
        if vendor == Vendor::Intel {
            fd.set_identity_map_address(IDENTITY_MAP).map_err(failed("refuses its page tables"))?;
            fd.set_tss_address(TASK_STATE).map_err(failed("refuses its task state"))?;
        }
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("tells no CPUID"))?;
        let supported = supported.as_slice().to_vec();
        let vm = Self { fd, supported, memory };
        vm.map_memory().map_err(failed("takes no memory"))?;
        vm.take_msrs().map_err(failed("does not hand over MSRs"))?;
        Ok(vm)
    }

    fn map_memory(&self) -> Result<(), kvm_ioctls::Error> {
        let memory = &self.memory;
        let host = memory.host_base() as u64;
        let parts = [(0, 0, memory.low_size()), (HIGH_RAM_START, LOW_RAM_END, memory.high_size())];
        for (slot, (gpa, offset, size)) in (0..).zip(parts) {
            if size == 0 {
                continue;
            }
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: host + offset,
            };
            // SAFETY: the range lies in RAM's mapping, which `self.memory` keeps longer than the VM, and which is meant to be
            // changed by a guest at any time.
            unsafe { self.fd.set_user_memory_region(region) }?;
        }
        Ok(())
    }

    /// Has KVM leave to us the MSRs that are the machine's, and those that it doesn't know.
    fn take_msrs(&self) -> Result<(), kvm_ioctls::Error> {
        let reasons = MsrExitReason::Inval | MsrExitReason::Unknown | MsrExitReason::Filter;
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        cap.args[0] = reasons.bits().into();
        self.fd.enable_cap(&cap)?;
        let ranges = msrs::TAKEN.map(|number| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: number,
            msr_count: 1,
            bitmap: &[0],
        });
        self.fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
    }

    pub(crate) fn create_vcpu(&self, index: u32) -> Result<VcpuFd, kvm_ioctls::Error> {
        self.fd.create_vcpu(index.into())
    }
}

/// The engine `kvm`, for one VM.
pub struct KvmEngine {
    device: Device,
    /// Made for the first virtual processor's RAM.
    vm: Mutex<Option<Arc<Vm>>>,
}

impl KvmEngine {
    /// The engine on an open device. Whether guests are executed by hardware is not looked at: see [`crate::probe()`].
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), vm: Mutex::default() }
    }

    fn vm(&self, setup: &VcpuSetup) -> Result<Arc<Vm>, EngineError> {
        let mut vm = self.vm.lock().unwrap_or_else(PoisonError::into_inner);
        let vm = match &mut *vm {
            Some(vm) => vm,
            none => {
                let vm = Vm::new(self.device.kvm(), setup.memory.clone(), setup.model.vendor)?;
                none.insert(Arc::new(vm))
            }
        };
        if !Arc::ptr_eq(&vm.memory, &setup.memory) {
            return Err(EngineError("all virtual processors of an engine must have the same RAM".into()));
        }
        Ok(vm.clone())
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, EngineError> {
        let vm = self.vm(&setup)?;
        Ok(Box::new(KvmVcpu::new(vm, index, setup)?))
    }
}
