//! `bivisor doctor`: what this host can run, and why or why not, in words.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bivisor_kvm::probe::{ASKED_FOR, CHOOSING, Measured};

use crate::host::clock;
use crate::host::memory;
use crate::jail::{self, Support};
use crate::{image, status};

/// How a finding bears on `bivisor run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As it should be.
    Good,
    /// Something does not work, but machines run.
    Lacking,
    /// No machine can run.
    Fatal,
}

#[derive(Debug)]
struct Finding {
    verdict: Verdict,
    what: &'static str,
    text: String,
}

impl Finding {
    fn new(verdict: Verdict, what: &'static str, text: impl Into<String>) -> Self {
        Self { verdict, what, text: text.into() }
    }
}

/// Looks at everything; gives the report, and as status 0 if machines can run.
pub fn run() -> (String, u8) {
    let findings = [
        kvm(),
        translator(),
        interpreter(),
        confinement(),
        cpu(&host_flags()),
        tsc(),
        ram(),
        packages(),
        cache_folder(),
    ];
    let mut report = String::new();
    for Finding { verdict, what, text } in &findings {
        let mark = match verdict {
            Verdict::Good => "ok",
            Verdict::Lacking => "--",
            Verdict::Fatal => "NO",
        };
        report.push_str(&format!("{mark}  {what:<18} {text}\n"));
    }
    if findings.iter().any(|finding| finding.verdict == Verdict::Fatal) {
        report.push_str("\nMachines can't run on this host.\n");
        return (report, status::HOST);
    }
    report.push_str(
        "\n`bivisor run` works here; --engine auto takes the first of kvm, dbt and interp that is usable.\n",
    );
    (report, status::SUCCESS)
}

fn translator() -> Finding {
    if bivisor_dbt::host_can_translate() {
        let text = "usable: translates 64-bit code; needs no virtualization hardware, no privilege";
        return Finding::new(Verdict::Good, "engine dbt", text);
    }
    Finding::new(Verdict::Lacking, "engine dbt", "not usable: it needs a CPU with BMI2 and AVX")
}

/// The interpreter executes vector instructions from generated code: the host must allow such memory.
fn interpreter() -> Finding {
    match bivisor_dbt::host_unit::HostUnit::new() {
        Ok(_) => Finding::new(
            Verdict::Good,
            "engine interp",
            "usable: needs no virtualization hardware, no privilege; it is slow",
        ),
        Err(error) => Finding::new(
            Verdict::Fatal,
            "engine interp",
            format!(
                "not usable: the host gives no memory for generated code ({error}); look for a policy like SELinux's execmem"
            ),
        ),
    }
}

/// How far machines' processes can be confined.
fn confinement() -> Finding {
    let by_seccomp_alone = |why: &str| {
        let text = format!(
            "machines run confined by seccomp alone, so that one with sockets in the file system could remove other \
             files, and one with a user-mode network does not hear of new name servers: {why}"
        );
        (Verdict::Lacking, text)
    };
    let (verdict, text) = match jail::try_out() {
        Err(error) => (Verdict::Lacking, error.to_string()),
        Ok(Support::Full) => {
            (Verdict::Good, "machines run confined to what is theirs, by seccomp and Landlock".into())
        }
        Ok(Support::Partial) => (
            Verdict::Good,
            "machines run confined to what is theirs, by seccomp and an early Landlock".into(),
        ),
        Ok(Support::NotEnabled) => {
            by_seccomp_alone("the kernel was started without Landlock: add it to the boot parameter lsm=")
        }
        Ok(Support::Missing) => by_seccomp_alone("the kernel has no Landlock, which came with Linux 5.13"),
    };
    Finding::new(verdict, "jail", text)
}

/// Executes a small guest on it, which takes some milliseconds.
fn kvm() -> Finding {
    match bivisor_kvm::probe(ASKED_FOR) {
        Ok(Measured { guest, whole }) if whole <= CHOOSING => {
            let text = format!("usable, by virtualization hardware: a small guest took {guest:.1?}");
            Finding::new(Verdict::Good, "engine kvm", text)
        }
        Ok(Measured { guest, whole }) => {
            let text = format!(
                "usable where it is asked for, with --engine kvm: a small guest took {guest:.1?}, but making it {whole:.1?}, \
                 for which --engine auto does not wait"
            );
            Finding::new(Verdict::Good, "engine kvm", text)
        }
        Err(why) => Finding::new(Verdict::Lacking, "engine kvm", format!("not usable: {why}")),
    }
}

