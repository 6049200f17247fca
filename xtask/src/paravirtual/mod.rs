//! What the paravirtual interface changes for a guest: how often it is left for the same work, and how well it keeps time.
mod drift;
mod machine;

use crate::{
    bench::guest::{default_guest, write_archive},
    linux,
    steps::Tally,
    test::root,
};
use anyhow::{Context, Result, ensure};
use machine::{Exits, Machine};
use std::{
    fs,
    io::{self, Read},
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

/// Round trips of the byte between two processors.
const ROUNDS: u32 = 10_000;
/// Seconds of the transfer.
const TRANSFER: u32 = 10;
/// Names of the two machines, and what they say of the interface.
const GUESTS: [(&str, &str); 2] = [("unmodified", "off"), ("paravirtualized", "on")];
/// The guest's way to the host.
const GATEWAY: &str = "10.0.2.2";

/// What is counted.
#[derive(clap::Args)]
pub struct Arguments {
    /// Seconds for which the guests have nothing to do.
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// The engine.
    #[arg(long, default_value = "dbt")]
    engine: String,
}

/// How long the clocks are watched.
#[derive(clap::Args)]
pub struct DriftArguments {
    /// Minutes.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// The engine.
    #[arg(long, default_value = "dbt")]
    engine: String,
}

/// Some work, and what it took. Where the work is not the same each time, exits are those of a unit of it.
struct Work {
    what: String,
    exits: Exits,
}

/// Counts the exits of the same work with and without the interface, prints a table, and says whether they are never more with it.
///
/// # Errors
/// A machine can't be run.
pub fn exits(arguments: &Arguments) -> Result<bool> {
    let program = linux::program(&mut Tally::default())?;
    let folder = tempfile::tempdir()?;
    let description = describe(&program, folder.path(), &arguments.engine)?;
    let mut all = Vec::new();
    for (name, pv) in GUESTS {
        println!("==> {name}");
        let file = folder.path().join(format!("{name}.toml"));
        fs::write(&file, format!("{description}pv = \"{pv}\"\n"))?;
        all.push(measure(Machine::up(&program, folder.path(), name, &file)?, arguments.idle)?);
    }
    let (text, good) = table(&all[0], &all[1]);
    println!("\n{text}");
    Ok(good)
}

/// Watches the clocks of two guests against the host's; says whether they kept within a millisecond.
///
/// # Errors
/// A machine can't be run.
pub fn clock_drift(arguments: &DriftArguments) -> Result<bool> {
    let program = linux::program(&mut Tally::default())?;
    drift::watch(&program, &arguments.engine, Duration::from_secs(60 * arguments.minutes))
}

/// Makes the guest, Debian's with a program for the work; gives what both machines have in common.
fn describe(program: &Path, folder: &Path, engine: &str) -> Result<String> {
    let image = default_guest(program)?;
    let work = compile(folder)?;
    let initrd = folder.join("initrd.img");
    // Linux unpacks one archive after the other.
    let mut archives = fs::read(image.join("initrd.img"))?;
    archives.extend(write_archive(&[("bin/work".into(), fs::read(work)?)])?);
    fs::write(&initrd, archives)?;
    let (kernel, initrd) = (image.join("vmlinuz"), initrd);
    Ok(format!(
        "kernel = {:?}\ninitrd = {:?}\nappend = \"console=ttyS0 quiet\"\nengine = {engine:?}\ncpus = 2\nmemory = \"256M\"\n\
         net = [\"user,host-loopback=on\"]\n",
        kernel.display().to_string(),
        initrd.display().to_string(),
    ))
}

fn compile(folder: &Path) -> Result<PathBuf> {
    let to = folder.join("work");
    let output = Command::new("gcc")
        .args(["-std=gnu17", "-O2", "-Wall", "-Wextra", "-static", "-o"])
        .arg(&to)
        .arg(root().join("xtask/src/paravirtual/work.c"))
        .output()
        .context("gcc could not be started; on Debian: apt-get install gcc libc6-dev")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(to)
}

fn measure(mut machine: Machine, idle: u64) -> Result<Vec<Work>> {
    let mut works = Vec::new();
    let boot = machine.statistics()?;
    works.push(Work { what: "boot to a shell".into(), exits: boot.exits });

    machine.sit_down()?;
    let before = machine.statistics()?;
    machine.work(&format!("work pipes {ROUNDS}"))?;
    let exits = machine.statistics()?.exits.since(&before.exits);
    works.push(Work { what: format!("{ROUNDS} round trips by pipes"), exits });

    machine
        .ask(&format!("ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ping -c 1 -W 5 {GATEWAY}"))?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let sink = thread::spawn(move || swallow(&listener));
    let before = machine.statistics()?;
    machine.work(&format!("work send {GATEWAY} {port} {TRANSFER}"))?;
    let after = machine.statistics()?;
    let got = sink.join().map_err(|_| anyhow::anyhow!("the sink has failed"))??;
    let sent = after.sent.saturating_sub(before.sent);
    ensure!(sent >= got && got > 0, "{sent} bytes were sent, {got} arrived");
    println!("    {} MiB sent", got >> 20);
    let exits = after.exits.since(&before.exits).of_each((got as f64 / (100 << 20) as f64).max(0.01));
    works.push(Work { what: format!("{TRANSFER} s of sending, for 100 MiB"), exits });

    let before = machine.statistics()?;
    thread::sleep(Duration::from_secs(idle));
    let exits = machine.statistics()?.exits.since(&before.exits);
    works.push(Work { what: format!("{idle} s of nothing"), exits });
    Ok(works)
}

/// Takes what comes to the first who connects; how much it was.
fn swallow(listener: &TcpListener) -> io::Result<u64> {
    let mut line = listener.accept()?.0;
    let mut buffer = vec![0; 1 << 20];
    let mut all = 0;
    loop {
        match line.read(&mut buffer)? {
            0 => return Ok(all),
            count => all += count as u64,
        }
    }
}

/// A sum of exits, and its name.
type Sum = (&'static str, fn(&Exits) -> u64);

const SUMS: [Sum; 2] = [("all", Exits::all), ("all but memory", Exits::all_but_the_engines_own)];

/// A table of both, and whether the second one is never more.
fn table(off: &[Work], on: &[Work]) -> (String, bool) {
    let mut text = String::from("| exits of both CPUs |");
    off.iter().for_each(|work| text.push_str(&format!(" {} | |", work.what)));
    text.push_str("\n|---|");
    off.iter().for_each(|_| text.push_str("--:|--:|"));
    text.push_str("\n| `--pv` |");
    off.iter().for_each(|_| text.push_str(" off | on |"));
    let both = || off.iter().chain(on);
    let mut kinds: Vec<_> = both().flat_map(|work| work.exits.kinds()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for kind in kinds.into_iter().filter(|kind| both().any(|work| work.exits.of(kind) > 0)) {
        text.push_str(&format!("\n| {kind} |"));
        for (off, on) in off.iter().zip(on) {
            text.push_str(&format!(" {} | {} |", off.exits.of(kind), on.exits.of(kind)));
        }
    }
    for (name, sum) in SUMS {
        text.push_str(&format!("\n| **{name}** |"));
        for (off, on) in off.iter().zip(on) {
            text.push_str(&format!(" **{}** | **{}** |", sum(&off.exits), sum(&on.exits)));
        }
    }
    let good = off.iter().zip(on).all(|(off, on)| on.exits.all() <= off.exits.all());
    (text, good)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(counts: &[(&str, u64)]) -> Vec<Work> {
        vec![Work { what: "boot".into(), exits: Exits::new(counts) }]
    }

    #[test]
    fn more_exits_with_the_interface_are_no_good_end() {
        let (text, good) =
            table(&work(&[("port", 10), ("halt", 0)]), &work(&[("port", 7), ("hypercall 5", 3)]));
        assert!(
            good && text
                .contains("| hypercall 5 | 0 | 3 |\n| port | 10 | 7 |\n| **all** | **10** | **10** |"),
            "{text}"
        );
        assert!(!text.contains("halt"), "{text}");
        assert!(!table(&work(&[("port", 10)]), &work(&[("port", 11)])).1);
        let (text, good) =
            table(&work(&[("port", 10), ("memory", 1)]), &work(&[("port", 10), ("memory", 5)]));
        assert!(!good && text.ends_with("| **all but memory** | **10** | **10** |"), "{text}");
    }
}
