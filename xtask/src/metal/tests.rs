//! The hypervisor for the bare machine in QEMU's emulation of AMD-V: the guests with their one expected output, and two stock
//! Debians at once.
use super::{GOOD_END, bochs, build, by_pvh, images, machine, pack};
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

/// The guest that takes longest: half a million exits. In about one of two runs it does not come back from code at the border of
/// the canonical addresses (issue 5), and the run ends by [`GUEST_LIMIT`].
pub(super) const SLOW: &str = "escape";
/// The real machine.
pub(super) const QEMU: &str = "qemu-system-x86_64";
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

/// Whether QEMU is there; says so if not.
fn installed() -> bool {
    let there = Command::new(QEMU).arg("--version").output().is_ok();
    if !there {
        println!(
            "skipped: the bare machine, since {QEMU} is not installed (Debian: apt-get install qemu-system-x86)"
        );
    }
    there
}

/// Runs all of it.
///
/// # Errors
/// A check can't be started.
pub fn all(tally: &mut Tally, program: &Path) -> Result<()> {
    let clippy = ["clippy", "--profile", "metal", "--package", "bivisor-metal", "--features", "image"];
    tally
        .step("lints of the bare machine's image", cargo(".").args(clippy).args(["--", "-D", "warnings"]))?;
    if !installed() {
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
    for guest in ALL.iter().filter(|guest| guest.name != SLOW) {
        tally.check(&name(guest), || runs(&image, guest));
    }
    tally.check("a guest that crashes on svm", || crash_is_its_own(&image));
    tally.check("two Debians on svm", || two_debians(program, &image));
    images::all(tally, program, &image)?;
    bochs::all(tally, program, &image)
}

/// Runs the guest that takes minutes.
pub fn slow(tally: &mut Tally, image: &Path) {
    if installed() {
        for guest in ALL.iter().filter(|guest| guest.name == SLOW) {
            tally.check(&name(guest), || runs(image, guest));
        }
    }
}

fn name(guest: &Guest) -> String {
    format!("guest {} on svm", guest.name)
}

/// The hypervisor with machines, in QEMU, and the file that they are packed in.
fn boot(image: &Path, bundle: &Bundle<'_>, limit: Duration) -> Result<(NamedTempFile, Session)> {
    let module = NamedTempFile::new()?;
    fs::write(module.path(), bundle.encode())?;
    let session = start(image, &module, limit)?;
    Ok((module, session))
}

/// The hypervisor with packed machines, in QEMU.
fn start(image: &Path, module: &NamedTempFile, limit: Duration) -> Result<Session> {
    let mut command = machine(Path::new(QEMU), MEMORY);
    let command = by_pvh(&mut command, image, module.path()).args(["-serial", "stdio"]);
    Session::start(command, Instant::now() + limit)
}

fn config_of(guest: &Guest, name: &str) -> MachineConfig<'static> {
    MachineConfig {
        name: name.into(),
        cpus: 1,
        memory: 64 << 20,
        testdev: true,
        pv: true,
        on_crash: OnCrash::Stop,
        command_line: String::new(),
        kernel: Cow::Borrowed(guest.image),
        initrd: None,
        nets: Vec::new(),
        disks: Vec::new(),
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
    let bundle = Bundle { command_line: String::new(), machines: vec![config_of(guest, guest.name)] };
    let (_module, mut metal) = boot(image, &bundle, GUEST_LIMIT)?;
    let outcome = converse(guest, &mut metal)?;
    let code = outcome.status.and_then(|status| status.code());
    ensure!(code == Some(GOOD_END), "QEMU ended with {code:?}: {}", outcome.messages);
    judge(guest, &outcome, &excused::checks(guest, EXCUSED))
}

/// Lets a guest that is alone on the bare machine run to its end, and gives it what it wants typed.
pub(super) fn converse(guest: &Guest, metal: &mut Session) -> Result<Outcome> {
    let start = Instant::now();
    let mut output = String::new();
    // Line by line: a serial port's buffer is small, and nobody waits for room in it.
    for line in guest.input.split_inclusive('\r') {
        output.push_str(&metal.screen.until("> ")?);
        metal.type_text(line)?;
    }
    let (rest, status) = metal.rest()?;
    output.push_str(&rest);
    let (own, guests): (Vec<&str>, Vec<&str>) =
        output.lines().map(|line| line.trim_end_matches('\r')).partition(|line| line.starts_with(OWN_LINES));
    Ok(Outcome {
        output: guests.join("\n"),
        messages: own.join("\n"),
        status: Some(status),
        time: start.elapsed(),
    })
}

/// Whether a guest printed what it prints everywhere, but for the checks in `excused`, one a line.
pub(super) fn judge(guest: &Guest, outcome: &Outcome, excused: &str) -> Result<String> {
    let verdict = outcome.compare(guest, excused);
    ensure!(verdict.differences.is_empty(), "{}\n{}", verdict.differences.join("\n"), outcome.messages);
    let end = machines_end(&outcome.messages);
    ensure!(end.is_some_and(|end| excused::is_good_end(&verdict, end)), "{}", outcome.messages);
    let (passed, skipped) = (verdict.passed, verdict.skipped.len());
    Ok(format!(", {:.1?} by itself, {passed} checks, {skipped} excused", outcome.time))
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
    let bundle = Bundle { command_line: String::new(), machines: vec![stays, crashes] };
    let (_module, mut metal) = boot(image, &bundle, GUEST_LIMIT)?;
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

/// Two machines at one switch. The second one does without the paravirtual interface, and so would give up if its timer's
/// interrupts came late, as they do on a busy host.
const DEBIANS: &str = "[vm.one]\nimage = \"debian\"\nmemory = \"256M\"\nnet = [\"switch=lan\"]\n\
    [[vm.one.disk]]\npath = \"disk\"\nsnapshot = true\n\
    [vm.two]\nimage = \"debian\"\nmemory = \"256M\"\nnet = [\"switch=lan\"]\ncpus = 2\npv = \"off\"\n\
    append = \"no_timer_check\"\n";

/// What is on the first one's disk, and where.
const MARK: (usize, &[u8]) = (16 << 20, b"it came along");
/// What the first one does with it, and what must be in the answer.
const DISK_DIALOGUE: [(&str, &str); 2] = [
    ("dd if=/dev/vda bs=1M skip=16 count=1 2>/dev/null | head -c 13", "it came along"),
    (
        "mke2fs -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && cp /bin/busybox /mnt && umount /mnt && \
         mount -t ext4 /dev/vda /mnt && cmp /bin/busybox /mnt/busybox && echo all$((1+1))same",
        "all2same",
    ),
];

/// Both, one of them with two processors, reach a shell; the console switches between them; they reach each other; each powers
/// off by itself.
fn two_debians(program: &Path, image: &Path) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("two.toml");
    fs::write(&file, DEBIANS)?;
    let mut disk = vec![0; 32 << 20];
    disk[MARK.0..][..MARK.1.len()].copy_from_slice(MARK.1);
    fs::write(folder.path().join("disk"), &disk)?;
    let module = pack(program, &file)?;
    let begin = Instant::now();
    let mut metal = start(image, &module, LINUX_LIMIT)?;
    metal.screen.until(&format!("[one] {PROMPT}"))?;
    let shell = begin.elapsed();
    metal.type_text("uname -r; ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up\r")?;
    metal.screen.until("-cloud-amd64")?;
    metal.type_text("cat /sys/devices/system/clocksource/*/current_clocksource\r")?;
    metal.screen.until("[one] kvm-clock")?;
    for (line, answer) in DISK_DIALOGUE {
        metal.type_text(&format!("{line}\r"))?;
        metal.screen.until(answer)?;
    }
    metal.type_text(&format!("{ESCAPE}2"))?;
    metal.screen.until(&format!("[two] {PROMPT}"))?;
    metal.type_text("echo CPUs: $(nproc); cat /proc/interrupts; dmesg | grep -c kvm-clock\r")?;
    metal.screen.until("[two] CPUs: 2")?;
    metal.screen.until("Local timer interrupts")?;
    metal.screen.until("[two] 0\r\n")?;
    metal.type_text("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 10.0.0.1\r")?;
    metal.screen.until("3 packets received")?;
    metal.type_text("poweroff\r")?;
    metal.screen.until("two: powered off")?;
    metal.screen.until(&format!("[one] {PROMPT}"))?;
    metal.type_text("poweroff\r")?;
    let (rest, status) = metal.rest()?;
    ensure!(rest.contains("one: powered off") && status.code() == Some(GOOD_END), "{status}: {rest}");
    Ok(format!(", first shell after {shell:.1?}"))
}
