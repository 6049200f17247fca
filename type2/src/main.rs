//! Bivisor as a Linux program.
fn main() {}
