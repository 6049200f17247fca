//! Runs tests in assembler language on an engine, and counts what passed.

use std::collections::BTreeMap;
use std::io::Result;
use std::path::PathBuf;
use std::process::ExitCode;

use bivisor_oracle::asm_tests::{Runner, Verdict, files};
use bivisor_oracle::blocks::guest::EngineKind;
use clap::{Parser, ValueEnum};

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    Dbt,
    /// The translator, treating all code as hot.
    DbtHot,
    Interp,
}

/// Runs tests in assembler language on an engine.
///
/// The tests are those of a folder and of the folders in it. nasm must be there.
#[derive(Parser)]
struct Arguments {
    /// The folder with the tests.
    folder: PathBuf,
    /// The engine.
    #[arg(long, value_enum, default_value_t = Engine::Dbt)]
    engine: Engine,
    /// Only tests whose path contains this.
    #[arg(long)]
    only: Option<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("asm-tests: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether no test failed.
fn run(arguments: &Arguments) -> Result<bool> {
    let engine = match arguments.engine {
        Engine::Dbt => EngineKind::Dbt,
        Engine::DbtHot => EngineKind::DbtHot,
        Engine::Interp => EngineKind::Interp,
    };
    let runner = Runner::new(engine, &arguments.folder)?;
    let (mut passed, mut failed) = (0, 0);
    let mut skipped: BTreeMap<String, u64> = BTreeMap::new();
    for file in files(&arguments.folder)? {
        let name = file.strip_prefix(&arguments.folder).unwrap_or(&file).display().to_string();
        if arguments.only.as_ref().is_some_and(|only| !name.contains(only)) {
            continue;
        }
        match runner.run(&file)? {
            Verdict::Passed => passed += 1,
            Verdict::Failed(what) => {
                failed += 1;
                println!("FAIL {name}: {what}");
            }
            Verdict::Skipped(why) => *skipped.entry(why).or_default() += 1,
        }
    }
    for (why, count) in &skipped {
        println!("{count:6} skipped: {why}");
    }
    println!("{passed} passed, {failed} failed, {} skipped", skipped.values().sum::<u64>());
    Ok(failed == 0)
}
