//! What the checks need beyond Rust, all of it packaged by Debian; installed where that is allowed.
use crate::steps::progress;
use anyhow::{Context, Result, bail};
use std::{env, fs, path::Path, process::Command};

/// A program that the checks call, by its name, or another file that they need, by its path.
struct Tool {
    program: &'static str,
    /// Separated by blanks.
    package: &'static str,
    /// Why it is needed, as the end of a sentence.
    purpose: &'static str,
    /// Whether the checks can go on without it.
    optional: bool,
}

const TOOLS: &[Tool] = &[
    Tool { program: "cc", package: "gcc", purpose: "cargo links with it", optional: false },
    Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
        purpose: "the guests are checked against it; their checks on QEMU are left out",
        optional: true,
    },
    Tool {
        program: "grub-mkimage",
        package: "grub-pc-bin",
        purpose: "it starts the bare machine's hypervisor; that check is left out",
        optional: true,
    },
    Tool {
        program: "/usr/share/OVMF/OVMF_CODE.fd",
        package: "ovmf",
        purpose: "it is UEFI for emulated machines; the checks with it are left out",
        optional: true,
    },
    Tool {
        program: "qemu-img",
        package: "qemu-utils",
        purpose: "it judges disk images; its checks are left out",
        optional: true,
    },
    Tool {
        program: "bochs",
        package: "bochs bochsbios vgabios",
        purpose: "its processor has VT-x; the checks of the bare machine on it are left out",
        optional: true,
    },
];

/// Components of the Rust toolchain that the checks call as cargo subcommands.
const COMPONENTS: &[(&str, &str)] = &[("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")];

/// Makes sure that everything is there, or says in words what is missing.
///
/// On Debian, packages are installed if the user is root or `CI=true` is set.
///
/// # Errors
/// If something without which the checks cannot run is missing and cannot be installed.
pub fn prepare() -> Result<()> {
    let missing: Vec<&Tool> = TOOLS.iter().filter(|tool| !installed(tool.program)).collect();
    if !missing.is_empty() && may_install() {
        let packages: Vec<&str> = missing.iter().flat_map(|tool| tool.package.split(' ')).collect();
        progress(&format!("installing {} with apt-get", packages.join(", ")));
        if let Err(error) = install(&packages) {
            println!("apt-get could not install them: {error:#}");
        }
    }
    for tool in missing.iter().filter(|tool| !installed(tool.program)) {
        let Tool { program, package, purpose, optional } = tool;
        println!("missing: {program}; {purpose}. To install it on Debian: sudo apt-get install {package}");
        if !optional {
            bail!("{program} is needed and not installed");
        }
    }
    for (component, program) in COMPONENTS.iter().filter(|(_, program)| !installed(program)) {
        progress(&format!("adding the Rust component {component}"));
        let added = Command::new("rustup").args(["component", "add", component]).status();
        if !added.is_ok_and(|status| status.success()) {
            bail!("{program} is missing and rustup could not add it; try: rustup component add {component}");
        }
    }
    Ok(())
}

/// Whether a file is there, or a program is on the search path and, if it is rustup's stand-in, has something behind it.
fn installed(program: &str) -> bool {
    if program.starts_with('/') {
        return Path::new(program).is_file();
    }
    let found = env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|dir| dir.join(program).is_file()));
    found && Command::new(program).arg("--help").output().is_ok_and(|output| output.status.success())
}

fn may_install() -> bool {
    // /proc/self belongs to the effective user.
    let root = fs::metadata("/proc/self").is_ok_and(|self_| std::os::unix::fs::MetadataExt::uid(&self_) == 0);
    let allowed = root || env::var("CI").is_ok_and(|ci| ci == "true");
    allowed && Path::new("/etc/debian_version").exists()
}

fn install(packages: &[&str]) -> Result<()> {
    let root = fs::metadata("/proc/self").is_ok_and(|self_| std::os::unix::fs::MetadataExt::uid(&self_) == 0);
    for arguments in [&["update"][..], &[&["install", "--yes", "--no-install-recommends"], packages].concat()]
    {
        let mut command = if root { Command::new("apt-get") } else { Command::new("sudo") };
        if !root {
            command.arg("apt-get");
        }
        let status = command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status();
        let status = status.context("could not start apt-get")?;
        if !status.success() {
            bail!("apt-get {} ended with {status}", arguments.join(" "));
        }
    }
    Ok(())
}
