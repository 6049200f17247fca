//! The console on a pseudo-terminal.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::output::FarEnd;
use super::stdio::{read, write_all};
use super::{Console, ConsoleError, Held, Input, Output};
use crate::thread::{Role, spawn};

pub(super) fn open(
    input: Input,
    lost: impl FnOnce(io::Error) + Send + 'static,
) -> Result<Console, ConsoleError> {
    let (master, slave, name) = open_pair().map_err(ConsoleError::Pty)?;
    let master = Arc::new(master);
    let output = Output::start(PtyEnd(master.clone()), lost).map_err(ConsoleError::Thread)?;
    let sink = input.clone();
    spawn(Role::ConsoleIn, "console-in", move || {
        // While we hold the other side open ourselves, users come and go without an error here.
        let _slave = slave;
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = read(master.as_fd(), &mut buffer) {
            sink.deliver(&buffer[..count], &|| true);
        }
    })
    .map_err(ConsoleError::Thread)?;
    Ok(Console::new(output, input, Some(name), Duration::from_millis(200), Held::Nothing))
}

/// The two sides, in raw mode, and the name of the slave.
fn open_pair() -> io::Result<(OwnedFd, OwnedFd, String)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let slave = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    let mut settings = tcgetattr(&slave)?;
    settings.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &settings)?;
    Ok((master, slave, name.to_string_lossy().into_owned()))
}

struct PtyEnd(Arc<OwnedFd>);

impl FarEnd for PtyEnd {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        write_all(self.0.as_fd(), bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ConsoleSpec, InputSink};
    use super::*;
    use bivisor_machine::host::ByteStream;
    use std::fs::OpenOptions;
    use std::io::{Read, Write};
    use std::sync::mpsc::{Sender, channel};

    struct Tell(Sender<Vec<u8>>);
    impl InputSink for Tell {
        fn receive(&self, bytes: &[u8]) -> usize {
            self.0.send(bytes.to_vec()).unwrap();
            bytes.len()
        }
    }

    #[test]
    fn both_directions_and_reconnection() {
        let console = Console::open(&ConsoleSpec::Pty, Arc::new(|_| ())).unwrap();
        let (tell, hear) = channel();
        console.input().connect(Arc::new(Tell(tell)));
        for round in [b"one", b"two"] {
            let mut user =
                OpenOptions::new().read(true).write(true).open(console.address().unwrap()).unwrap();
            console.output().write(round);
            let mut seen = [0; 3];
            user.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, round);
            user.write_all(b"\r\n").unwrap();
            let mut typed = Vec::new();
            while typed.len() < 2 {
                typed.extend(hear.recv_timeout(Duration::from_secs(5)).unwrap());
            }
            assert_eq!(typed, b"\r\n", "raw: nothing is translated");
        }
        assert_eq!(console.close(), 0);
    }
}
