//! Bivisor as a Linux program.
mod image;
fn main() {}
