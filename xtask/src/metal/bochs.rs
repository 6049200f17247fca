//! The hypervisor in Bochs, whose processor has VT-x: the guests with their one expected output, and a stock Debian.
use super::metal;
use super::tests::{SLOW, converse, judge};
use crate::{
    console::Session,
    excused::{self, Excused},
    linux::PROMPT,
    steps::Tally,
};
use anyhow::{Context, Result, ensure};
use bivisor_guests::{ALL, Guest};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The program.
const BOCHS: &str = "bochs";
/// Where Debian's packages bochsbios and vgabios have the firmware.
const FIRMWARE: [&str; 2] = ["/usr/share/bochs/BIOS-bochs-latest", "/usr/share/vgabios/vgabios.bin"];
/// A guest's time from power-up to the end, with much to spare on a busy machine.
const GUEST_LIMIT: Duration = Duration::from_secs(180);
/// The same for [`SLOW`].
const SLOW_LIMIT: Duration = Duration::from_secs(1200);
/// Debian's time from power-up to the end.
const LINUX_LIMIT: Duration = Duration::from_secs(1800);
/// RAM of the emulated machine in MiB.
const MEMORY: u32 = 256;
/// The same for Debian.
const LINUX_MEMORY: u32 = 640;
/// Instructions in a second of the machine's own time, which has nothing to do with ours.
const SPEED: u32 = 50_000_000;
/// Bytes of a cylinder of the disk, with 16 heads and 63 sectors of 512 bytes.
const CYLINDER: u64 = 16 * 63 * 512;
/// What the hypervisor says last; Bochs ends with the same status whatever happens.
const GOOD_WORDS: &str = "no virtual machine runs any more";

/// Checks that fail here: Bochs names the stack segment where an address on an interrupt stack is not canonical, and says of an
/// absent one that it is another segment; it lets its own accesses pass SMAP. As on svm, the engine refuses vector
/// instructions on devices.
const EXCUSED: Excused = &[
    ("exceptions", "#SS by a non-canonical IST stack\n#SS once the stack segment is absent\n"),
    ("paging", "SMAP: the CPU's own accesses count as ring 0's\n"),
    (
        "escape",
        "devices: holes take everything\ndevices: the local APIC is read in every size and place\n\
         devices: the I/O APIC is used in every size and place\n\
         devices: junk to everything below 4 GiB that is no RAM\ndevices: every size of physical address\n",
    ),
];
/// Whether Bochs is there; says so if not.
fn installed() -> bool {
    let there = Command::new(BOCHS).arg("--help").output().is_ok()
        && FIRMWARE.iter().all(|file| Path::new(file).exists());
    if !there {
        println!(
            "skipped: VT-x, since {BOCHS} is not installed (Debian: apt-get install bochs bochsbios vgabios)"
        );
    }
    there
}

/// Runs the guests.
///
/// # Errors
/// A check can't be started.
pub fn all(tally: &mut Tally, program: &Path, hypervisor: &Path) -> Result<()> {
    if installed() {
        for guest in ALL.iter().filter(|guest| guest.name != SLOW) {
            tally.check(&format!("guest {} on vmx", guest.name), || runs(program, hypervisor, guest));
        }
    }
    Ok(())
}

/// Runs what takes minutes.
///
/// # Errors
/// A check can't be started.
pub fn slow(tally: &mut Tally, program: &Path, hypervisor: &Path) -> Result<()> {
    if installed() {
        for guest in ALL.iter().filter(|guest| guest.name == SLOW) {
            tally.check(&format!("guest {} on vmx", guest.name), || runs(program, hypervisor, guest));
        }
        tally.check("Debian on vmx", || debian(program, hypervisor));
    }
    Ok(())
}

