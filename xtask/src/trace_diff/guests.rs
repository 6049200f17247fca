//! The bare-metal guests as a test: their traces on both engines agree, and a wrong register would be found.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bivisor_guests::{ALL, Guest};

use super::Comparison;
use super::line::Reader;
use crate::steps::Tally;

/// The guests that are about time, or about storms of interrupts: what they do depends on how many came.
const ABOUT_TIME: [&str; 2] = ["escape", "timers"];
/// Line of the translator's trace that is changed: every guest comes so far.
const CHANGED: usize = 1000;
/// Time for a guest at most.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Compares the traces of each guest.
pub fn agree(tally: &mut Tally, program: &Path) {
    for guest in ALL.iter().filter(|guest| !ABOUT_TIME.contains(&guest.name)) {
        tally.check(&format!("traces of {}", guest.name), || {
            Ok(format!(", {} lines", check(guest, program)?))
        });
    }
}

/// How many lines agree.
fn check(guest: &Guest, program: &Path) -> Result<u64> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join(guest.name);
    fs::write(&image, guest.image)?;
    let [interp, dbt] = ["interp", "dbt"].map(|engine| folder.path().join(engine));
    for trace in [&interp, &dbt] {
        let mut bivisor = Command::new(program);
        bivisor.args(["run", "--testdev", "--no-reboot", "--memory", "64M", "--engine"]);
        bivisor.arg(trace.file_name().unwrap_or_default()).arg("--kernel").arg(&image);
        bivisor.arg("--trace").arg(trace);
        bivisor_guests::run(guest, &mut bivisor, TIME_LIMIT).context("bivisor could not be run")?;
    }
    let compare = |dbt: &Path| -> Result<(Option<String>, u64)> {
        let mut comparison = Comparison::new(Reader::open(&interp, 0)?, Reader::open(dbt, 0)?);
        Ok((comparison.run()?, comparison.compared))
    };
    let (difference, lines) = compare(&dbt)?;
    ensure!(difference.is_none(), "{}", difference.unwrap_or_default());
    let changed = folder.path().join("changed");
    fs::write(&changed, with_a_changed_register(&fs::read_to_string(&dbt)?))?;
    let (difference, _) = compare(&changed)?;
    ensure!(difference.is_some_and(|text| text.contains("RBP: dead")), "a wrong RBP is not found");
    Ok(lines)
}

fn with_a_changed_register(trace: &str) -> String {
    let mut text = String::with_capacity(trace.len());
    for (number, line) in trace.lines().enumerate() {
        let mut words: Vec<&str> = line.split(' ').collect();
        if number == CHANGED
            && let Some(rbp) = words.get_mut(11)
        {
            *rbp = "dead";
        }
        text.push_str(&words.join(" "));
        text.push('\n');
    }
    text
}
