//! The Linux that has a KVM: Debian's kernel with the modules of its own package, in QEMU, with busybox around it.
use super::{guests, inner};
use crate::{
    bench::guest::{extract, packages, write_archive},
    console::Session,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// What the init tells when it takes lines.
const READY: &str = "outer-ready";
/// What it tells behind each line, with its status.
const STATUS: &str = "outer-status ";
/// What QEMU's machine may take to get there.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// KVM's modules, in the order of loading, by their places in the kernel's package.
const MODULES: [&str; 3] = ["virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko", "arch/x86/kvm/kvm-amd.ko"];

/// A running one.
pub struct Outer(Session);

impl Outer {
    /// Starts it. `program`: bivisor; `image`: the folder with Debian's kernel and initramfs; `folder`: for what is made.
    pub fn start(program: &Path, image: &Path, folder: &Path) -> Result<Self> {
        let initrd = folder.join("outer.img");
        fs::write(&initrd, pack(program, image, folder)?)?;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1536", "-nographic", "-no-reboot"])
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .arg("-kernel")
            .arg(image.join("vmlinuz"))
            .arg("-initrd")
            .arg(&initrd);
        let session = Session::start(&mut qemu, Instant::now() + BOOT_LIMIT)
            .context("the outer Linux needs QEMU (Debian: apt-get install qemu-system-x86)")?;
        let mut outer = Self(session);
        let booted = outer.until(READY, BOOT_LIMIT)?;
        ensure!(!booted.contains("no module"), "KVM can't be loaded: {booted}");
        outer.ask("true", BOOT_LIMIT)?;
        Ok(outer)
    }

    /// Types text.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.0.type_text(text)
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.0.type_line(line)
    }

    /// What is written up to `end`, that included, without carriage returns.
    pub fn until(&mut self, end: &str, limit: Duration) -> Result<String> {
        self.0.screen.set_deadline(Instant::now() + limit);
        Ok(self.0.screen.until(end)?.replace('\r', ""))
    }

    /// What is written until the line typed last has been done, and its status.
    pub fn until_status(&mut self, limit: Duration) -> Result<(String, i32)> {
        let mut text = self.until(STATUS, limit)?;
        text.truncate(text.len() - STATUS.len());
        let status = self.until("\n", limit)?;
        Ok((text, status.trim().parse().context("the status of a line")?))
    }

    /// What a line writes, which must succeed.
    pub fn ask(&mut self, line: &str, limit: Duration) -> Result<String> {
        self.type_line(line)?;
        match self.until_status(limit)? {
            (text, 0) => Ok(text),
            (text, status) => bail!("`{line}` ends with {status}: {text}"),
        }
    }

    /// Powers it off.
    pub fn end(mut self) -> Result<()> {
        self.type_line("poweroff -f")?;
        self.0.screen.set_deadline(Instant::now() + BOOT_LIMIT);
        let (_, status) = self.0.rest()?;
        ensure!(status.success(), "QEMU failed");
        Ok(())
    }
}

/// Packs the initramfs: bivisor and the libraries that it needs, the guests, the modules, busybox.
fn pack(program: &Path, image: &Path, folder: &Path) -> Result<Vec<u8>> {
    let packed = fs::read(image.join("initrd.img")).context("the default guest's initramfs")?;
    let mut files = vec![
        ("init".to_owned(), include_bytes!("init.sh").to_vec()),
        ("bin/busybox".to_owned(), extract(&packed, "bin/busybox")?),
        ("bin/bivisor".to_owned(), fs::read(program)?),
    ];
    for library in libraries(program)? {
        let place = library.strip_prefix("/").unwrap_or(&library).display().to_string();
        files.push((place, fs::read(&library)?));
    }
    for (name, contents) in modules(image, folder)? {
        files.push((format!("modules/{name}"), contents));
    }
    files.extend(guests());
    files.extend(inner(image)?);
    write_archive(&files)
}

/// The shared libraries that a program is loaded with.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd could not be started")?;
    ensure!(output.status.success(), "ldd does not know what {} needs", program.display());
    let text = String::from_utf8(output.stdout)?;
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}

/// KVM's modules, with their names, from the package of the image's kernel.
fn modules(image: &Path, folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let packages = packages(image)?;
    let kernel = packages.iter().find_map(|package| {
        let (name, version) = package.split_once(' ')?;
        name.starts_with("linux-image-").then_some((name, version))
    });
    let (name, version) = kernel.context("the default guest's kernel is of no Debian package")?;
    let downloaded = Command::new("apt-get")
        .args(["download", "-q", &format!("{name}={version}")])
        .current_dir(folder)
        .output()
        .context("apt-get could not be started")?;
    ensure!(downloaded.status.success(), "{}", String::from_utf8_lossy(&downloaded.stderr));
    let package = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded nothing")?;
    let unpacked = folder.join("kernel");
    let status = Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacked).status();
    ensure!(status.context("dpkg-deb could not be started")?.success(), "the package can't be unpacked");
    let release = name.trim_start_matches("linux-image-");
    let tree = unpacked.join("lib/modules").join(release).join("kernel");
    let read = |place: &str| -> Result<_> {
        let path = tree.join(place);
        let name = place.rsplit('/').next().unwrap_or(place).to_owned();
        Ok((name, fs::read(&path).with_context(|| path.display().to_string())?))
    };
    MODULES.into_iter().map(read).collect()
}
