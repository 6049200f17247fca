//! Inputs that nobody would make by accident, a few seconds of each; `cargo xtask fuzz` runs them longer. The frames of
//! a user-mode network are fuzzed beside its other tests.

mod budget;
mod qcow2;
mod virtio;
