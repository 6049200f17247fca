//! Threads by what they do. Whoever confines the process decides by that what each of them may ask of the host.

use std::io;
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Supervises the machine, and makes it anew after a reset.
    Main,
    /// Executes a virtual processor, and with it what the guest asks of devices.
    Vcpu,
    /// Tells devices that a deadline has come.
    Timer,
    /// Carries out requests to a disk.
    Disk,
    /// The user-mode network.
    NetUser,
    /// Takes frames from a tap.
    NetTap,
    /// Takes frames from the other members of a switch.
    NetSwitch,
    /// Sends frames that a limit has held up.
    NetLimit,
    /// Stream sockets between guest and host.
    Vsock,
    /// Reads what is typed at a console, and accepts its clients.
    ConsoleIn,
    /// Writes a console's output.
    ConsoleOut,
    /// Hears signals.
    Signals,
    /// Writes the log.
    Log,
    /// Serves a debugger.
    Debugger,
    /// Takes orders of a supervisor.
    Control,
}

impl Role {
    /// What such a thread is for, in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "supervision",
            Self::Vcpu => "a virtual processor",
            Self::Timer => "timers",
            Self::Disk => "a disk",
            Self::NetUser => "the user-mode network",
            Self::NetTap => "a tap",
            Self::NetSwitch => "a switch",
            Self::NetLimit => "a network's limits",
            Self::Vsock => "stream sockets",
            Self::ConsoleIn => "a console's input",
            Self::ConsoleOut => "a console's output",
            Self::Signals => "signals",
            Self::Log => "the log",
            Self::Debugger => "the debugger",
            Self::Control => "a supervisor's orders",
        }
    }
}

type Entry = Box<dyn Fn(Role) + Send + Sync>;

static ENTRY: OnceLock<Entry> = OnceLock::new();

/// From now on, each new thread calls this before it does anything else. Only the first call counts.
pub fn on_entry(entry: impl Fn(Role) + Send + Sync + 'static) {
    let _ = ENTRY.set(Box::new(entry));
}

/// Starts a thread.
///
/// # Errors
/// The host has none to give.
pub fn spawn(role: Role, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).spawn(move || {
        if let Some(entry) = ENTRY.get() {
            entry(role);
        }
        body();
    })
}
