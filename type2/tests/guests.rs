//! The bare-metal guests through `bivisor run` on each software engine, with one expected output.
use bivisor_guests::{ALL, Guest, run};
use std::{fs, process::Command, time::Duration};

/// Ends of a run that count as good: power-off, and the verdict "passed" at port 0xf4 (2 * 0x10 + 1).
const GOOD_ENDS: [i32; 2] = [0, 33];

/// Runs a guest on an engine; what is not as expected is an error in words.
fn on_engine(guest: &Guest, engine: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|e| format!("no temporary folder: {e}"))?;
    let image = folder.path().join(guest.name);
    fs::write(&image, guest.image).map_err(|e| format!("{}: {e}", image.display()))?;
    let mut bivisor = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    bivisor.args(["run", "--testdev", "--no-reboot", "--memory", "64M", "--engine", engine, "--kernel"]);
    bivisor.arg(&image).current_dir(folder.path());
    let outcome = run(guest, &mut bivisor, Duration::from_secs(60)).map_err(|e| format!("bivisor: {e}"))?;
    let verdict = outcome.compare(guest, "");
    let code = outcome.status.and_then(|status| status.code());
    println!("{} on {engine}: {} passed in {:.1?}", guest.name, verdict.passed, outcome.time);
    // Nothing may be skipped here: the machine offers all that the guests ask for.
    if verdict.differences.is_empty()
        && verdict.skipped.is_empty()
        && code.is_some_and(|c| GOOD_ENDS.contains(&c))
    {
        return Ok(());
    }
    let differences = verdict.differences.join("\n");
    let Guest { name, .. } = guest;
    let skipped = verdict.skipped;
    Err(format!(
        "{name} on {engine}: status {code:?}, skipped {skipped:?}\n{differences}\n{}",
        outcome.messages
    ))
}

/// Every guest on an engine, all failures in one message.
fn all_on(engine: &str) {
    let failures: Vec<String> = ALL.iter().filter_map(|guest| on_engine(guest, engine).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn every_guest_passes_on_the_interpreter() {
    all_on("interp");
}

#[test]
fn every_guest_passes_on_the_translator() {
    all_on("dbt");
}
