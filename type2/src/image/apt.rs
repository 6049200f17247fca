//! Packages from the Debian sources that the host is set to, without root: apt with a state folder of its own.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use indicatif::ProgressBar;

use super::{ImageError, io_error};

/// apt as this user can run it.
pub struct Apt {
    options: Vec<OsString>,
    folder: PathBuf,
}

/// A package file that was downloaded.
pub struct Package {
    /// Name and version as apt has them, like `busybox-static 1:1.35.0-4`.
    pub label: String,
    /// The package's name.
    pub name: String,
    /// The file.
    pub file: PathBuf,
}

/// A file that apt would download.
struct Download {
    size: u64,
}

impl Apt {
    /// apt whose own files, where it needs any, go to `folder`. Nothing is read or written yet: the host's package
    /// lists serve as long as they know the packages.
    pub fn new(folder: &Path) -> Self {
        let folder = folder.to_owned();
        let options = ["APT::Sandbox::User=", "Acquire::Languages=none", "Debug::NoLocking=1"]
            .into_iter()
            .map(OsString::from)
            .collect();
        Self { options, folder }
    }

    fn command(&self, program: &'static str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        command
    }

    /// Fetches package lists into the private folder; from then on these are used instead of the host's.
    pub fn update(&mut self) -> Result<(), ImageError> {
        let state = self.folder.join("state");
        let cache = self.folder.join("cache");
        for folder in [state.join("lists/partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&folder).map_err(io_error("making folder", &folder))?;
        }
        for (name, folder) in [("Dir::State=", state), ("Dir::Cache=", cache)] {
            let mut option = OsString::from(name);
            option.push(folder);
            self.options.push(option);
        }
        self.options.push("Dir::State::status=/var/lib/dpkg/status".into());
        // "any": an unreachable source is a failure, not a warning.
        let mut command = self.command("apt-get");
        command.args(["-o", "APT::Update::Error-Mode=any", "-qq", "update"]);
        let output = run(command, "apt-get")?;
        if output.status.success() {
            return Ok(());
        }
        Err(ImageError::Program {
            what: "fetching Debian's package lists (apt-get update)".into(),
            detail: complaint(&output),
        })
    }

    /// The package that a meta-package depends on first.
    pub fn first_dependency(&self, package: &str) -> Result<String, ImageError> {
        let mut command = self.command("apt-cache");
        command.args(["depends", package]);
        let output = run(command, "apt-cache")?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .ok_or_else(|| ImageError::NoPackage { package: package.to_owned(), detail: complaint(&output) })
    }

    fn describe(&self, package: &str) -> Result<Download, ImageError> {
        let mut command = self.command("apt-get");
        command.args(["--print-uris", "download", package]);
        let output = run(command, "apt-get")?;
        // 'URI' FILE SIZE HASH
        let text = String::from_utf8_lossy(&output.stdout);
        let size = text
            .lines()
            .find(|line| line.starts_with('\''))
            .and_then(|line| line.split_whitespace().nth(2)?.parse().ok())
            .ok_or_else(|| ImageError::NoPackage {
                package: package.to_owned(),
                detail: complaint(&output),
            })?;
        Ok(Download { size })
    }

    /// Downloads a package into `folder`; the bar's length and position become its bytes.
    pub fn download(&self, package: &str, folder: &Path, bar: &ProgressBar) -> Result<Package, ImageError> {
        let download = self.describe(package)?;
        bar.set_length(download.size);
        fs::create_dir_all(folder).map_err(io_error("making folder", folder))?;
        let mut command = self.command("apt-get");
        command.args(["-q", "download", package]).current_dir(folder);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|e| spawn_error(e, "apt-get"))?;
        let waiter = thread::spawn(move || child.wait_with_output());
        while !waiter.is_finished() {
            bar.set_position(folder_size(folder).min(download.size));
            thread::sleep(Duration::from_millis(100));
        }
        let no_package = |detail| ImageError::NoPackage { package: package.to_owned(), detail };
        let output = match waiter.join() {
            Ok(Ok(output)) => output,
            Ok(Err(e)) => return Err(no_package(e.to_string())),
            Err(_) => return Err(no_package("apt-get could not be waited for".into())),
        };
        let file = deb_in(folder);
        match file {
            Some(file) if output.status.success() => {
                bar.finish();
                let label = label(&file).unwrap_or_else(|| package.to_owned());
                Ok(Package { label, name: package.to_owned(), file })
            }
            _ => Err(no_package(complaint(&output))),
        }
    }
}

