//! What a machine is made of: the options of `bivisor run`, the same words in a TOML file, and their defaults.

mod set;

use std::borrow::Borrow;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bivisor_backends::console::ConsoleSpec;
use bivisor_backends::disk::DiskSpec;
use bivisor_backends::net::NetSpec;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::cli::RunArgs;
use crate::image::DiskRecipe;

pub use set::{Described, read_set};

/// RAM of a machine whose user says nothing: 512 MiB.
const DEFAULT_MEMORY: MemorySize = MemorySize(512 << 20);
/// vCPUs of a machine at most.
const MAX_CPUS: i64 = 64;
/// Smallest RAM: what lies below 1 MiB in a PC, and as much again for a kernel.
const MIN_MEMORY: u64 = 2 << 20;

/// Bytes of RAM: whole MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            "" if !number.is_empty() => return Err(format!("'{text}' has no unit: say {text}M or {text}G")),
            _ => {
                return Err(format!(
                    "'{text}' is no size of memory: say a number and K, M, G or T, as in 512M"
                ));
            }
        };
        let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
        let Some(bytes) = bytes.filter(|bytes| *bytes <= 1 << 46) else {
            return Err(format!("'{text}' is more memory than a machine can have: say 64T or less"));
        };
        if bytes < MIN_MEMORY {
            return Err(format!("'{text}' is too little memory for any guest: say 2M or more"));
        }
        if !bytes.is_multiple_of(1 << 20) {
            return Err(format!("'{text}' is not a whole number of MiB: say {}M", bytes.div_ceil(1 << 20)));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1 << 30) {
            write!(f, "{}G", self.0 >> 30)
        } else {
            write!(f, "{}M", self.0 >> 20)
        }
    }
}

/// `--engine`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// The fastest that works here
    #[default]
    Auto,
    /// Interpreter: slow, works everywhere
    Interp,
    /// Dynamic binary translation
    Dbt,
    /// The CPU's virtualization, through Linux KVM
    Kvm,
}

impl EngineChoice {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Interp => "interp",
            Self::Dbt => "dbt",
            Self::Kvm => "kvm",
        }
    }
}

/// `--pv`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Paravirtual {
    /// Guests find KVM's interface
    #[default]
    On,
    /// Guests find a PC and nothing else
    Off,
}

/// `--gdb`: where to wait for a debugger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GdbSpec {
    /// A TCP port of the loopback address.
    Port(u16),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for GdbSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(port) = text.strip_prefix(':') {
            return port
                .parse()
                .map(Self::Port)
                .map_err(|_| format!("'{port}' is no TCP port: say a number from 0 to 65535"));
        }
        match text.strip_prefix("unix=") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("'{text}' is no place for a debugger: say :PORT or unix=PATH")),
        }
    }
}

/// When the supervisor starts a machine again that has ended by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never
    #[default]
    No,
    /// Unless the guest powered off
    OnFailure,
    /// Always
    Always,
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// A kernel named by the user.
    Kernel {
        /// The kernel's file.
        kernel: PathBuf,
        /// The initial RAM disk's file.
        initrd: Option<PathBuf>,
    },
    /// An image by name.
    Image(String),
    /// The default guest.
    Default,
}

