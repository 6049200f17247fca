//! Seeds for cloud-init: a small disk with who the machine is and what it is to do (NoCloud data source).

use std::fs;
use std::io::{self, Cursor, Write};
use std::path::PathBuf;

use clap::Args;
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use super::{ImageError, own_key};

/// Bytes of the seed's disk at least: the smallest FAT file system has room for more than is ever said here.
const SIZE: usize = 1 << 20;
/// Bytes of the user's files at most.
const MAX_FILE: u64 = 16 << 20;
/// The label that cloud-init looks for.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// Who a new machine is: options of `bivisor image build debian` and `bivisor image import`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct Personality {
    /// Name of the machine [default: the image's name]
    #[arg(long, value_name = "NAME")]
    pub host_name: Option<String>,
    /// A public key that may log in by ssh
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Option<PathBuf>,
    /// Let `bivisor ssh` log in, by a key of Bivisor's own that is made the first time
    #[arg(long)]
    pub ssh: bool,
    /// Files for cloud-init: user-data, then meta-data, then network-config
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    pub cloud_init: Vec<PathBuf>,
}

impl Personality {
    /// The host name, checked.
    pub(super) fn host_name(&self, image: &str) -> Result<String, ImageError> {
        let name = self.host_name.as_deref().unwrap_or(image);
        let label = |label: &str| {
            let good = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
            good && !label.is_empty() && label.len() <= 63 && !label.starts_with('-') && !label.ends_with('-')
        };
        if name.len() <= 253 && name.split('.').all(label) {
            return Ok(name.to_owned());
        }
        Err(ImageError::Refused(format!(
            "'{name}' is no host name: say --host-name with letters, digits and hyphens"
        )))
    }

    /// Whether anybody is to log in by ssh.
    pub(super) fn wants_ssh(&self) -> bool {
        self.ssh || self.ssh_key.is_some()
    }

    /// The public keys, a line each: the user's, checked to be one, and ours.
    pub(super) fn ssh_keys(&self) -> Result<Option<String>, ImageError> {
        let mut keys: Vec<String> = self.users_key()?.into_iter().collect();
        if self.ssh {
            keys.push(own_key::public()?);
        }
        Ok((!keys.is_empty()).then(|| keys.join("\n")))
    }

    fn users_key(&self) -> Result<Option<String>, ImageError> {
        let Some(path) = &self.ssh_key else { return Ok(None) };
        let text = read(path)?;
        let is_key = |line: &str| {
            let kind = line.split_whitespace().next().unwrap_or_default();
            ["ssh-", "ecdsa-", "sk-"].iter().any(|prefix| kind.starts_with(prefix))
        };
        let mut lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
        if text.contains("PRIVATE KEY") || lines.clone().next().is_none() || !lines.all(is_key) {
            return Err(ImageError::Refused(format!(
                "{} holds no public ssh key: give the file that ends in .pub",
                path.display()
            )));
        }
        Ok(Some(text.trim().to_owned()))
    }

    /// Whether a seed is asked for.
    pub(super) fn has_cloud_init(&self) -> bool {
        !self.cloud_init.is_empty()
    }

    /// The seed's disk for an image of this name.
    pub(super) fn seed(&self, image: &str) -> Result<Vec<u8>, ImageError> {
        if self.cloud_init.len() > 3 {
            return Err(ImageError::Refused(
                "--cloud-init takes three files at most: user-data, meta-data and network-config".into(),
            ));
        }
        let host = self.host_name(image)?;
        let key = self.ssh_keys()?;
        let given = |index: usize| self.cloud_init.get(index).map(read).transpose();
        let meta = given(1)?.unwrap_or_else(|| meta_data(image, &host, key.as_deref()));
        let user = given(0)?.unwrap_or_else(|| "#cloud-config\n{}\n".into());
        let mut files = vec![("user-data", user), ("meta-data", meta)];
        files.extend(given(2)?.map(|network| ("network-config", network)));
        pack(&files)
            .map_err(|error| ImageError::Refused(format!("the seed for cloud-init can't be made: {error}")))
    }
}

/// The machine's name and keys; a new instance each time an image is made, so that cloud-init starts anew.
fn meta_data(image: &str, host: &str, key: Option<&str>) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let mut text = format!("instance-id: {image}-{}\nlocal-hostname: {host}\n", now.as_secs());
    let keys: Vec<&str> = key.iter().flat_map(|key| key.lines()).collect();
    if !keys.is_empty() {
        text.push_str("public-keys:\n");
    }
    for key in keys {
        // YAML: a single quote within single quotes is written twice.
        text.push_str(&format!("  - '{}'\n", key.trim().replace('\'', "''")));
    }
    text
}

fn read(path: &PathBuf) -> Result<String, ImageError> {
    let size = fs::metadata(path).map_err(super::io_error("reading", path))?.len();
    if size > MAX_FILE {
        return Err(ImageError::Refused(format!(
            "{} is too large to tell a machine who it is",
            path.display()
        )));
    }
    fs::read_to_string(path).map_err(super::io_error("reading", path))
}

fn pack(files: &[(&str, String)]) -> io::Result<Vec<u8>> {
    let content: usize = files.iter().map(|(_, text)| text.len().next_multiple_of(4096)).sum();
    let mut disk = Cursor::new(vec![0; (SIZE + content).next_multiple_of(1 << 20)]);
    fatfs::format_volume(&mut disk, FormatVolumeOptions::new().volume_label(LABEL))?;
    let system = FileSystem::new(&mut disk, FsOptions::new())?;
    for (name, text) in files {
        let mut file = system.root_dir().create_file(name)?;
        file.write_all(text.as_bytes())?;
        file.flush()?;
    }
    system.unmount()?;
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn unpacked(disk: Vec<u8>) -> Vec<(String, String)> {
        let system = FileSystem::new(Cursor::new(disk), FsOptions::new()).unwrap();
        assert_eq!(system.volume_label().trim(), "CIDATA");
        let files = system.root_dir().iter().map(|entry| {
            let entry = entry.unwrap();
            let mut text = String::new();
            entry.to_file().read_to_string(&mut text).unwrap();
            (entry.file_name(), text)
        });
        files.collect()
    }

    #[test]
    fn a_seed_names_the_machine_and_its_keys() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let mut who = Personality {
            ssh_key: Some(file("key.pub", "ssh-ed25519 AAAA it's me\n")),
            cloud_init: vec![file("user", "#cloud-config\npackages: [nginx]\n")],
            ..Personality::default()
        };
        let files = unpacked(who.seed("web").unwrap());
        assert_eq!(files[0], ("user-data".into(), "#cloud-config\npackages: [nginx]\n".into()));
        assert_eq!(files[1].0, "meta-data");
        assert!(files[1].1.contains("local-hostname: web\npublic-keys:\n  - 'ssh-ed25519 AAAA it''s me'\n"));

        who.cloud_init
            .extend([file("meta", "instance-id: one\n"), file("net", "x".repeat(3 << 20).as_str())]);
        let files = unpacked(who.seed("web").unwrap());
        assert_eq!(files[1].1, "instance-id: one\n");
        assert_eq!((files[2].0.as_str(), files[2].1.len()), ("network-config", 3 << 20));

        who.ssh_key = Some(file("key", "-----BEGIN OPENSSH PRIVATE KEY-----\n"));
        assert!(who.seed("web").unwrap_err().to_string().contains("no public ssh key"));
        who.host_name = Some("a_b".into());
        assert!(who.seed("web").unwrap_err().to_string().contains("no host name"));
    }
}
