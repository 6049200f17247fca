//! A disk with a Debian system on it, made from packages by mmdebstrap, without root where the host allows that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use super::apt::{self, Source};
use super::kernel_finder::version_order;
use super::root_files::RootFiles;
use super::seed::Personality;
use super::work::{Work, step, write_file};
use super::{DEFAULT_IMAGE, Image, ImageError, Manifest, Store, check_new_name, io_error};
use crate::config::MemorySize;

/// What every system has.
const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    "dbus",
    "kmod",
    "iproute2",
    "iputils-ping",
    "netbase",
    "procps",
    "less",
    "nano",
    "ca-certificates",
    "initramfs-tools",
    "busybox",
    "zstd",
    "linux-image-cloud-amd64",
];
/// A system takes no more than the half of this, so that there is room left.
const MIN_SIZE: u64 = 2 << 30;
const DEFAULT_SIZE: u64 = 8 << 30;
const DISK: &str = "disk.raw";
const SEED: &str = "seed.img";
/// The file system made by these options is read by every kernel of the last years.
const MAKE_DISK: &str = r#"
mkdir root
trap 'rm -rf root' EXIT
trap 'exit 1' INT TERM HUP
tar --numeric-owner --xattrs --xattrs-include='*' --exclude='./dev/*' -C root -xpf root.tar
tar --numeric-owner -C root -xpf own.tar
mke2fs -q -t ext4 -L "$LABEL" -U "$UUID" -E lazy_itable_init=1 -d root "$DISK"
"#;

/// `bivisor image build debian`: with one of these words a disk is made, without a small system in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct DiskRecipe {
    /// Make a disk of this size, such as 8G, with a Debian system on it [default, if a disk is made: 8G]
    #[arg(long, value_name = "SIZE")]
    pub size: Option<MemorySize>,
    /// More packages for the disk
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub packages: Vec<String>,
    /// Debian's release for the disk [default: the host's, or else stable]
    #[arg(long, value_name = "NAME")]
    pub suite: Option<String>,
    /// Name of the image with the disk [default: debian]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// A file whose first line becomes root's password; without it the console logs in by itself
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// A folder whose files are put over the system, as root's, such as etc/nginx/nginx.conf in it
    #[arg(long, value_name = "FOLDER")]
    pub files: Option<PathBuf>,
    /// Who the machine is
    #[command(flatten)]
    pub personality: Personality,
}

impl DiskRecipe {
    /// Whether any word asks for a disk.
    pub fn is_asked_for(&self) -> bool {
        let who = &self.personality;
        self.size.is_some()
            || !self.packages.is_empty()
            || self.suite.is_some()
            || self.name.is_some()
            || self.password_file.is_some()
            || who.host_name.is_some()
            || who.wants_ssh()
            || self.files.is_some()
            || who.has_cloud_init()
    }

    fn size(&self) -> Result<u64, ImageError> {
        let size = self.size.map_or(DEFAULT_SIZE, |size| size.0);
        if size < MIN_SIZE {
            return Err(ImageError::Refused(format!(
                "a Debian system does not fit into {} MiB: say --size 2G or more",
                size >> 20
            )));
        }
        Ok(size)
    }

    /// All packages, none of which may look like an option or a pattern to apt.
    fn packages(&self) -> Result<Vec<String>, ImageError> {
        let good = |name: &str| {
            let mut bytes = name.bytes();
            bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
                && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
        };
        if let Some(bad) = self.packages.iter().find(|name| !good(name)) {
            return Err(ImageError::Refused(format!("'{bad}' is no name of a Debian package")));
        }
        let mut all: Vec<String> = PACKAGES.iter().map(|&name| name.to_owned()).collect();
        all.extend(self.packages.iter().cloned());
        if self.personality.wants_ssh() {
            all.push("openssh-server".into());
        }
        if self.personality.has_cloud_init() {
            all.push("cloud-init".into());
        }
        Ok(all)
    }

    fn suite(&self) -> Result<String, ImageError> {
        let suite = self.suite.clone().or_else(apt::host_release).unwrap_or_else(|| "stable".into());
        if suite.is_empty() || !suite.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(ImageError::Refused(format!(
                "'{suite}' is no release of Debian's: say --suite bookworm"
            )));
        }
        Ok(suite)
    }

    fn password(&self) -> Result<Option<String>, ImageError> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let text = fs::read_to_string(path).map_err(io_error("reading", path))?;
        let line = text.lines().next().unwrap_or_default();
        if line.is_empty() || line.contains('\0') {
            return Err(ImageError::Refused(format!("{} has no password in its first line", path.display())));
        }
        Ok(Some(line.to_owned()))
    }
}