/// Makes an image of machines that are described by `text`, and boots it in Bochs.
fn boot(folder: &Path, text: &str, memory: u32, tools: (&Path, &Path), limit: Duration) -> Result<Session> {
    let (program, hypervisor) = tools;
    let (description, image) = (folder.join("machines.toml"), folder.join("disk.img"));
    fs::write(&description, text)?;
    let [build, append, words, output, source] =
        ["build", "--append", "debug-exit", "--output", "--hypervisor"].map(Path::new);
    metal(program, &[build, &description, append, words, output, &image, source, hypervisor])?;
    let size = fs::metadata(&image)?.len().next_multiple_of(CYLINDER);
    fs::File::options().write(true).open(&image)?.set_len(size)?;
    Session::by_terminal(|console| bochs(folder, &image, size, memory, console), Instant::now() + limit)
}

/// Bochs with a disk of this size, RAM of so many MiB, and a terminal as its serial port.
fn bochs(folder: &Path, image: &Path, size: u64, memory: u32, console: &Path) -> Result<Command> {
    let [bios, video] = FIRMWARE;
    let lines = [
        "plugin_ctrl: unmapped=true, biosdev=true, serial=true, iodebug=true, speaker=false".into(),
        // Without a device for sound, its default ends it.
        "sound: driver=default, waveout=dummy".into(),
        "config_interface: textconfig".into(),
        // The only display that needs none; it doesn't wait for somebody who looks.
        "display_library: rfb, options=\"timeout=0\"".into(),
        format!("romimage: file={bios}"),
        format!("vgaromimage: file={video}"),
        format!("cpu: model=corei7_skylake_x, ips={SPEED}, reset_on_triple_fault=0"),
        format!("megs: {memory}"),
        "clock: sync=none".into(),
        format!(
            "ata0-master: type=disk, path={}, mode=flat, cylinders={}, heads=16, spt=63",
            image.display(),
            size / CYLINDER
        ),
        "boot: disk".into(),
        format!("com1: enabled=1, mode=term, dev={}", console.display()),
        format!("log: {}", folder.join("log").display()),
        "panic: action=fatal".into(),
        "error: action=report".into(),
        "info: action=ignore".into(),
    ];
    fs::write(folder.join("bochsrc"), lines.join("\n"))?;
    // Debian's Bochs begins in its debugger.
    fs::write(folder.join("commands"), "continue\n")?;
    // Its display waits for anybody at a port of every interface: it gets a network of its own.
    let mut bochs = Command::new("unshare");
    bochs.args(["--map-root-user", "--net", BOCHS, "-q", "-f", "bochsrc", "-rc", "commands"]);
    bochs.current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(bochs)
}

/// A guest prints what it prints on every other engine, but for what Bochs' processor does its own way.
fn runs(program: &Path, hypervisor: &Path, guest: &Guest) -> Result<String> {
    let limit = if guest.name == SLOW { SLOW_LIMIT } else { GUEST_LIMIT };
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("guest"), guest.image)?;
    let text = "[vm.guest]\nkernel = \"guest\"\nmemory = \"64M\"\ntestdev = true\n";
    let mut metal = boot(folder.path(), text, MEMORY, (program, hypervisor), limit)?;
    let outcome = converse(guest, &mut metal)?;
    ensure!(outcome.messages.contains(GOOD_WORDS), "{}", outcome.messages);
    ensure!(outcome.messages.contains("guests run on vmx"), "{}", outcome.messages);
    judge(guest, &outcome, excused::of(guest, EXCUSED))
}

/// A stock Debian reaches a shell, which works, and powers off.
fn debian(program: &Path, hypervisor: &Path) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let text = "[vm.debian]\nimage = \"debian\"\nmemory = \"256M\"\n";
    let start = Instant::now();
    let mut metal = boot(folder.path(), text, LINUX_MEMORY, (program, hypervisor), LINUX_LIMIT)?;
    metal.screen.until(PROMPT)?;
    let shell = start.elapsed();
    metal.type_text("uname -r; grep -c hypervisor /proc/cpuinfo\r")?;
    metal.screen.until("-cloud-amd64").context("uname")?;
    metal.screen.until(PROMPT)?;
    metal.type_text("poweroff\r")?;
    let (rest, _) = metal.rest()?;
    ensure!(rest.contains("debian: powered off") && rest.contains(GOOD_WORDS), "{rest}");
    Ok(format!(", shell after {shell:.0?}"))
}