/// A machine to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// What to boot.
    pub boot: Boot,
    /// Kernel command line, if the user gave one.
    pub append: Option<String>,
    /// RAM.
    pub memory: MemorySize,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Engine.
    pub engine: EngineChoice,
    /// Paravirtual interface.
    pub pv: Paravirtual,
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<DiskSpec>,
    /// What the guest writes to any disk is forgotten at the end.
    pub snapshot: bool,
    /// Network interfaces, in the order in which the guest sees them.
    pub nets: Vec<NetSpec>,
    /// Virtio console.
    pub virtio_console: Option<ConsoleSpec>,
    /// Unix socket that leads to the guest's stream sockets.
    pub vsock: Option<PathBuf>,
    /// A source of randomness.
    pub rng: bool,
    /// A memory balloon.
    pub balloon: bool,
    /// Console.
    pub console: ConsoleSpec,
    /// End at a reset.
    pub no_reboot: bool,
    /// Test devices.
    pub testdev: bool,
    /// Tell what the engine has counted.
    pub stats: bool,
    /// Where to write what the guest executes.
    pub trace: Option<PathBuf>,
    /// Name translated code for perf.
    pub perf_map: bool,
    /// Debugger.
    pub gdb: Option<GdbSpec>,
    /// When the supervisor starts it again.
    pub restart: RestartPolicy,
    /// How its image is made if it is not there.
    pub build: Option<DiskRecipe>,
    /// Do without the jail.
    pub no_jail: bool,
}

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read the configuration {path}: {source}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not TOML, or has a key or value that means nothing.
    #[error("{path}:{line}:{column}: {message}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1, in characters.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// An initrd without a kernel.
    #[error("an initrd needs a kernel: give --kernel too, or leave --initrd away")]
    InitrdAlone,
    /// Both a kernel and an image.
    #[error("both the image '{0}' and a kernel are given: leave one of them away")]
    KernelAndImage(String),
    /// Both consoles at the terminal.
    #[error(
        "only one console can be at the terminal: say --virtio-console pty or unix=PATH, or --console so"
    )]
    TwoTerminals,
    /// A file of several machines where one is asked for.
    #[error("{path} describes {machines}: start them with `bivisor up {path}`", path = .path.display())]
    SeveralMachines {
        /// The file.
        path: PathBuf,
        /// Their names.
        machines: String,
    },
    /// A recipe for an image that has no name.
    #[error("'build' says how an image is made, so the machine needs `image = \"NAME\"` too")]
    BuildWithoutImage,
    /// A command line with a NUL character.
    #[error("the kernel command line contains a NUL character: leave it away")]
    NulInAppend,
    /// More RAM than the host has.
    #[error(
        "the machine is to have {asked} of memory, but this host has only {host}M: say --memory with less"
    )]
    TooMuchMemory {
        /// What is asked for.
        asked: MemorySize,
        /// MiB that the host has.
        host: u64,
    },
}

/// The keys of a TOML file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileConfig {
    image: Option<String>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    append: Option<String>,
    memory: Option<Spanned<String>>,
    cpus: Option<Spanned<i64>>,
    engine: Option<Spanned<String>>,
    pv: Option<Spanned<String>>,
    #[serde(default)]
    disk: Vec<Spanned<toml::Table>>,
    snapshot: Option<bool>,
    #[serde(default)]
    net: Vec<Spanned<String>>,
    virtio_console: Option<Spanned<String>>,
    vsock: Option<PathBuf>,
    rng: Option<bool>,
    balloon: Option<bool>,
    console: Option<Spanned<String>>,
    no_reboot: Option<bool>,
    testdev: Option<bool>,
    stats: Option<bool>,
    trace: Option<PathBuf>,
    perf_map: Option<bool>,
    gdb: Option<Spanned<String>>,
    restart: Option<Spanned<String>>,
    build: Option<Spanned<toml::Table>>,
    no_jail: Option<bool>,
}

impl VmConfig {
    /// Merges the command line with the TOML file that it names, if it names one: options win.
    pub fn new(args: &RunArgs) -> Result<Self, ConfigError> {
        let mut settings = Settings::default();
        let mut image = None;
        match args.target.as_deref() {
            Some(target) if is_file_name(target) => {
                (settings, image) = Settings::read(Path::new(target))?;
            }
            Some(name) => image = Some(name.to_owned()),
            None => {}
        }
        settings.override_with(args);
        if args.kernel.is_some() && args.target.as_deref().is_some_and(is_file_name) {
            // An option wins over the file's image, and the file's initrd belongs to the file's kernel.
            image = None;
            settings.initrd.clone_from(&args.initrd);
        }
        Self::of_settings(settings, image)
    }

