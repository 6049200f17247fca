//! Reading files out of a Debian package.

use std::io::{BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use super::ImageError;
use super::apt::Package;

/// Calls `take` with the path (relative, without `./`) and contents of each regular file of the package for
/// which `wanted` says yes.
pub fn read_files(
    package: &Package,
    wanted: impl Fn(&str) -> bool,
    mut take: impl FnMut(&str, Vec<u8>),
) -> Result<(), ImageError> {
    let failed =
        |detail: String| ImageError::Program { what: format!("reading {}", package.file.display()), detail };
    let mut child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(&package.file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => ImageError::MissingProgram { program: "dpkg-deb" },
            _ => failed(e.to_string()),
        })?;
    let result = match child.stdout.take() {
        Some(stdout) => extract(BufReader::with_capacity(1 << 16, stdout), wanted, &mut take),
        None => Ok(()),
    };
    let status = child.wait().map_err(|e| failed(e.to_string()))?;
    result.map_err(|e| failed(e.to_string()))?;
    if status.success() { Ok(()) } else { Err(failed(format!("dpkg-deb ended with {status}"))) }
}

fn extract(
    stream: impl Read,
    wanted: impl Fn(&str) -> bool,
    take: &mut impl FnMut(&str, Vec<u8>),
) -> std::io::Result<()> {
    let mut archive = tar::Archive::new(stream);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path()?.into_owned();
        let Some(name) = path.strip_prefix("./").unwrap_or(&path).to_str().map(str::to_owned) else {
            continue;
        };
        if wanted(&name) {
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents)?;
            take(&name, contents);
        }
    }
    // dpkg-deb must not be ended by a closed pipe: read the padding after the last entry.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink())?;
    Ok(())
}

/// Name of a kernel module from its path, with the kernel's spelling: `virtio-rng.ko.xz` is `virtio_rng`.
pub fn module_name(path: &str) -> Option<String> {
    let file = Path::new(path).file_name()?.to_str()?;
    let (stem, ending) = file.split_once(".ko")?;
    matches!(ending, "" | ".xz" | ".zst").then(|| stem.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extract_gives_wanted_regular_files() {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, contents) in
            [("./boot/vmlinuz-6.1", b"kernel".as_slice()), ("./boot/config-6.1", b"config")]
        {
            let mut header = tar::Header::new_gnu();
            header.set_size(contents.len() as u64);
            header.set_cksum();
            builder.append_data(&mut header, name, contents).unwrap();
        }
        let tarball = builder.into_inner().unwrap();
        let mut got = Vec::new();
        extract(tarball.as_slice(), |name| name.starts_with("boot/vmlinuz"), &mut |name, contents| {
            got.push((name.to_owned(), contents))
        })
        .unwrap();
        assert_eq!(got, [("boot/vmlinuz-6.1".to_owned(), b"kernel".to_vec())]);
    }

    #[test]
    fn module_names_use_underscores() {
        assert_eq!(
            module_name("lib/modules/6.1/kernel/drivers/virtio-rng.ko").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(module_name("lib/evdev.ko.xz").as_deref(), Some("evdev"));
        assert_eq!(module_name("lib/modules.order"), None);
    }
}
