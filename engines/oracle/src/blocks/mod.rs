//! Random sequences of instructions, natively and on an engine: what single instructions don't show.

pub mod build;
pub mod check;
pub mod code;
pub mod compare;
pub mod control;
pub mod flags;
pub mod guest;
pub mod isolate;
pub mod layout;
pub mod monitor;
pub mod narrow;
pub mod native;
pub mod ordinary;
pub mod privileged;
pub mod report;
pub mod shrink;
pub mod special;
pub mod trial;

use std::io::Result;
use std::ops::Range;
use std::sync::Arc;

use bivisor_x86::cpuid::CpuModel;

use self::check::{Checker, Reference, engine_error, first_difference};
use self::code::Assembled;
use self::guest::{EngineKind, Guest};
use self::layout::{Batch, Image, Outcome, PANIC, SKIPPED, TIMEOUT, images};
use self::native::{CODES, RUNS};
use self::trial::{Trial, trial};
use crate::host_model;
use crate::mode::Mode;

/// What the engine is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// The host's processor.
    Native,
    /// The interpreter.
    Interp,
}

/// What is tried, and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The engine that is proved.
    pub engine: EngineKind,
    /// What it is compared with.
    pub against: Against,
    /// Where the random numbers start.
    pub seed: u64,
    /// Number of the first trial.
    pub first: u64,
    /// Arithmetic flags that a fault saves where they are dead are not compared.
    pub dead_flags_ignored: bool,
    /// So many trials with a difference are made small; others are only counted.
    pub explained: u64,
}

impl Options {
    /// The engine for a trial.
    fn engine_for(&self, trial: &Trial) -> EngineKind {
        match self.engine {
            EngineKind::Dbt if trial.hot => EngineKind::DbtHot,
            engine => engine,
        }
    }

    /// Whether privileged instructions are tried, too.
    fn is_privileged(&self) -> bool {
        self.against == Against::Interp
    }

    /// Names of the two sides.
    fn names(&self) -> [&'static str; 2] {
        let reference = if self.against == Against::Native { "native" } else { "interp" };
        [reference, if self.engine == EngineKind::Dbt { "dbt" } else { "interp" }]
    }
}

/// A difference between the two sides.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Number of the trial.
    pub trial: u64,
    /// What it is about, for telling it from others.
    pub title: String,
    /// Everything to know about it, several lines.
    pub report: String,
}

/// Who hears how it goes.
pub trait Listener {
    /// Trials with these numbers are about to be run on the engine.
    fn starting(&mut self, trials: Range<u64>);
    /// There was a difference.
    fn found(&mut self, difference: Difference);
    /// So far it went.
    fn progress(&mut self, totals: &Totals);
}

/// The two sides, and a third that counts.
pub struct Blocks {
    options: Options,
    model: Arc<CpuModel>,
    reference: Reference,
    checker: Checker,
    /// For each kind of engine: a guest.
    subjects: Vec<(EngineKind, Guest)>,
    counter: Guest,
    next: u64,
}

/// Trials that are run together.
struct Prepared {
    /// Number of the first.
    first: u64,
    trials: Vec<(Trial, Assembled)>,
    batch: Arc<Batch>,
}

/// What a run of many trials came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Instructions executed.
    pub instructions: u64,
    /// Runs of sequences.
    pub runs: u64,
    /// Trials.
    pub trials: u64,
    /// Trials with a difference.
    pub differences: u64,
    /// Runs that ended by each exception.
    pub by_vector: [u64; 32],
    /// Runs that were left out because natively some run of the trial did not end.
    pub endless: u64,
}

impl Blocks {
    /// Starts both sides.
    ///
    /// # Errors
    /// The host gives no memory or process, or can't run the engine.
    pub fn new(options: Options) -> Result<Self> {
        let model = Arc::new(host_model());
        let images: Arc<[Image]> = images().into();
        let guest = |kind| Guest::new(kind, Arc::clone(&model), Arc::clone(&images)).map_err(engine_error);
        let kinds = match options.engine {
            EngineKind::Dbt => &[EngineKind::Dbt, EngineKind::DbtHot][..],
            _ => &[options.engine],
        };
        Ok(Self {
            // First: the child processes should not have what the others allocate.
            reference: Reference::new(options.against, &model, &images)?,
            checker: Checker::new(options, &model, &images)?,
            subjects: kinds.iter().map(|&kind| Ok((kind, guest(kind)?))).collect::<Result<_>>()?,
            counter: guest(EngineKind::Counter)?,
            options,
            model: Arc::clone(&model),
            next: options.first,
        })
    }

    /// Runs a sequence of these bytes at an offset in the code pages, with these general registers, as 64-bit code or
    /// as 32-bit code. Returns a report if there is a difference.
    pub fn reproduce(
        &mut self,
        code: &[u8],
        is_32bit: bool,
        origin: usize,
        registers: &[(usize, u64)],
    ) -> Option<String> {
        let mode = Mode::new(&self.model, is_32bit);
        self.checker.reproduce(&Trial::of_code(code, mode, origin, registers))
    }

