//! `bivisor metal`: images for the bare machine, with the hypervisor of `type1/` and the machines that it runs.

mod config;
mod disk;
mod disk_content;
mod hypervisor;

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bivisor_backends::disk::DiskError;
use bivisor_machine::block::BlockError;
use clap::{Args, Subcommand};

use crate::config::ConfigError;
use crate::error::Failure;
use crate::guest::GuestError;
use crate::image::ImageError;
use crate::{say, status};
use hypervisor::Hypervisor;

/// File name of the hypervisor, which is looked for beside this program and beside cargo's profile of this program.
const HYPERVISOR: &str = "bivisor-metal";
/// A BIOS must find room for the machines in one piece.
const MAX_END: u64 = 2 << 30;

/// `bivisor metal`.
#[derive(Clone, Debug, Subcommand)]
pub enum MetalCommand {
    /// Say whether the bare machine can run the machines of a file, and what of it it can't
    Check {
        /// The file: as for `bivisor up`
        #[arg(value_name = "FILE.toml")]
        file: PathBuf,
    },
    /// Make an image that starts machines with BIOS or UEFI, from disk, stick or CD, with the machines of a file in it
    Build {
        /// The file: as for `bivisor up`
        #[arg(value_name = "FILE.toml")]
        file: PathBuf,
        /// The image: .img and .iso are the same
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Words for the hypervisor
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        append: String,
        #[command(flatten)]
        source: Source,
    },
    /// Pack the machines of a file into a module, for a boot loader that you have: GRUB's module2
    Bundle {
        /// The file: as for `bivisor up`
        #[arg(value_name = "FILE.toml")]
        file: PathBuf,
        /// The module
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Write the hypervisor as a kernel, for a boot loader that you have: GRUB's multiboot2, or PVH
    Kernel {
        /// The kernel
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        #[command(flatten)]
        source: Source,
    },
}

/// Where the hypervisor comes from.
#[derive(Clone, Debug, Args)]
pub struct Source {
    /// The hypervisor, as cargo builds it [default: bivisor-metal, beside this program]
    #[arg(long, value_name = "FILE")]
    hypervisor: Option<PathBuf>,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum MetalError {
    /// The description can't be used anywhere.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A kernel or initrd can't be used.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// An image can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It names what the bare machine does not have.
    #[error("{path}: the bare machine does not have: {keys}", path = .path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What.
        keys: String,
    },
    /// A disk can't be opened.
    #[error(transparent)]
    OpenDisk(#[from] DiskError),
    /// A disk can't be read.
    #[error("cannot read the disk {path}: {error}", path = .path.display())]
    ReadDisk {
        /// The disk.
        path: PathBuf,
        /// Why.
        error: BlockError,
    },
    /// A guest's own disk.
    #[error(
        "vm.{name}: its image has a disk, and on the bare machine writes to disks don't last: say snapshot = true"
    )]
    Disk {
        /// The machine.
        name: String,
    },
    /// Too many machines.
    #[error("the bare machine runs {} machines at most", bivisor_metal::bundle::MAX_MACHINES)]
    TooMany,
    /// No hypervisor.
    #[error(
        "there is no {path}, the hypervisor: build it with `cargo build --profile metal --package bivisor-metal --features image`, \
         or say --hypervisor FILE",
        path = .0.display()
    )]
    NoHypervisor(PathBuf),
    /// Another file.
    #[error("the file given as hypervisor is none, or of another version of this program: build it again")]
    Hypervisor,
    /// Too large for the image's loader.
    #[error(
        "the machines' kernels and initial RAM disks are more than an image can hold: leave some of them away"
    )]
    TooLarge,
    /// A file operation failed.
    #[error("{action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Does what a command says.
///
/// # Errors
/// As [`MetalError`].
pub fn run(command: &MetalCommand) -> Result<u8, Failure> {
    execute(command).map_err(Failure::configuration)?;
    Ok(status::SUCCESS)
}

fn execute(command: &MetalCommand) -> Result<(), MetalError> {
    match command {
        MetalCommand::Check { file } => {
            for machine in config::read(file, "")?.machines {
                say(&format!("{}: {} CPUs, {} MiB\n", machine.name, machine.cpus, machine.memory >> 20));
            }
            Ok(())
        }
        MetalCommand::Build { file, output, append, source } => {
            let hypervisor = source.read()?;
            let machines = config::read(file, append)?.encode();
            if disk::end_in_memory(&hypervisor, &machines) > MAX_END {
                return Err(MetalError::TooLarge);
            }
            let image = disk::image(&hypervisor, &machines).map_err(failed("making", output))?;
            write(output, &image)
        }
        MetalCommand::Bundle { file, output } => write(output, &config::read(file, "")?.encode()),
        MetalCommand::Kernel { output, source } => write(output, &source.read()?.elf()?),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MetalError {
    let path = path.to_owned();
    move |source| MetalError::Io { action, path, source }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), MetalError> {
    fs::write(path, bytes).map_err(failed("cannot write", path))
}

impl Source {
    fn read(&self) -> Result<Hypervisor, MetalError> {
        let path = match &self.hypervisor {
            Some(path) => path.clone(),
            None => find(&env::current_exe().unwrap_or_default())?,
        };
        Hypervisor::parse(fs::read(&path).map_err(failed("cannot read", &path))?)
    }
}

/// The hypervisor that belongs to this program.
fn find(program: &Path) -> Result<PathBuf, MetalError> {
    let folder = program.parent().unwrap_or(Path::new(""));
    let beside = folder.join(HYPERVISOR);
    let of_cargo = folder.parent().map(|target| target.join("metal").join(HYPERVISOR));
    let found = [Some(beside.clone()), of_cargo].into_iter().flatten().find(|path| path.is_file());
    found.ok_or(MetalError::NoHypervisor(beside))
}
