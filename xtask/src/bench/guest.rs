//! What the machines run: the benchmark program of `bench/guest`, busybox and Debian's kernel.
use crate::test::root;
use anyhow::{Context, Result, bail, ensure};
use cpio::newc::{self, ModeFileType};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    env, fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// A figure that the program measures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub group: String,
    pub name: String,
}

impl Row {
    /// Whether this is its name or its group's.
    pub fn is(&self, name: &str) -> bool {
        self.name == name || self.group == name
    }
}

/// Everything that is needed to run the program on the host and in a machine.
pub struct Image {
    /// The program, static.
    pub bench: PathBuf,
    /// busybox, static.
    pub busybox: PathBuf,
    /// Debian's kernel, a bzImage.
    pub kernel: PathBuf,
    /// An initramfs with the program as its first process.
    pub initrd: PathBuf,
    /// The Debian packages of kernel and busybox, with versions.
    pub packages: Vec<String>,
}

/// What `image.toml` says of an image of Bivisor's.
#[derive(Deserialize)]
struct Manifest {
    packages: Vec<String>,
}

impl Image {
    /// Builds the program and packs the initramfs, in a folder. Kernel and busybox are those of Bivisor's default
    /// guest, which is made now if it isn't there.
    pub fn prepare(bivisor: &Path, folder: &Path) -> Result<Self> {
        let image = default_guest(bivisor)?;
        let bench = folder.join("bench");
        compile(&bench)?;
        let packed = fs::read(image.join("initrd.img")).context("the default guest's initramfs")?;
        let program = extract(&packed, "bin/busybox")?;
        let busybox = folder.join("busybox");
        write_program(&busybox, &program)?;
        let initrd = folder.join("initrd.img");
        fs::write(&initrd, pack(&fs::read(&bench)?, &program)?)?;
        Ok(Self { bench, busybox, kernel: image.join("vmlinuz"), initrd, packages: packages(&image)? })
    }
}

/// The folder of Bivisor's default guest, which is made now if it isn't there.
pub fn default_guest(bivisor: &Path) -> Result<PathBuf> {
    let image = cache_folder()?.join("images/debian");
    if !image.join("image.toml").is_file() {
        let status = Command::new(bivisor).args(["image", "build", "debian"]).status();
        let status = status.with_context(|| format!("{} could not be started", bivisor.display()))?;
        ensure!(status.success(), "the kernel for the machines could not be had: see above");
    }
    Ok(image)
}

/// The Debian packages of an image, with versions.
pub fn packages(image: &Path) -> Result<Vec<String>> {
    let manifest = fs::read_to_string(image.join("image.toml"))?;
    let manifest: Manifest = toml::from_str(&manifest).context("image.toml of the default guest")?;
    Ok(manifest.packages)
}

/// Bivisor's folder under the user's cache folder.
pub fn cache_folder() -> Result<PathBuf> {
    own_folder("XDG_CACHE_HOME", ".cache").context("no cache folder: set HOME or XDG_CACHE_HOME")
}

/// Bivisor's folder under a folder of the user's: the one that a variable names, or one in the home folder.
pub fn own_folder(variable: &str, in_home: &str) -> Option<PathBuf> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = absolute(variable).or_else(|| Some(absolute("HOME")?.join(in_home)))?;
    Some(folder.join("bivisor"))
}

/// Compiles the program.
///
/// # Errors
/// If there is no gcc, or no static C library.
pub fn compile(to: &Path) -> Result<()> {
    let folder = root().join("bench/guest");
    let mut sources: Vec<PathBuf> =
        fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    sources.retain(|path| path.extension().is_some_and(|ending| ending == "c"));
    sources.sort();
    let output = Command::new("gcc")
        .args(["-std=gnu17", "-O2", "-Wall", "-Wextra", "-static", "-pthread", "-o"])
        .arg(to)
        .args(&sources)
        .arg("-lm")
        .output()
        .context("gcc could not be started; on Debian: apt-get install gcc libc6-dev")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the benchmark program could not be compiled:\n{said}");
    Ok(())
}

