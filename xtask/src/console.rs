//! Programs whose standard input and output are a guest's console: what is typed there, and what is waited for.
use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{self, Read, Write},
    net::TcpListener,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// Time in which a program has to make the connection that is its guest's console.
const CONNECTION_LIMIT: Duration = Duration::from_secs(30);

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

    /// Starts a program whose guest's console is a connection that the program makes to `listener`, within a few seconds.
    ///
    /// # Errors
    /// It can't be started, or doesn't make the connection.
    pub fn by_connection(command: &mut Command, listener: &TcpListener, deadline: Instant) -> Result<Self> {
        let name = command.get_program().display().to_string();
        let program = command.spawn().with_context(|| format!("{name} could not be started"))?;
        let mut session =
            Self { program, keyboard: Box::new(io::sink()), screen: Screen::new(io::empty(), deadline) };
        listener.set_nonblocking(true)?;
        let until = Instant::now() + CONNECTION_LIMIT;
        let connection = loop {
            match listener.accept() {
                Ok((connection, _)) => break connection,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            ensure!(session.program.try_wait()?.is_none(), "{name} ended before its guest had a console");
            ensure!(Instant::now() < until, "{name} gives its guest no console");
            thread::sleep(Duration::from_millis(10));
        };
        connection.set_nonblocking(false)?;
        session.keyboard = Box::new(connection.try_clone()?);
        session.screen = Screen::new(connection, deadline);
        Ok(session)
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
