//! Compares random instructions between the host's processor and the interpreter.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use bivisor_oracle::{Oracle, exclude};
use clap::Parser;

/// Compares random instructions between the host's processor and the interpreter.
#[derive(Parser)]
struct Arguments {
    /// How many instructions to try.
    #[arg(long, default_value_t = 1_000_000)]
    count: u64,
    /// Where the random numbers start.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Differences to report in full for each mnemonic.
    #[arg(long, default_value_t = 1)]
    reports: u64,
    /// List the kinds of instruction that no random number has hit.
    #[arg(long)]
    untried: bool,
    /// Only tell what is not tried, and why.
    #[arg(long)]
    exclusions: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.exclusions {
        print!("{}", exclude::table());
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("oracle: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether there was no difference.
fn run(arguments: &Arguments) -> std::io::Result<bool> {
    let start = Instant::now();
    let mut oracle = Oracle::new(arguments.seed)?;
    let mut by_mnemonic: BTreeMap<String, u64> = BTreeMap::new();
    let mut shown = 0;
    let tried = oracle.run(
        arguments.count,
        |difference| {
            let count = by_mnemonic.entry(difference.mnemonic).or_default();
            *count += 1;
            if *count <= arguments.reports {
                println!("\r{}", difference.report);
            }
            true
        },
        |tried| {
            if tried >= shown + (1 << 16) {
                shown = tried;
                eprint!("\r{tried} instructions, {:.0} s ", start.elapsed().as_secs_f64());
                let _ = std::io::stderr().flush();
            }
        },
    )?;
    let differences: u64 = by_mnemonic.values().sum();
    eprintln!("\r{tried} instructions in {:.1} s, {differences} differences", start.elapsed().as_secs_f64());
    let untried = oracle.untried();
    eprintln!("{} kinds of instruction tried, {} were not", oracle.tried(), untried.len());
    if arguments.untried {
        untried.iter().for_each(|code| println!("not tried: {}", code.op_code().instruction_string()));
    }
    for (mnemonic, count) in &by_mnemonic {
        println!("{count:8} {mnemonic}");
    }
    Ok(differences == 0)
}
