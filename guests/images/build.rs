//! Builds the bare-metal guests with a cargo of their own: they want panic = "abort", their own linker
//! script and a static relocation model, none of which the host programs may inherit.
use std::{env, path::PathBuf, process::Command};

fn main() {
    let var = |name| PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("cargo did not set {name}")));
    let bare = var("CARGO_MANIFEST_DIR").join("../bare");
    let target_dir = var("OUT_DIR").join("bare");
    println!("cargo::rerun-if-changed={}", bare.display());

    let mut cargo = Command::new(var("CARGO"));
    // The directory decides which .cargo/config.toml, and so which target and code generation flags, are read.
    cargo.current_dir(&bare).args(["build", "--quiet", "--release", "--locked", "--offline", "--bins"]);
    cargo.arg("--target-dir").arg(&target_dir);
    // What the outer cargo (or clippy) put into the environment is meant for host programs.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let inherited = ["RUSTFLAGS", "RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CLIPPY_ARGS"];
        let kept = ["CARGO", "CARGO_HOME"];
        if inherited.contains(&name.as_str()) || name.starts_with("CARGO") && !kept.contains(&name.as_str()) {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().unwrap_or_else(|e| panic!("could not start cargo for the guests: {e}"));
    assert!(status.success(), "the guests in {} did not build: {status}", bare.display());
    let images = target_dir.join("x86_64-unknown-linux-gnu/release");
    println!("cargo::rustc-env=BIVISOR_GUEST_IMAGES={}", images.display());
}
