//! One trial at a time, each on an engine of its own: what making trials smaller asks for.

use std::io::{Error, Result};
use std::sync::Arc;

use bivisor_x86::cpuid::CpuModel;

use super::code::Assembled;
use super::compare::Comparison;
use super::guest::{EngineKind, Guest};
use super::layout::{Batch, Image, Outcome, SKIPPED, TIMEOUT};
use super::native::Native;
use super::report::{listing, report, title};
use super::shrink::shrink;
use super::trial::{Trial, trial};
use super::{Against, Difference, Options};

/// Who says what is right.
pub enum Reference {
    /// The host's processor.
    Native(Box<Native>),
    /// An engine.
    Guest(Box<Guest>, Vec<Outcome>),
}

/// An engine's error as one of input and output.
pub fn engine_error(error: impl std::fmt::Display) -> Error {
    Error::other(error.to_string())
}

impl Reference {
    /// Starts it.
    ///
    /// # Errors
    /// The host gives no memory or process.
    pub fn new(against: Against, model: &Arc<CpuModel>, images: &Arc<[Image]>) -> Result<Self> {
        Ok(match against {
            Against::Native => Self::Native(Box::new(Native::start(images)?)),
            Against::Interp => {
                let guest = Guest::new(EngineKind::Interp, Arc::clone(model), Arc::clone(images));
                Self::Guest(Box::new(guest.map_err(engine_error)?), Vec::new())
            }
        })
    }

    /// Lets it execute a batch.
    ///
    /// # Errors
    /// The engine failed.
    pub fn submit(&mut self, batch: &Arc<Batch>) -> Result<()> {
        match self {
            Self::Native(native) => native.submit(batch),
            Self::Guest(guest, outcomes) => {
                let empty = vec![Outcome::empty(); batch.inputs.len()];
                *outcomes = guest.execute(batch, empty).map_err(engine_error)?;
            }
        }
        Ok(())
    }

    /// Waits until it has.
    ///
    /// # Errors
    /// The native process died.
    pub fn wait(&mut self) -> Result<Vec<Outcome>> {
        match self {
            Self::Native(native) => Ok(native.wait()?.to_vec()),
            Self::Guest(_, outcomes) => Ok(std::mem::take(outcomes)),
        }
    }
}

/// The first run of a trial that differs, and how.
struct Finding {
    run: usize,
    lines: Vec<String>,
    expected: Outcome,
    outcome: Outcome,
}

impl Finding {
    /// What differs first.
    fn kind(&self) -> &str {
        let line = self.lines.first().map_or("", String::as_str).trim_start();
        if line.starts_with('[') { "memory" } else { line.split("  ").next().unwrap_or_default() }
    }
}

/// Checks single trials.
pub struct Checker {
    options: Options,
    model: Arc<CpuModel>,
    images: Arc<[Image]>,
    reference: Reference,
}

/// The first run of a trial whose outcomes differ, and how.
pub fn first_difference(
    comparison: &Comparison<'_>,
    expected: &[Outcome],
    outcomes: &[Outcome],
) -> Option<(usize, Vec<String>)> {
    let runs = expected.iter().zip(outcomes).enumerate();
    let mut comparable = runs.take_while(|(_, (expected, _))| !comparison.is_overwritten(expected));
    comparable.find_map(|(run, (expected, outcome))| {
        let lines = match outcome.state.vector {
            SKIPPED => Vec::new(),
            _ => comparison.differences(expected, outcome),
        };
        (!lines.is_empty()).then_some((run, lines))
    })
}

impl Checker {
    /// With these options.
    ///
    /// # Errors
    /// The host gives no memory or process.
    pub fn new(options: Options, model: &Arc<CpuModel>, images: &Arc<[Image]>) -> Result<Self> {
        let reference = Reference::new(options.against, model, images)?;
        Ok(Self { options, model: Arc::clone(model), images: Arc::clone(images), reference })
    }

    /// How the runs of a trial are compared; `None` if it reads undefined flags.
    pub fn comparison<'a>(&self, trial: &'a Trial, assembled: &'a Assembled) -> Option<Comparison<'a>> {
        Comparison::new(trial, assembled, self.options.names(), self.options.dead_flags_ignored)
    }

