//! A machine in the background: started by `bivisor up`, asked by `bivisor stat`, and its console.
use crate::{console::Session, linux::PROMPT};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// What booting, and any work, may take.
const LIMIT: Duration = Duration::from_secs(240);

/// Looks into the guest's page tables, for the translator's own cache of addresses: how many there are depends on where the host
/// lets the processors run, and on what was executed before.
const ENGINES_OWN: &str = "memory";

/// Exits of all processors, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits(BTreeMap<String, u64>);

impl Exits {
    #[cfg(test)]
    pub fn new(counts: &[(&str, u64)]) -> Self {
        Self(counts.iter().map(|&(kind, count)| (kind.to_owned(), count)).collect())
    }

    /// How many of a kind.
    pub fn of(&self, kind: &str) -> u64 {
        self.0.get(kind).copied().unwrap_or(0)
    }

    /// How many.
    pub fn all(&self) -> u64 {
        self.0.values().sum()
    }

    /// How many, but for those that are no business between guest and hypervisor.
    pub fn all_but_the_engines_own(&self) -> u64 {
        self.all() - self.of(ENGINES_OWN)
    }

    /// The kinds that there are.
    pub fn kinds(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Those since some moment.
    pub fn since(&self, before: &Self) -> Self {
        let left = |(kind, count): (&String, &u64)| (kind.clone(), count.saturating_sub(before.of(kind)));
        Self(self.0.iter().map(left).collect())
    }

    /// Those of one of so many.
    pub fn of_each(&self, count: f64) -> Self {
        let part = |(kind, all): (&String, &u64)| (kind.clone(), (*all as f64 / count).round() as u64);
        Self(self.0.iter().map(part).collect())
    }

    /// Adds those of a processor, as `bivisor stat --json` tells them.
    fn add(&mut self, cpu: &Value) -> Result<()> {
        for (field, prefix) in [("exits", ""), ("hypercalls", "hypercall ")] {
            for (kind, count) in cpu[field].as_object().with_context(|| format!("no {field}"))? {
                let count = count.as_u64().with_context(|| format!("{field} of {kind}"))?;
                *self.0.entry(format!("{prefix}{kind}")).or_default() += count;
            }
        }
        Ok(())
    }
}

/// What a machine tells of itself.
pub struct Statistics {
    pub exits: Exits,
    /// Bytes that it has sent into its network.
    pub sent: u64,
}

/// One that has booted; it is ended when this is dropped.
pub struct Machine {
    program: PathBuf,
    folder: PathBuf,
    name: String,
    console: Option<Session>,
}

impl Machine {
    /// Starts the machine of a file with its name, and waits for its shell. `folder`: for sockets and logs.
    pub fn up(program: &Path, folder: &Path, name: &str, file: &Path) -> Result<Self> {
        let machine =
            Self { program: program.into(), folder: folder.into(), name: name.into(), console: None };
        for sub in ["run", "data"] {
            let path = folder.join(sub);
            fs::create_dir_all(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        }
        machine.told(machine.command(&["up"]).arg(file))?;
        let end = Instant::now() + LIMIT;
        while !machine.told(&mut machine.command(&["logs", name]))?.contains(PROMPT) {
            ensure!(Instant::now() < end, "{name} comes to no shell");
            thread::sleep(Duration::from_millis(200));
        }
        Ok(machine)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words);
        command
            .env("XDG_RUNTIME_DIR", self.folder.join("run"))
            .env("XDG_DATA_HOME", self.folder.join("data"));
        command
    }

    /// What a command prints, which must succeed.
    fn told(&self, command: &mut Command) -> Result<String> {
        let output = command.output()?;
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What it has done so far.
    pub fn statistics(&self) -> Result<Statistics> {
        let text = self.told(&mut self.command(&["stat", &self.name, "--json"]))?;
        let all: Value = serde_json::from_str(&text)?;
        let mut exits = Exits::default();
        for cpu in all[0]["cpus"].as_array().context("no processors")? {
            exits.add(cpu)?;
        }
        let sent = all[0]["networks"][0]["out_bytes"].as_u64().context("no network")?;
        Ok(Statistics { exits, sent })
    }

    /// Connects to its console.
    pub fn sit_down(&mut self) -> Result<()> {
        let mut session =
            Session::start(&mut self.command(&["console", &self.name]), Instant::now() + LIMIT)?;
        session.screen.set_deadline(Instant::now() + LIMIT);
        self.console = Some(session);
        self.ask("true").map(drop)
    }

    /// What the shell answers to a line.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        let session = self.console.as_mut().context("nobody sits at the console")?;
        session.screen.set_deadline(Instant::now() + LIMIT);
        // Prompts may be left from before, and what is typed is shown; the sum is not.
        session.type_line(&format!("{line}; echo asked-$((40 + 2))"))?;
        let mut answer = session.screen.until("asked-42")?;
        answer.push_str(&session.screen.until(PROMPT)?);
        Ok(answer)
    }

    /// Has the shell execute a line of our program, which must succeed.
    pub fn work(&mut self, line: &str) -> Result<()> {
        let start = Instant::now();
        let answer = self.ask(line)?;
        ensure!(answer.contains("work-done"), "`{line}`: {answer}");
        println!("    {line}: {:.1?}", start.elapsed());
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.console.take());
        for word in ["kill", "down"] {
            // That it is there still is all that can be said.
            let _ = self.command(&[word, &self.name]).output();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn exits_of_processors_are_added_by_kind() {
        let mut exits = Exits::default();
        exits.add(&json!({"exits": {"port": 3, "halt": 1}, "hypercalls": {"5": 2}})).unwrap();
        exits.add(&json!({"exits": {"port": 4, "halt": 0}, "hypercalls": {}})).unwrap();
        assert_eq!(exits, Exits::new(&[("port", 7), ("halt", 1), ("hypercall 5", 2)]));
        let since = exits.since(&Exits::new(&[("port", 2)]));
        assert_eq!((since.of("port"), since.all()), (5, 8));
        assert_eq!(exits.of_each(2.0).of("hypercall 5"), 1);
        assert!(exits.add(&json!({"exits": {}})).is_err());
    }
}
