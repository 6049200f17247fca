//! Intel's VT-x: virtual-machine extensions (SDM Vol. 3C and 3D, chapters 24 to 32).

mod controls;
mod exit;
mod field;
mod guest;
mod host_state;
mod memory_type;
mod permissions;
mod processor;
mod state;
mod switch;

pub use guest::{VmxGuest, VmxMachine};
pub use processor::VmxProcessor;
