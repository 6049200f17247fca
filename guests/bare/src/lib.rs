//! The runtime of the bare-metal guests: PVH start-up, a serial port to print on, an interrupt table that
//! records every trap and can resume after it, page tables, and the PC's interrupt hardware.
//!
//! One CPU, one thread, physical memory mapped one to one below 4 GiB. A guest owns its whole machine and
//! its business is to break rules, so instructions such as a port write or a load of CR3 are offered as
//! plain functions: what they do to the program is what the program is there to find out.
#![no_std]

pub mod acpi;
pub mod apic;
pub mod check;
pub mod cpu;
pub mod global;
pub mod machine;
pub mod memory;
pub mod pic;
pub mod segments;
pub mod serial;
pub mod start;
pub mod time;
pub mod trap;
pub mod user;

pub use check::Suite;
pub use global::Global;
pub use trap::{Trap, catch};
