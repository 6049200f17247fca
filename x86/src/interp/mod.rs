//! The interpreter: one instruction after the other, as the manuals describe it.

pub mod op;
pub mod operand;
pub mod vector;
