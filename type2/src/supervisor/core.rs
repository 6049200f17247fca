//! The supervisor's own thread: it alone knows the machines, and hears one message after the other.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::machine::{How, Machine};
use super::places::Places;
use super::process::News;
use super::protocol::{self, Reply, Request, State, Which};
use super::record::{Goal, Spec};
use crate::status;

/// A supervisor without a machine ends after this time.
const IDLE: Duration = Duration::from_secs(3);

/// What the supervisor hears.
pub enum Message {
    /// A command, and who waits for the answer.
    Request(Request, Sender<Reply>),
    /// A machine's process.
    News {
        /// The machine.
        name: String,
        /// The number of the process among those of the machine.
        run: u64,
        /// What it says.
        news: News,
    },
}

/// Somebody who waits for machines.
struct Waiter {
    names: Vec<String>,
    until: Until,
    reply: Sender<Reply>,
}

enum Until {
    /// All have started; if one fails, none is left.
    Up,
    /// None is left; then this is the answer.
    Undone(Reply),
    /// All have started again.
    Started,
    /// All have ended.
    Over,
    /// None is left.
    Gone,
}

/// The supervisor.
pub struct Core {
    places: Places,
    machines: BTreeMap<String, Machine>,
    waiters: Vec<Waiter>,
    messages: Sender<Message>,
}

impl Core {
    /// Takes over what another supervisor has left.
    pub fn new(places: &Places, messages: Sender<Message>) -> Self {
        let mut machines = BTreeMap::new();
        for name in places.machines().unwrap_or_default() {
            match Machine::adopt(&name, places, &messages) {
                Ok(Some(machine)) => drop(machines.insert(name, machine)),
                Ok(None) => {}
                Err(error) => eprintln!("bivisor: the machine {name} can't be taken over: {error}"),
            }
        }
        Self { places: places.clone(), machines, waiters: Vec::new(), messages }
    }

