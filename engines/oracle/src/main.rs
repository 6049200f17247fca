//! Compares random instructions between the host's processor and the interpreter.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use bivisor_oracle::blocks::guest::EngineKind;
use bivisor_oracle::blocks::{Against, Difference, Listener, Options, Totals, isolate};
use bivisor_oracle::{Oracle, exclude};
use clap::{Parser, ValueEnum};

/// Compares random instructions between the host's processor and the interpreter.
#[derive(Parser)]
struct Arguments {
    /// How many instructions to try.
    #[arg(long, default_value_t = 1_000_000)]
    count: u64,
    /// Where the random numbers start.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds to try, this one and those that follow, with the instructions shared out between them.
    #[arg(long, default_value_t = 1, requires = "blocks", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Differences to report in full for each mnemonic, or for each of the kinds that sequences show.
    #[arg(long, default_value_t = 1)]
    reports: u64,
    /// Try sequences of instructions instead of single ones.
    #[arg(long)]
    blocks: bool,
    /// The engine that sequences are tried on.
    #[arg(long, value_enum, default_value_t = Engine::Dbt, requires = "blocks")]
    engine: Engine,
    /// What it is compared with.
    #[arg(long, value_enum, default_value_t = Side::Native, requires = "blocks")]
    against: Side,
    /// Number of the first trial, for repeating one.
    #[arg(long, default_value_t = 0, requires = "blocks")]
    first: u64,
    /// Sequences with a difference that are made small; others are only counted.
    #[arg(long, default_value_t = 100, requires = "blocks")]
    explained: u64,
    /// Do not compare arithmetic flags that a fault saves where they are dead: the code that follows overwrites them
    /// unread.
    #[arg(long, requires = "blocks")]
    dead_flags_ignored: bool,
    /// List the kinds of instruction that no random number has hit.
    #[arg(long)]
    untried: bool,
    /// Only tell what is not tried, and why.
    #[arg(long)]
    exclusions: bool,
}

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    Dbt,
    Interp,
}

/// What an engine is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Side {
    Native,
    Interp,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.exclusions {
        print!("{}", exclude::table());
        return ExitCode::SUCCESS;
    }
    let result = if arguments.blocks { run_blocks(&arguments) } else { run(&arguments) };
    match result {
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

/// Prints what there is to say of sequences.
struct Printer<'a> {
    arguments: &'a Arguments,
    seed: u64,
    start: Instant,
    shown: u64,
    by_title: BTreeMap<String, u64>,
}

impl Listener for Printer<'_> {
    fn starting(&mut self, _trials: Range<u64>) {}

    fn found(&mut self, difference: Difference) {
        let Difference { trial, title, report } = difference;
        let count = self.by_title.entry(title.clone()).or_default();
        *count += 1;
        if *count <= self.arguments.reports {
            println!("\r--- {title}; trial {trial} of seed {}\n{report}", self.seed);
        }
    }

    fn progress(&mut self, totals: &Totals) {
        if totals.instructions >= self.shown + (1 << 18) {
            self.shown = totals.instructions;
            eprint!("\r{} instructions, {:.0} s ", self.shown, self.start.elapsed().as_secs_f64());
            let _ = std::io::stderr().flush();
        }
    }
}

impl Printer<'_> {
    fn finished(&mut self, totals: &Totals) {
        let Totals { instructions, runs, trials, differences, by_vector, endless } = totals;
        let seconds = self.start.elapsed().as_secs_f64();
        eprintln!("\r{instructions} instructions in {seconds:.1} s, {differences} differences");
        eprintln!("{runs} runs in {trials} trials; {endless} runs were left out, because some did not end");
        for (vector, count) in by_vector.iter().enumerate().filter(|(_, count)| **count > 0) {
            eprintln!("{count:8} ended by #{vector}");
        }
        for (title, count) in &self.by_title {
            println!("{count:8} {title}");
        }
    }
}

/// The same for sequences.
fn run_blocks(arguments: &Arguments) -> std::io::Result<bool> {
    let mut agrees = true;
    for seed in arguments.seed..arguments.seed.saturating_add(arguments.seeds) {
        agrees &= run_seed(arguments, seed)?;
    }
    if arguments.seeds > 1 {
        let result = if agrees { "no difference" } else { "differences" };
        eprintln!("{result} in {} instructions of {} seeds", arguments.count, arguments.seeds);
    }
    Ok(agrees)
}

/// The same for the sequences of one seed.
fn run_seed(arguments: &Arguments, seed: u64) -> std::io::Result<bool> {
    let options = Options {
        engine: if arguments.engine == Engine::Dbt { EngineKind::Dbt } else { EngineKind::Interp },
        against: if arguments.against == Side::Native { Against::Native } else { Against::Interp },
        seed,
        first: arguments.first,
        dead_flags_ignored: arguments.dead_flags_ignored,
        explained: arguments.explained,
    };
    let mut printer = Printer { arguments, seed, start: Instant::now(), shown: 0, by_title: BTreeMap::new() };
    isolate::run(options, arguments.count.div_ceil(arguments.seeds), &mut printer, Printer::finished)
}
