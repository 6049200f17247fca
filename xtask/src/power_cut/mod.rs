//! `cargo xtask power-cut`: kills the machine's process while its guest writes, and looks for what was safe.
mod check;

use crate::{
    console::listen,
    linux::{self, PROMPT},
    steps::Tally,
    test::root,
};
use anyhow::{Context, Result, bail, ensure};
use bivisor_backends::disk::Format;
use check::Safe;
use clap::{Args, ValueEnum};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

/// Bytes of the guest's disk.
const DISK_SIZE: u64 = 96 << 20;
/// A guest that has said nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the guest writes at most.
const LONGEST: Duration = Duration::from_millis(1500);
/// What is typed: no kernel messages among the lines, and clusters that are given back and taken again.
const LOAD: &str =
    "stty -echo; dmesg -n 1; mkdir -p /mnt; mount -t ext4 -o discard /dev/vda /mnt && /mnt/power_cut /mnt";

/// The options of `cargo xtask power-cut`.
#[derive(Args)]
pub struct Arguments {
    /// How often the power is cut.
    #[arg(long, default_value_t = 10)]
    runs: u32,
    /// The format of the disk's image; both, if none is given.
    #[arg(long)]
    format: Option<ImageFormat>,
    /// Where the random moments begin; printed by every run.
    #[arg(long)]
    seed: Option<u64>,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ImageFormat {
    Raw,
    Qcow2,
}

impl ImageFormat {
    const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Cuts the power as often as is asked for. Whether nothing was lost.
///
/// # Errors
/// If something that the task needs is missing.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut tally = Tally::default();
    let program = linux::program(&mut tally)?;
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..));
    cut(&mut tally, &program, arguments.runs, arguments.format, seed);
    Ok(tally.close())
}

/// A few runs of each format, for `cargo xtask test`.
pub fn briefly(tally: &mut Tally, program: &Path) {
    cut(tally, program, 3, None, fastrand::u64(..));
}

fn cut(tally: &mut Tally, program: &Path, runs: u32, format: Option<ImageFormat>, seed: u64) {
    for format in ImageFormat::ALL.into_iter().filter(|one| format.is_none_or(|wanted| wanted == *one)) {
        tally.check(&format!("{runs} power cuts, {}", format.name()), || {
            let Safe { log, file } =
                series(program, runs, format, seed).with_context(|| format!("--seed {seed}"))?;
            Ok(format!(", {log} records and {} files were safe and are there", file / 8))
        });
    }
}

/// Cuts the power of machines with one disk, again and again. Returns what is safe in the end.
fn series(program: &Path, runs: u32, format: ImageFormat, seed: u64) -> Result<Safe> {
    let folder = tempfile::tempdir().context("no temporary folder")?;
    let disk = make_disk(folder.path(), format)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut safe = Safe::default();
    for run in 1..=runs {
        let cache = ["writeback", "none", "writethrough"][random.usize(..3)];
        let option = format!("{},format={},cache={cache}", disk.display(), format.name());
        // One in eight comes while the file system is being mounted.
        let moment = random.u64(..LONGEST.as_millis() as u64);
        let early = random.u8(..8) == 0;
        let text = one(program, &option, Duration::from_millis(moment), early)?;
        safe.read(&text);
        let kind = match format {
            ImageFormat::Raw => Format::Raw,
            ImageFormat::Qcow2 => Format::Qcow2,
        };
        check::check(&disk, kind, safe, folder.path()).with_context(|| {
            let kept = std::env::temp_dir().join(format!("power-cut-{seed}-{run}.{}", format.name()));
            let kept = fs::copy(&disk, &kept).map_or("nowhere".into(), |_| kept.display().to_string());
            format!("run {run}, cache={cache}, cut after {moment} ms, image kept at {kept}")
        })?;
    }
    ensure!(safe.log > 0, "nothing was written in {runs} runs");
    Ok(safe)
}

/// A disk with an ext4 file system that holds the guest's program.
fn make_disk(folder: &Path, format: ImageFormat) -> Result<PathBuf> {
    let tree = folder.join("tree");
    fs::create_dir(&tree)?;
    let compiled = Command::new("gcc")
        .args(["-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o"])
        .arg(tree.join("power_cut"))
        .arg(root().join("guests/linux/power_cut.c"))
        .status()
        .context("gcc could not be started; on Debian: apt-get install gcc libc6-dev")?;
    ensure!(compiled.success(), "guests/linux/power_cut.c could not be compiled");
    let raw = folder.join("disk.raw");
    fs::File::create(&raw)?.set_len(DISK_SIZE)?;
    let made = check::tool("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&tree, &raw]).status();
    ensure!(
        made.context("mke2fs could not be started; on Debian: apt-get install e2fsprogs")?.success(),
        "mke2fs failed"
    );
    if format == ImageFormat::Raw {
        return Ok(raw);
    }
    let image = folder.join("disk.qcow2");
    let made = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).args([&raw, &image]).status();
    ensure!(
        made.context("qemu-img could not be started; on Debian: apt-get install qemu-utils")?.success(),
        "qemu-img failed"
    );
    Ok(image)
}

/// Starts a machine, lets it write for a while, and kills its process. `early`: counted from when the load is started,
/// otherwise from the first record that is safe. Returns what the guest has printed.
fn one(program: &Path, disk: &str, moment: Duration, early: bool) -> Result<String> {
    let mut child = Command::new(program)
        // A host as busy as this one may be late for the kernel's look at its timer.
        .args(["run", "--no-reboot", "--append", "no_timer_check", "--disk", disk])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} could not be started", program.display()))?;
    let bytes = listen(child.stdout.take().context("no standard output")?);
    let mut keyboard = child.stdin.take().context("no standard input")?;
    let result = drive(&mut keyboard, &bytes, moment, early);
    // SIGKILL.
    child.kill()?;
    child.wait()?;
    let mut text = result?;
    // What had left the process before it died.
    text.extend(bytes.iter().flatten());
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn drive(
    keyboard: &mut impl Write,
    bytes: &Receiver<Vec<u8>>,
    moment: Duration,
    early: bool,
) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    until(bytes, &mut text, PROMPT)?;
    text.clear();
    writeln!(keyboard, "{LOAD}")?;
    if !early {
        until(bytes, &mut text, "log ")?;
    }
    let end = Instant::now() + moment;
    loop {
        match bytes.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(more) => text.extend(more),
            Err(RecvTimeoutError::Timeout) => return Ok(text),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the machine ended by itself: {}", String::from_utf8_lossy(&text))
            }
        }
    }
}

fn until(bytes: &Receiver<Vec<u8>>, text: &mut Vec<u8>, end: &str) -> Result<()> {
    while !String::from_utf8_lossy(text).contains(end) {
        let more = bytes.recv_timeout(PATIENCE);
        text.extend(more.with_context(|| format!("no {end:?}: {}", String::from_utf8_lossy(text)))?);
    }
    Ok(())
}
