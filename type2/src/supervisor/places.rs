//! Where the supervisor and its machines keep what belongs to them.
//!
//! `$XDG_RUNTIME_DIR/bivisor/` has the supervisor's lock and socket, and a folder for each machine: what lasts no longer
//! than its processes. `$XDG_DATA_HOME/bivisor/logs/` has the logs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bivisor_backends::runtime;

use crate::error::Failure;
use crate::{image, status};

/// The places of one user.
#[derive(Clone, Debug)]
pub struct Places {
    runtime: PathBuf,
    machines: PathBuf,
    logs: PathBuf,
}

impl Places {
    /// Finds the folders, and makes them if they aren't there, for nobody but the user.
    ///
    /// # Errors
    /// There is no such folder, or it is somebody else's.
    pub fn find() -> Result<Self, Failure> {
        let failed =
            |error: io::Error| Failure::new(status::HOST, format!("no folder for running machines: {error}"));
        let runtime = runtime::folder().map_err(failed)?;
        let machines = runtime.join("vms");
        runtime::private(&machines).map_err(failed)?;
        let data = image::data_folder().map_err(Failure::configuration)?;
        fs::create_dir_all(&data).map_err(failed)?;
        let logs = data.join("logs");
        runtime::private(&logs).map_err(failed)?;
        Ok(Self { runtime, machines, logs })
    }

    /// Held by the supervisor that runs.
    pub fn lock(&self) -> PathBuf {
        self.runtime.join("supervisor.lock")
    }

    /// Where the supervisor listens.
    pub fn socket(&self) -> PathBuf {
        self.runtime.join("supervisor")
    }

    /// What the supervisor has to say beside its answers.
    pub fn supervisor_log(&self) -> PathBuf {
        self.logs.join(".supervisor.log")
    }

    /// A machine's log, which stays when the machine goes.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// A machine's places.
    pub fn machine(&self, name: &str) -> MachinePlaces {
        MachinePlaces { folder: self.machines.join(name) }
    }

    /// The names of the machines that have a folder.
    ///
    /// # Errors
    /// The folder can't be read.
    pub fn machines(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.machines)?;
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }
}

/// The places of one machine, in a folder of its own.
#[derive(Clone, Debug)]
pub struct MachinePlaces {
    folder: PathBuf,
}

impl MachinePlaces {
    /// Those in this folder.
    pub fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the machine is.
    pub fn spec(&self) -> PathBuf {
        self.folder.join("spec.json")
    }

    /// How far the supervisor is with it.
    pub fn progress(&self) -> PathBuf {
        self.folder.join("progress.json")
    }

    /// Held by the machine's process, from before it exists.
    pub fn lock(&self) -> PathBuf {
        self.folder.join("lock")
    }

    /// Which process it is, written by itself.
    pub fn process(&self) -> PathBuf {
        self.folder.join("process.json")
    }

    /// How the process ended, written by itself; empty if it could not.
    pub fn ending(&self) -> PathBuf {
        self.folder.join("ending.json")
    }

    /// Where the process takes orders.
    pub fn control(&self) -> PathBuf {
        self.folder.join("control")
    }

    /// Where the console is.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console")
    }

    /// The machine's key, as ssh has seen it first.
    pub fn known_hosts(&self) -> PathBuf {
        self.folder.join("known_hosts")
    }
}
