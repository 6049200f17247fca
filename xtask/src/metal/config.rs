//! Virtual machines of the bare machine, from the same TOML as those of Linux: a table `[vm.NAME]` for each, with the words of
//! `bivisor run` as far as the bare machine has what they name.
use crate::bench::guest::own_folder;
use anyhow::{Context, Result, bail, ensure};
use bivisor_metal::bundle::{Bundle, MAX_MACHINES, MachineConfig, OnCrash};
use serde::Deserialize;
use std::{borrow::Cow, collections::BTreeMap, fs, path::Path, path::PathBuf};

/// RAM of a machine whose table says nothing.
const DEFAULT_MEMORY: &str = "512M";
/// vCPUs of a machine at most.
const MAX_CPUS: u32 = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    vm: BTreeMap<String, toml::Table>,
}

/// What a table may say.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Table {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    image: Option<String>,
    #[serde(default)]
    append: String,
    #[serde(default = "default_memory")]
    memory: String,
    #[serde(default = "default_cpus")]
    cpus: u32,
    #[serde(default)]
    testdev: bool,
    #[serde(default)]
    restart: Restart,
}

const KNOWN: &[&str] = &["kernel", "initrd", "image", "append", "memory", "cpus", "testdev", "restart"];

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Restart {
    #[default]
    No,
    OnFailure,
}

fn default_memory() -> String {
    DEFAULT_MEMORY.into()
}

fn default_cpus() -> u32 {
    1
}

/// The `append` of an image's description.
#[derive(Deserialize)]
struct Description {
    #[serde(default)]
    append: String,
    disk: Option<String>,
}

/// Reads a file and everything that it names.
///
/// # Errors
/// Something in it is wrong, missing, or not there on the bare machine, in words.
pub fn read(path: &Path) -> Result<Bundle<'static>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text, path.parent().unwrap_or(Path::new(""))).with_context(|| path.display().to_string())
}

/// Reads a description whose relative paths start in a folder, and everything that it names.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str, folder: &Path) -> Result<Bundle<'static>> {
    let file: File = toml::from_str(text)?;
    ensure!(!file.vm.is_empty(), "no machine is described: say [vm.NAME] and what it boots");
    ensure!(file.vm.len() <= MAX_MACHINES as usize, "more than {MAX_MACHINES} machines");
    let machines = file
        .vm
        .into_iter()
        .map(|(name, table)| machine(&name, table, folder).with_context(|| format!("vm.{name}")))
        .collect::<Result<_>>()?;
    Ok(Bundle { machines })
}

fn machine(name: &str, table: toml::Table, folder: &Path) -> Result<MachineConfig<'static>> {
    if let Some(key) = table.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        bail!("the bare machine has no '{key}' (yet): it knows {}", KNOWN.join(", "));
    }
    let table: Table = table.try_into()?;
    let (kernel, initrd, append) = match (table.kernel, table.image) {
        (Some(kernel), None) => {
            (folder.join(kernel), table.initrd.map(|path| folder.join(path)), table.append)
        }
        (None, Some(image)) => {
            ensure!(table.initrd.is_none(), "an image has an initrd of its own: leave 'initrd' away");
            let (folder, own) = find_image(&image)?;
            (folder.join("vmlinuz"), Some(folder.join("initrd.img")), format!("{own} {}", table.append))
        }
        _ => bail!("say what it boots: either kernel = \"FILE\" or image = \"NAME\""),
    };
    ensure!((1..=MAX_CPUS).contains(&table.cpus), "a machine has 1 to {MAX_CPUS} CPUs, not {}", table.cpus);
    let file = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    Ok(MachineConfig {
        name: name.into(),
        cpus: table.cpus,
        memory: memory(&table.memory)?,
        testdev: table.testdev,
        on_crash: match table.restart {
            Restart::No => OnCrash::Stop,
            Restart::OnFailure => OnCrash::Restart,
        },
        command_line: append.trim().into(),
        kernel: Cow::Owned(file(&kernel)?),
        initrd: initrd.as_deref().map(file).transpose()?.map(Cow::Owned),
    })
}

/// A size such as 512M or 1G.
fn memory(text: &str) -> Result<u64> {
    let shift = match text.bytes().last() {
        Some(b'M') => 20,
        Some(b'G') => 30,
        _ => bail!("'{text}' is no size of memory: say a number and M or G, as in 512M"),
    };
    let number: u64 =
        text[..text.len() - 1].parse().with_context(|| format!("'{text}' is no size of memory"))?;
    let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes >= 2 << 20);
    bytes.with_context(|| format!("'{text}' is no size of memory that a guest can do with"))
}

/// The folder of an image that `bivisor image build` made, and its command line.
fn find_image(name: &str) -> Result<(PathBuf, String)> {
    let places = [own_folder("XDG_CACHE_HOME", ".cache"), own_folder("XDG_DATA_HOME", ".local/share")];
    let mut with_disk = false;
    for place in places.into_iter().flatten() {
        let folder = place.join("images").join(name);
        let Ok(text) = fs::read_to_string(folder.join("image.toml")) else { continue };
        let description: Description = toml::from_str(&text).context("image.toml")?;
        if description.disk.is_none() {
            return Ok((folder, description.append));
        }
        with_disk = true;
    }
    if with_disk {
        bail!("the image '{name}' has a disk, and the bare machine has no disks yet");
    }
    bail!(
        "there is no image '{name}': `bivisor image ls` lists those that there are, `bivisor run` makes debian"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", parse(text, Path::new("/nowhere")).unwrap_err())
    }

    #[test]
    fn machines_come_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("k"), "kernel").unwrap();
        fs::write(folder.path().join("i"), "initrd").unwrap();
        let text = "[vm.b]\nkernel = \"k\"\n[vm.a]\nkernel = \"k\"\ninitrd = \"i\"\nappend = \"quiet\"\n\
                    memory = \"64M\"\ncpus = 2\ntestdev = true\nrestart = \"on-failure\"\n";
        let bundle = parse(text, folder.path()).unwrap();
        let [a, b] = &bundle.machines[..] else { panic!("{bundle:?}") };
        assert_eq!((a.name.as_str(), a.cpus, a.memory, a.testdev), ("a", 2, 64 << 20, true));
        assert_eq!((a.on_crash, a.command_line.as_str()), (OnCrash::Restart, "quiet"));
        assert_eq!((&*a.kernel, a.initrd.as_deref()), (&b"kernel"[..], Some(&b"initrd"[..])));
        assert_eq!((b.name.as_str(), b.cpus, b.memory, &b.initrd), ("b", 1, 512 << 20, &None));
        assert_eq!(b.on_crash, OnCrash::Stop);
    }

    #[test]
    fn what_is_not_there_is_named() {
        assert!(error("[vm.a]\nkernel = \"k\"\nnet = [\"user\"]\n").contains("no 'net' (yet)"));
        assert!(error("[vm.a]\nkernel = \"k\"\n").contains("/nowhere/k"));
        assert!(error("[vm.a]\nmemory = \"1G\"\n").contains("say what it boots"));
        assert!(error("[vm.a]\nkernel = \"k\"\nmemory = \"1\"\n").contains("no size of memory"));
        assert!(error("[vm.a]\nkernel = \"k\"\ncpus = 65\n").contains("1 to 64 CPUs"));
        assert!(error("[vm]\n").contains("no machine"));
    }
}
