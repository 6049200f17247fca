//! What is written down, so that another supervisor can go on where one was killed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::places::MachinePlaces;
use super::policy::Restarts;
use crate::config::{RestartPolicy, VmConfig};
use crate::error::Failure;
use crate::status;

/// A machine as `bivisor up` found it in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Its name.
    pub name: String,
    /// The file.
    pub file: PathBuf,
    /// Its part of the file.
    pub text: String,
    /// When to start it again.
    pub restart: RestartPolicy,
    /// Tell more in its log.
    pub verbose: bool,
}

impl Spec {
    /// That of the machine with these places.
    ///
    /// # Errors
    /// It is not there, or not whole.
    pub fn of(places: &MachinePlaces) -> Result<Self, Failure> {
        let path = places.spec();
        read(&path)
            .ok_or_else(|| Failure::new(status::CONFIGURATION, format!("{} can't be read", path.display())))
    }

    /// What the machine is made of.
    ///
    /// # Errors
    /// Something in its part of the file means nothing.
    pub fn config(&self) -> Result<VmConfig, Failure> {
        VmConfig::from_text(&self.text, &self.file).map_err(Failure::configuration)
    }

    /// The folder that paths are relative to.
    pub fn folder(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new("/"))
    }
}

/// What is to become of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Goal {
    /// It is to run.
    #[default]
    Run,
    /// It is to stop, and to keep its name.
    Stop,
    /// It is to stop and to start again.
    Restart,
    /// It is to stop and to go.
    Remove,
}

/// How far the supervisor is with a machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// What is to become of it.
    pub goal: Goal,
    /// All machines of the same `up` have started.
    pub committed: bool,
    /// The number of processes that were started for it.
    pub started: u64,
    /// The last of them has ended, and what follows from that has been decided.
    pub settled: bool,
    /// It is over: nothing but an order starts it again.
    pub over: bool,
    /// It was given up because it ended too often.
    pub given_up: bool,
    /// Since when its guest runs, or ran last, in seconds since 1970.
    pub since: Option<u64>,
    /// What its policy must know.
    pub restarts: Restarts,
    /// How its last process ended.
    pub ending: Option<Ending>,
}

/// The process of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: i32,
    /// When it was started, in clock ticks since the host's start: with the number, it names one process.
    pub start: u64,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Its status; none if a signal ended it.
    pub status: Option<u8>,
    /// What there is to tell.
    pub sentence: String,
    /// When, in seconds since 1970.
    pub at: u64,
}

impl Ending {
    /// An ending of this moment.
    pub fn now(status: Option<u8>, sentence: impl Into<String>) -> Self {
        Self { status, sentence: sentence.into(), at: seconds() }
    }

    /// Whether the guest powered off.
    pub fn is_success(&self) -> bool {
        self.status == Some(0)
    }
}

/// Seconds since 1970.
pub fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Reads what was written; none if it is not there or not whole.
pub fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes so that a reader finds the old or the new, and nobody else reads it.
///
/// # Errors
/// The host can't write it.
pub fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = private_file(&new)?;
    serde_json::to_writer(&mut file, value)?;
    file.flush()?;
    fs::rename(&new, path)
}

/// An empty file that only its owner may read.
///
/// # Errors
/// The host can't make it.
pub fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}
