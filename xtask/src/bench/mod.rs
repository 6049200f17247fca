//! `cargo xtask bench`: one benchmark program on the host itself, in Bivisor and in every QEMU there is, in turns.
pub mod guest;
mod host;
mod io;
mod peer;
mod plot;
mod qemu;
mod record;
mod report;
mod run;
mod summary;
mod table;

use crate::{
    steps::progress,
    test::{cargo, root, target},
};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use guest::{Image, Row};
use peer::{Machine, Peer};
use record::{Log, Record, Setup};
use summary::Summary;

/// The group whose rows need several CPUs.
const SMP: &str = "smp";
/// RAM of every machine, in MiB.
const MEMORY: u32 = 512;

/// Options of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Short rows, measured once: under three minutes, good for a first look only
    #[arg(long)]
    quick: bool,
    /// Measure these groups or rows only; may be given several times
    #[arg(long, value_name = "NAME")]
    group: Vec<String>,
    /// Measure disks and networks of Debian machines instead: needs iperf3 and wrk on the host
    #[arg(long)]
    io: bool,
    /// How often everything is measured; the tables give the medians [default: 5, 3 with --io, 1 with --quick]
    #[arg(long, value_name = "NUMBER")]
    repeats: Option<u32>,
    /// Seconds that a row takes [default: 0.3, 2 with --io, 0.08 with --quick]
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Engine of Bivisor, as for `bivisor run`
    #[arg(long, default_value = "auto", value_name = "ENGINE")]
    engine: String,
    /// CPUs of every machine [default: 1, and 2 for the group smp]
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<u32>,
    /// Folder for tables, plot, raw results and consoles [default: bench in cargo's target folder]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// First fetch the QEMU of this Debian suite, such as forky or sid; it is measured from then on
    #[arg(long, value_name = "SUITE")]
    fetch_qemu: Option<String>,
    /// Measure this QEMU too; may be given several times
    #[arg(long, value_name = "PROGRAM")]
    qemu: Vec<PathBuf>,
    /// Measure no QEMU but those of --qemu
    #[arg(long)]
    no_qemu: bool,
    /// Run the program on the host itself too (the default)
    #[arg(long, overrides_with = "no_native")]
    native: bool,
    /// Don't run the program on the host itself
    #[arg(long)]
    no_native: bool,
    /// Measure this bivisor instead of building one
    #[arg(long, value_name = "PROGRAM")]
    bivisor: Option<PathBuf>,
    /// Seconds to wait at most for a quiet host before each run [default: 10, or 3 with --quick]
    #[arg(long, value_name = "SECONDS")]
    patience: Option<u64>,
    /// Measure nothing: make table and plot anew from raw results; may be given several times
    #[arg(long, value_name = "FILE")]
    from: Vec<PathBuf>,
    /// Put the table, the plot and the raw results into docs/
    #[arg(long)]
    bless: bool,
}

impl Arguments {
    fn repeats(&self) -> u32 {
        let usual = match (self.quick, self.io) {
            (true, _) => 1,
            (false, true) => 3,
            (false, false) => 5,
        };
        self.repeats.unwrap_or(usual).max(1)
    }

    fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 0.08 } else { 0.3 })
    }

    /// Whether this row or its group is to be measured.
    fn wants(&self, row: &str, group: &str) -> bool {
        self.group.is_empty() || self.group.iter().any(|name| name == row || name == group)
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.patience.unwrap_or(if self.quick { 3 } else { 10 }))
    }
}

/// Measures, or reads what was measured, and writes table and plot. Whether every row of every run came to an end.
///
/// # Errors
/// If something needed is missing, or a file cannot be read or written.
pub fn bench(arguments: &Arguments) -> Result<bool> {
    let out = arguments.out.clone().unwrap_or_else(|| target().join("bench"));
    std::fs::create_dir_all(&out).with_context(|| format!("making folder {}", out.display()))?;
    let out = out.canonicalize()?;
    let raw = match (arguments.from.is_empty(), arguments.io) {
        (true, true) => vec![io::measure(arguments, &out)?],
        (true, false) => vec![measure(arguments, &out)?],
        (false, _) => arguments.from.clone(),
    };
    let mut records = Vec::new();
    for file in &raw {
        records.extend(record::read(file)?);
    }
    let summary = Summary::of(&records)?;
    report::write(&summary, &out)?;
    if arguments.bless {
        ensure!(raw.len() == 1, "--bless takes the results of one file");
        let page = if arguments.io { "performance-io" } else { "performance" };
        report::bless(&summary, &raw[0], &root().join("docs"), page)?;
    }
    print!("{}", table::markdown(&summary));
    let troubles = record::troubles(&records);
    troubles.iter().for_each(|trouble| println!("{trouble}"));
    Ok(troubles.is_empty())
}

/// Rows that one start of a machine measures.
struct Pass {
    cpus: u32,
    rows: Vec<Row>,
}