    fn of_settings(settings: Settings, image: Option<String>) -> Result<Self, ConfigError> {
        if settings.build.is_some() && image.is_none() {
            return Err(ConfigError::BuildWithoutImage);
        }
        let boot = match (settings.kernel, image) {
            (Some(_), Some(image)) => return Err(ConfigError::KernelAndImage(image)),
            (Some(kernel), None) => Boot::Kernel { kernel, initrd: settings.initrd },
            (None, _) if settings.initrd.is_some() => return Err(ConfigError::InitrdAlone),
            (None, Some(image)) => Boot::Image(image),
            (None, None) => Boot::Default,
        };
        if settings.append.as_deref().is_some_and(|text| text.contains('\0')) {
            return Err(ConfigError::NulInAppend);
        }
        let console = settings.console.unwrap_or(ConsoleSpec::Stdio);
        if settings.virtio_console == Some(ConsoleSpec::Stdio) && console == ConsoleSpec::Stdio {
            return Err(ConfigError::TwoTerminals);
        }
        Ok(Self {
            boot,
            append: settings.append,
            memory: settings.memory.unwrap_or(DEFAULT_MEMORY),
            cpus: settings.cpus.unwrap_or(1),
            engine: settings.engine.unwrap_or_default(),
            pv: settings.pv.unwrap_or_default(),
            disks: settings.disks,
            snapshot: settings.snapshot,
            nets: settings.nets,
            virtio_console: settings.virtio_console,
            vsock: settings.vsock,
            rng: settings.rng,
            balloon: settings.balloon,
            console,
            no_reboot: settings.no_reboot,
            testdev: settings.testdev,
            stats: settings.stats,
            trace: settings.trace,
            perf_map: settings.perf_map,
            gdb: settings.gdb,
            restart: settings.restart,
            build: settings.build,
            no_jail: settings.no_jail,
        })
    }

    /// Checks the machine's RAM against the host's, in bytes.
    pub fn check_memory(&self, host: u64) -> Result<(), ConfigError> {
        if self.memory.0 > host {
            return Err(ConfigError::TooMuchMemory { asked: self.memory, host: host >> 20 });
        }
        Ok(())
    }
}

/// Whether a target names a file rather than an image.
fn is_file_name(target: &str) -> bool {
    target.ends_with(".toml") || target.contains('/')
}

/// What was set by file or option.
#[derive(Default)]
struct Settings {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    append: Option<String>,
    memory: Option<MemorySize>,
    cpus: Option<u32>,
    engine: Option<EngineChoice>,
    pv: Option<Paravirtual>,
    disks: Vec<DiskSpec>,
    snapshot: bool,
    nets: Vec<NetSpec>,
    virtio_console: Option<ConsoleSpec>,
    vsock: Option<PathBuf>,
    rng: bool,
    balloon: bool,
    console: Option<ConsoleSpec>,
    no_reboot: bool,
    testdev: bool,
    stats: bool,
    trace: Option<PathBuf>,
    perf_map: bool,
    gdb: Option<GdbSpec>,
    restart: RestartPolicy,
    build: Option<DiskRecipe>,
    no_jail: bool,
}

impl Settings {
    /// Reads a file; returns its settings and its image's name.
    fn read(path: &Path) -> Result<(Self, Option<String>), ConfigError> {
        let text = Source::read(path)?;
        let source = Source { path, text: &text };
        if let Some(names) = set::names(&text) {
            let machines = names.join(", ");
            return Err(ConfigError::SeveralMachines { path: path.to_owned(), machines });
        }
        Self::of_file(source.parse()?, &source)
    }

