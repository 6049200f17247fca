//! The x86-64 architecture: registers, modes, segmentation, paging, exceptions, and an interpreter that is
//! the readable specification of what every engine must do.
//!
//! Nothing here knows of a bus, a device or a host: what lies around a CPU is the [`env::Env`] trait.
//! References: "SDM" is the Intel 64 and IA-32 Architectures Software Developer's Manual, "APM" the AMD64
//! Architecture Programmer's Manual.
#![no_std]

extern crate alloc;

pub mod control;
pub mod cpu;
pub mod cpuid;
pub mod debug;
pub mod env;
pub mod exception;
#[cfg(test)]
mod hostile_tests;
pub mod interp;
pub mod interrupt;
pub mod memory;
pub mod msr;
pub mod paging;
pub mod registers;
pub mod segment;
pub mod state;
pub mod syscall;
pub mod system;
pub mod task;
#[cfg(test)]
pub(crate) mod testing;
pub mod tlb;
pub mod transfer;
