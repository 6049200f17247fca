//! What the machine's devices are backed by on Linux.

pub mod console;
pub mod disk;
pub mod net;
pub mod rate;
pub mod runtime;
pub mod stderr_log;
pub mod terminal;
pub mod thread;
pub mod vsock;