    /// The settings of a file, whose paths are relative to its folder.
    fn of_file(file: FileConfig, source: &Source<'_>) -> Result<(Self, Option<String>), ConfigError> {
        let folder = source.path.parent().unwrap_or(Path::new(""));
        let settings = Self {
            kernel: file.kernel.map(|path| folder.join(path)),
            initrd: file.initrd.map(|path| folder.join(path)),
            append: file.append,
            memory: source.value("memory", file.memory, MemorySize::from_str)?,
            cpus: source.value("cpus", file.cpus, parse_cpus)?,
            engine: source.value("engine", file.engine, parse_engine)?,
            pv: source.value("pv", file.pv, parse_pv)?,
            disks: file
                .disk
                .iter()
                .map(|disk| {
                    disk_of(disk.get_ref(), folder)
                        .map_err(|message| source.error(disk.span().start, format!("disk: {message}")))
                })
                .collect::<Result<_, _>>()?,
            snapshot: file.snapshot.unwrap_or(false),
            nets: file
                .net
                .into_iter()
                .filter_map(|net| source.value("net", Some(net), NetSpec::from_str).transpose())
                .collect::<Result<_, _>>()?,
            virtio_console: source
                .value("virtio-console", file.virtio_console, ConsoleSpec::from_str)?
                .map(|console| console_in(console, folder)),
            vsock: file.vsock.map(|path| folder.join(path)),
            rng: file.rng.unwrap_or(false),
            balloon: file.balloon.unwrap_or(false),
            console: source
                .value("console", file.console, ConsoleSpec::from_str)?
                .map(|console| console_in(console, folder)),
            no_reboot: file.no_reboot.unwrap_or(false),
            testdev: file.testdev.unwrap_or(false),
            stats: file.stats.unwrap_or(false),
            trace: file.trace.map(|path| folder.join(path)),
            perf_map: file.perf_map.unwrap_or(false),
            gdb: source.value("gdb", file.gdb, GdbSpec::from_str)?.map(|gdb| match gdb {
                GdbSpec::Unix(path) => GdbSpec::Unix(folder.join(path)),
                port => port,
            }),
            restart: source.value("restart", file.restart, parse_restart)?.unwrap_or_default(),
            build: source.value("build", file.build, |table| set::recipe(table, folder))?,
            no_jail: file.no_jail.unwrap_or(false),
        };
        Ok((settings, file.image))
    }

    fn override_with(&mut self, args: &RunArgs) {
        fn set<T: Clone>(setting: &mut Option<T>, option: &Option<T>) {
            if option.is_some() {
                setting.clone_from(option);
            }
        }
        set(&mut self.kernel, &args.kernel);
        set(&mut self.initrd, &args.initrd);
        set(&mut self.append, &args.append);
        set(&mut self.memory, &args.memory);
        set(&mut self.cpus, &args.cpus);
        set(&mut self.engine, &args.engine);
        set(&mut self.pv, &args.pv);
        set(&mut self.console, &args.console);
        set(&mut self.virtio_console, &args.virtio_console);
        set(&mut self.vsock, &args.vsock);
        self.disks.extend_from_slice(&args.disks);
        self.nets.extend_from_slice(&args.nets);
        self.rng |= args.rng;
        self.balloon |= args.balloon;
        set(&mut self.trace, &args.trace);
        set(&mut self.gdb, &args.gdb);
        self.snapshot |= args.snapshot;
        self.no_reboot |= args.no_reboot;
        self.testdev |= args.testdev;
        self.stats |= args.stats;
        self.perf_map |= args.perf_map;
        self.no_jail |= args.no_jail;
    }
}

/// A file's text, for errors with a place.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    /// The text of a file.
    fn read(path: &Path) -> Result<String, ConfigError> {
        let bytes = fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        String::from_utf8(bytes).map_err(|error| {
            let valid = String::from_utf8_lossy(&error.as_bytes()[..error.utf8_error().valid_up_to()]);
            Source { path, text: &valid }.error(valid.len(), "this is not UTF-8 text, so not TOML".into())
        })
    }

    fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(self.text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            self.error(at, one_line(error.message()))
        })
    }

    fn error(&self, at: usize, message: String) -> ConfigError {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        ConfigError::File { path: self.path.to_owned(), line, column, message }
    }

    /// Parses a value as the option of the same name is parsed.
    fn value<V: Borrow<T>, T: ?Sized, R>(
        &self,
        key: &str,
        value: Option<Spanned<V>>,
        parse: impl Fn(&T) -> Result<R, String>,
    ) -> Result<Option<R>, ConfigError> {
        let Some(value) = value else { return Ok(None) };
        let at = value.span().start;
        parse(value.get_ref().borrow())
            .map(Some)
            .map_err(|message| self.error(at, format!("{key}: {message}")))
    }
}