/// The rows of the program.
pub fn rows(bench: &Path) -> Result<Vec<Row>> {
    let output = Command::new(bench).arg("--list").output()?;
    ensure!(output.status.success(), "{} --list ended with {}", bench.display(), output.status);
    parse_rows(&String::from_utf8_lossy(&output.stdout))
}

fn parse_rows(text: &str) -> Result<Vec<Row>> {
    text.lines()
        .map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [group, name, _unit] => Ok(Row { group: group.to_owned(), name: name.to_owned() }),
            _ => bail!("a line of the program's list is not understood: {line:?}"),
        })
        .collect()
}

fn write_program(path: &Path, contents: &[u8]) -> Result<()> {
    fs::write(path, contents)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// A file of a gzipped cpio archive.
pub fn extract(packed: &[u8], wanted: &str) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    GzDecoder::new(packed).read_to_end(&mut plain)?;
    let mut rest = plain.as_slice();
    loop {
        let mut reader = newc::Reader::new(rest)?;
        ensure!(!reader.entry().is_trailer(), "the archive holds no {wanted}");
        if reader.entry().name() == wanted {
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents)?;
            return Ok(contents);
        }
        rest = reader.finish()?;
    }
}

/// Packs the initramfs.
fn pack(bench: &[u8], busybox: &[u8]) -> Result<Vec<u8>> {
    write_archive(&[("bin/busybox".into(), busybox.to_vec()), ("init".into(), bench.to_vec())])
}

/// Packs an initramfs of programs and other files, with the folders that they lie in and a console.
pub fn write_archive(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    // Hardly compressed: unpacking is not what is measured.
    let mut archive = GzEncoder::new(Vec::new(), Compression::fast());
    let mut number = 0;
    let mut add = |path: &str, kind, device: (u32, u32), contents: &[u8]| -> Result<()> {
        number += 1;
        let builder = newc::Builder::new(path).ino(number).mode(0o755).set_mode_file_type(kind);
        let builder = builder.rdev_major(device.0).rdev_minor(device.1);
        let mut writer = builder.write(&mut archive, u32::try_from(contents.len())?);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    };
    let above = files.iter().flat_map(|(path, _)| Path::new(path).ancestors().skip(1));
    let folders: BTreeSet<_> = above.chain([Path::new("dev")]).filter_map(Path::to_str).collect();
    for folder in folders.into_iter().filter(|folder| !folder.is_empty()) {
        add(folder, ModeFileType::Directory, (0, 0), &[])?;
    }
    for (path, contents) in files {
        add(path, ModeFileType::Regular, (0, 0), contents)?;
    }
    // The console is device 5:1; no other file is a device.
    add("dev/console", ModeFileType::Char, (5, 1), &[])?;
    newc::trailer(&mut archive)?;
    Ok(archive.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_holds_both_programs() {
        let packed = pack(b"bench!", b"busybox").unwrap();
        assert_eq!(extract(&packed, "init").unwrap(), b"bench!");
        assert_eq!(extract(&packed, "bin/busybox").unwrap(), b"busybox");
        assert!(extract(&packed, "bin/none").is_err());
    }

    #[test]
    fn lists_of_rows_are_read() {
        let rows = parse_rows("integer sieve /s\nsmp lock_2 M/s\n").unwrap();
        assert_eq!(rows[1], Row { group: "smp".into(), name: "lock_2".into() });
        assert!(rows[0].is("integer") && rows[0].is("sieve") && !rows[0].is("smp"));
        assert!(parse_rows("nonsense\n").is_err());
    }

    /// Compiles the program and lets it measure, for a moment, what needs no machine of its own.
    #[test]
    fn the_program_computes_what_it_should() {
        let folder = tempfile::tempdir().unwrap();
        let bench = folder.path().join("bench");
        compile(&bench).unwrap();
        let groups = ["integer", "float", "vector", "kernel", "process"];
        let expected = rows(&bench).unwrap().into_iter().filter(|row| groups.contains(&row.group.as_str()));
        let output = Command::new(&bench).args(["--seconds", "0.001"]).args(groups).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for row in expected {
            let told = |what: &str| text.contains(&format!("{what} {} ", row.name));
            assert!(told("RESULT") || told("SKIP"), "nothing of {row:?} in:\n{text}");
        }
        assert!(!text.contains("BAD"), "{text}");
    }
}
