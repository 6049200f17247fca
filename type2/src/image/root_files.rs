//! The files of our own in a Debian root file system: names, network, serial console, who may log in.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tar::{Builder, EntryType, Header};

/// DHCP on whatever Ethernet device there is (systemd.network(5)).
const NETWORK: &str = "[Match]\nType=ether\n\n[Network]\nDHCP=yes\n";
/// Who has the serial console has the machine: root is logged in there (agetty(8)).
const AUTOLOGIN: &str = "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear --keep-baud \
                         115200,57600,38400,9600 %I $TERM\n";
/// Only the small disk that comes with a machine has something to say (cloud-init, datasources).
const CLOUD: &str = "datasource_list: [ NoCloud, None ]\nnetwork: {config: disabled}\n";

/// What distinguishes one root file system from another.
pub(super) struct RootFiles<'a> {
    pub(super) host_name: &'a str,
    /// UUID of the root file system.
    pub(super) uuid: &'a str,
    /// A public key that may log in as root.
    pub(super) ssh_key: Option<&'a str>,
    /// Root has a password, which the console asks for.
    pub(super) has_password: bool,
    pub(super) cloud_init: bool,
    /// A folder of the user's with more files.
    pub(super) more: Option<&'a Path>,
}

impl RootFiles<'_> {
    /// Packs the files as a tar archive, to be unpacked over the system.
    pub(super) fn pack(&self, to: impl Write) -> io::Result<()> {
        let mut archive = Archive(Builder::new(to));
        let host = self.host_name;
        archive.file("etc/hostname", 0o644, &format!("{host}\n"))?;
        archive.file(
            "etc/hosts",
            0o644,
            &format!("127.0.0.1 localhost\n127.0.1.1 {host}\n::1 localhost\n"),
        )?;
        archive.file("etc/fstab", 0o644, &format!("UUID={} / ext4 errors=remount-ro 0 1\n", self.uuid))?;
        // Empty: the first boot makes one, so that two machines never share it.
        archive.file("etc/machine-id", 0o444, "")?;
        archive.file("etc/systemd/network/20-ethernet.network", 0o644, NETWORK)?;
        archive.link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")?;
        for unit in ["systemd-networkd", "systemd-resolved"] {
            let link = format!("etc/systemd/system/multi-user.target.wants/{unit}.service");
            archive.link(&link, &format!("/lib/systemd/system/{unit}.service"))?;
        }
        if !self.has_password {
            archive.folder("etc/systemd/system/serial-getty@ttyS0.service.d", 0o755)?;
            archive.file(
                "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf",
                0o644,
                AUTOLOGIN,
            )?;
        }
        if let Some(key) = self.ssh_key {
            archive.folder("root/.ssh", 0o700)?;
            archive.file("root/.ssh/authorized_keys", 0o600, &format!("{}\n", key.trim()))?;
        }
        if self.cloud_init {
            archive.file("etc/cloud/cloud.cfg.d/90-bivisor.cfg", 0o644, CLOUD)?;
        }
        if let Some(folder) = self.more {
            archive.folder_of_user(folder, "")?;
        }
        archive.0.into_inner()?.flush()
    }
}

struct Archive<W: Write>(Builder<W>);

impl<W: Write> Archive<W> {
    fn entry(&mut self, path: &str, kind: EntryType, mode: u32, contents: &str) -> io::Result<()> {
        self.bytes(path, kind, mode, contents.as_bytes())
    }

    fn bytes(&mut self, path: &str, kind: EntryType, mode: u32, contents: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(contents.len() as u64);
        self.0.append_data(&mut header, path, contents)
    }

    fn file(&mut self, path: &str, mode: u32, contents: &str) -> io::Result<()> {
        self.entry(path, EntryType::Regular, mode, contents)
    }

    fn folder(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path, EntryType::Directory, mode, "")
    }

    /// Files, folders and symbolic links of the user's, as root's. Nobody but their owner may write to them.
    fn folder_of_user(&mut self, from: &Path, to: &str) -> io::Result<()> {
        let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name().into_string();
            let name = name.map_err(|name| io::Error::other(format!("{} is not UTF-8", name.display())))?;
            let (path, kind) = (format!("{to}{name}"), entry.file_type()?);
            let mode = entry.metadata()?.mode() & 0o755;
            if kind.is_dir() {
                self.folder(&path, mode)?;
                self.folder_of_user(&entry.path(), &format!("{path}/"))?;
            } else if kind.is_symlink() {
                self.link(&path, &fs::read_link(entry.path())?.to_string_lossy())?;
            } else if kind.is_file() {
                self.bytes(&path, EntryType::Regular, mode, &fs::read(entry.path())?)?;
            } else {
                let text = format!("{} is no file, folder or symbolic link", entry.path().display());
                return Err(io::Error::other(text));
            }
        }
        Ok(())
    }

    fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        self.0.append_link(&mut header, path, target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    fn packed(files: &RootFiles<'_>) -> BTreeMap<String, (u32, String)> {
        let mut bytes = Vec::new();
        files.pack(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            if let Some(target) = entry.link_name().unwrap() {
                text = format!("-> {}", target.display());
            }
            (entry.path().unwrap().display().to_string(), (entry.header().mode().unwrap(), text))
        });
        entries.collect()
    }

    #[test]
    fn nobody_logs_in_by_network_unless_asked_for() {
        let mut files = RootFiles {
            host_name: "web",
            uuid: "1-2",
            ssh_key: None,
            has_password: false,
            cloud_init: false,
            more: None,
        };
        let plain = packed(&files);
        assert_eq!(plain["etc/hostname"].1, "web\n");
        assert!(plain["etc/fstab"].1.starts_with("UUID=1-2 / ext4"));
        assert!(plain.keys().any(|path| path.ends_with("autologin.conf")));
        assert!(!plain.keys().any(|path| path.contains("ssh") || path.contains("cloud")));
        assert_eq!(plain["etc/resolv.conf"].1, "-> ../run/systemd/resolve/stub-resolv.conf");

        (files.ssh_key, files.has_password, files.cloud_init) = (Some("ssh-ed25519 AAAA me\n"), true, true);
        let full = packed(&files);
        assert_eq!(full["root/.ssh/authorized_keys"], (0o600, "ssh-ed25519 AAAA me\n".into()));
        assert!(!full.keys().any(|path| path.ends_with("autologin.conf")));
        assert!(full.contains_key("etc/cloud/cloud.cfg.d/90-bivisor.cfg"));
    }

    #[test]
    fn files_of_the_user_become_roots() {
        let folder = tempfile::tempdir().unwrap();
        let etc = folder.path().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("motd"), "hello\n").unwrap();
        fs::set_permissions(etc.join("motd"), fs::Permissions::from_mode(0o666)).unwrap();
        std::os::unix::fs::symlink("motd", etc.join("issue")).unwrap();
        let files = RootFiles {
            host_name: "web",
            uuid: "1-2",
            ssh_key: None,
            has_password: false,
            cloud_init: false,
            more: Some(folder.path()),
        };
        let all = packed(&files);
        assert_eq!(all["etc/motd"], (0o644, "hello\n".into()));
        assert_eq!(all["etc/issue"].1, "-> motd");
        let _socket = std::os::unix::net::UnixListener::bind(etc.join("socket")).unwrap();
        assert!(files.pack(Vec::new()).unwrap_err().to_string().contains("no file, folder or symbolic link"));
    }
}
