//! The hardware engine: guests run on the processor itself, which leaves them where the hypervisor must act. For a
//! hypervisor that owns the machine, in privilege level 0.
//!
//! The seam is [`guest::HardwareGuest`]: one virtual processor as the hardware keeps it, to be entered until something ends
//! that ([`guest::Cause`]). [`svm`] is AMD's, [`vmx`] is Intel's. Above the seam ([`vcpu`]) nothing knows whose hardware it is: what a
//! guest may not do by itself is executed, one instruction at a time, by the interpreter of the x86 crate, the same that
//! executes everything on the engine `interp`.
//!
//! "APM" is the AMD64 Architecture Programmer's Manual, "SDM" Intel's Software Developer's Manual.
#![no_std]

extern crate alloc;

pub mod engine;
mod env;
pub mod guest;
pub mod host;
mod nested;
mod page;
pub mod svm;
pub mod vcpu;
pub mod vmx;

pub use engine::Hardware;
pub use page::PhysicalMap;
