//! The engine kvm on a KVM that is not pretended: in a Linux of its own, which QEMU emulates with a processor that has
//! virtualization, so that this needs none here.
mod outer;

use crate::{
    bench::guest::default_guest,
    excused::{self, Excused},
    linux::{DIALOGUE, PROMPT},
    steps::{Tally, progress},
};
use anyhow::{Context, Result, bail, ensure};
use bivisor_guests::{ALL, Guest, Outcome};
use outer::Outer;
use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::ExitStatus,
    time::{Duration, Instant},
};

/// Checks that fail by KVM, on whatever processor: it executes IN and OUT itself, without regard to the guest's breakpoints.
const EXCUSED: Excused = &[("exceptions", "#DB by a port breakpoint\n")];
/// Where KVM gives up on a guest: what a guest does to a device is executed by KVM's own emulator, which does not know all
/// instructions (FNSAVE, here). So the guest's name, the first check that is not made, and the sentence.
const GIVEN_UP: (&str, &str, &str) =
    ("escape", "devices: LOCK INC: ok\n", "KVM could not go on (internal error 1)");
/// Status of a machine whose engine could not go on.
const ENGINE_STATUS: i32 = 16;
/// What a guest may take, emulated twice and on a busy machine.
const GUEST_LIMIT: Duration = Duration::from_secs(300);
/// What a boot of Linux and all that is typed there may take.
const LINUX_LIMIT: Duration = Duration::from_secs(480);
/// What ends a machine, typed at its console: Ctrl-A x, of which QEMU's console, too, wants the first character twice.
const QUIT: &str = "\x01\x01x";
/// What else is typed in the inner Linux: that it has a network, and knows what executes it.
const MORE: &[(&str, &[&str])] = &[
    ("ip link set eth0 up && udhcpc -n -q -s /bin/true -i eth0", &["10.0.2.15 obtained"]),
    ("dmesg | grep -o 'Hypervisor detected: KVM'", &["\nHypervisor detected: KVM"]),
    ("cat /sys/devices/system/clocksource/clocksource0/available_clocksource", &["kvm-clock"]),
];

/// Runs the test guests and Linux with one and two processors; of these, those with one of the names in theirs, if there are
/// any. `program`: bivisor.
///
/// # Errors
/// If something that the outer Linux needs can't be had.
pub fn all(tally: &mut Tally, program: &Path, names: &[String]) -> Result<()> {
    let is_wanted = |check: &str| names.is_empty() || names.iter().any(|name| check.contains(name.as_str()));
    progress("nested KVM");
    let folder = tempfile::tempdir()?;
    let start = Instant::now();
    let mut outer = Outer::start(program, &default_guest(program)?, folder.path())?;
    println!("    the outer Linux is up after {:.1?}", start.elapsed());
    let chosen = outer.ask("bivisor doctor | grep kvm", GUEST_LIMIT)?;
    let usable = chosen.contains("ok  engine kvm");
    println!("    bivisor doctor: {}", chosen.lines().next().unwrap_or_default());
    tally.count("nested KVM: doctor", usable);
    for guest in ALL {
        let name = format!("{} on kvm", guest.name);
        if is_wanted(&name) {
            tally.check(&name, || run(&mut outer, guest).inspect_err(|_| quit(&mut outer)));
        }
    }
    for cpus in [1, 2] {
        let name = format!("Linux with {cpus} CPUs on kvm");
        if is_wanted(&name) {
            tally.check(&name, || boot(&mut outer, cpus).inspect_err(|_| quit(&mut outer)));
        }
    }
    outer.end()?;
    println!("    nested KVM: {:.0?} in all", start.elapsed());
    Ok(())
}

/// Ends a machine that may still be there, so that the next one has the console for itself.
fn quit(outer: &mut Outer) {
    let mut end = || {
        outer.type_line(QUIT)?;
        outer.type_line("echo free-$((40 + 2))")?;
        outer.until("free-42", GUEST_LIMIT)?;
        outer.until_status(GUEST_LIMIT)
    };
    let ended = end();
    if let Err(error) = ended {
        println!("    what was left over can't be ended: {error:#}");
    }
}

