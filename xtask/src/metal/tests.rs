//! The hypervisor for the bare machine in QEMU's emulation of AMD-V: the guests with their one expected output, and two stock
//! Debians at once.
use super::{GOOD_END, build, config, machine};
use crate::{
    console::Session,
    excused::{self, Excused},
    linux::PROMPT,
    steps::Tally,
    test::cargo,
};
use anyhow::{Context, Result, ensure};
use bivisor_guests::{ALL, Guest, LOST, Outcome};
use bivisor_metal::bundle::{Bundle, MachineConfig, OnCrash};
use std::{
    borrow::Cow,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};
use tempfile::NamedTempFile;

const QEMU: &str = "qemu-system-x86_64";
/// A guest's time. The slowest leaves its processor some million times, which QEMU makes expensive.
const GUEST_LIMIT: Duration = Duration::from_secs(600);
/// The time of two Debians from power-up to the end.
const LINUX_LIMIT: Duration = Duration::from_secs(300);
/// RAM of the emulated machine in MiB.
const MEMORY: u64 = 768;
/// A machine that crashes this often is not started again.
const MAX_CRASHES: u32 = 5;
/// What begins the hypervisor's own lines.
const OWN_LINES: &str = "bivisor: ";
/// Before a command to the hypervisor: Ctrl-].
const ESCAPE: &str = "\x1d";

/// Runs all of it.
///
/// # Errors
/// A check can't be started.
pub fn all(tally: &mut Tally) -> Result<()> {
    let clippy = ["clippy", "--profile", "metal", "--package", "bivisor-metal", "--features", "image"];
    tally
        .step("lints of the bare machine's image", cargo(".").args(clippy).args(["--", "-D", "warnings"]))?;
    if Command::new(QEMU).arg("--version").output().is_err() {
        println!(
            "skipped: the bare machine, since {QEMU} is not installed (Debian: apt-get install qemu-system-x86)"
        );
        return Ok(());
    }
    let image = match build() {
        Ok(image) => image,
        Err(error) => {
            println!("    {error:#}");
            tally.count("the bare machine's image", false);
            return Ok(());
        }
    };
    for guest in ALL {
        tally.check(&format!("guest {} on svm", guest.name), || runs(&image, guest));
    }
    tally.check("a guest that crashes on svm", || crash_is_its_own(&image));
    tally.check("two Debians on svm", || two_debians(&image));
    Ok(())
}

/// The hypervisor with machines, in QEMU, and the file that they are packed in.
fn boot(image: &Path, bundle: &Bundle<'_>, limit: Duration) -> Result<(NamedTempFile, Session)> {
    let module = NamedTempFile::new()?;
    fs::write(module.path(), bundle.encode())?;
    let mut command = machine(Path::new(QEMU), image, module.path(), MEMORY);
    let session = Session::start(command.args(["-serial", "stdio"]), Instant::now() + limit)?;
    Ok((module, session))
}

fn config_of(guest: &Guest, name: &str) -> MachineConfig<'static> {
    MachineConfig {
        name: name.into(),
        cpus: 1,
        memory: 64 << 20,
        testdev: true,
        on_crash: OnCrash::Stop,
        command_line: String::new(),
        kernel: Cow::Borrowed(guest.image),
        initrd: None,
    }
}

/// Checks that fail here for reasons of their own: QEMU's VMRUN loads DR7 without setting the breakpoints; the processor looks
/// at the address in RAX before it finds VMRUN intercepted; and the engine refuses vector instructions on devices.
const EXCUSED: Excused = &[
    (
        "exceptions",
        "#DB by a write breakpoint\nDR6 names the breakpoint\n#DB by an access breakpoint, last byte\n\
         #DB by an instruction breakpoint\nDR6 names the instruction breakpoint\n\
         an instruction breakpoint pushes RF as it was\n",
    ),
    (
        "escape",
        "devices: holes take everything\ndevices: the local APIC is read in every size and place\n\
         devices: the I/O APIC is used in every size and place\n\
         devices: junk to everything below 4 GiB that is no RAM\ndevices: every size of physical address\n\
         registers: the instructions of hypervisors are #UD\n",
    ),
];

