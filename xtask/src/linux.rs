//! Stock Linux as a test: the default guest boots to a shell, does what a user would try first, and powers off.
use crate::{
    console::Session,
    steps::Tally,
    test::{cargo, target},
};
use anyhow::{Context, Result, ensure};
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

/// What the guest's shell asks with.
pub const PROMPT: &str = "root@debian:/root# ";
/// The guest's time from power-up to power-off on the slower engine, with much to spare on a busy machine.
const TIME_LIMIT: Duration = Duration::from_secs(400);

/// Bytes of the guest's disk.
const DISK_SIZE: u64 = 64 << 20;

/// A line to type, and what must be in the answer.
pub const DIALOGUE: &[(&str, &[&str])] = &[
    ("uname -a", &["Linux debian", "-cloud-amd64", "x86_64"]),
    ("cat /proc/interrupts", &["IO-APIC", "ttyS0", "acpi", "Local timer interrupts"]),
    ("cat /proc/cmdline", &["console=ttyS0"]),
    ("dmesg | grep -c 'ACPI: Interpreter enabled'", &["\n1"]),
    ("mke2fs -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && echo mounted", &["\nmounted"]),
    ("head -c 4000000 /dev/urandom > /mnt/x; cp /bin/busybox /mnt; sync; echo kept", &["\nkept"]),
    ("sha256sum < /mnt/x > /sum; umount /mnt; mount -t ext4 /dev/vda /mnt && echo again", &["\nagain"]),
    ("sha256sum < /mnt/x | cmp - /sum && /mnt/busybox echo same", &["\nsame"]),
    ("umount /mnt; cat /sys/block/vda/serial; grep -c virtio0-req /proc/interrupts", &["serial-1"]),
    ("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo counted $i | sha256sum", &["  -"]),
];

/// Builds the program as a user does; returns where it is.
///
/// # Errors
/// If cargo cannot be started.
pub fn program(tally: &mut Tally) -> Result<PathBuf> {
    tally.step("optimised build", cargo(".").args(["build", "--release", "--package", "bivisor"]))?;
    Ok(target().join("release/bivisor"))
}

/// Boots Linux on each software engine.
pub fn boots(tally: &mut Tally, program: &PathBuf) {
    for engine in ["dbt", "interp"] {
        tally.check(&format!("Linux on {engine}"), || {
            Ok(format!(", shell after {:.1?}", boot(program, engine)?))
        });
    }
}

/// What stock Linux tells of the paravirtual interface's parts that it has taken up. (Of the flag that spares EOIs it says nothing.)
const TAKEN_UP: [&str; 6] = [
    "kvm-clock: Using msrs 4b564d01 and 4b564d00",
    "Switched to clocksource kvm-clock",
    "KVM setup pv remote TLB flush",
    "setup PV sched yield",
    "PV spinlocks enabled",
    "setup PV IPIs",
];

/// Looks at what Linux tells with the paravirtual interface, and without.
pub fn takes_up_the_interface(tally: &mut Tally, program: &Path) {
    tally.check("Linux takes up the paravirtual interface", || {
        let told = messages(program, "on")?;
        let missing: Vec<_> = TAKEN_UP.into_iter().filter(|line| !told.contains(line)).collect();
        ensure!(missing.is_empty(), "no {} in {told}", missing.join(", no "));
        let told = messages(program, "off")?;
        let found: Vec<_> = told.lines().filter(|line| line.to_lowercase().contains("kvm")).collect();
        ensure!(found.is_empty(), "without it: {}", found.join("\n"));
        ensure!(told.contains("Booting paravirtualized kernel on bare hardware"), "{told}");
        Ok(String::new())
    });
}

/// What Linux with two processors tells while it boots.
fn messages(program: &Path, pv: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(["run", "--no-reboot", "--engine", "dbt", "--cpus", "2", "--memory", "256M", "--pv", pv]);
    let mut session = Session::start(&mut command, Instant::now() + TIME_LIMIT)?;
    session.screen.until(PROMPT)?;
    session.type_line("dmesg")?;
    session.screen.until("dmesg")?;
    let told = session.screen.until(PROMPT)?;
    session.type_line("poweroff")?;
    session.rest()?;
    Ok(told)
}

/// Boots with an empty disk, talks to the shell, powers off, looks at the disk. Returns the time to the shell.
fn boot(program: &PathBuf, engine: &str) -> Result<Duration> {
    let disk = tempfile::NamedTempFile::new().context("no temporary file")?;
    disk.as_file().set_len(DISK_SIZE)?;
    let option = format!("{},serial=serial-1", disk.path().display());
    let start = Instant::now();
    let mut command = Command::new(program);
    command.args(["run", "--no-reboot", "--engine", engine, "--disk", &option]);
    let mut session = Session::start(&mut command, start + TIME_LIMIT)?;
    let (shell, status) = talk(&mut session, start)?;
    ensure!(status.success(), "the guest powered off, but bivisor ended with {status}");
    // Where the host has the program: the file system must be whole without repair.
    match Command::new("/sbin/e2fsck").args(["-fn"]).arg(disk.path()).output() {
        Ok(check) => ensure!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout)),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("e2fsck could not be started"),
    }
    Ok(shell)
}

/// Returns the time to the shell, and how the program ended.
fn talk(session: &mut Session, start: Instant) -> Result<(Duration, ExitStatus)> {
    session.screen.until(PROMPT)?;
    let shell = start.elapsed();
    for (line, expected) in DIALOGUE {
        session.type_line(line)?;
        let answer = session.screen.until(PROMPT)?;
        for part in *expected {
            ensure!(answer.contains(part), "`{line}` answers without {part:?}: {answer:?}");
        }
    }
    session.type_line("poweroff")?;
    let (rest, status) = session.rest()?;
    ensure!(rest.contains("Power down"), "no power-off: {rest:?}");
    Ok((shell, status))
}