/// Runs a test guest and compares what it prints.
fn run(outer: &mut Outer, guest: &Guest) -> Result<String> {
    let Guest { name, input, .. } = guest;
    let start = Instant::now();
    outer.type_line(&format!(
        "bivisor run --engine kvm --testdev --no-reboot --memory 64M --kernel /guests/{name} 2>/tmp/messages"
    ))?;
    let mut output = String::new();
    if !input.is_empty() {
        output = outer.until("\n> ", GUEST_LIMIT)?;
        outer.type_text(input)?;
    }
    let (rest, code) = outer.until_status(GUEST_LIMIT)?;
    output.push_str(&rest);
    let messages = outer.ask("cat /tmp/messages", GUEST_LIMIT)?;
    let status = Some(ExitStatus::from_raw(code << 8));
    let outcome = Outcome { output, messages, status, time: start.elapsed() };
    let mut guest = *guest;
    let (given_up, first, sentence) = GIVEN_UP;
    let given_up = guest.name == given_up;
    if given_up {
        let (before, _) = guest.expected.split_once(first).context("a check that the guest does not have")?;
        guest.expected = before;
    }
    let verdict = outcome.compare(&guest, &excused::checks(&guest, EXCUSED));
    let good = if given_up {
        code == ENGINE_STATUS && outcome.messages.contains(sentence)
    } else {
        excused::is_good_end(&verdict, code)
    };
    if !good || !verdict.differences.is_empty() {
        bail!("status {code}\n{}\n{}", verdict.differences.join("\n"), outcome.messages);
    }
    Ok(format!(", {} checks, {} excused", verdict.passed, verdict.skipped.len()))
}

/// Boots Linux with a disk and a network, types what a user would try first, and powers it off.
fn boot(outer: &mut Outer, cpus: u32) -> Result<String> {
    outer.ask("truncate -s 64M /tmp/disk", GUEST_LIMIT)?;
    outer.type_line(&format!(
        "bivisor run --engine kvm --cpus {cpus} --memory 256M --no-reboot --disk /tmp/disk,serial=serial-1 --net user \
         --kernel /inner/vmlinuz --initrd /inner/initrd.img --append console=ttyS0 2>/tmp/messages"
    ))?;
    let deadline = Instant::now() + LINUX_LIMIT;
    let left = || deadline.saturating_duration_since(Instant::now());
    outer.until(PROMPT, left())?;
    let processors = format!("\n{cpus}");
    let count = ("nproc", &[processors.as_str()][..]);
    for (line, expected) in DIALOGUE.iter().chain(MORE).copied().chain([count]) {
        outer.type_line(line)?;
        let answer = outer.until(PROMPT, left())?;
        for part in expected {
            ensure!(answer.contains(part), "`{line}` answers without {part:?}: {answer:?}");
        }
    }
    outer.type_line("poweroff")?;
    let (rest, code) = outer.until_status(left())?;
    let messages = outer.ask("cat /tmp/messages; rm /tmp/disk", GUEST_LIMIT)?;
    ensure!(code == 0 && rest.contains("Power down"), "status {code}: {rest:?}\n{messages}");
    Ok(String::new())
}

/// The test guests, as files of the outer Linux.
fn guests() -> impl Iterator<Item = (String, Vec<u8>)> {
    ALL.iter().map(|guest| (format!("guests/{}", guest.name), guest.image.to_vec()))
}

/// Kernel and initramfs of the inner Linux, as files of the outer one.
fn inner(image: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |name: &str| -> Result<_> {
        let path = image.join(name);
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        Ok((format!("inner/{name}"), bytes))
    };
    Ok(vec![read("vmlinuz")?, read("initrd.img")?])
}
