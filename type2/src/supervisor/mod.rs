//! Several machines that run in the background: `bivisor up` and the commands that go with it.
//!
//! Each machine is a process of its own (`machine_process.rs`), which does what `bivisor run` does. The supervisor, a
//! process too (`daemon.rs`, `core.rs`, `machine.rs`), starts them, knows them by name and starts them again by policy. It
//! holds nothing that they need: when it is killed they go on, and the next command starts another one, which finds them
//! by what was written down (`record.rs`), by the lock that each process has had since before it existed, and by its number
//! and start time (`process.rs`).

mod commands;
mod core;
mod daemon;
mod machine;
mod machine_process;
mod places;
mod policy;
mod process;
mod protocol;
mod record;

pub use commands::{Command, LONG_HELP, run};
pub use machine_process::tell_ending;
