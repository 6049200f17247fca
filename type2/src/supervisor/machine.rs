//! One machine under the supervisor: its process, what is to become of it, and what follows from its end.

use std::fs;
use std::io;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use bivisor_backends::runtime;
use rustix::process::Signal;

use super::core::Message;
use super::places::{MachinePlaces, Places};
use super::policy::{Restarts, Verdict};
use super::process::{self, Found, News, Process};
use super::protocol::{MachineStatus, State};
use super::record::{self, Ending, Goal, Progress, Spec, seconds};
use crate::status;

/// How long a process may take until its guest runs.
const START_LIMIT: Duration = Duration::from_secs(120);
/// The power button is pressed again: a guest that is still booting doesn't hear it.
const PRESS_AGAIN: Duration = Duration::from_secs(10);
/// How long an orderly end of the process may take: disks are flushed.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How often a process is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The time-out of a stop that another supervisor has begun.
const INHERITED_PATIENCE: Duration = Duration::from_secs(30);

/// How a machine is to end.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// By the power button, or after this time without the guest.
    PowerButton(Duration),
    /// At once.
    Kill,
}

enum Phase {
    /// It has a process, but which one is not known; that is looked for at this time.
    Lost(Instant),
    /// Its process opens what it needs, and may until then.
    Starting(Process, Instant),
    /// Its guest runs.
    Running(Process),
    /// Its process is to end.
    Stopping(Process, Step),
    /// It starts again then.
    Waiting(Instant),
    /// It has no process.
    Ended,
}

/// The next thing to do with a process that is to end.
#[derive(Clone, Copy)]
enum Step {
    /// Press the power button again at the first time; stop asking at the second.
    Press(Instant, Instant),
    /// It was told to end; kill it then.
    Kill(Instant, Cause),
    /// It was killed.
    Killed(Cause),
}

/// Why a process is ended.
#[derive(Clone, Copy)]
enum Cause {
    /// The guest has not heeded the power button in time.
    Unheeded,
    /// Its guest did not run in time.
    SlowStart,
    /// It is stopped before its guest runs.
    Unstarted,
    /// Somebody wants it killed.
    Kill,
}

impl Cause {
    /// What is told of the end, if not how the process ended.
    fn sentence(self) -> Option<String> {
        match self {
            Self::Unheeded => Some("it did not end in time when asked, so it was ended".into()),
            Self::SlowStart => {
                Some(format!("its guest did not run within {} s, so it was ended", START_LIMIT.as_secs()))
            }
            Self::Unstarted => Some("it was ended before its guest ran".into()),
            Self::Kill => None,
        }
    }
}

/// A machine.
pub struct Machine {
    spec: Spec,
    progress: Progress,
    places: MachinePlaces,
    all: Places,
    phase: Phase,
    /// The user has asked for this start and has not heard yet that it worked.
    asked: bool,
    /// It is to be forgotten.
    gone: bool,
    messages: Sender<Message>,
}

impl Machine {
    /// A machine that has no process yet.
    ///
    /// # Errors
    /// Its folder can't be made.
    pub fn create(spec: Spec, all: &Places, messages: &Sender<Message>) -> io::Result<Self> {
        let places = all.machine(&spec.name);
        runtime::private(places.folder())?;
        record::write(&places.spec(), &spec)?;
        let mut machine = Self::new(spec, Progress::default(), all, messages);
        machine.asked = true;
        Ok(machine)
    }

    fn new(spec: Spec, progress: Progress, all: &Places, messages: &Sender<Message>) -> Self {
        Self {
            places: all.machine(&spec.name),
            all: all.clone(),
            spec,
            progress,
            phase: Phase::Ended,
            asked: false,
            gone: false,
            messages: messages.clone(),
        }
    }

    /// Takes over a machine from a supervisor that is gone. None: nothing is left of it.
    ///
    /// # Errors
    /// What is left of it can't be removed.
    pub fn adopt(name: &str, all: &Places, messages: &Sender<Message>) -> io::Result<Option<Self>> {
        let places = all.machine(name);
        let Some(spec) = record::read::<Spec>(&places.spec()) else {
            // Its supervisor was killed before it had begun.
            fs::remove_dir_all(places.folder())?;
            return Ok(None);
        };
        let mut progress: Progress = record::read(&places.progress()).unwrap_or_default();
        if !progress.committed {
            progress.goal = Goal::Remove;
        }
        let mut machine = Self::new(spec, progress, all, messages);
        machine.look();
        Ok((!machine.gone).then_some(machine))
    }

