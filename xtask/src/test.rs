//! `cargo xtask test`: everything that has to hold.
use crate::{fuzz, linux, metal, nested, power_cut, setup, steps::Tally, trace_diff};
use anyhow::Result;
use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The folder of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Cargo's folder for what it builds.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A cargo of the same toolchain, to run in a folder of the repository.
pub fn cargo(folder: &str) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root().join(folder));
    cargo
}

/// Builds the program and runs the checks of the engine kvm, or those with one of the names in theirs.
///
/// # Errors
/// If something that the checks need is missing.
pub fn nested_kvm(names: &[String]) -> Result<bool> {
    let mut tally = Tally::default();
    let program = linux::program(&mut tally)?;
    nested::all(&mut tally, &program, names)?;
    Ok(tally.close())
}

/// Runs every check; with `quick`, without what needs an optimised build: traces and the boot of Linux. With `all`, with
/// the servers of `examples/consolidation.toml` too.
///
/// # Errors
/// If something that the checks need is missing.
pub fn run(quick: bool, all: bool) -> Result<bool> {
    setup::prepare()?;
    let mut tally = Tally::default();
    tally.step("formatting", cargo(".").args(["fmt", "--all", "--check"]))?;
    tally.step("formatting of the guests", cargo("guests/bare").args(["fmt", "--check"]))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    tally.step("lints", cargo(".").args(clippy))?;
    let bare = ["clippy", "--release", "--", "-D", "warnings"];
    tally.step("lints of the guests", cargo("guests/bare").args(bare))?;
    tally.cargo_test("tests", cargo(".").args(["test", "--workspace", "--no-fail-fast"]))?;
    if !quick {
        let program = linux::program(&mut tally)?;
        trace_diff::guests::agree(&mut tally, &program);
        linux::boots(&mut tally, &program);
        linux::takes_up_the_interface(&mut tally, &program);
        power_cut::briefly(&mut tally, &program);
        fuzz::briefly(&mut tally)?;
        metal::tests::all(&mut tally, &program)?;
    }
    if all {
        let program = linux::program(&mut tally)?;
        metal::slow(&mut tally, &program)?;
        let servers = ["test", "--release", "--package", "bivisor", "--test", "consolidation"];
        tally
            .cargo_test("three servers", cargo(".").args(servers).args(["--", "--ignored", "--nocapture"]))?;
    }
    Ok(tally.close())
}
