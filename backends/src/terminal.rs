//! The user's terminal: raw while the guest has it, restored whatever ends the process (SIGKILL excepted).
//!
//! There is one controlling terminal per process, so its saved settings are process-wide: a signal handler and
//! the panic hook must be able to reach them without a lock.
#![allow(unsafe_code)]

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, QueueSelector, Termios, tcflush, tcgetattr, tcsetattr};
use signal_hook::consts;

use crate::stderr_log;

static SAVED: OnceLock<Termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Signals whose default action ends the process and which nobody handles in an orderly way: the terminal is
/// restored, then the default action is taken.
const FATAL: [i32; 11] = [
    consts::SIGABRT,
    consts::SIGALRM,
    consts::SIGBUS,
    consts::SIGIO,
    consts::SIGPROF,
    consts::SIGSYS,
    consts::SIGTRAP,
    consts::SIGUSR1,
    consts::SIGUSR2,
    consts::SIGVTALRM,
    consts::SIGXCPU,
];

/// Signals by which the CPU reports our own faults. The standard library's handler for a stack overflow was there
/// before and is called first.
const FAULTS: [i32; 3] = [consts::SIGSEGV, consts::SIGILL, consts::SIGFPE];

/// The terminal on standard input in raw mode; dropping it restores the settings.
#[must_use]
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts the terminal on standard input into raw mode; `None` if standard input is no terminal. From now on a
    /// panic or a fatal signal restores it.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let saved = tcgetattr(io::stdin().as_fd())?;
        if SAVED.set(saved).is_ok() {
            install_restorers()?;
        }
        set_raw()?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_and_discard_input();
    }
}

/// Whether the terminal is raw now.
pub fn is_raw() -> bool {
    RAW.load(Ordering::Relaxed)
}

/// Restores the terminal, if it is raw. Async-signal-safe.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
    {
        // There is nothing to be done about a terminal that is gone.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, saved);
    }
}

/// Restores the terminal at the end of a session. What was typed or pasted for the guest and not yet read must
/// not become commands of the user's shell.
pub fn restore_and_discard_input() {
    if is_raw() {
        let _ = tcflush(rustix::stdio::stdin(), QueueSelector::IFlush);
    }
    restore();
}

/// Makes the terminal raw again after a stop ([`restore`], SIGSTOP, SIGCONT); nothing happens if it never was.
pub fn set_raw() -> io::Result<()> {
    if let Some(saved) = SAVED.get() {
        let mut raw = saved.clone();
        raw.make_raw();
        RAW.store(true, Ordering::SeqCst);
        tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &raw)?;
    }
    Ok(())
}

/// Writes a message of ours to standard error; in raw mode a line needs its carriage return.
pub fn message(text: &str) {
    let text = if is_raw() { text.replace('\n', "\r\n") } else { text.to_owned() };
    stderr_log::write(text.as_bytes());
}

/// Makes panics and fatal signals restore the terminal.
fn install_restorers() -> io::Result<()> {
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        next(info);
    }));
    for signal in FATAL.into_iter().chain(FAULTS) {
        let action = move || {
            restore();
            // Only fails for an unknown signal.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        };
        // SAFETY: the action is async-signal-safe: atomics, tcsetattr, and what `emulate_default_handler`
        // promises. It never returns to a faulting instruction, because the default action of each of these
        // signals ends the process.
        unsafe { signal_hook_registry::register_signal_unchecked(signal, action) }?;
    }
    Ok(())
}
