//! The console on standard input and output.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::escape::{Command, Escape, HELP};
use super::output::FarEnd;
use super::{Console, ConsoleError, ConsoleEvent, EventHandler, Held, Input, Output, notice};
use crate::terminal::RawTerminal;
use crate::thread::{Role, spawn};

pub(super) fn open(
    input: Input,
    events: EventHandler,
    lost: impl FnOnce(io::Error) + Send + 'static,
) -> Result<Console, ConsoleError> {
    let raw = RawTerminal::enter().map_err(ConsoleError::Terminal)?;
    let output = Output::start(StdoutEnd, lost).map_err(ConsoleError::Thread)?;
    // The escape key must work while the guest takes no input, so another thread waits for the guest.
    let (keys, typed) = sync_channel::<Vec<u8>>(READS_QUEUED);
    let guest = input.clone();
    spawn(Role::ConsoleIn, "console-wait", move || {
        for bytes in typed {
            guest.deliver(&bytes, &|| true);
        }
    })
    .map_err(ConsoleError::Thread)?;
    let reader = Reader { output: output.clone(), events, terminal: raw.is_some() };
    spawn(Role::ConsoleIn, "console-in", move || reader.run(&keys)).map_err(ConsoleError::Thread)?;
    // A pipe's reader or a stopped terminal may take its time; a signal still ends the wait.
    Ok(Console::new(output, input, None, Duration::from_secs(10), Held::Terminal { _raw: raw }))
}

/// Reads (of up to 4 KiB) that wait for the guest before we leave the rest to the terminal or pipe.
const READS_QUEUED: usize = 4096;

struct StdoutEnd;

impl FarEnd for StdoutEnd {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        write_all(rustix::stdio::stdout(), bytes)
    }
}

/// Writes all bytes to a descriptor that may be non-blocking.
pub(super) fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::OUT)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads from a descriptor that may be non-blocking; 0 at the end.
pub(super) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(fd, &mut *buffer) {
            Ok(count) => return Ok(count),
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::IN)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

struct Reader {
    output: Output,
    events: EventHandler,
    /// Standard input is a terminal: it has an escape key, and its end means that the user is gone.
    terminal: bool,
}

impl Reader {
    fn run(self, keys: &SyncSender<Vec<u8>>) {
        match self.read_loop(keys) {
            // Without a terminal the end of input says nothing about the guest.
            Ok(()) if !self.terminal => {}
            Ok(()) => (self.events)(ConsoleEvent::Lost(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => (self.events)(ConsoleEvent::Lost(error)),
        }
    }

    fn read_loop(&self, keys: &SyncSender<Vec<u8>>) -> io::Result<()> {
        let (mut escape, mut buffer) = (Escape::default(), [0; 4096]);
        let stdin = io::stdin();
        loop {
            let count = match read(stdin.as_fd(), &mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                // Standard input closed before we began.
                Err(error) if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) => return Ok(()),
                Err(error) => return Err(error),
            };
            let mut guest = Vec::with_capacity(count);
            if self.terminal {
                for &byte in &buffer[..count] {
                    match escape.key(byte, &mut guest) {
                        None => {}
                        Some(Command::Help) => notice(&self.output, HELP),
                        Some(command) => (self.events)(ConsoleEvent::Command(command)),
                    }
                }
            } else {
                guest.extend_from_slice(&buffer[..count]);
            }
            if keys.send(guest).is_err() {
                return Ok(());
            }
        }
    }
}
