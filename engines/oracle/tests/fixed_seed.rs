//! Runs of the oracle that are the same every time.

use std::ops::Range;

use bivisor_oracle::Oracle;
use bivisor_oracle::blocks::guest::EngineKind;
use bivisor_oracle::blocks::{Against, Blocks, Difference, Listener, Options, Totals};

#[test]
fn the_interpreter_agrees_with_the_host() {
    let mut reports = Vec::new();
    let mut oracle = Oracle::new(20_240_601).expect("the oracle starts");
    let tried = oracle
        .run(
            100_000,
            |difference| {
                reports.push(difference.report);
                reports.len() < 5
            },
            |_| {},
        )
        .expect("the native process lives");
    assert!(reports.is_empty(), "{}", reports.join("\n"));
    assert!(tried >= 100_000);
    assert!(oracle.tried() > 1500, "only {} kinds of instruction", oracle.tried());
}

/// Collects what there is to tell.
#[derive(Default)]
struct Reports(Vec<String>);

impl Listener for Reports {
    fn starting(&mut self, _trials: Range<u64>) {}
    fn found(&mut self, difference: Difference) {
        self.0.push(format!("{}; trial {}\n{}", difference.title, difference.trial, difference.report));
    }
    fn progress(&mut self, _totals: &Totals) {}
}

/// Tries sequences on an engine. The flags that a fault saves where they are dead are known to be wrong.
fn try_sequences(engine: EngineKind, against: Against, count: u64) {
    let options =
        Options { engine, against, seed: 20_240_601, first: 0, dead_flags_ignored: true, explained: 3 };
    let mut reports = Reports::default();
    let totals = Blocks::new(options).expect("both sides start").run(count, &mut reports).expect("it runs");
    assert_eq!(totals.differences, 0, "{}", reports.0.join("\n"));
    assert!(totals.instructions >= count);
    assert!(totals.by_vector[14] > totals.runs / 50, "few page faults");
    assert!(totals.by_vector[3] > totals.runs / 2, "few sequences come to their end");
}

#[test]
fn the_translator_agrees_with_the_host_on_sequences() {
    try_sequences(EngineKind::Dbt, Against::Native, 200_000);
}

#[test]
fn the_interpreter_agrees_with_the_host_on_sequences() {
    try_sequences(EngineKind::Interp, Against::Native, 50_000);
}

#[test]
fn the_translator_agrees_with_the_interpreter_on_privileged_sequences() {
    try_sequences(EngineKind::Dbt, Against::Interp, 100_000);
}