/// Measures everything. Returns the file with the raw results.
fn measure(arguments: &Arguments, out: &Path) -> Result<PathBuf> {
    let folder = target().join("bench");
    std::fs::create_dir_all(&folder)?;
    let program = bivisor(arguments)?;
    if let Some(suite) = &arguments.fetch_qemu {
        qemu::fetch(suite)?;
    }
    progress("the benchmark program and its initramfs");
    let image = Image::prepare(&program, &folder)?;
    let passes = passes(arguments, guest::rows(&image.bench)?)?;
    let mut peers = peers(arguments, program, Some(&image))?;
    for peer in &peers {
        println!("    {}: {}", peer.label, peer.version);
    }
    let file = out.join("results.jsonl");
    let mut log = Log::create(&file)?;
    log.write(&Record::Setup(setup(arguments, image.packages.clone(), arguments.seconds(), &peers)))?;
    let runs = arguments.repeats() * (peers.len() * passes.len()) as u32;
    let rows: usize = passes.iter().map(|pass| pass.rows.len()).sum();
    progress(&format!("{runs} runs of {} machines in turns", peers.len()));
    let bar = ProgressBar::new((arguments.repeats() as usize * peers.len() * rows) as u64);
    if let Ok(style) =
        ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {eta} {msg:32!}")
    {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    for repeat in 0..arguments.repeats() {
        for pass in &passes {
            for peer in &mut peers {
                let machine = machine(arguments, &image, pass);
                let options = run::Options { repeat, out, patience: arguments.patience() };
                run::measure(peer, &machine, &pass.rows, &options, &mut log, &bar)?;
            }
        }
    }
    bar.finish_and_clear();
    Ok(file)
}

/// The program to measure: the one given, or the one that is built now.
fn bivisor(arguments: &Arguments) -> Result<PathBuf> {
    if let Some(program) = &arguments.bivisor {
        return Ok(program.clone());
    }
    progress("optimised build");
    let status = cargo(".").args(["build", "--release", "--package", "bivisor"]).status()?;
    ensure!(status.success(), "bivisor could not be built");
    Ok(target().join("release/bivisor"))
}

/// The rows asked for, by the number of CPUs that they are measured with.
fn passes(arguments: &Arguments, mut rows: Vec<Row>) -> Result<Vec<Pass>> {
    for name in &arguments.group {
        if !rows.iter().any(|row| row.is(name)) {
            let mut groups: Vec<&str> = rows.iter().map(|row| row.group.as_str()).collect();
            groups.dedup();
            bail!("no group or row is named {name}; the groups are {}", groups.join(", "));
        }
    }
    rows.retain(|row| arguments.group.is_empty() || arguments.group.iter().any(|name| row.is(name)));
    let (smp, single): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(|row| row.group == SMP);
    let single = Pass { cpus: arguments.cpus.unwrap_or(1), rows: single };
    let smp = Pass { cpus: arguments.cpus.unwrap_or(2), rows: smp };
    // With one CPU there is nothing to measure of what takes two.
    let smp_counts = smp.cpus > 1 && host::cpu_count() > 1;
    let mut passes = vec![single];
    passes.extend(smp_counts.then_some(smp));
    passes.retain(|pass| !pass.rows.is_empty());
    ensure!(!passes.is_empty(), "nothing to measure: the group {SMP} takes two CPUs, of the host as well");
    Ok(passes)
}

/// Who is measured: the host too, if there is an image that it can run.
fn peers(arguments: &Arguments, program: PathBuf, image: Option<&Image>) -> Result<Vec<Peer>> {
    let mut peers = Vec::new();
    peers.extend(image.filter(|_| !arguments.no_native).map(Peer::native));
    peers.push(Peer::bivisor(program, &arguments.engine)?);
    let mut qemus: Vec<qemu::Qemu> = arguments.qemu.iter().map(|program| qemu::Qemu::at(program)).collect();
    if !arguments.no_qemu {
        qemus.extend(qemu::installed());
        qemus.extend(qemu::fetched()?);
    }
    peers.extend(Peer::qemus(qemus)?);
    Ok(peers)
}

fn machine(arguments: &Arguments, image: &Image, pass: &Pass) -> Machine {
    // Whole groups by their names: command lines of kernels are not long.
    let mut names: Vec<&str> = Vec::new();
    for row in &pass.rows {
        let whole = arguments.group.is_empty() || arguments.group.contains(&row.group);
        let name = if whole { &row.group } else { &row.name };
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let options = format!("--seconds {} --cpus {} {}", arguments.seconds(), pass.cpus, names.join(" "));
    Machine {
        kernel: image.kernel.clone(),
        initrd: image.initrd.clone(),
        memory: MEMORY,
        cpus: pass.cpus,
        options: options.split(' ').map(str::to_owned).collect(),
    }
}

fn setup(arguments: &Arguments, guest: Vec<String>, seconds: f64, peers: &[Peer]) -> Setup {
    Setup {
        date: host::date(),
        cpu: host::cpu_model(),
        cpus: host::cpu_count(),
        kernel: host::kernel(),
        guest,
        memory: MEMORY,
        repeats: arguments.repeats(),
        seconds,
        commit: host::commit(&root()),
        peers: peers.iter().map(Peer::describe).collect(),
    }
}
