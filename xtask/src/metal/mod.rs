//! The hypervisor for the bare machine: building its image, and running it in QEMU.
mod bochs;
mod images;
pub mod tests;

use crate::linux;
use crate::steps::Tally;
use crate::test::{cargo, target};
use anyhow::{Context, Result, ensure};
use bivisor_metal::bundle::Bundle;
use clap::Subcommand;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::NamedTempFile;

/// QEMU's status when the hypervisor has ended by its debug-exit device, and all was well.
const GOOD_END: i32 = 33;
/// RAM of the real machine beside that of the guests, in MiB: the hypervisor's, and the packed file's.
const OWN_MEMORY: u64 = 192;

/// What to do.
#[derive(Subcommand)]
pub enum Task {
    /// Build the hypervisor's image, which `bivisor metal build` puts into others; prints where it is.
    Build,
    /// Build, pack the machines of a file, and boot in QEMU's emulation of a processor with AMD-V, on this terminal. Ctrl-] ?
    /// helps.
    Run {
        /// The description.
        file: PathBuf,
        /// QEMU's program.
        #[arg(long, default_value = "qemu-system-x86_64")]
        qemu: PathBuf,
    },
    /// Run the checks of the bare machine alone; they are part of `cargo xtask test` too.
    Test {
        /// Only those on Bochs' processor, which has VT-x.
        #[arg(long)]
        vmx: bool,
        /// With those that take minutes on Bochs' processor.
        #[arg(long)]
        all: bool,
    },
}

/// Does it; false if the hypervisor ended badly.
///
/// # Errors
/// Something is missing or wrong.
pub fn run(task: &Task) -> Result<bool> {
    match task {
        Task::Build => println!("{}", build()?.display()),
        Task::Test { vmx, all } => {
            let mut tally = Tally::default();
            let program = linux::program(&mut tally)?;
            if *vmx {
                bochs::all(&mut tally, &program, &build()?)?;
            } else {
                tests::all(&mut tally, &program)?;
            }
            if *all {
                slow(&mut tally, &program)?;
            }
            return Ok(tally.close());
        }
        Task::Run { file, qemu } => {
            let program = linux::program(&mut Tally::default())?;
            let module = pack(&program, file)?;
            let bytes = fs::read(module.path())?;
            let bundle = Bundle::parse(&bytes)?;
            let memory = OWN_MEMORY + bundle.machines.iter().map(|machine| machine.memory >> 20).sum::<u64>();
            let memory = memory + 2 * (bytes.len() as u64 >> 20);
            let mut command = machine(qemu, memory);
            let status = by_pvh(&mut command, &build()?, module.path())
                .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
                .status()
                .with_context(|| format!("{} could not be started", qemu.display()))?;
            return Ok(status.code() == Some(GOOD_END));
        }
    }
    Ok(true)
}

/// Runs the checks that take minutes.
///
/// # Errors
/// A check can't be started.
pub fn slow(tally: &mut Tally, program: &Path) -> Result<()> {
    let image = build()?;
    tests::slow(tally, &image);
    bochs::slow(tally, program, &image)
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

/// Runs `bivisor metal` with these arguments. It finds images that can be made again, and not those of the user's, which have
/// disks.
fn metal(program: &Path, arguments: &[&Path]) -> Result<()> {
    let data = tempfile::tempdir()?;
    let output =
        Command::new(program).arg("metal").args(arguments).env("XDG_DATA_HOME", data.path()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Packs the machines of a description.
fn pack(program: &Path, file: &Path) -> Result<NamedTempFile> {
    let module = NamedTempFile::new()?;
    metal(program, &[Path::new("bundle"), file, Path::new("--output"), module.path()])?;
    Ok(module)
}

/// QEMU as the real machine, with `memory` MiB.
fn machine(qemu: &Path, memory: u64) -> Command {
    let mut command = Command::new(qemu);
    command.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-no-reboot"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-m"]).arg(memory.to_string());
    command
}

/// Lets it boot by PVH.
fn by_pvh<'a>(command: &'a mut Command, image: &Path, module: &Path) -> &'a mut Command {
    command.args(["-append", "debug-exit", "-kernel"]).arg(image).arg("-initrd").arg(module)
}
