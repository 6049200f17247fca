//! The map of folders holds: imports point down it only, and its lower half is `no_std`.
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, TargetKind};
use std::{collections::BTreeSet, fs, path::Path};

/// The layers, highest first, by the folder a package lies in. A package may import what lies in lower folders. The
/// oracle tests the engines: it stands above them.
const LAYERS: &[&str] =
    &["xtask", "type2", "type1", "backends", "engines/oracle", "engines", "machine", "x86", "guests"];

/// Packages that must be `no_std`, with all that they depend on.
const LOWER_HALF: &[&str] = &["bivisor-machine", "bivisor-x86", "bivisor-hvm", "bivisor-metal"];

fn metadata() -> Metadata {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    MetadataCommand::new().manifest_path(manifest).exec().expect("cargo metadata describes the workspace")
}

fn layer(metadata: &Metadata, package: &Package) -> usize {
    let folder =
        package.manifest_path.strip_prefix(&metadata.workspace_root).expect("a member lies in the workspace");
    LAYERS
        .iter()
        .position(|layer| folder.starts_with(layer))
        .unwrap_or_else(|| panic!("{folder} is not on the map of layers"))
}

#[test]
fn imports_point_down_the_map() {
    let metadata = metadata();
    let members = metadata.workspace_packages();
    let mut upward = Vec::new();
    for package in &members {
        let own = layer(&metadata, package);
        for import in &package.dependencies {
            let Some(target) = members.iter().find(|member| member.name.as_str() == import.name) else {
                continue;
            };
            // Engines stand side by side: none may import another.
            if layer(&metadata, target) <= own {
                upward.push(format!("{} imports {} ({})", package.name, target.name, import.kind));
            }
        }
    }
    assert!(upward.is_empty(), "imports that do not point down the map {LAYERS:?}:\n{}", upward.join("\n"));
}

/// Names of the packages that `name` is built with (build scripts and tests aside), itself included.
fn built_with<'a>(metadata: &'a Metadata, name: &str) -> Vec<&'a Package> {
    let resolve = metadata.resolve.as_ref().expect("cargo metadata resolves");
    let start =
        metadata.packages.iter().find(|package| package.name.as_str() == name).expect("a member's name");
    let mut seen = BTreeSet::from([&start.id]);
    let mut open = vec![&start.id];
    while let Some(id) = open.pop() {
        for import in &resolve[id].deps {
            let linked = import.dep_kinds.iter().any(|info| info.kind == DependencyKind::Normal);
            // A procedural macro runs on the host that compiles; nothing of it is linked.
            if linked && !is_macro(&metadata[&import.pkg]) && seen.insert(&import.pkg) {
                open.push(&import.pkg);
            }
        }
    }
    seen.into_iter().map(|id| &metadata[id]).collect()
}

fn is_macro(package: &Package) -> bool {
    package.targets.iter().any(|target| target.kind.contains(&TargetKind::ProcMacro))
}

fn is_library(kinds: &[TargetKind]) -> bool {
    kinds.iter().any(|kind| matches!(kind, TargetKind::Lib | TargetKind::RLib))
}

#[test]
fn the_lower_half_and_what_it_is_built_with_is_no_std() {
    let metadata = metadata();
    for name in LOWER_HALF {
        for package in built_with(&metadata, name) {
            let library =
                package.targets.iter().find(|target| is_library(&target.kind)).expect("a library to link");
            let text = fs::read_to_string(&library.src_path).expect("its root module can be read");
            // Many crates are no_std unless a feature of theirs, by custom named std, is on: see the test below.
            let no_std = text.lines().any(|line| line.starts_with("#![") && line.contains("no_std"));
            assert!(
                no_std,
                "{name} is built with {}, which is not no_std ({})",
                package.name, library.src_path
            );
        }
    }
}

#[test]
fn nothing_in_the_lower_half_switches_on_std() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    for name in LOWER_HALF {
        // Features differ between builds of the whole workspace and of one member; the member's own count.
        let tree = std::process::Command::new(env!("CARGO"))
            .args([
                "tree",
                "--offline",
                "--edges",
                "normal,no-proc-macro",
                "--prefix",
                "none",
                "--format",
                "{p} {f}",
            ])
            .args(["--package", name, "--manifest-path"])
            .arg(&manifest)
            .output()
            .expect("cargo tree runs");
        let lines = String::from_utf8_lossy(&tree.stdout).into_owned();
        assert!(tree.status.success() && !lines.is_empty(), "{}", String::from_utf8_lossy(&tree.stderr));
        for line in lines.lines() {
            let features = line.rsplit(' ').next().unwrap_or_default();
            let std = features.split(',').any(|feature| feature == "std");
            assert!(!std, "{name} is built with the feature std of {line}");
        }
    }
}

/// Whether the word stands in the line, and not as the end of a longer one.
fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

#[test]
fn the_lower_half_never_names_std() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for folder in ["x86/src", "machine/src", "engines/hvm/src", "type1/src"] {
        let mut open = vec![root.join(folder)];
        while let Some(path) = open.pop() {
            if path.is_dir() {
                let entries = fs::read_dir(&path).expect("a source folder can be read");
                open.extend(entries.map(|entry| entry.expect("its entries can be read").path()));
                continue;
            }
            // Tests run on the host: in files of their own, or last in a file.
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            if name.ends_with("tests") || name == "testing" {
                continue;
            }
            let text = fs::read_to_string(&path).expect("a source file can be read");
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            for (number, line) in product.lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                let names_std = names(code, "std::") || code.contains("extern crate std");
                assert!(!names_std, "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}
