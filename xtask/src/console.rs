//! Programs whose standard input and output are a guest's console: what is typed there, and what is waited for.
use anyhow::{Context, Result, bail, ensure};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use std::{
    ffi::OsString,
    fs::File,
    io::{Read, Write},
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Instant,
};

/// A program that runs, until this is dropped at the latest.
pub struct Session {
    program: Child,
    /// Where typed text goes.
    keyboard: Box<dyn Write + Send>,
    /// What it writes.
    pub screen: Screen,
}

impl Session {
    /// Starts it, and waits until `deadline` for what it writes.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(command: &mut Command, deadline: Instant) -> Result<Self> {
        let mut program = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} could not be started", command.get_program().display()))?;
        let screen = Screen::new(program.stdout.take().context("no standard output")?, deadline);
        let keyboard = Box::new(program.stdin.take().context("no standard input")?);
        Ok(Self { program, keyboard, screen })
    }

    /// Starts a program whose guest's console is a terminal; `command` gives the program for one that has this path.
    ///
    /// # Errors
    /// It can't be started.
    pub fn by_terminal(command: impl FnOnce(&Path) -> Result<Command>, deadline: Instant) -> Result<Self> {
        const MODE: OpenptFlags = OpenptFlags::RDWR.union(OpenptFlags::NOCTTY).union(OpenptFlags::CLOEXEC);
        let terminal = openpt(MODE)?;
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        let path = PathBuf::from(OsString::from_vec(ptsname(&terminal, Vec::new())?.into_bytes()));
        // Its standard input, too, so that the terminal ends with the program, even before that has opened it.
        let input = ioctl_tiocgptpeer(&terminal, MODE)?;
        let mut command = command(&path)?;
        let program = command
            .stdin(input)
            .spawn()
            .with_context(|| format!("{} could not be started", command.get_program().display()))?;
        let terminal = File::from(terminal);
        let keyboard = Box::new(terminal.try_clone()?);
        Ok(Self { program, keyboard, screen: Screen::new(terminal, deadline) })
    }

    /// Types text.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.keyboard.write_all(text.as_bytes())?;
        Ok(self.keyboard.flush()?)
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.type_text(&format!("{line}\n"))
    }

    /// What is written until the end, and how the program ended.
    pub fn rest(&mut self) -> Result<(String, ExitStatus)> {
        let text = self.screen.rest()?;
        Ok((text, self.program.wait()?))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It has ended by itself where all went well.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// Reads in a thread of its own.
pub fn listen(mut output: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (send, bytes) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            if send.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    bytes
}

/// What a guest writes.
pub struct Screen {
    bytes: Receiver<Vec<u8>>,
    text: String,
    deadline: Instant,
}

impl Screen {
    /// Reads it by [`listen`].
    pub fn new(output: impl Read + Send + 'static, deadline: Instant) -> Self {
        Self { bytes: listen(output), text: String::new(), deadline }
    }

    /// Waits no longer than this for what is still to come.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// More text, or `false` at the end.
    fn more(&mut self) -> Result<bool> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.bytes.recv_timeout(left) {
            Ok(bytes) => {
                self.text.push_str(&String::from_utf8_lossy(&bytes));
                Ok(true)
            }
            Err(RecvTimeoutError::Disconnected) => Ok(false),
            Err(RecvTimeoutError::Timeout) => {
                bail!("nothing more in time: {:?}", tail(&self.text))
            }
        }
    }

    /// The text up to `end`.
    pub fn until(&mut self, end: &str) -> Result<String> {
        loop {
            if let Some(at) = self.text.find(end) {
                let rest = self.text.split_off(at + end.len());
                return Ok(std::mem::replace(&mut self.text, rest));
            }
            ensure!(self.more()?, "the machine ended before {end:?}: {:?}", tail(&self.text));
        }
    }

    /// The text up to the end of all.
    pub fn rest(&mut self) -> Result<String> {
        while self.more()? {}
        Ok(std::mem::take(&mut self.text))
    }
}

/// The last lines of a text.
fn tail(text: &str) -> &str {
    let start = text.rmatch_indices('\n').nth(12).map_or(0, |(at, _)| at);
    &text[start..]
}
