//! The interpreter: one instruction after the other, as the manuals describe it.
//!
//! `run` is the loop over events and instructions, `cache` keeps decoded ones, `decode` and `op` make them,
//! `dispatch` executes the frequent ones and knows who executes the others.

mod bits;
pub(crate) mod cache;
mod control;
#[cfg(test)]
mod coverage_tests;
mod data;
mod decimal;
pub mod decode;
mod dispatch;
mod flag_instructions;
pub(crate) mod flags;
mod fpu_state;
#[cfg(test)]
mod integer_tests;
mod multiply;
pub mod op;
pub mod operand;
mod port;
mod processor;
mod run;
pub mod segment_ops;
mod stack;
mod string;
mod string_runs;
#[cfg(test)]
mod string_tests;
#[cfg(test)]
mod tests;
pub mod vector;
mod vector_memory;
