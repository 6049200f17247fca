//! Exit statuses: every way a run can end has one of its own. They are even, except those of signals, so that
//! `--testdev`'s (value << 1) | 1 can be told from ours.

/// The guest powered off, or the command did what it was asked.
pub const SUCCESS: u8 = 0;
/// The command line was wrong.
pub const USAGE: u8 = 2;
/// A configuration, kernel, initrd or other input could not be used.
pub const CONFIGURATION: u8 = 4;
/// The host refused something: memory, a thread, a terminal, an engine.
pub const HOST: u8 = 6;
/// The guest crashed: a triple fault.
pub const CRASH: u8 = 8;
/// The guest reset the machine and `--no-reboot` was given.
pub const RESET: u8 = 10;
/// The user ended the machine with Ctrl-A x.
pub const QUIT: u8 = 12;
/// The console is gone: terminal hung up, pipe closed, disk full.
pub const CONSOLE_LOST: u8 = 14;
/// The engine could not go on with this guest.
pub const ENGINE: u8 = 16;
/// A bug of ours.
pub const INTERNAL: u8 = 18;
/// The jail refused a system call of the machine's process.
pub const JAIL: u8 = 20;

/// Ended by a signal, as shells count: SIGTERM gives 143.
pub fn of_signal(signal: i32) -> u8 {
    128u8.saturating_add(u8::try_from(signal).unwrap_or(u8::MAX))
}

/// The statuses in words, for `--help`.
pub const HELP: &str = "\
Exit status of run:
  0    the guest powered off
  2    the command line is wrong
  4    a configuration, kernel or other input file can't be used
  6    the host refused something
  8    the guest crashed (triple fault)
  10   the guest reset the machine (with --no-reboot)
  12   ended by Ctrl-A x
  14   the console is gone
  16   the engine could not go on
  18   a bug in bivisor
  20   the jail refused a system call
  129, 130, 131, 143   ended by SIGHUP, SIGINT, SIGQUIT, SIGTERM
  odd  with --testdev: (value << 1) | 1 of what the guest wrote to port 0xf4";
