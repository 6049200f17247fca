//! Consoles: where the guest's first serial port leads to.

mod escape;
mod input;
mod output;
mod pty;
mod stdio;
mod unix;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bivisor_machine::host::ByteStream;

pub use escape::{Command, Escape, HELP};
pub use input::{Input, InputSink};
pub use output::Output;
pub use unix::{SocketFile, accept, listen_at};

use output::FarEnd;

/// What a console is connected to, as the user says it: `stdio`, `pty`, `file=PATH`, `unix=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleSpec {
    /// Standard input and output.
    Stdio,
    /// A pseudo-terminal, whose name is told.
    Pty,
    /// A file that is overwritten; output only.
    File(PathBuf),
    /// A Unix socket that we listen at.
    Unix(PathBuf),
}

impl FromStr for ConsoleSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("'{text}' is no console: say stdio, pty, file=PATH or unix=PATH")),
        }
    }
}

impl fmt::Display for ConsoleSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => write!(f, "stdio"),
            Self::Pty => write!(f, "pty"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Unix(path) => write!(f, "unix={}", path.display()),
        }
    }
}

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The terminal could not be set to raw mode.
    #[error("cannot switch the terminal to raw mode")]
    Terminal(#[source] io::Error),
    /// No pseudo-terminal.
    #[error("cannot open a pseudo-terminal; use --console stdio or unix=PATH")]
    Pty(#[source] io::Error),
    /// The output file can't be written.
    #[error("cannot write the console file {path}: {1}", path = .0.display())]
    File(PathBuf, #[source] io::Error),
    /// The socket can't be made.
    #[error("cannot listen at the console socket {path}: {1}", path = .0.display())]
    Socket(PathBuf, #[source] io::Error),
    /// Another process listens at the socket.
    #[error("the console socket {} is in use by another process: choose another path or end that process", .0.display())]
    SocketInUse(PathBuf),
    /// Something else than a socket is in the way.
    #[error("{} exists and is not a socket: choose another path for the console", .0.display())]
    NotASocket(PathBuf),
    /// A thread could not be started.
    #[error("cannot start a console thread")]
    Thread(#[source] io::Error),
}

/// What happens at a console besides bytes for the guest.
#[derive(Debug)]
pub enum ConsoleEvent {
    /// The user pressed an escape command (never [`Command::Help`], which the console answers itself).
    Command(Command),
    /// The far end is gone for good: the terminal hung up, the disk is full, the pipe's reader left.
    Lost(io::Error),
}

/// Hears [`ConsoleEvent`]s, on a thread of the console.
pub type EventHandler = Arc<dyn Fn(ConsoleEvent) + Send + Sync>;

/// An open console. Dropping it restores the terminal and removes the socket.
pub struct Console {
    output: Output,
    /// Where output goes besides.
    copy: Option<Output>,
    input: Input,
    /// What a user must know to reach the console: the name of the pseudo-terminal, the path of the socket.
    address: Option<String>,
    /// How long an end may wait for a far end that takes nothing.
    patience: Duration,
    _held: Held,
}

/// What is undone when the console is closed.
enum Held {
    Nothing,
    Terminal { _raw: Option<crate::terminal::RawTerminal> },
    Socket { _file: unix::SocketFile },
}

impl Console {
    /// Opens the console and starts its threads.
    pub fn open(spec: &ConsoleSpec, events: EventHandler) -> Result<Self, ConsoleError> {
        let input = Input::default();
        let lost = {
            let events = events.clone();
            move |error| events(ConsoleEvent::Lost(error))
        };
        match spec {
            ConsoleSpec::Stdio => stdio::open(input, events, lost),
            ConsoleSpec::Pty => pty::open(input, lost),
            ConsoleSpec::File(path) => {
                let file = open_output_file(path).map_err(|error| ConsoleError::File(path.clone(), error))?;
                let output = Output::start(FileEnd(file), lost).map_err(ConsoleError::Thread)?;
                Ok(Self::new(output, input, None, Duration::from_secs(30), Held::Nothing))
            }
            ConsoleSpec::Unix(path) => unix::open(path, input, lost),
        }
    }

    fn new(output: Output, input: Input, address: Option<String>, patience: Duration, held: Held) -> Self {
        Self { output, copy: None, input, address, patience, _held: held }
    }

    /// Lets what the guest writes go to standard error too, which is a log file then. No client of the console can hold
    /// that up.
    pub fn copy_to_stderr(&mut self) -> Result<(), ConsoleError> {
        self.copy = Some(Output::start(StderrEnd, |_| ()).map_err(ConsoleError::Thread)?);
        Ok(())
    }

    /// The far end of the guest's serial port.
    pub fn line(&self) -> Arc<dyn ByteStream> {
        let (output, copy) = (self.output.clone(), self.copy.clone());
        Arc::new(FarSide { output, copy, input: self.input.clone() })
    }

    /// Where the guest's serial port writes to.
    pub fn output(&self) -> Output {
        self.output.clone()
    }

    /// Where the guest's serial port is plugged in to read.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// The name of the pseudo-terminal or the path of the socket.
    pub fn address(&self) -> Option<&str> {
        self.address.as_deref()
    }

    /// Writes out what the guest has sent, then closes the console. Returns the number of bytes that the far end
    /// did not take.
    pub fn close(self) -> u64 {
        if let Some(copy) = &self.copy {
            copy.flush(self.patience);
        }
        self.output.flush(self.patience)
    }
}

/// Both directions of the line, as the guest's serial port sees them.
struct FarSide {
    output: Output,
    copy: Option<Output>,
    input: Input,
}

impl ByteStream for FarSide {
    fn write(&self, bytes: &[u8]) {
        self.output.write(bytes);
        if let Some(copy) = &self.copy {
            copy.write(bytes);
        }
    }
    fn ready(&self) {
        self.input.ready();
    }
}

fn open_output_file(path: &Path) -> io::Result<File> {
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    OpenOptions::new().write(true).create(true).truncate(true).open(path)
}

struct FileEnd(File);

impl FarEnd for FileEnd {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }
}

struct StderrEnd;

impl FarEnd for StderrEnd {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        crate::stderr_log::write(bytes);
        Ok(())
    }
}

/// Sends one line of ours to a far end, among the guest's output.
fn notice(output: &Output, text: &str) {
    output.write(text.replace('\n', "\r\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_parse_and_print() {
        for text in ["stdio", "pty", "file=/tmp/a=b", "unix=x.sock"] {
            assert_eq!(text.parse::<ConsoleSpec>().unwrap().to_string(), text);
        }
        for text in ["", "tty", "file", "file=", "unix=", "stdio=x"] {
            assert!(text.parse::<ConsoleSpec>().unwrap_err().contains("say stdio, pty"), "{text}");
        }
    }

    #[test]
    fn a_directory_is_no_console_file() {
        let error = Console::open(&ConsoleSpec::File("/tmp".into()), Arc::new(|_| ())).err().unwrap();
        assert!(error.to_string().starts_with("cannot write the console file /tmp: "), "{error}");
    }
}