    /// Works until there is nothing to hold.
    pub fn run(mut self, hear: &Receiver<Message>) {
        loop {
            let now = Instant::now();
            let deadline = self.machines.values().filter_map(Machine::deadline).min();
            let idle = self.machines.is_empty() && self.waiters.is_empty();
            let patience = match deadline {
                Some(deadline) => deadline.saturating_duration_since(now),
                None if idle => IDLE,
                None => Duration::from_secs(3600),
            };
            match hear.recv_timeout(patience) {
                Ok(Message::Request(request, reply)) => self.request(request, reply),
                Ok(Message::News { name, run, news }) => {
                    if let Some(machine) = self.machines.get_mut(&name) {
                        machine.hear(run, news);
                    }
                }
                Err(RecvTimeoutError::Timeout) if idle => return,
                Err(RecvTimeoutError::Timeout) => {}
                // It holds a sender itself.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let now = Instant::now();
            self.machines.values_mut().for_each(|machine| machine.tick(now));
            self.settle();
        }
    }

    fn request(&mut self, request: Request, reply: Sender<Reply>) {
        let begun = match request {
            Request::List => {
                let list = self.machines.values().map(Machine::status).collect();
                // Who asked may be gone.
                let _ = reply.send(Reply::List(list));
                return;
            }
            Request::Up(specs) => self.up(specs).map(|names| (names, Until::Up)),
            Request::Stop { names, patience } => {
                self.order(names, Goal::Stop, power_button(patience)).map(|names| (names, Until::Over))
            }
            Request::Kill(names) => {
                self.order(names, Goal::Stop, How::Kill).map(|names| (names, Until::Over))
            }
            Request::Restart { names, patience } => {
                self.order(names, Goal::Restart, power_button(patience)).map(|names| (names, Until::Started))
            }
            Request::Down { which, patience } => self.chosen(&which).and_then(|names| {
                self.order(names, Goal::Remove, power_button(patience)).map(|names| (names, Until::Gone))
            }),
        };
        match begun {
            Ok((names, until)) => self.waiters.push(Waiter { names, until, reply }),
            Err(sentence) => drop(reply.send(Reply::refused(sentence))),
        }
    }

    /// Begins to start machines, all or none.
    fn up(&mut self, specs: Vec<Spec>) -> Result<Vec<String>, String> {
        self.check_names(&specs)?;
        let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
        let mut machines = Vec::new();
        for spec in specs {
            let name = spec.name.clone();
            match Machine::create(spec, &self.places, &self.messages) {
                Ok(machine) => machines.push(machine),
                Err(error) => {
                    let kill = |machine: &mut Machine| machine.order(Goal::Remove, How::Kill);
                    machines.iter_mut().for_each(kill);
                    return Err(format!("{name}: its folder can't be made: {error}"));
                }
            }
        }
        for mut machine in machines {
            machine.start();
            self.machines.insert(machine.spec().name.clone(), machine);
        }
        Ok(names)
    }

    fn check_names(&self, specs: &[Spec]) -> Result<(), String> {
        let taken = |spec: &Spec| self.machines.get(&spec.name);
        let Some(other) = specs.iter().find_map(taken) else { return Ok(()) };
        let (name, file) = (&other.spec().name, other.spec().file.display());
        if specs.iter().all(|spec| taken(spec).is_some_and(|other| other.spec().file == spec.file)) {
            let states: Vec<String> = self.of_file(&other.spec().file);
            return Err(format!(
                "{file} is up already ({}): `bivisor restart NAME` starts a machine again, `bivisor down {file}` ends all",
                states.join(", ")
            ));
        }
        Err(format!(
            "there is a machine {name} already, from {file}: end it with `bivisor down {name}`, or choose another name"
        ))
    }

    /// The machines of a file, with what they do.
    fn of_file(&self, file: &Path) -> Vec<String> {
        let machines = self.machines.values().filter(|machine| machine.spec().file == file);
        machines.map(|machine| format!("{} {}", machine.spec().name, machine.status().state)).collect()
    }

    /// The names of those that a user has named.
    fn chosen(&self, which: &[Which]) -> Result<Vec<String>, String> {
        if which.is_empty() {
            return Ok(self.machines.keys().cloned().collect());
        }
        let mut names = Vec::new();
        for which in which {
            match which {
                Which::Name(name) => names.push(name.clone()),
                Which::File(file) => {
                    let before = names.len();
                    let machines = self.machines.values().map(Machine::spec);
                    names.extend(machines.filter(|spec| spec.file == *file).map(|spec| spec.name.clone()));
                    if names.len() == before {
                        return Err(format!("no machine of {} is up", file.display()));
                    }
                }
            }
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Orders something of machines, all or none.
    fn order(&mut self, names: Vec<String>, goal: Goal, how: How) -> Result<Vec<String>, String> {
        if let Some(unknown) = names.iter().find(|name| !self.machines.contains_key(*name)) {
            return Err(protocol::unknown(unknown, self.machines.keys().map(String::as_str)));
        }
        self.each(&names, |machine| machine.order(goal, how));
        Ok(names)
    }

    /// Does something with those of these machines that are there.
    fn each(&mut self, names: &[String], act: impl Fn(&mut Machine)) {
        for name in names {
            if let Some(machine) = self.machines.get_mut(name) {
                act(machine);
            }
        }
    }

    /// Forgets who is gone, and answers whose wait is over.
    fn settle(&mut self) {
        self.machines.retain(|_, machine| !machine.is_gone());
        let mut waiters = std::mem::take(&mut self.waiters);
        waiters.retain_mut(|waiter| match self.answer(waiter) {
            Some(reply) => {
                // Who asked may be gone.
                let _ = waiter.reply.send(reply);
                false
            }
            None => true,
        });
        self.waiters.extend(waiters);
    }

    fn answer(&mut self, waiter: &mut Waiter) -> Option<Reply> {
        let done = || Reply::Done(waiter.names.clone());
        let mut present = waiter.names.iter().filter_map(|name| self.machines.get(name));
        match &waiter.until {
            Until::Gone => present.next().is_none().then(done),
            Until::Over => present.all(Machine::is_over).then(done),
            Until::Undone(reply) => present.next().is_none().then(|| reply.clone()),
            Until::Started => self.started(&waiter.names)?.err().map_or_else(|| Some(done()), Some),
            Until::Up => match self.started(&waiter.names)? {
                Ok(()) => {
                    let done = done();
                    self.each(&waiter.names, Machine::commit);
                    Some(done)
                }
                Err(reply) => {
                    self.each(&waiter.names, |machine| machine.order(Goal::Remove, How::Kill));
                    self.machines.retain(|_, machine| !machine.is_gone());
                    waiter.until = Until::Undone(reply);
                    self.answer(waiter)
                }
            },
        }
    }

    /// Whether all of these have started; an answer if one has failed to.
    fn started(&self, names: &[String]) -> Option<Result<(), Reply>> {
        let mut all = true;
        for name in names {
            let Some(machine) = self.machines.get(name) else {
                return Some(Err(Reply::refused(format!("{name} was taken down meanwhile"))));
            };
            if machine.is_to_stop() {
                return Some(Err(Reply::refused(format!("{name} was stopped meanwhile"))));
            }
            match machine.start_worked() {
                Some(Err(ending)) => {
                    let status = ending.status.filter(|status| *status != 0).unwrap_or(status::HOST);
                    let sentence = format!("{name}: {}", ending.sentence);
                    return Some(Err(Reply::Refused { status, sentence }));
                }
                Some(Ok(())) => {}
                None => all = false,
            }
        }
        all.then_some(Ok(()))
    }
}

fn power_button(seconds: u64) -> How {
    // More than a year is for ever, and an Instant can take it.
    How::PowerButton(Duration::from_secs(seconds.min(1 << 25)))
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Waiting => "waiting",
            Self::Stopped => "stopped",
            Self::GivenUp => "given up",
        })
    }
}
