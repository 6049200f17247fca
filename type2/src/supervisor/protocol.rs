//! What the commands and the supervisor say to each other: a line of JSON each way, by a socket of the user's.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::places::Places;
use super::process;
use super::record::{self, Ending, Spec};
use crate::config::RestartPolicy;
use crate::error::Failure;
use crate::status;

/// Changes with what is said, so that an older supervisor says so instead of misunderstanding.
const VERSION: u32 = 1;
/// Bytes of a line at most.
const LONGEST: u64 = 64 << 20;
/// How often something is asked of supervisors that are ended in the middle.
const ATTEMPTS: u32 = 3;
/// How long a supervisor may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a command wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Start these machines, or none of them.
    Up(Vec<Spec>),
    /// Tell of all machines.
    List,
    /// End these by the power button, or after so many seconds without it.
    Stop {
        /// Which.
        names: Vec<String>,
        /// Seconds.
        patience: u64,
    },
    /// End these at once.
    Kill(Vec<String>),
    /// Stop these, if they run, and start them.
    Restart {
        /// Which.
        names: Vec<String>,
        /// Seconds.
        patience: u64,
    },
    /// Stop these and forget them.
    Down {
        /// Which; none: all.
        which: Vec<Which>,
        /// Seconds.
        patience: u64,
    },
}

/// Machines as a user names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Which {
    /// The one of this name.
    Name(String),
    /// All of a file.
    File(PathBuf),
}

/// What the supervisor answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// It is done, to these machines.
    Done(Vec<String>),
    /// All machines.
    List(Vec<MachineStatus>),
    /// It is not done.
    Refused {
        /// The exit status.
        status: u8,
        /// Why.
        sentence: String,
    },
}

impl Reply {
    /// A refusal because of what was asked.
    pub fn refused(sentence: impl Into<String>) -> Self {
        Self::Refused { status: status::CONFIGURATION, sentence: sentence.into() }
    }
}

/// What is said of a name that no machine has.
pub fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    let known = if known.is_empty() { "none is up".into() } else { known.join(", ") };
    format!("there is no machine {name}; those there are: {known}")
}

/// A machine as `bivisor ps` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: State,
    /// Its process, if it has one.
    pub pid: Option<i32>,
    /// Since when its guest runs, in seconds since 1970.
    pub since: Option<u64>,
    /// Restarts by policy since the user started it.
    pub restarts: u64,
    /// Its policy.
    pub policy: RestartPolicy,
    /// How its last process ended.
    pub ending: Option<Ending>,
    /// The file that describes it.
    pub file: PathBuf,
    /// Its log.
    pub log: PathBuf,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its process opens what it needs.
    Starting,
    /// Its guest runs.
    Running,
    /// It has been told to end.
    Stopping,
    /// It has ended and will start again.
    Waiting,
    /// It has ended.
    Stopped,
    /// It has ended too often.
    GivenUp,
}

#[derive(Serialize, Deserialize)]
struct Line<T> {
    version: u32,
    said: T,
}

/// Asks the supervisor, which is started if none runs.
///
/// # Errors
/// It can't be started or refuses.
pub fn ask(places: &Places, request: &Request) -> Result<Reply, Failure> {
    let mut error = None;
    for _ in 0..ATTEMPTS {
        let stream = connect(places)?;
        match exchange(&stream, request) {
            Ok(Reply::Refused { status, sentence }) => return Err(Failure::new(status, sentence)),
            Ok(reply) => return Ok(reply),
            // It was ended in the middle, and the next one finds things as far as they were.
            Err(broken) => error = Some(broken),
        }
    }
    let error = error.map(|error| error.to_string()).unwrap_or_default();
    Err(out_of_reach(places, &error))
}

/// A connection to the supervisor, which is started if none runs.
fn connect(places: &Places) -> Result<UnixStream, Failure> {
    let begin = Instant::now();
    let mut started = false;
    loop {
        let error = match UnixStream::connect(places.socket()) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if begin.elapsed() > PATIENCE {
            return Err(out_of_reach(places, &error.to_string()));
        }
        if !std::mem::replace(&mut started, true) {
            start(places).map_err(|error| {
                Failure::new(status::HOST, format!("the supervisor can't be started: {error}"))
            })?;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn out_of_reach(places: &Places, why: &str) -> Failure {
    let log = places.supervisor_log();
    let sentence = format!("the supervisor can't be reached ({why}); {} may say more", log.display());
    Failure::new(status::HOST, sentence)
}

fn start(places: &Places) -> io::Result<()> {
    let log = record::private_file(&places.supervisor_log())?;
    let mut command = process::this_program();
    command.arg("supervisor").current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().map(drop)
}

fn exchange(stream: &UnixStream, request: &Request) -> io::Result<Reply> {
    send(stream, request)?;
    let reply: Line<Reply> = serde_json::from_str(&receive(stream)?)?;
    Ok(reply.said)
}

fn send(mut stream: &UnixStream, said: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(&Line { version: VERSION, said })?;
    text.push(b'\n');
    stream.write_all(&text)
}

fn receive(stream: &UnixStream) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut line)?;
    if line.ends_with('\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// The supervisor's side of one conversation.
pub fn answer(stream: &UnixStream, with: impl FnOnce(Request) -> Reply) {
    // Nobody may keep the supervisor waiting for a question.
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let Ok(line) = receive(stream) else { return };
    let version = serde_json::from_str::<Line<serde_json::Value>>(&line).map_or(0, |line| line.version);
    let reply = match serde_json::from_str::<Line<Request>>(&line) {
        Ok(request) if version == VERSION => with(request.said),
        _ => Reply::refused(format!(
            "the supervisor (process {}) is of another version of bivisor: end it with `kill {0}`; machines go on, and the next command starts a new one",
            std::process::id()
        )),
    };
    // Who does not wait for the answer does not want it.
    let _ = send(stream, &reply);
}
