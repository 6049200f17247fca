//! AMD-V: secure virtual machine (APM Vol. 2, chapter 15).

mod exit;
mod guest;
mod permissions;
mod processor;
mod switch;
mod vmcb;

pub use guest::{SvmGuest, SvmMachine};
pub use processor::{Features, SvmProcessor};
