//! Software engines: they need no virtualization hardware and no privilege.
//!
//! [`interp_vcpu`] interprets every instruction, [`translator`] translates what is 64-bit code. Vector and floating-point instructions are executed by the host's own
//! units ([`host_unit`]).

pub mod code_memory;
pub mod code_tracker;
pub mod engine;
pub mod env;
pub mod host_cpu;
pub mod host_thread;
pub mod host_unit;
pub mod interp_vcpu;
pub mod peers;
pub mod trace;
pub mod translator;

pub use engine::SoftwareEngine;
pub use translator::analysis::host_can_translate;