/// Makes an image with a disk, with progress on standard error.
///
/// # Errors
/// In one sentence each; then nothing is left of it.
pub fn build_debian_disk(recipe: &DiskRecipe) -> Result<Image, ImageError> {
    let name = recipe.name.as_deref().unwrap_or(DEFAULT_IMAGE);
    check_new_name(name)?;
    let (size, packages, suite) = (recipe.size()?, recipe.packages()?, recipe.suite()?);
    let host_name = recipe.personality.host_name(name)?;
    let ssh_key = recipe.personality.ssh_keys()?;
    let password = recipe.password()?;
    if let Some(folder) = recipe.files.as_deref().filter(|folder| !folder.is_dir()) {
        return Err(ImageError::Refused(format!("{} is no folder of files for a system", folder.display())));
    }
    let seed = recipe.personality.has_cloud_init().then(|| recipe.personality.seed(name)).transpose()?;
    let rootless = !rustix::process::geteuid().is_root();
    check_tools(rootless)?;

    let work = Work::start(Store::Data.folder()?)?;
    let image = work.image()?;
    eprintln!(
        "Making the image \"{name}\": Debian {suite} on a disk (some minutes; about 150 MB to download)."
    );
    bootstrap(&work, &suite, &packages, password.as_deref(), rootless)?;
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map_err(io_error("reading", Path::new("/proc/sys/kernel/random/uuid")))?;
    let files = RootFiles {
        host_name: &host_name,
        uuid: uuid.trim(),
        ssh_key: ssh_key.as_deref(),
        has_password: password.is_some(),
        cloud_init: seed.is_some(),
        more: recipe.files.as_deref(),
    };
    write_file(&work.path().join("own.tar"), |file| files.pack(file))?;
    let kernel = extract_boot_files(&work.path().join("root.tar"), &image)?;
    make_disk(&work, &image.join(DISK), size, uuid.trim(), rootless)?;
    if let Some(seed) = &seed {
        write_file(&image.join(SEED), |file| file.write_all(seed))?;
    }
    let manifest = Manifest {
        description: format!("Debian {suite} with kernel {kernel}, disk of {} GiB", size >> 30),
        append: format!("root=UUID={} console=ttyS0 quiet", uuid.trim()),
        packages,
        disk: Some(DISK.into()),
        seed: seed.map(|_| SEED.into()),
    };
    manifest.write(&image)?;
    work.finish(name)?;
    Image::open_in(Store::Data, name)
}

fn check_tools(rootless: bool) -> Result<(), ImageError> {
    let always = [
        ("mmdebstrap", "mmdebstrap", "it makes Debian systems from packages"),
        ("mke2fs", "e2fsprogs", "it makes the file system"),
        ("tar", "tar", "it unpacks the system"),
    ];
    let unprivileged = [
        ("unshare", "util-linux", "it makes root's rights needless"),
        ("newuidmap", "uidmap", "without it only root can make disks"),
    ];
    let needed = always.iter().chain(unprivileged.iter().filter(|_| rootless));
    for &(program, package, purpose) in needed {
        if find(program).is_none() {
            return Err(ImageError::MissingTool { program, package, purpose });
        }
    }
    Ok(())
}

/// A program on the search path, or where Debian keeps what is mostly root's.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Lets mmdebstrap make the system, as an archive in the work folder.
fn bootstrap(
    work: &Work,
    suite: &str,
    packages: &[String],
    password: Option<&str>,
    rootless: bool,
) -> Result<(), ImageError> {
    let mut command = Command::new("mmdebstrap");
    command.arg(if rootless { "--mode=unshare" } else { "--mode=root" });
    command.args(["--variant=minbase", "--format=tar"]).arg(format!("--include={}", packages.join(",")));
    for left_out in ["/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*"] {
        command.arg(format!("--dpkgopt=path-exclude={left_out}"));
    }
    command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
    if let Some(password) = password {
        let file = work.path().join("password");
        let write = || {
            let mut open = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&file)?;
            writeln!(open, "root:{password}")
        };
        write().map_err(io_error("writing", &file))?;
        // mmdebstrap's own "upload" is done by its part outside the new system, which can read the file.
        command.arg(format!("--customize-hook=upload '{}' /run/password", quoted(&file)));
        command.arg("--customize-hook=chroot \"$1\" sh -c 'chpasswd < /run/password && rm /run/password'");
    }
    command.arg(suite).arg(work.path().join("root.tar"));
    command.args(apt::debian_sources(suite).iter().map(Source::line));
    let bar = step("starting mmdebstrap");
    let what = || "making the Debian system (mmdebstrap)".to_owned();
    let (status, lines) = work
        .run(&mut command, &bar)
        .map_err(|error| ImageError::Program { what: what(), detail: error.to_string() })?;
    bar.finish_and_clear();
    if status.success() {
        Ok(())
    } else {
        Err(ImageError::Program { what: what(), detail: complaint(&lines) })
    }
}

/// A path for a shell's single quotes.
fn quoted(path: &Path) -> String {
    path.display().to_string().replace('\'', r"'\''")
}

/// The line that says most about a failure: apt's and mmdebstrap's errors begin with "E:".
fn complaint(lines: &[String]) -> String {
    let error = lines.iter().find(|line| line.starts_with("E: "));
    let line = error.or_else(|| lines.last()).map_or("it said nothing", |line| line.as_str());
    line.strip_prefix("E: ").unwrap_or(line).trim_end_matches('.').to_owned()
}

