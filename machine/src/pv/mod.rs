//! KVM's paravirtual interface, which stock Linux speaks (Linux, Documentation/virt/kvm/x86: cpuid.rst, msr.rst,
//! hypercalls.rst): what a guest asks for instead of being interrupted or emulated.
//!
//! A guest finds it by CPUID ([`cpuid`]) and gives, by MSRs ([`Processor`]), addresses in its RAM where it wants to find
//! the time ([`clock`]), whether an interrupt needs no EOI ([`eoi`]), and how long the host let it wait ([`steal`]); it
//! calls by VMCALL or VMMCALL ([`hypercall`]). An address is only followed if all that is to be written lies in RAM.

pub mod clock;
pub mod cpuid;
pub mod eoi;
pub mod hypercall;
mod processor;
pub mod steal;

pub use processor::{Paravirt, Processor, SavedProcessor, msr};
