//! The translator: the engine `dbt`, x86-64 to x86-64.
//!
//! A block of guest code becomes host code that is the guest's own instructions, with memory operands that go through
//! an inline TLB and registers that are mostly where the guest has them ([`context`]). [`block`] translates,
//! [`cache`] keeps, [`vcpu`] executes and does what translated code leaves undone; whatever is rare is left to the
//! interpreter of the x86 crate, one instruction at a time.

pub mod analysis;
mod biases;
pub mod block;
mod block_index;
pub mod cache;
pub mod checks;
pub mod code32;
pub mod context;
mod decode;
pub mod emit;
mod exits;
pub mod fault;
mod flow;
mod interrupt_return;
pub mod key;
mod names;
mod operand;
mod pause;
mod routines;
mod sensitive;
pub mod shared_code;
pub mod site;
pub mod spaces;
mod stack_moves;
pub mod statistics;
mod values;
pub mod vcpu;
pub mod windows;
mod written_pages;