/// Takes kernel and initramfs out of the archive into the image; returns the kernel's version.
fn extract_boot_files(archive: &Path, image: &Path) -> Result<String, ImageError> {
    let reading = || io_error("reading", archive);
    let names = boot_entries(archive).map_err(reading())?;
    let newest = |prefix: &str| {
        let versions = names.iter().filter_map(|name| name.strip_prefix(prefix));
        versions.max_by(|a, b| version_order(a, b)).map(str::to_owned)
    };
    let missing =
        |file: &str| ImageError::MissingFile { package: "linux-image-cloud-amd64".into(), file: file.into() };
    let version = newest("vmlinuz-").ok_or_else(|| missing("boot/vmlinuz"))?;
    let wanted = [(format!("vmlinuz-{version}"), "vmlinuz"), (format!("initrd.img-{version}"), "initrd.img")];
    let mut archive_file = tar::Archive::new(File::open(archive).map_err(reading())?);
    let mut left = wanted.len();
    for entry in archive_file.entries().map_err(reading())? {
        let mut entry = entry.map_err(reading())?;
        let path = entry.path().map_err(reading())?.into_owned();
        let Some((_, name)) = wanted.iter().find(|(file, _)| path.ends_with(Path::new("boot").join(file)))
        else {
            continue;
        };
        write_file(&image.join(name), |file| io::copy(&mut entry, file).map(drop))?;
        left -= 1;
    }
    if left > 0 { Err(missing("boot/initrd.img")) } else { Ok(version) }
}

/// Names of the files in the archive's folder boot.
fn boot_entries(archive: &Path) -> io::Result<Vec<String>> {
    let mut archive = tar::Archive::new(File::open(archive)?);
    let mut names = Vec::new();
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let path = entry.path()?;
        let path = path.strip_prefix(".").unwrap_or(&path);
        if path.parent() == Some(Path::new("boot")) && entry.header().entry_type().is_file() {
            names.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    Ok(names)
}

/// Makes the disk from the archives, as root or as who has root's rights over a range of user numbers.
fn make_disk(work: &Work, disk: &Path, size: u64, uuid: &str, rootless: bool) -> Result<(), ImageError> {
    File::create(disk).and_then(|file| file.set_len(size)).map_err(io_error("making", disk))?;
    let mut command = Command::new(if rootless { "unshare" } else { "sh" });
    if rootless {
        command.args(["--map-root-user", "--map-auto", "sh"]);
    }
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(["-ec", MAKE_DISK]).current_dir(work.path());
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("DISK", disk);
    command.env("UUID", uuid).env("LABEL", "debian-root");
    let bar = step("making the disk");
    let what = || "making the file system (mke2fs)".to_owned();
    let (status, lines) = work
        .run(&mut command, &bar)
        .map_err(|error| ImageError::Program { what: what(), detail: error.to_string() })?;
    bar.finish_and_clear();
    if !status.success() {
        return Err(ImageError::Program { what: what(), detail: complaint(&lines) });
    }
    File::open(disk).and_then(|file| file.sync_all()).map_err(io_error("writing", disk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_ask_for_a_disk_and_are_checked() {
        let mut recipe = DiskRecipe::default();
        assert!(!recipe.is_asked_for());
        recipe.packages = vec!["nginx".into(), "libstdc++6".into()];
        assert!(recipe.is_asked_for());
        assert!(recipe.packages().unwrap().ends_with(&["nginx".into(), "libstdc++6".into()]));
        for bad in ["-o", "a b", "?installed", "", "x=1"] {
            recipe.packages = vec![bad.into()];
            assert!(recipe.packages().is_err(), "{bad}");
        }
        recipe.size = Some("1G".parse().unwrap());
        assert!(recipe.size().unwrap_err().to_string().contains("2G"));
        recipe.suite = Some("book worm".into());
        assert!(recipe.suite().is_err());
    }

    #[test]
    fn the_telling_line_of_a_failure_is_found() {
        let lines = ["I: running", "E: Unable to locate package nginxx", "W: x", "E: run_chroot failed."]
            .map(str::to_owned);
        assert_eq!(complaint(&lines), "Unable to locate package nginxx");
        assert_eq!(complaint(&["mke2fs: no space".to_owned()]), "mke2fs: no space");
        assert_eq!(complaint(&[]), "it said nothing");
    }

    #[test]
    fn boot_files_are_taken_from_the_newest_kernel() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("root.tar");
        let mut builder = tar::Builder::new(File::create(&archive).unwrap());
        for (path, text) in [
            ("./boot/vmlinuz-6.1.0-9-cloud-amd64", "old"),
            ("./boot/vmlinuz-6.1.0-10-cloud-amd64", "new"),
            ("./boot/initrd.img-6.1.0-10-cloud-amd64", "initrd"),
            ("./usr/boot/vmlinuz-9", "other"),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, text.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap();
        assert_eq!(extract_boot_files(&archive, folder.path()).unwrap(), "6.1.0-10-cloud-amd64");
        assert_eq!(fs::read_to_string(folder.path().join("vmlinuz")).unwrap(), "new");
        assert_eq!(fs::read_to_string(folder.path().join("initrd.img")).unwrap(), "initrd");
    }
}
