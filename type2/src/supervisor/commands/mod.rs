//! The commands of a user who has machines in the background.

mod console;
mod logs;
mod ps;
mod ssh;
mod stat;
mod top;
mod up;

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::places::Places;
use super::protocol::{self, MachineStatus, Reply, Request, Which};
use super::{daemon, machine_process};
use crate::error::Failure;
use crate::status;

/// Seconds that a guest has to end by itself.
const PATIENCE: &str = "60";

/// What is told after the list of commands.
pub const LONG_HELP: &str = "\
Machines in the background are started by `bivisor up FILE.toml` and known by their names in the file: see docs/several.md";

/// `bivisor up` and the commands that go with it.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Start the machines of a file in the background: all, or none if one can't start
    Up {
        /// The file: a table [vm.NAME] for each machine, or the words of one machine
        #[arg(value_name = "FILE.toml")]
        file: PathBuf,
    },
    /// List the machines that `up` has started
    Ps {
        /// As JSON, with all there is to know
        #[arg(long)]
        json: bool,
    },
    /// Tell what machines have done since they started: CPU time, disks, networks, exits of their processors by kind
    Stat {
        /// Their names; nothing: all that run
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// As JSON
        #[arg(long, conflicts_with = "prometheus")]
        json: bool,
        /// In the text format of Prometheus
        #[arg(long)]
        prometheus: bool,
    },
    /// Show what the machines are doing, again and again; Ctrl-C ends it
    Top {
        /// Seconds between two looks
        #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u32).range(1..=3600))]
        interval: u32,
        /// End after so many looks
        #[arg(short = 'n', long, value_name = "COUNT")]
        count: Option<u64>,
    },
    /// Sit down at a machine's console; Ctrl-A x leaves it
    Console {
        /// Its name
        name: String,
    },
    /// End machines by the power button, or after a time without it; they keep their names
    Stop {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
        /// How long guests may take
        #[arg(long, value_name = "SECONDS", default_value = PATIENCE)]
        timeout: u64,
    },
    /// End machines at once, as a power cut does
    Kill {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
    /// Stop machines, if they run, and start them
    Restart {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
        /// How long guests may take to end
        #[arg(long, value_name = "SECONDS", default_value = PATIENCE)]
        timeout: u64,
    },
    /// Show what a machine's console has shown, and what was told about it
    Logs {
        /// Its name
        name: String,
        /// Go on as long as the machine is there
        #[arg(short, long)]
        follow: bool,
    },
    /// Log in to a machine, or run a command in it, by ssh through a port that its user network forwards
    Ssh {
        /// As whom
        #[arg(short = 'l', long, default_value = "root")]
        user: String,
        /// The machine's name
        name: String,
        /// The command, instead of a shell
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Stop machines and forget them
    Down {
        /// Names, or files that `up` was given; nothing: all
        #[arg(value_name = "NAME|FILE.toml")]
        which: Vec<String>,
        /// How long guests may take to end
        #[arg(long, value_name = "SECONDS", default_value = PATIENCE)]
        timeout: u64,
    },
    /// The process that holds the machines; commands start it
    #[command(hide = true)]
    Supervisor,
    /// The process of one machine; the supervisor starts it
    #[command(hide = true)]
    Machine {
        /// The machine's folder
        folder: PathBuf,
    },
}

/// Does what a command says; returns the exit status.
///
/// # Errors
/// In a sentence each.
pub fn run(command: &Command, verbose: bool) -> Result<u8, Failure> {
    match command {
        Command::Up { file } => up::run(file, verbose),
        Command::Ps { json } => ps::run(*json),
        Command::Stat { names, json, prometheus } => stat::run(names, *json, *prometheus),
        Command::Top { interval, count } => top::run(*interval, *count),
        Command::Console { name } => console::run(name),
        Command::Logs { name, follow } => logs::run(name, *follow),
        Command::Ssh { user, name, command } => ssh::run(user, name, command),
        Command::Stop { names, timeout } => {
            done("stopped", &Request::Stop { names: names.clone(), patience: *timeout })
        }
        Command::Kill { names } => done("killed", &Request::Kill(names.clone())),
        Command::Restart { names, timeout } => {
            done("started", &Request::Restart { names: names.clone(), patience: *timeout })
        }
        Command::Down { which, timeout } => {
            let which = which.iter().map(|text| chosen(text)).collect();
            done("down", &Request::Down { which, patience: *timeout })
        }
        Command::Supervisor => daemon::run(),
        Command::Machine { folder } => machine_process::run(folder),
    }
}

/// Lets the supervisor do something, and tells to which machines.
fn done(what: &str, request: &Request) -> Result<u8, Failure> {
    if let Reply::Done(names) = protocol::ask(&Places::find()?, request)?
        && !names.is_empty()
    {
        crate::say(&format!("{what}: {}\n", names.join(", ")));
    }
    Ok(status::SUCCESS)
}

/// A name, or a file as `up` has noted it.
fn chosen(text: &str) -> Which {
    if !text.ends_with(".toml") && !text.contains('/') {
        return Which::Name(text.to_owned());
    }
    let path = Path::new(text);
    // The file may be gone by now.
    Which::File(path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.into()))
}

/// All machines; without a supervisor being started for nothing.
fn machines(places: &Places) -> Result<Vec<MachineStatus>, Failure> {
    if places.machines().is_ok_and(|names| names.is_empty()) {
        return Ok(Vec::new());
    }
    match protocol::ask(places, &Request::List)? {
        Reply::List(machines) => Ok(machines),
        _ => Ok(Vec::new()),
    }
}

/// The machine of this name.
fn machine(places: &Places, name: &str) -> Result<MachineStatus, Failure> {
    let machines = machines(places)?;
    let unknown = protocol::unknown(name, machines.iter().map(|machine| machine.name.as_str()));
    machines
        .into_iter()
        .find(|machine| machine.name == name)
        .ok_or_else(|| Failure::new(status::CONFIGURATION, unknown))
}

/// The same, if it runs.
fn running(places: &Places, name: &str) -> Result<MachineStatus, Failure> {
    let machine = machine(places, name)?;
    if machine.pid.is_some() {
        return Ok(machine);
    }
    let sentence = format!(
        "the machine {name} does not run ({}): `bivisor restart {name}` starts it",
        ps::state(&machine)
    );
    Err(Failure::new(status::CONFIGURATION, sentence))
}