/// A guest prints what it prints on every other engine, but for what QEMU's processor does its own way.
fn runs(image: &Path, guest: &Guest) -> Result<String> {
    let start = Instant::now();
    let bundle = Bundle { machines: vec![config_of(guest, guest.name)] };
    let (_module, mut metal) = boot(image, &bundle, GUEST_LIMIT)?;
    let mut output = String::new();
    if !guest.input.is_empty() {
        output = metal.screen.until("> ")?;
        metal.type_text(guest.input)?;
    }
    let (rest, status) = metal.rest()?;
    output.push_str(&rest);
    let (own, guests): (Vec<&str>, Vec<&str>) =
        output.lines().map(|line| line.trim_end_matches('\r')).partition(|line| line.starts_with(OWN_LINES));
    let outcome = Outcome {
        output: guests.join("\n"),
        messages: own.join("\n"),
        status: Some(status),
        time: start.elapsed(),
    };
    let verdict = outcome.compare(guest, &excused::checks(guest, EXCUSED));
    ensure!(verdict.differences.is_empty(), "{}\n{}", verdict.differences.join("\n"), outcome.messages);
    let end = machines_end(&outcome.messages);
    let good = end.is_some_and(|end| excused::is_good_end(&verdict, end));
    ensure!(status.code() == Some(GOOD_END) && good, "{status}: {}", outcome.messages);
    Ok(format!(", {} checks, {} excused", verdict.passed, verdict.skipped.len()))
}

/// The status by which a machine ended, as the hypervisor tells it.
fn machines_end(messages: &str) -> Option<i32> {
    if messages.contains("powered off") {
        return Some(0);
    }
    let (_, status) = messages.split_once("ended with status ")?;
    status.split(|other: char| !other.is_ascii_digit()).next()?.parse().ok()
}

/// A triple fault ends one machine, or starts it again a few times, and leaves the other one alone.
fn crash_is_its_own(image: &Path) -> Result<String> {
    let stays = config_of(&bivisor_guests::HELLO, "stays");
    let crashes = MachineConfig { on_crash: OnCrash::Restart, ..config_of(&LOST, "crashes") };
    let (_module, mut metal) = boot(image, &Bundle { machines: vec![stays, crashes] }, GUEST_LIMIT)?;
    metal.screen.until("[stays] > ")?;
    metal.type_text(&format!("{ESCAPE}2"))?;
    for round in 1..=MAX_CRASHES {
        metal.screen.until("[crashes] lost: waits for a key").with_context(|| format!("round {round}"))?;
        metal.type_text("1")?;
        metal.screen.until("triple fault").with_context(|| format!("crash {round}"))?;
    }
    metal.screen.until("[stays] > ")?;
    metal.type_text("poweroff\r")?;
    let (rest, status) = metal.rest()?;
    ensure!(rest.contains("stays: powered off") && status.code() == Some(GOOD_END), "{status}: {rest}");
    Ok(String::new())
}

/// Both, one of them with two processors, reach a shell; the console switches between them; each powers off by itself.
fn two_debians(image: &Path) -> Result<String> {
    let description = "[vm.one]\nimage = \"debian\"\nmemory = \"256M\"\n[vm.two]\nimage = \"debian\"\nmemory = \"256M\"\ncpus = 2\n";
    let start = Instant::now();
    let bundle = config::parse(description, Path::new(""))?;
    let (_module, mut metal) = boot(image, &bundle, LINUX_LIMIT)?;
    metal.screen.until(&format!("[one] {PROMPT}"))?;
    let shell = start.elapsed();
    metal.type_text("uname -r; cat /proc/cpuinfo | grep -c hypervisor\r")?;
    metal.screen.until("-cloud-amd64")?;
    metal.type_text(&format!("{ESCAPE}2"))?;
    metal.screen.until(&format!("[two] {PROMPT}"))?;
    metal.type_text("echo CPUs: $(nproc); cat /proc/interrupts\r")?;
    metal.screen.until("[two] CPUs: 2")?;
    metal.screen.until("Local timer interrupts")?;
    metal.type_text("poweroff\r")?;
    metal.screen.until("two: powered off")?;
    metal.screen.until(&format!("[one] {PROMPT}"))?;
    metal.type_text("poweroff\r")?;
    let (rest, status) = metal.rest()?;
    ensure!(rest.contains("one: powered off") && status.code() == Some(GOOD_END), "{status}: {rest}");
    Ok(format!(", first shell after {shell:.1?}"))
}
