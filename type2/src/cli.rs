//! The command line. Scripts depend on these words.

use std::path::PathBuf;

use bivisor_backends::console::ConsoleSpec;
use bivisor_backends::disk::DiskSpec;
use bivisor_backends::net::NetSpec;
use clap::{Args, Parser, Subcommand};

use crate::config::{EngineChoice, GdbSpec, MemorySize, Paravirtual};
use crate::image::{DiskRecipe, ImportRequest};
use crate::jail::Probe;
use crate::metal::MetalCommand;
use crate::{status, supervisor};

/// Virtual machines with or without virtualization hardware.
#[derive(Debug, Parser)]
#[command(name = "bivisor", version, propagate_version = true, arg_required_else_help = true, after_help = supervisor::LONG_HELP)]
pub struct Cli {
    /// Tell more: causes of errors, and what guests do that devices refuse
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine
    #[command(after_help = status::HELP)]
    Run(Box<RunArgs>),
    /// Machines in the background
    #[command(flatten)]
    Background(supervisor::Command),
    /// Make and list images of guests
    #[command(subcommand)]
    Image(ImageCommand),
    /// Images for the bare machine, on which bivisor is the lowest program
    #[command(subcommand)]
    Metal(MetalCommand),
    /// Tell which engines this host can run, and why or why not
    Doctor,
}

/// `bivisor image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an image
    #[command(subcommand)]
    Build(Recipe),
    /// Make an image of a disk that others made, such as a distribution's cloud image
    Import(Box<ImportRequest>),
    /// List images
    Ls,
    /// Remove images, with all that guests wrote to their disks
    Rm {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
}

/// What `bivisor image build` can make.
#[derive(Clone, Debug, Subcommand)]
pub enum Recipe {
    /// Debian's cloud kernel with a small initramfs, the default guest; or, with any option, a system on a disk
    Debian(Box<DiskRecipe>),
}

/// `bivisor run`.
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// An image's name, or a TOML file with the same words as the options; nothing: the default guest
    #[arg(value_name = "NAME|FILE.toml")]
    pub target: Option<String>,
    /// Kernel: Linux bzImage, ELF with a PVH note, or Multiboot
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Size of RAM, such as 512M or 2G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<MemorySize>,
    /// Number of virtual CPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: Option<u32>,
    /// What executes the guest's instructions [default: auto]
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub engine: Option<EngineChoice>,
    /// Whether the guest finds KVM's paravirtual interface, by which it asks instead of being emulated [default: on]
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub pv: Option<Paravirtual>,
    /// Disk, again for each: an image or block device, then options such as format=raw|qcow2, readonly, snapshot,
    /// serial=TEXT
    #[arg(long = "disk", value_name = "PATH[,OPTION]…")]
    pub disks: Vec<DiskSpec>,
    /// Forget at the end what the guest writes to its disks, the image's own too
    #[arg(long)]
    pub snapshot: bool,
    /// Network interface, again for each: user, then options such as hostfwd=tcp:127.0.0.1:2222-:22
    #[arg(long = "net", value_name = "NETWORK[,OPTION]…")]
    pub nets: Vec<NetSpec>,
    /// Where a virtio console of the guest (hvc0) leads: as --console
    #[arg(long, value_name = "CONSOLE")]
    pub virtio_console: Option<ConsoleSpec>,
    /// Unix socket that leads to the guest's stream sockets (AF_VSOCK), and whose path with _PORT leads to the host's
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// Give the guest a source of the host's randomness
    #[arg(long)]
    pub rng: bool,
    /// Give the guest a memory balloon, by which pages that it does not need go back to the host
    #[arg(long)]
    pub balloon: bool,
    /// Where the guest's first serial port leads: stdio, pty, file=PATH or unix=PATH [default: stdio]
    #[arg(long, value_name = "CONSOLE")]
    pub console: Option<ConsoleSpec>,
    /// End when the guest resets the machine, instead of starting it again
    #[arg(long)]
    pub no_reboot: bool,
    /// Offer the devices of QEMU that test kernels use: isa-debug-exit at port 0xf4 and pc-testdev
    #[arg(long)]
    pub testdev: bool,
    /// Tell at the end what the engine has counted, on standard error
    #[arg(long)]
    pub stats: bool,
    /// Write to a file what the guest executes, with its registers: see docs/debugging.md
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Name translated code for perf, in /tmp/perf-PID.map
    #[arg(long)]
    pub perf_map: bool,
    /// Wait for a debugger at a TCP port of this host's loopback address, or at a Unix socket
    #[arg(long, value_name = ":PORT|unix=PATH")]
    pub gdb: Option<GdbSpec>,
    /// Do without the jail that keeps the machine's process from everything but the machine: to debug bivisor itself
    #[arg(long)]
    pub no_jail: bool,
    /// Let a thread of the jail try something, for tests
    #[arg(long, hide = true, value_name = "ROLE:ATTEMPT")]
    pub jail_probe: Option<Probe>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_of_run_is_understood() {
        let line = "bivisor run vm.toml --kernel k --initrd i --append -x --memory 1G --cpus 4 --engine interp --pv off \
                    --disk a.img,readonly --disk b.img --net user --virtio-console pty --vsock v --rng --balloon --console unix=s --no-reboot --testdev --stats --trace t --perf-map --gdb :1234 --no-jail";
        let Command::Run(run) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("not run");
        };
        assert_eq!(run.target.as_deref(), Some("vm.toml"));
        assert_eq!(run.append.as_deref(), Some("-x"));
        assert_eq!((run.cpus, run.pv), (Some(4), Some(Paravirtual::Off)));
        assert!(run.no_reboot && run.testdev && run.stats && run.perf_map && run.no_jail);
        assert_eq!(run.trace, Some(PathBuf::from("t")));
        assert_eq!((run.nets.len(), run.virtio_console), (1, Some(ConsoleSpec::Pty)));
        assert_eq!(run.vsock, Some(PathBuf::from("v")));
        assert!(run.disks[0].read_only && run.rng && run.balloon);
        assert_eq!(run.disks[1], DiskSpec::new("b.img"));
    }
}