/// A console whose path is relative to a folder.
fn console_in(console: ConsoleSpec, folder: &Path) -> ConsoleSpec {
    match console {
        ConsoleSpec::File(path) => ConsoleSpec::File(folder.join(path)),
        ConsoleSpec::Unix(path) => ConsoleSpec::Unix(folder.join(path)),
        other => other,
    }
}

/// A disk as a table: its path, and the options of `--disk`.
fn disk_of(table: &toml::Table, folder: &Path) -> Result<DiskSpec, String> {
    let Some(toml::Value::String(path)) = table.get("path") else {
        return Err("a disk needs a path: say path = \"FILE\"".into());
    };
    let mut disk = DiskSpec::new(folder.join(path));
    for (key, value) in table.iter().filter(|(key, _)| *key != "path") {
        let text = match value {
            toml::Value::Boolean(true) => "on".into(),
            toml::Value::Boolean(false) => "off".into(),
            other => in_words(other),
        };
        disk.set(key, Some(&text))?;
    }
    Ok(disk)
}

/// A value as it is said on a command line.
fn in_words(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn parse_engine(text: &str) -> Result<EngineChoice, String> {
    EngineChoice::from_str(text, false)
        .map_err(|_| format!("'{text}' is no engine: say auto, interp, dbt or kvm"))
}

fn parse_restart(text: &str) -> Result<RestartPolicy, String> {
    RestartPolicy::from_str(text, false)
        .map_err(|_| format!("'{text}' is no policy: say no, on-failure or always"))
}

fn parse_pv(text: &str) -> Result<Paravirtual, String> {
    Paravirtual::from_str(text, false).map_err(|_| format!("'{text}' means nothing here: say on or off"))
}

fn parse_cpus(number: &i64) -> Result<u32, String> {
    match u32::try_from(*number) {
        Ok(cpus @ 1..) if *number <= MAX_CPUS => Ok(cpus),
        _ => Err(format!("{number} is no number of CPUs: say 1 to {MAX_CPUS}")),
    }
}

/// The TOML library explains some errors over several lines.
fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn parse(text: &str, line: &str) -> Result<VmConfig, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        fs::write(&file, text).unwrap();
        let words = ["bivisor", "run", file.to_str().unwrap()];
        let cli = crate::cli::Cli::try_parse_from(words.into_iter().chain(line.split_whitespace())).unwrap();
        let crate::cli::Command::Run(args) = cli.command else { panic!("not run") };
        VmConfig::new(&args).map(|mut config| {
            // Paths relative to the file, for comparison.
            if let Boot::Kernel { kernel, initrd } = &mut config.boot {
                for path in [Some(kernel), initrd.as_mut()].into_iter().flatten() {
                    *path = path.strip_prefix(folder.path()).map_or(path.clone(), Path::to_owned);
                }
            }
            config
        })
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("2M", 2 << 20), ("512MiB", 512 << 20), ("3G", 3 << 30), ("4096K", 4 << 20)] {
            assert_eq!(text.parse(), Ok(MemorySize(bytes)), "{text}");
        }
        assert_eq!(MemorySize(512 << 20).to_string(), "512M");
        assert_eq!(MemorySize(2 << 30).to_string(), "2G");
        for text in ["", "M", "1.5G", "-1M", "5X", "512MB", "1K", "999999999999999999999M"] {
            assert!(text.parse::<MemorySize>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_default_machine() {
        let config = VmConfig::new(&RunArgs::default()).unwrap();
        assert_eq!((config.boot, config.cpus, config.memory.0), (Boot::Default, 1, 512 << 20));
        assert_eq!((config.engine, config.console), (EngineChoice::Auto, ConsoleSpec::Stdio));
        assert_eq!(config.pv, Paravirtual::On);
        assert!(!config.no_reboot && !config.testdev && config.gdb.is_none());
    }

    #[test]
    fn a_file_says_what_options_say() {
        let config = parse(
            "kernel = \"k\"\ninitrd = \"i\"\nappend = \"quiet\"\nmemory = \"1G\"\ncpus = 4\nengine = \"interp\"\npv = \"off\"\n\
             console = \"pty\"\nno-reboot = true\ntestdev = true\nstats = true\ntrace = \"/t\"\nperf-map = true\ngdb = \":1234\"\n",
            "",
        )
        .unwrap();
        assert_eq!(config.boot, Boot::Kernel { kernel: "k".into(), initrd: Some("i".into()) });
        assert_eq!((config.append.as_deref(), config.memory.0, config.cpus), (Some("quiet"), 1 << 30, 4));
        assert_eq!((config.engine, config.console), (EngineChoice::Interp, ConsoleSpec::Pty));
        assert_eq!(config.pv, Paravirtual::Off);
        assert!(config.no_reboot && config.testdev && config.stats && config.perf_map);
        assert_eq!((config.trace, config.gdb), (Some("/t".into()), Some(GdbSpec::Port(1234))));
    }

    #[test]
    fn other_devices_of_a_file() {
        let text = "kernel = \"k\"\nnet = [\"user\"]\nvirtio-console = \"unix=/s\"\nvsock = \"/v\"\nrng = true\nballoon = true\n";
        let config = parse(text, "--net user,mac=52:54:00:00:00:01").unwrap();
        assert_eq!(config.nets.iter().map(|net| net.mac.is_some()).collect::<Vec<_>>(), [false, true]);
        assert_eq!(config.virtio_console, Some(ConsoleSpec::Unix("/s".into())));
        assert_eq!(config.vsock, Some("/v".into()));
        assert!(config.rng && config.balloon);
        assert!(matches!(parse("\nnet = [\"wire\"]", ""), Err(ConfigError::File { line: 2, .. })));
        assert!(matches!(parse("virtio-console = \"stdio\"", ""), Err(ConfigError::TwoTerminals)));
    }

    #[test]
    fn disks_of_a_file_come_before_those_of_options() {
        let text =
            "kernel = \"k\"\n[[disk]]\npath = \"/a\"\nreadonly = true\niops = 5\n[[disk]]\npath = \"/b\"\n";
        let disks = parse(text, "--disk c,snapshot").unwrap().disks;
        assert_eq!(
            disks.iter().map(|disk| disk.path.to_str()).collect::<Vec<_>>(),
            [Some("/a"), Some("/b"), Some("c")]
        );
        assert!(disks[0].read_only && disks[2].snapshot && !disks[1].read_only);
        assert_eq!(disks[0].limit.operations, Some(5));
        for wrong in ["[[disk]]\nformat = \"raw\"", "[[disk]]\npath = \"a\"\nreadonly = 3"] {
            assert!(matches!(parse(wrong, ""), Err(ConfigError::File { line: 1, .. })), "{wrong}");
        }
    }

    #[test]
    fn options_win() {
        let text = "kernel = \"k\"\ninitrd = \"i\"\nmemory = \"1G\"\ncpus = 4\nconsole = \"pty\"\n";
        let config = parse(text, "--memory 64M --console stdio").unwrap();
        assert_eq!((config.memory.0, config.cpus, config.console), (64 << 20, 4, ConsoleSpec::Stdio));
        assert_eq!(parse("kernel = \"k\"\npv = \"off\"", "--pv on").unwrap().pv, Paravirtual::On);
        assert!(matches!(parse("\npv = \"yes\"", ""), Err(ConfigError::File { line: 2, .. })));
        let config = parse(text, "--kernel other").unwrap();
        assert_eq!(config.boot, Boot::Kernel { kernel: "other".into(), initrd: None });
        let config = parse("image = \"debian\"", "--kernel other").unwrap();
        assert_eq!(config.boot, Boot::Kernel { kernel: "other".into(), initrd: None });
        assert_eq!(parse("image = \"debian\"", "").unwrap().boot, Boot::Image("debian".into()));
        assert!(matches!(parse("image = \"x\"\nkernel = \"k\"", ""), Err(ConfigError::KernelAndImage(_))));
    }
}
