//! Images that `bivisor metal build` makes start a guest with every firmware, and its kernel does with GRUB.
use super::tests::QEMU;
use super::{GOOD_END, machine, metal};
use crate::{console::Session, steps::Tally};
use anyhow::{Context, Result, ensure};
use bivisor_guests::HELLO;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Time from power-up to the end.
const LIMIT: Duration = Duration::from_secs(120);
/// RAM of the emulated machine in MiB.
const MEMORY: u64 = 256;
/// Where Debian's package ovmf has UEFI.
const UEFI: &str = "/usr/share/OVMF/OVMF_CODE.fd";
/// Where Debian's package grub-pc-bin has GRUB for a BIOS.
const GRUB: &str = "/usr/lib/grub/i386-pc";
/// What GRUB needs to find files on a partition and start what they hold.
const GRUB_MODULES: [&str; 5] = ["biosdisk", "part_msdos", "fat", "multiboot2", "normal"];
const GRUB_SCRIPT: &str = "multiboot2 (hd1,msdos1)/kernel debug-exit\nmodule2 (hd1,msdos1)/machines\nboot\n";

/// Runs all of it.
///
/// # Errors
/// What is needed can't be made.
pub fn all(tally: &mut Tally, program: &Path, hypervisor: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("bivisor.iso");
    tally.check("an image for the bare machine", || {
        build(program, hypervisor, folder.path(), &image)?;
        Ok(format!(", {} MiB", fs::metadata(&image)?.len() >> 20))
    });
    let disk = format!("if=virtio,format=raw,file={}", image.display());
    let cd = format!("media=cdrom,if=ide,format=raw,file={}", image.display());
    for (medium, drive) in [("disk", &disk), ("CD", &cd)] {
        let drive = ["-snapshot", "-drive", drive];
        tally.check(&format!("BIOS starts it from a {medium}"), || {
            greets(machine(Path::new(QEMU), MEMORY).args(drive), SWITCHED_OFF)
        });
        if !Path::new(UEFI).exists() {
            println!("skipped: UEFI, since {UEFI} is not there (Debian: apt-get install ovmf)");
            continue;
        }
        tally.check(&format!("UEFI starts it from a {medium}"), || {
            greets(machine(Path::new(QEMU), MEMORY).args(["-bios", UEFI]).args(drive), SWITCHED_OFF)
        });
    }
    if Command::new("grub-mkimage").arg("--version").output().is_err() || !Path::new(GRUB).exists() {
        println!("skipped: GRUB, which is not installed (Debian: apt-get install grub-pc-bin grub-common)");
        return Ok(());
    }
    tally.check("GRUB starts the hypervisor", || by_grub(program, hypervisor, &folder));
    Ok(())
}

/// The description of one small guest.
fn describe(folder: &Path) -> Result<PathBuf> {
    fs::write(folder.join("hello"), HELLO.image)?;
    let file = folder.join("machines.toml");
    fs::write(&file, "[vm.hello]\nkernel = \"hello\"\nmemory = \"64M\"\ntestdev = true\n")?;
    Ok(file)
}

fn build(program: &Path, hypervisor: &Path, folder: &Path, image: &Path) -> Result<()> {
    let file = describe(folder)?;
    let [build, output, source] = ["build", "--output", "--hypervisor"].map(Path::new);
    metal(program, &[build, &file, output, image, source, hypervisor])
}

/// QEMU's status when the machine was switched off.
const SWITCHED_OFF: i32 = 0;

/// The guest has its console, and the machine ends when it does, with this status.
fn greets(qemu: &mut Command, end: i32) -> Result<String> {
    let start = Instant::now();
    let mut session = Session::start(qemu.args(["-serial", "stdio"]), start + LIMIT)?;
    session.screen.until("> ")?;
    let prompt = start.elapsed();
    session.type_text("poweroff\r")?;
    let (rest, status) = session.rest()?;
    ensure!(rest.contains("hello: powered off") && status.code() == Some(end), "{status}: {rest}");
    Ok(format!(", first prompt after {prompt:.1?}"))
}

/// GRUB on one disk, and on another one what it loads.
fn by_grub(program: &Path, hypervisor: &Path, folder: &TempDir) -> Result<String> {
    let files = folder.path().join("files");
    fs::create_dir(&files)?;
    let [bundle, kernel, output, source] = ["bundle", "kernel", "--output", "--hypervisor"].map(Path::new);
    metal(program, &[bundle, &folder.path().join("machines.toml"), output, &files.join("machines")])?;
    metal(program, &[kernel, output, &files.join("kernel"), source, hypervisor])?;
    let (script, core) = (folder.path().join("grub.cfg"), folder.path().join("core.img"));
    fs::write(&script, GRUB_SCRIPT)?;
    let mut grub = Command::new("grub-mkimage");
    grub.args(["-O", "i386-pc", "-p", "/", "-d", GRUB, "-c"]).arg(&script).arg("-o").arg(&core);
    let made = grub.args(GRUB_MODULES).output().context("grub-mkimage could not be started")?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // Its boot sector finds the rest in the sectors behind it.
    let mut disk = fs::read(Path::new(GRUB).join("boot.img"))?;
    disk.extend(fs::read(&core)?);
    disk.resize(disk.len().next_multiple_of(1 << 20), 0);
    let path = folder.path().join("grub.img");
    fs::write(&path, disk)?;
    let drives = [
        format!("if=ide,format=raw,file={}", path.display()),
        format!("if=ide,format=raw,file=fat:{}", files.display()),
    ];
    let mut qemu = machine(Path::new(QEMU), MEMORY);
    greets(qemu.args(["-snapshot", "-drive", &drives[0], "-drive", &drives[1]]), GOOD_END)
}
