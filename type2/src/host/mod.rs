//! Linux as the machine's host: memory, time, wake-ups, signals.

pub mod alarm;
pub mod clock;
pub mod log;
pub mod memory;
pub mod signals;
