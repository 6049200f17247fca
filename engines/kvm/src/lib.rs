//! The engine `kvm`: the CPU's virtualization, through Linux' KVM (Linux, Documentation/virt/kvm/api.rst).
//!
//! KVM executes instructions and keeps page tables, and that is all that is asked of it: local APICs, I/O APIC and PIC are
//! the machine's own, as on every other engine. So interrupts are injected when KVM says that the guest can take them
//! ([`vcpu`]), and what the guest does with its local APIC comes back as MMIO and MSR exits. Of the paravirtual interface
//! KVM itself gives what belongs to time ([`cpuid`]); the rest is the machine's.

pub mod cpuid;
mod debug;
pub mod engine;
pub mod ioctls;
mod kick;
mod msrs;
pub mod probe;
mod registers;
pub mod vcpu;

pub use engine::KvmEngine;
pub use probe::{Device, Unusable, probe};
