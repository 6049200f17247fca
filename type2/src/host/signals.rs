//! Signals of the host: an orderly end, and a terminal that is never left raw while the process is stopped.

use std::io;

use bivisor_backends::terminal;
use bivisor_backends::thread::{Role, spawn};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::{Handle, Signals};

/// Somebody who hears signals, until dropped.
#[must_use]
pub struct Watch(Handle);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Starts a thread that calls `end` with the number of the first signal that asks for the end. A second one ends
/// the process at once, so that nothing that hangs can keep it.
pub fn watch(end: impl Fn(i32) + Send + 'static) -> io::Result<Watch> {
    let mut signals = Signals::new([SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP])?;
    let watch = Watch(signals.handle());
    spawn(Role::Signals, "signals", move || {
        let mut ending = false;
        for signal in signals.forever() {
            match signal {
                // The terminal is the user's while we are stopped, and raw again when we go on.
                SIGTSTP => {
                    let raw = terminal::is_raw();
                    terminal::restore();
                    let _ = signal_hook::low_level::emulate_default_handler(SIGTSTP);
                    if raw {
                        let _ = terminal::set_raw();
                    }
                }
                // After SIGSTOP, which nobody hears of, the shell has set the terminal to its own liking.
                SIGCONT => {
                    if terminal::is_raw() {
                        let _ = terminal::set_raw();
                    }
                }
                _ if ending => {
                    terminal::restore_and_discard_input();
                    std::process::exit(crate::status::of_signal(signal).into());
                }
                _ => {
                    ending = true;
                    end(signal);
                }
            }
        }
    })?;
    Ok(watch)
}

/// A signal's name.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}
