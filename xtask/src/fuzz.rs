//! `cargo xtask fuzz`: the fuzz tests of the devices and of what is behind them, for as long as is wanted.
use crate::{
    steps::{Tally, progress},
    test::cargo,
};
use anyhow::Result;
use clap::{Args, ValueEnum};

/// Seconds of each in `cargo xtask test`.
const BRIEFLY: u64 = 60;

/// The options of `cargo xtask fuzz`.
#[derive(Args)]
pub struct Arguments {
    /// What is fuzzed; everything, one after the other, if nothing is said.
    target: Option<Target>,
    /// How long each is.
    #[arg(long, default_value_t = BRIEFLY)]
    seconds: u64,
    /// The first round, as a failure has named it; otherwise the time of day says where to begin.
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Target {
    /// Registers, configuration space, rings and requests of every virtio device.
    Virtio,
    /// The opening of qcow2 images.
    Qcow2,
    /// The guest's frames to the user-mode network.
    Packets,
}

impl Target {
    const ALL: [Self; 3] = [Self::Virtio, Self::Qcow2, Self::Packets];

    /// The test program, and the test in it.
    fn test(self) -> (&'static str, &'static str) {
        match self {
            Self::Virtio => ("fuzz", "virtio::fuzz_virtio_devices"),
            Self::Qcow2 => ("fuzz", "qcow2::fuzz_qcow2_opening"),
            Self::Packets => ("net", "hostile::fuzz_frames_of_the_user_network"),
        }
    }
}

/// Fuzzes. Whether nothing was found.
///
/// # Errors
/// If cargo can't be started.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut tally = Tally::default();
    let all = Target::ALL.as_slice();
    let targets = arguments.target.as_ref().map_or(all, std::slice::from_ref);
    fuzz(&mut tally, targets, arguments.seconds, arguments.seed)?;
    Ok(tally.close())
}

/// A minute of each, for `cargo xtask test`.
///
/// # Errors
/// As for [`run`].
pub fn briefly(tally: &mut Tally) -> Result<()> {
    fuzz(tally, &Target::ALL, BRIEFLY, None)
}

fn fuzz(tally: &mut Tally, targets: &[Target], seconds: u64, seed: Option<u64>) -> Result<()> {
    for target in targets {
        let (program, test) = target.test();
        progress(&format!("{seconds} seconds of {test}"));
        // Not an optimised build: overflows and broken assumptions are to be found, too.
        let mut command = cargo(".");
        command.args(["test", "--quiet", "--package", "bivisor-backends", "--test", program, test]);
        command.args(["--", "--exact", "--nocapture"]).env("BIVISOR_FUZZ_SECONDS", seconds.to_string());
        command.env("BIVISOR_FUZZ_SEED", seed.unwrap_or_else(|| fastrand::u64(..1 << 48)).to_string());
        tally.cargo_test(test, &mut command)?;
    }
    Ok(())
}
