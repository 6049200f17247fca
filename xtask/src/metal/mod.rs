//! The hypervisor for the bare machine: building its image, packing machines, running both in QEMU.
mod config;
pub mod tests;

use crate::steps::Tally;
use crate::test::{cargo, target};
use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// QEMU's status when the hypervisor has ended by its debug-exit device, and all was well.
const GOOD_END: i32 = 33;
/// RAM of the real machine beside that of the guests, in MiB: the hypervisor's, and the packed file's.
const OWN_MEMORY: u64 = 192;

/// What to do.
#[derive(Subcommand)]
pub enum Task {
    /// Build the hypervisor's image; prints where it is.
    Build,
    /// Say what is wrong with a description of machines, if anything.
    Check {
        /// The description.
        file: PathBuf,
    },
    /// Pack machines into the module that the hypervisor is booted with.
    Bundle {
        /// The description.
        file: PathBuf,
        /// The module.
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Build, pack, and boot in QEMU's emulation of a processor with AMD-V, on this terminal. Ctrl-] ? helps.
    Run {
        /// The description.
        file: PathBuf,
        /// QEMU's program.
        #[arg(long, default_value = "qemu-system-x86_64")]
        qemu: PathBuf,
    },
    /// Run the checks of the bare machine alone; they are part of `cargo xtask test` too.
    Test,
}

/// Does it; false if the hypervisor ended badly.
///
/// # Errors
/// Something is missing or wrong.
pub fn run(task: &Task) -> Result<bool> {
    match task {
        Task::Build => println!("{}", build()?.display()),
        Task::Check { file } => {
            for machine in config::read(file)?.machines {
                println!("{}: {} CPUs, {} MiB", machine.name, machine.cpus, machine.memory >> 20);
            }
        }
        Task::Bundle { file, output } => {
            fs::write(output, config::read(file)?.encode())
                .with_context(|| format!("cannot write {}", output.display()))?;
        }
        Task::Test => {
            let mut tally = Tally::default();
            tests::all(&mut tally)?;
            return Ok(tally.close());
        }
        Task::Run { file, qemu } => {
            let bundle = config::read(file)?;
            let memory = OWN_MEMORY + bundle.machines.iter().map(|machine| machine.memory >> 20).sum::<u64>();
            let module = tempfile::NamedTempFile::new()?;
            let bytes = bundle.encode();
            let memory = memory + 2 * (bytes.len() as u64 >> 20);
            fs::write(module.path(), bytes)?;
            let status = machine(qemu, &build()?, module.path(), memory)
                .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
                .status()
                .with_context(|| format!("{} could not be started", qemu.display()))?;
            return Ok(status.code() == Some(GOOD_END));
        }
    }
    Ok(true)
}

/// Builds the image.
///
/// # Errors
/// It doesn't build.
pub fn build() -> Result<PathBuf> {
    let arguments =
        ["build", "--quiet", "--profile", "metal", "--package", "bivisor-metal", "--features", "image"];
    let status = cargo(".").args(arguments).status().context("cargo could not be started")?;
    ensure!(status.success(), "the image for the bare machine did not build");
    Ok(target().join("metal/bivisor-metal"))
}

/// QEMU as the real machine, with `memory` MiB, booting by PVH.
fn machine(qemu: &Path, image: &Path, module: &Path, memory: u64) -> Command {
    let mut command = Command::new(qemu);
    command.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-no-reboot"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-append", "debug-exit", "-m"]);
    command.arg(memory.to_string()).arg("-kernel").arg(image).arg("-initrd").arg(module);
    command
}