    fn prepare(&mut self) -> Prepared {
        let first = self.next;
        let mut trials = Vec::new();
        let mut batch = Batch::default();
        while trials.len() < CODES {
            let trial = trial(self.options.seed, self.next, &self.model, self.options.is_privileged());
            if batch.inputs.len() + trial.runs.len() > RUNS {
                break;
            }
            let (assembled, inputs) = trial.assemble(batch.codes.len() as u32);
            batch.codes.push(*assembled.code);
            batch.inputs.extend(inputs);
            trials.push((trial, assembled));
            self.next += 1;
        }
        Prepared { first, trials, batch: Arc::new(batch) }
    }

    /// Runs trials until `count` instructions were executed.
    ///
    /// # Errors
    /// The native process died, or the engine can't be had any more.
    pub fn run(&mut self, count: u64, listener: &mut impl Listener) -> Result<Totals> {
        let mut totals = Totals::default();
        let mut current = self.prepare();
        self.reference.submit(&current.batch)?;
        while totals.instructions < count {
            let expected = self.reference.wait()?;
            let next = self.prepare();
            self.reference.submit(&next.batch)?;
            let empty = outcomes_to_fill(&current, &expected);
            let counted = self.counter.execute(&current.batch, empty.clone()).map_err(engine_error)?;
            listener.starting(current.first..current.first + current.trials.len() as u64);
            let outcomes = self.execute(&current, empty)?;
            totals.add(&current, &expected, &counted);
            for (number, lines) in self.different(&current, &expected, &outcomes) {
                totals.differences += 1;
                if totals.differences <= self.options.explained {
                    listener.found(self.checker.explain(number, &lines));
                }
            }
            listener.progress(&totals);
            current = next;
        }
        Ok(totals)
    }

    /// Executes trials on the engines that they are for.
    fn execute(&mut self, prepared: &Prepared, empty: Vec<Outcome>) -> Result<Vec<Outcome>> {
        let mut all = empty.clone();
        for (kind, guest) in &mut self.subjects {
            let mut mine = empty.clone();
            let runs = prepared.trials.iter().flat_map(|(trial, _)| trial.runs.iter().map(move |_| trial));
            let is_mine: Vec<bool> = runs.map(|trial| self.options.engine_for(trial) == *kind).collect();
            for (outcome, _) in mine.iter_mut().zip(&is_mine).filter(|(_, is_mine)| !**is_mine) {
                outcome.state.vector = SKIPPED;
            }
            let done = guest.execute(&prepared.batch, mine).map_err(engine_error)?;
            let done = all.iter_mut().zip(done).zip(&is_mine).filter(|(_, is_mine)| **is_mine);
            done.for_each(|((place, outcome), _)| *place = outcome);
        }
        Ok(all)
    }

    /// Numbers of the trials with a difference, and the first of each.
    fn different(
        &self,
        prepared: &Prepared,
        expected: &[Outcome],
        outcomes: &[Outcome],
    ) -> Vec<(u64, Vec<String>)> {
        let mut start = 0;
        let differs = |trial: &Trial, assembled: &Assembled, start: usize| {
            let runs = start..start + trial.runs.len();
            // One that reads undefined flags is the generator's fault; that has a test.
            let comparison = self.checker.comparison(trial, assembled)?;
            first_difference(&comparison, &expected[runs.clone()], &outcomes[runs])
        };
        let mut numbers = Vec::new();
        for (number, (trial, assembled)) in (prepared.first..).zip(&prepared.trials) {
            if let Some((run, mut lines)) = differs(trial, assembled, start) {
                lines.insert(0, format!("  run {run}, of sequence {}", trial.runs[run].0));
                numbers.push((number, lines));
            }
            start += trial.runs.len();
        }
        numbers
    }
}

/// Outcomes to be filled in: trials in which some run did not end natively are marked to be skipped.
fn outcomes_to_fill(prepared: &Prepared, expected: &[Outcome]) -> Vec<Outcome> {
    let mut outcomes = vec![Outcome::empty(); expected.len()];
    let mut start = 0;
    for (trial, _) in &prepared.trials {
        let runs = start..start + trial.runs.len();
        start = runs.end;
        if expected[runs.clone()].iter().any(|outcome| outcome.state.vector == TIMEOUT) {
            outcomes[runs].iter_mut().for_each(|outcome| outcome.state.vector = SKIPPED);
        }
    }
    outcomes
}

impl Totals {
    fn add(&mut self, prepared: &Prepared, expected: &[Outcome], counted: &[Outcome]) {
        self.trials += prepared.trials.len() as u64;
        for (expected, counted) in expected.iter().zip(counted) {
            if counted.state.vector < PANIC {
                self.runs += 1;
                self.instructions += counted.count;
                self.by_vector[expected.state.vector as usize & 31] += 1;
            }
        }
        self.endless += counted.iter().filter(|outcome| outcome.state.vector == SKIPPED).count() as u64;
    }
}
