//! The interpreter: one instruction after the other, as the manuals describe it.

mod fpu_state;
pub mod op;
pub mod operand;
pub mod segment_ops;
pub mod vector;
mod vector_memory;