    /// Looks for the process that another supervisor may have started.
    fn look(&mut self) {
        let found = Process::find(&self.places, self.news()).unwrap_or_else(|error| {
            eprintln!("bivisor: the process of {} can't be found: {error}", self.spec.name);
            Found::Nameless
        });
        let progress = &self.progress;
        match found {
            Found::Nameless => self.phase = Phase::Lost(Instant::now() + LOOK_AGAIN),
            Found::Process(process) => {
                self.phase = Phase::Running(process);
                match progress.goal {
                    Goal::Run => {}
                    _ if progress.committed => self.end(How::PowerButton(INHERITED_PATIENCE)),
                    _ => self.end(How::Kill),
                }
            }
            Found::Nobody if !progress.settled && progress.started > 0 => {
                self.ended(process::ending_of_unwatched(&self.places));
            }
            Found::Nobody if progress.goal == Goal::Run && progress.over => self.phase = Phase::Ended,
            Found::Nobody => self.go_on(),
        }
    }

    fn news(&self) -> impl Fn(News) + Send + 'static {
        let (messages, name, run) = (self.messages.clone(), self.spec.name.clone(), self.progress.started);
        move |news| {
            // The supervisor is only gone at its end.
            let _ = messages.send(Message::News { name: name.clone(), run, news });
        }
    }

    /// Starts its process.
    pub fn start(&mut self) {
        self.progress.started += 1;
        (self.progress.settled, self.progress.over, self.progress.given_up) = (false, false, false);
        self.progress.since = None;
        let started = record::write(&self.places.progress(), &self.progress).and_then(|()| {
            Process::start(&self.places, self.spec.folder(), &self.all.log(&self.spec.name), self.news())
        });
        match started {
            Ok(process) => self.phase = Phase::Starting(process, Instant::now() + START_LIMIT),
            Err(error) => {
                let sentence = format!("its process can't be started: {error}");
                self.ended(Ending::now(Some(status::HOST), sentence));
            }
        }
    }

    /// What a user wants of it.
    pub fn order(&mut self, goal: Goal, how: How) {
        self.progress.goal = goal;
        self.asked = goal == Goal::Restart;
        self.save();
        match self.phase {
            Phase::Waiting(_) | Phase::Ended => self.go_on(),
            Phase::Starting(..) | Phase::Running(_) | Phase::Stopping(..) => self.end(how),
            // Once it is found.
            Phase::Lost(_) => {}
        }
    }

    /// Its process's news, if they are of the process that it has now.
    pub fn hear(&mut self, run: u64, news: News) {
        if run != self.progress.started {
            return;
        }
        match (news, &self.phase) {
            (News::Ready, Phase::Starting(process, _)) => {
                self.phase = Phase::Running(process.clone());
                self.asked = false;
                self.progress.since = Some(seconds());
                self.save();
            }
            (News::Ready, _) => {}
            (News::Ended(ending), _) => self.ended(ending),
        }
    }

    /// All of its `up` have started.
    pub fn commit(&mut self) {
        self.progress.committed = true;
        self.save();
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        if self.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        match &self.phase {
            Phase::Lost(_) => self.look(),
            Phase::Waiting(_) => self.start(),
            Phase::Starting(process, _) => {
                process.signal(Signal::KILL);
                self.phase = Phase::Stopping(process.clone(), Step::Killed(Cause::SlowStart));
            }
            Phase::Stopping(process, step) => {
                let step = self.next_step(process, *step, now);
                self.phase = Phase::Stopping(process.clone(), step);
            }
            Phase::Running(_) | Phase::Ended => {}
        }
    }

    fn next_step(&self, process: &Process, step: Step, now: Instant) -> Step {
        match step {
            Step::Press(_, end) if now < end => {
                self.press();
                Step::Press(now + PRESS_AGAIN, end)
            }
            Step::Press(..) => {
                process.signal(Signal::TERM);
                Step::Kill(now + END_LIMIT, Cause::Unheeded)
            }
            Step::Kill(_, cause) => {
                process.signal(Signal::KILL);
                Step::Killed(cause)
            }
            Step::Killed(_) => step,
        }
    }

    fn press(&self) {
        // A process that stands still takes no connection.
        let places = self.places.clone();
        let _ = thread::Builder::new().spawn(move || process::press_power_button(&places));
    }

    /// When something is due.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Lost(until) | Phase::Waiting(until) | Phase::Starting(_, until) => Some(*until),
            Phase::Stopping(_, Step::Press(next, end)) => Some(*next.min(end)),
            Phase::Stopping(_, Step::Kill(at, _)) => Some(*at),
            Phase::Stopping(_, Step::Killed(_)) | Phase::Running(_) | Phase::Ended => None,
        }
    }

    /// Begins to end its process.
    fn end(&mut self, how: How) {
        let now = Instant::now();
        self.phase = match (std::mem::replace(&mut self.phase, Phase::Ended), how) {
            (
                Phase::Starting(process, _) | Phase::Running(process) | Phase::Stopping(process, _),
                How::Kill,
            ) => {
                process.signal(Signal::KILL);
                Phase::Stopping(process, Step::Killed(Cause::Kill))
            }
            (Phase::Starting(process, _), _) => {
                process.signal(Signal::TERM);
                Phase::Stopping(process, Step::Kill(now + END_LIMIT, Cause::Unstarted))
            }
            (Phase::Running(process), How::PowerButton(patience)) => {
                Phase::Stopping(process, Step::Press(now, now + patience))
            }
            (other, _) => other,
        };
        self.tick(now);
    }

    fn ended(&mut self, mut ending: Ending) {
        // A guest that powered off at the last moment has done so.
        if let Phase::Stopping(_, Step::Kill(_, cause) | Step::Killed(cause)) = self.phase
            && let Some(sentence) = cause.sentence().filter(|_| !ending.is_success())
        {
            ending.sentence = sentence;
        }
        let ran = self.progress.since.map_or(0, |since| ending.at.saturating_sub(since));
        let success = ending.is_success();
        self.progress.ending = Some(ending);
        self.progress.settled = true;
        self.phase = Phase::Ended;
        if self.progress.goal != Goal::Run {
            return self.go_on();
        }
        let verdict = if self.asked {
            // The user hears of it; a start that has never worked is not tried again and again.
            Verdict::Stay
        } else {
            self.progress.restarts.judge(self.spec.restart, success, Duration::from_secs(ran))
        };
        match verdict {
            Verdict::Again(delay) => self.phase = Phase::Waiting(Instant::now() + delay),
            Verdict::Stay => self.progress.over = true,
            Verdict::GiveUp => (self.progress.over, self.progress.given_up) = (true, true),
        }
        self.save();
    }

    /// It has no process: does what is to become of it.
    fn go_on(&mut self) {
        match self.progress.goal {
            Goal::Run => self.start(),
            Goal::Stop => {
                self.phase = Phase::Ended;
                self.progress.over = true;
                self.save();
            }
            Goal::Restart => {
                self.progress.goal = Goal::Run;
                self.progress.restarts = Restarts::default();
                self.start();
            }
            Goal::Remove => {
                // What stays is found, and removed, by the next supervisor.
                let _ = fs::remove_dir_all(self.places.folder());
                self.gone = true;
            }
        }
    }

    fn save(&self) {
        if let Err(error) = record::write(&self.places.progress(), &self.progress) {
            eprintln!("bivisor: {}: {error}", self.places.progress().display());
        }
    }

    fn process(&self) -> Option<&Process> {
        match &self.phase {
            Phase::Starting(process, _) | Phase::Running(process) | Phase::Stopping(process, _) => {
                Some(process)
            }
            Phase::Lost(_) | Phase::Waiting(_) | Phase::Ended => None,
        }
    }

    /// Whether it is to be forgotten.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether it has neither a process nor will have one by itself.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// Whether somebody wants it to stop.
    pub fn is_to_stop(&self) -> bool {
        self.progress.goal == Goal::Stop
    }

    /// Whether the start that the user asked for has worked; an error is why it did not.
    pub fn start_worked(&self) -> Option<Result<(), &Ending>> {
        match (&self.progress.ending, self.asked) {
            (_, false) => Some(Ok(())),
            (Some(ending), true) if self.is_over() => Some(Err(ending)),
            _ => None,
        }
    }

    /// What it is.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What there is to tell of it.
    pub fn status(&self) -> MachineStatus {
        let state = match &self.phase {
            Phase::Lost(_) | Phase::Starting(..) => State::Starting,
            Phase::Running(_) => State::Running,
            Phase::Stopping(..) => State::Stopping,
            Phase::Waiting(_) => State::Waiting,
            Phase::Ended if self.progress.given_up => State::GivenUp,
            Phase::Ended => State::Stopped,
        };
        let process = self.process();
        MachineStatus {
            name: self.spec.name.clone(),
            state,
            pid: process.map(|process| process.pid),
            since: self.progress.since.filter(|_| process.is_some()),
            restarts: self.progress.restarts.total,
            policy: self.spec.restart,
            ending: self.progress.ending.clone(),
            file: self.spec.file.clone(),
            log: self.all.log(&self.spec.name),
        }
    }
}