/// Flags of the first processor in /proc/cpuinfo.
fn host_flags() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    line.map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect()).unwrap_or_default()
}

/// What x86-64-v3 has and v1 has not (x86-64 psABI, table 3.1), under Linux' names.
const LEVEL3: [&str; 16] = [
    "cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3", "avx", "avx2", "bmi1", "bmi2", "f16c",
    "fma", "abm", "movbe", "xsave",
];

fn cpu(flags: &[String]) -> Finding {
    let missing: Vec<_> = LEVEL3.into_iter().filter(|name| !flags.iter().any(|flag| flag == name)).collect();
    if missing.is_empty() {
        return Finding::new(Verdict::Good, "CPU", "x86-64-v3: guests see AVX2, BMI and FMA");
    }
    Finding::new(
        Verdict::Lacking,
        "CPU",
        format!("below x86-64-v3: guests see no {} (systems built for v3 don't start)", missing.join(", ")),
    )
}

fn tsc() -> Finding {
    let mhz = clock::measure_frequency(Duration::from_millis(20)) / 1_000_000;
    if clock::tsc_is_invariant() {
        Finding::new(Verdict::Good, "time-stamp counter", format!("constant, {mhz} MHz"))
    } else {
        Finding::new(
            Verdict::Lacking,
            "time-stamp counter",
            format!("{mhz} MHz now, but not said to be constant: guests' clocks may drift"),
        )
    }
}

fn ram() -> Finding {
    let mib = memory::host_memory() >> 20;
    let verdict = if mib < 640 { Verdict::Lacking } else { Verdict::Good };
    let text = match verdict {
        Verdict::Good => format!("{mib} MiB"),
        _ => format!("{mib} MiB: little for the default guest of 512 MiB; say --memory 256M"),
    };
    Finding::new(verdict, "memory", text)
}

/// Whether the default guest can be made, or is there.
fn packages() -> Finding {
    if image::Image::open(image::DEFAULT_IMAGE).is_ok() {
        return Finding::new(Verdict::Good, "default guest", "there");
    }
    let missing: Vec<_> = ["apt-get", "apt-cache"].into_iter().filter(|name| !is_in_path(name)).collect();
    if missing.is_empty() {
        Finding::new(Verdict::Good, "default guest", "not made yet; `bivisor run` makes it with apt-get")
    } else {
        Finding::new(
            Verdict::Lacking,
            "default guest",
            format!(
                "can't be made: no {} here, which Debian and its kin have; `bivisor run` starts a small built-in guest instead",
                missing.join(" and no ")
            ),
        )
    }
}

fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Whether images can be kept.
fn cache_folder() -> Finding {
    match image::cache_folder() {
        Err(error) => Finding::new(Verdict::Lacking, "cache folder", error.to_string()),
        Ok(folder) => match try_to_write(&folder) {
            Ok(()) => Finding::new(Verdict::Good, "cache folder", folder.display().to_string()),
            Err(error) => Finding::new(
                Verdict::Lacking,
                "cache folder",
                format!(
                    "{} can't be written ({error}): set XDG_CACHE_HOME to one that can",
                    folder.display()
                ),
            ),
        },
    }
}

/// Writes a file where images go, or would go, and removes it.
fn try_to_write(folder: &Path) -> io::Result<()> {
    let existing: PathBuf =
        folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned();
    let probe = existing.join(format!(".bivisor-doctor-{}", std::process::id()));
    File::create_new(&probe)?;
    fs::remove_file(&probe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_cpu_features_are_named() {
        let all: Vec<_> = LEVEL3.iter().map(|name| name.to_string()).collect();
        assert_eq!(cpu(&all).verdict, Verdict::Good);
        assert!(cpu(&all[..LEVEL3.len() - 2]).text.contains("no movbe, xsave"));
    }

    #[test]
    fn a_folder_that_is_not_there_yet_counts_as_its_parent() {
        assert!(try_to_write(&std::env::temp_dir().join("bivisor-no-such/images")).is_ok());
        assert!(try_to_write(Path::new("/proc/bivisor")).is_err());
    }
}
