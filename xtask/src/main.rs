//! The project's own tasks: `cargo xtask help` lists them.
mod bench;
mod console;
mod excused;
mod fuzz;
mod linux;
mod metal;
mod nested;
mod paravirtual;
mod power_cut;
mod setup;
mod steps;
mod test;
mod trace_diff;

use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

/// Builds and checks Bivisor.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run every check: formatting, lints, unit tests, the guests on every engine and a boot of Linux.
    ///
    /// Ends in one line, "N passed, N failed", with status 0 only if nothing failed.
    Test {
        /// Leave out what takes minutes: the guests' traces and the boot of Linux.
        #[arg(long)]
        quick: bool,
        /// Add what takes many minutes: three Debian servers, whose images are made the first time.
        #[arg(long, conflicts_with = "quick")]
        all: bool,
    },
    /// Run the guests and Linux on the engine kvm, in a Linux with KVM that QEMU emulates.
    NestedKvm {
        /// Only the checks with one of these in their names, such as `paging` or `Linux`.
        names: Vec<String>,
    },
    /// Count the exits of the same guest work with and without the paravirtual interface.
    ///
    /// Status 0 only if they are never more with it.
    PvExits(paravirtual::Arguments),
    /// Watch the clocks of two guests, with and without the paravirtual interface, against the host's.
    ///
    /// Status 0 only if they stay within a millisecond.
    ClockDrift(paravirtual::DriftArguments),
    /// Measure the same benchmark program on the host, in Bivisor and in every QEMU, in turns.
    ///
    /// Writes a table, a plot and the raw results. Status 0 only if every row of every run came out right.
    Bench(Box<bench::Arguments>),
    /// Run tests in assembler language, such as those of FEX, on an engine.
    AsmTests {
        /// The folder with the tests, and options such as `--engine dbt`; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Try random instructions, or sequences of them, on the host's processor and on an engine, and report every difference.
    Oracle {
        /// Arguments of the oracle, such as `--blocks --engine dbt`, `--count N` and `--seed S`; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Kill a machine at random moments while its guest writes, and look whether all is there that was safe.
    ///
    /// Disks in both formats, with every mode of caching; each time the image, the file system, and what the guest had been
    /// told to be written are checked.
    PowerCut(power_cut::Arguments),
    /// Give devices, disk images and networks what nobody would by accident: a fixed time of each, random each time.
    Fuzz(fuzz::Arguments),
    /// The hypervisor for the bare machine: build it, pack machines for it, run it in QEMU.
    #[command(subcommand)]
    Metal(metal::Task),
    /// Find where two traces of one guest (`bivisor run --trace`), one of them of the interpreter, first differ.
    TraceDiff {
        /// A trace.
        a: PathBuf,
        /// The other one.
        b: PathBuf,
        /// The processor whose lines are compared.
        #[arg(long, default_value_t = 0)]
        cpu: u32,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Test { quick, all } => test::run(quick, all),
        Task::NestedKvm { names } => test::nested_kvm(&names),
        Task::PvExits(arguments) => paravirtual::exits(&arguments),
        Task::ClockDrift(arguments) => paravirtual::clock_drift(&arguments),
        Task::Bench(arguments) => bench::bench(&arguments),
        Task::AsmTests { arguments } => optimised("asm-tests", &arguments),
        Task::Oracle { arguments } => optimised("bivisor-oracle", &arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::PowerCut(arguments) => power_cut::run(&arguments),
        Task::Metal(task) => metal::run(&task),
        Task::TraceDiff { a, b, cpu } => trace_diff::run(&a, &b, cpu),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether a program of the oracle found nothing wrong. It runs optimised: long runs are its purpose.
fn optimised(program: &str, arguments: &[String]) -> anyhow::Result<bool> {
    let mut command = std::process::Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--release", "--package", "bivisor-oracle", "--bin", program, "--"]);
    Ok(command.args(arguments).status()?.success())
}
