//! QEMUs: the installed one, and those of other Debian suites, unpacked into folders of their own.
//!
//! An unpacked QEMU brings all libraries that it needs, the C library included, and is started by its own dynamic
//! linker: nothing is installed, and the host's own packages don't matter.
use super::{guest::cache_folder, host::output_of};
use crate::steps::progress;
use anyhow::{Context, Result, bail, ensure};
use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const PROGRAM: &str = "qemu-system-x86_64";
/// Where packages of libraries put them.
const LIBRARIES: &[&str] = &["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
/// Where Debian's packages put what QEMU reads.
const DATA: &[&str] = &["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];
const LINKERS: &[&str] = &["usr/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"];

/// A QEMU that can be started.
pub struct Qemu {
    program: PathBuf,
    /// What comes before QEMU's own options.
    first: Vec<OsString>,
    /// Its folder of modules, if not where it looks by itself.
    modules: Option<PathBuf>,
}

impl Qemu {
    /// A program that needs nothing.
    pub fn at(program: &Path) -> Self {
        Self { program: program.to_owned(), first: Vec::new(), modules: None }
    }

    /// One that was unpacked in a folder, if it is complete.
    fn unpacked(folder: &Path) -> Option<Self> {
        let linker = LINKERS.iter().map(|name| folder.join(name)).find(|path| path.is_file())?;
        let program = folder.join("usr/bin").join(PROGRAM);
        let paths: Vec<PathBuf> =
            LIBRARIES.iter().flat_map(|name| with_folders(&folder.join(name))).collect();
        let mut first = vec!["--library-path".into(), env::join_paths(paths).ok()?, program.clone().into()];
        for data in DATA {
            first.extend(["-L".into(), folder.join(data).into()]);
        }
        let modules = Some(folder.join(LIBRARIES[0]).join("qemu"));
        program.is_file().then_some(Self { program: linker, first, modules })
    }

    /// The command, ready for options.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.first);
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        command
    }

    /// What it says of itself.
    pub fn version(&self) -> Result<String> {
        let text = output_of(self.command().arg("--version"))
            .with_context(|| format!("{} does not start", self.program.display()))?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

/// A folder of libraries and those in it: some packages keep private libraries there.
fn with_folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let inner = entries.map(|entry| entry.path()).filter(|path| path.is_dir());
    [folder.to_owned()].into_iter().filter(|path| path.is_dir()).chain(inner).collect()
}

/// `QEMU 7.2.22` from what a QEMU says of itself.
pub fn label(version: &str) -> Result<String> {
    let number = version.strip_prefix("QEMU emulator version ").and_then(|rest| rest.split(' ').next());
    Ok(format!("QEMU {}", number.with_context(|| format!("this is no QEMU: {version}"))?))
}

/// The version's numbers, by which versions are ordered.
pub fn number(label: &str) -> Vec<u32> {
    label.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// The one on the search path.
pub fn installed() -> Option<Qemu> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|folder| folder.join(PROGRAM))
        .find(|file| file.is_file())
        .map(|file| Qemu::at(&file))
}

fn folder() -> Result<PathBuf> {
    Ok(cache_folder()?.join("qemu"))
}

/// Those that were fetched.
pub fn fetched() -> Result<Vec<Qemu>> {
    let folder = folder()?;
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut suites: Vec<PathBuf> =
        fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    suites.sort();
    Ok(suites.iter().filter_map(|suite| Qemu::unpacked(suite)).collect())
}

/// Fetches the QEMU of a Debian suite, unless it is there.
///
/// # Errors
/// If the packages can't be had or the QEMU doesn't start.
pub fn fetch(suite: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(!suite.is_empty() && suite.chars().all(fits), "{suite:?} is not the name of a Debian suite");
    let place = folder()?.join(suite);
    if Qemu::unpacked(&place).is_some() {
        return Ok(());
    }
    progress(&format!("fetching the QEMU of Debian {suite} (about 100 MB)"));
    fs::create_dir_all(folder()?)?;
    // Beside its place and renamed when it is complete; hidden suites are not found.
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(folder()?)?;
    let tree = work.path().join("tree");
    for package in download(suite, &work.path().join("apt"))? {
        let status = Command::new("dpkg-deb").arg("-x").arg(&package).arg(&tree).status()?;
        ensure!(status.success(), "{} could not be unpacked", package.display());
    }
    let qemu = Qemu::unpacked(&tree).context("the packages hold no QEMU where Debian puts it")?;
    println!("    {}", qemu.version()?);
    fs::rename(&tree, &place).with_context(|| format!("putting {} in place", place.display()))
}

/// Downloads the packages of QEMU and of all that it depends on, as for a system with nothing on it.
fn download(suite: &str, apt: &Path) -> Result<Vec<PathBuf>> {
    let archives = apt.join("var/cache/apt/archives");
    for name in ["etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "var/lib/dpkg"] {
        fs::create_dir_all(apt.join(name))?;
    }
    fs::create_dir_all(apt.join("var/lib/apt/lists/partial"))?;
    fs::create_dir_all(archives.join("partial"))?;
    let status = apt.join("var/lib/dpkg/status");
    fs::write(&status, "")?;
    // From where the host takes its own packages: only the suite differs.
    let site = output_of(
        Command::new("apt-get")
            .args(["indextargets", "--format", "$(SITE)"])
            .args(["Created-By: Packages", "Origin: Debian"]),
    )
    .and_then(|text| text.lines().next().map(str::to_owned))
    .context("the host's apt has no Debian package lists: run `apt-get update` first")?;
    let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
    fs::write(apt.join("etc/apt/sources.list"), format!("deb [signed-by={key}] {site} {suite} main\n"))?;
    let run = |arguments: &[&str]| -> Result<()> {
        let mut dir = OsString::from("Dir=");
        dir.push(apt);
        let mut state = OsString::from("Dir::State::status=");
        state.push(&status);
        let mut command = Command::new("apt-get");
        command.arg("-o").arg(dir).arg("-o").arg(state);
        command.args([
            "-o",
            "APT::Sandbox::User=",
            "-o",
            "Acquire::Languages=none",
            "-o",
            "Debug::NoLocking=1",
        ]);
        // A mirror may lag behind; nobody's system is at stake here.
        command.args(["-o", "Acquire::Check-Valid-Until=false", "-qq"]).args(arguments);
        let status = command.status().context("apt-get could not be started")?;
        ensure!(status.success(), "apt-get {} ended with {status}", arguments[0]);
        Ok(())
    };
    run(&["-o", "APT::Update::Error-Mode=any", "update"])?;
    run(&["install", "--download-only", "--yes", "--no-install-recommends", "qemu-system-x86"])?;
    let mut packages: Vec<PathBuf> =
        fs::read_dir(&archives)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    packages.retain(|path| path.extension().is_some_and(|ending| ending == "deb"));
    if packages.is_empty() {
        bail!("apt-get downloaded nothing");
    }
    packages.sort();
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let old = label("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)").unwrap();
        let new = label("QEMU emulator version 11.1.2").unwrap();
        assert_eq!((old.as_str(), new.as_str()), ("QEMU 7.2.22", "QEMU 11.1.2"));
        assert!(number(&old) < number(&new));
        assert!(label("something else 1.2").is_err());
    }

    #[test]
    fn names_that_are_no_suites_are_refused() {
        for name in ["", "../x", "a b", "Sid"] {
            assert!(fetch(name).is_err(), "{name}");
        }
    }

    #[test]
    fn an_unpacked_qemu_is_started_by_its_own_linker() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Qemu::unpacked(folder.path()).is_none());
        for file in [LINKERS[0], "usr/bin/qemu-system-x86_64", "usr/lib/x86_64-linux-gnu/private/lib.so"] {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let command = Qemu::unpacked(folder.path()).unwrap().command();
        assert_eq!(command.get_program(), folder.path().join(LINKERS[0]));
        let words: Vec<String> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        assert_eq!(words[0], "--library-path");
        assert!(words[1].contains("x86_64-linux-gnu/private"), "{words:?}");
        assert!(words[2].ends_with("usr/bin/qemu-system-x86_64"));
    }
}