/// A source of Debian's packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    site: String,
    release: String,
}

impl Source {
    /// As a line of sources.list(5).
    pub fn line(&self) -> String {
        const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let signed =
            if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        format!("deb {signed}{} {} main", self.site, self.release)
    }
}

/// The release of Debian that this host runs, by its name.
pub fn host_release() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    (value("ID")? == "debian").then(|| value("VERSION_CODENAME")).flatten()
}

/// The sources that this host is set to, for another release perhaps; none where the host has none of Debian's.
pub fn debian_sources(suite: &str) -> Vec<Source> {
    let mut command = Command::new("apt-get");
    command.args([
        "indextargets",
        "--format",
        "$(SITE) $(RELEASE)",
        "Created-By: Packages",
        "Origin: Debian",
    ]);
    let output = command.stdin(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    sources_for(suite, host_release().as_deref(), &text)
}

/// The host's own release has updates and security fixes in further sources; of another one only the base is sure
/// to be where the host's is.
fn sources_for(suite: &str, host: Option<&str>, targets: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for (site, release) in targets.lines().filter_map(|line| line.split_once(' ')) {
        let release = match host {
            Some(host) if host != suite && release == host => suite,
            Some(host) if host == suite && release.starts_with(host) => release,
            _ => continue,
        };
        let source = Source { site: site.to_owned(), release: release.to_owned() };
        if !sources.contains(&source) {
            sources.push(source);
        }
    }
    sources
}

fn run(mut command: Command, program: &'static str) -> Result<Output, ImageError> {
    command.output().map_err(|e| spawn_error(e, program))
}

fn spawn_error(error: std::io::Error, program: &'static str) -> ImageError {
    if error.kind() == std::io::ErrorKind::NotFound {
        return ImageError::MissingProgram { program };
    }
    ImageError::Program { what: format!("starting {program}"), detail: error.to_string() }
}

/// The last complaint of apt: its first error line, without the prefix.
fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let errors = || text.lines().filter_map(|line| line.strip_prefix("E: "));
    // "Some index files failed…" says less than the errors before it.
    let line = errors().next().or_else(|| text.lines().rev().find(|line| !line.trim().is_empty()));
    line.map_or_else(|| output.status.to_string(), |line| line.trim_end_matches('.').to_owned())
}

fn folder_size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

fn deb_in(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
}

/// "name version" from a file name like `busybox-static_1%3a1.35.0-4+b3_amd64.deb`.
fn label(file: &Path) -> Option<String> {
    let mut parts = file.file_stem()?.to_str()?.split('_');
    let (name, version) = (parts.next()?, parts.next()?);
    Some(format!("{name} {}", version.replace("%3a", ":")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_undoes_the_epoch_escape() {
        let file = Path::new("debs/busybox-static_1%3a1.35.0-4+b3_amd64.deb");
        assert_eq!(label(file).as_deref(), Some("busybox-static 1:1.35.0-4+b3"));
        assert_eq!(label(Path::new("odd.deb")), None);
    }

    #[test]
    fn sources_follow_the_hosts() {
        let targets = "http://a/debian bookworm\nhttp://a/debian bookworm\nhttp://a/debian bookworm-updates\n\
                       http://a/security bookworm-security\nhttp://b/x sid\n";
        let releases = |suite: &str, host: Option<&str>| {
            let sources = sources_for(suite, host, targets);
            sources.iter().map(|source| format!("{} {}", source.site, source.release)).collect::<Vec<_>>()
        };
        assert_eq!(
            releases("bookworm", Some("bookworm")),
            [
                "http://a/debian bookworm",
                "http://a/debian bookworm-updates",
                "http://a/security bookworm-security"
            ]
        );
        assert_eq!(releases("trixie", Some("bookworm")), ["http://a/debian trixie"]);
        assert!(releases("trixie", None).is_empty());
        let line = Source { site: "http://a".into(), release: "sid".into() }.line();
        assert!(line.starts_with("deb ") && line.ends_with(" http://a sid main"));
    }

    #[test]
    fn an_unknown_package_is_refused_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let apt = Apt::new(folder.path());
        match apt.download("no-such-package-bivisor", &folder.path().join("debs"), &ProgressBar::hidden()) {
            Err(ImageError::NoPackage { package, .. }) => assert_eq!(package, "no-such-package-bivisor"),
            Err(ImageError::MissingProgram { program }) => assert_eq!(program, "apt-get"),
            Err(other) => panic!("unexpected error {other}"),
            Ok(package) => panic!("got {}", package.label),
        }
    }
}