    fn batch(trial: &Trial) -> (Assembled, Arc<Batch>) {
        let (assembled, inputs) = trial.assemble(0);
        let batch = Batch { codes: vec![*assembled.code], inputs };
        (assembled, Arc::new(batch))
    }

    fn execute(&self, kind: EngineKind, batch: &Arc<Batch>) -> Option<Vec<Outcome>> {
        let mut guest = Guest::new(kind, Arc::clone(&self.model), Arc::clone(&self.images)).ok()?;
        guest.execute(batch, vec![Outcome::empty(); batch.inputs.len()]).ok()
    }

    /// Runs a trial on a new engine, and looks at nothing.
    pub fn execute_only(&self, trial: &Trial) {
        let (_, batch) = Self::batch(trial);
        let _ = self.execute(self.options.engine_for(trial), &batch);
    }

    /// Runs a trial on a new engine.
    fn check(&mut self, trial: &Trial) -> Option<Finding> {
        let (assembled, batch) = Self::batch(trial);
        let comparison = self.comparison(trial, &assembled)?;
        self.reference.submit(&batch).ok()?;
        let expected = self.reference.wait().ok()?;
        if expected.iter().any(|outcome| outcome.state.vector == TIMEOUT) {
            return None;
        }
        let outcomes = self.execute(self.options.engine_for(trial), &batch)?;
        let (run, lines) = first_difference(&comparison, &expected, &outcomes)?;
        Some(Finding { run, lines, expected: expected[run].clone(), outcome: outcomes[run].clone() })
    }

    /// Makes the trial with this number as small as it can be, and reports on it.
    /// `seen`: what differed when it ran among others.
    pub fn explain(&mut self, number: u64, seen: &[String]) -> Difference {
        let whole = trial(self.options.seed, number, &self.model, self.options.is_privileged());
        let Some(first) = self.check(&whole) else {
            let (assembled, _) = Self::batch(&whole);
            let listing = listing(&whole, &assembled);
            let title = "no difference without the trials before it".to_string();
            return Difference { trial: number, title, report: listing + &seen.join("\n") + "\n" };
        };
        // Not just any difference: leaving out what prepares an instruction may make another.
        let mut differs = |trial: &Trial| {
            let finding = self.check(trial)?;
            (finding.kind() == first.kind()).then_some(finding.run)
        };
        let small = shrink(&whole, &mut differs);
        let Some(finding) = self.check(&small) else {
            let title = "no difference any more once it was made smaller".to_string();
            return Difference { trial: number, title, report: String::new() };
        };
        let title = title(&small, &finding.lines);
        Difference { trial: number, title, report: self.report(&small, &finding) }
    }

    /// Reports how a trial differs, if it does, as it is.
    pub fn reproduce(&mut self, trial: &Trial) -> Option<String> {
        self.check(trial).map(|finding| self.report(trial, &finding))
    }

    fn report(&self, small: &Trial, finding: &Finding) -> String {
        let (assembled, batch) = Self::batch(small);
        let mut lines = finding.lines.clone();
        if self.options.engine == EngineKind::Dbt && self.options.against == Against::Native {
            lines.push(self.third_opinion(small, &assembled, &batch, finding));
        }
        report(small, &assembled, finding.run, &batch.inputs[finding.run], &lines)
    }

    /// Whom the interpreter agrees with.
    fn third_opinion(
        &self,
        small: &Trial,
        assembled: &Assembled,
        batch: &Arc<Batch>,
        finding: &Finding,
    ) -> String {
        let (Some(comparison), Some(third)) =
            (self.comparison(small, assembled), self.execute(EngineKind::Interp, batch))
        else {
            return "the interpreter fails, too".into();
        };
        let third = &third[finding.run];
        let agrees = |side: &Outcome| comparison.differences(side, third).is_empty();
        match (agrees(&finding.expected), agrees(&finding.outcome)) {
            (true, _) => "the interpreter agrees with the host".into(),
            (_, true) => "the interpreter agrees with the translator".into(),
            _ => "the interpreter agrees with neither".into(),
        }
    }
}
