//! The initramfs of the default guest: busybox, a few kernel modules, and an init that ends in a shell.

use std::collections::BTreeMap;
use std::io::{self, Write};

use cpio::newc::{self, ModeFileType};
use flate2::Compression;
use flate2::write::GzEncoder;

/// First program: mounts what a shell needs, loads the modules, and becomes busybox's init. That has no name of
/// its own in Debian's build, but answers to `linuxrc` as process 1.
const INIT: &str = r#"#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /root /sbin /usr/bin /usr/sbin /var/run /var/log
/bin/busybox --install -s
export PATH=/sbin:/usr/sbin:/bin:/usr/bin
mount -t proc -o nosuid,noexec,nodev proc /proc
mount -t sysfs -o nosuid,noexec,nodev sysfs /sys
mount -t devtmpfs -o nosuid dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o nosuid,noexec devpts /dev/pts
mount -t tmpfs -o nosuid,nodev shm /dev/shm
while read -r module; do insmod "/modules/$module.ko"; done < /modules/order
hostname -F /etc/hostname
ip link set lo up
[ -e /dev/input/event0 ] && acpid
exec /linuxrc
"#;

/// busybox's init: a shell on the console, started again when it ends.
const INITTAB: &str = "::respawn:-/bin/cttyhack /bin/sh -l\n::ctrlaltdel:/sbin/reboot\n";

/// What the shell greets with.
const PROFILE: &str = r#"export PS1='root@\h:\w# ' HOME=/root TERM=${TERM:-vt100}
cd
if [ ! -e /run/greeted ]; then
    : > /run/greeted
    echo
    echo "Debian's kernel $(uname -r) in Bivisor. 'poweroff' ends, Ctrl-A h helps."
fi
"#;

/// A kernel module with its name, in the order of loading.
pub struct Module {
    /// Name with underscores.
    pub name: String,
    /// The uncompressed module.
    pub contents: Vec<u8>,
}

/// Picks the named modules and everything they need, each after what it needs. Names that the kernel lacks
/// (built in, or not there) are left out.
pub fn with_dependencies(wanted: &[&str], available: &mut BTreeMap<String, Vec<u8>>) -> Vec<Module> {
    let mut order = Vec::new();
    for name in wanted {
        add(name, available, &mut order);
    }
    order
}

fn add(name: &str, available: &mut BTreeMap<String, Vec<u8>>, order: &mut Vec<Module>) {
    // Removed first: a circle of dependencies ends here.
    let Some(contents) = available.remove(name) else { return };
    for dependency in dependencies(&contents) {
        add(&dependency, available, order);
    }
    order.push(Module { name: name.to_owned(), contents });
}

/// Names after `depends=` in a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    let record = module.split(|&byte| byte == 0).find_map(|record| record.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(record.unwrap_or_default()).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Packs the initramfs (cpio "newc", gzip).
pub fn pack(busybox: &[u8], modules: &[Module], to: impl Write) -> io::Result<()> {
    let mut archive = Archive { to: GzEncoder::new(to, Compression::new(6)), inode: 0 };
    for folder in ["bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "modules"] {
        archive.entry(folder, ModeFileType::Directory, 0o755, b"")?;
    }
    archive.entry("bin/busybox", ModeFileType::Regular, 0o755, busybox)?;
    for link in ["bin/sh", "linuxrc"] {
        archive.entry(link, ModeFileType::Symlink, 0o777, b"/bin/busybox")?;
    }
    let mut order = String::new();
    for module in modules {
        archive.entry(
            &format!("modules/{}.ko", module.name),
            ModeFileType::Regular,
            0o644,
            &module.contents,
        )?;
        order.push_str(&module.name);
        order.push('\n');
    }
    archive.entry("init", ModeFileType::Regular, 0o755, INIT.as_bytes())?;
    for (path, contents) in [
        ("modules/order", order.as_bytes()),
        ("etc/inittab", INITTAB.as_bytes()),
        ("etc/profile", PROFILE.as_bytes()),
        ("etc/hostname", b"debian\n".as_slice()),
        ("etc/passwd", b"root::0:0:root:/root:/bin/sh\n"),
        ("etc/group", b"root:x:0:\n"),
    ] {
        archive.entry(path, ModeFileType::Regular, 0o644, contents)?;
    }
    // Where busybox's acpid looks for what to do when the power button is pressed.
    archive.entry("etc/acpi/PWRF/00000080", ModeFileType::Regular, 0o755, b"#!/bin/sh\nexec poweroff\n")?;
    // The kernel's own /dev/console, for messages before devtmpfs is there.
    archive.device("dev/console", 5, 1)?;
    newc::trailer(&mut archive.to)?;
    archive.to.finish()?.flush()
}

struct Archive<W: Write> {
    to: GzEncoder<W>,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn entry(&mut self, path: &str, kind: ModeFileType, mode: u32, contents: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let builder = newc::Builder::new(path).ino(self.inode).mode(mode).set_mode_file_type(kind);
        let size = u32::try_from(contents.len()).map_err(|_| io::Error::other("a file of 4 GiB or more"))?;
        let mut writer = builder.write(&mut self.to, size);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    }

    fn device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.inode += 1;
        let builder = newc::Builder::new(path).ino(self.inode).mode(0o600);
        let builder = builder.set_mode_file_type(ModeFileType::Char).rdev_major(major).rdev_minor(minor);
        builder.write(&mut self.to, 0).finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn module(depends: &str) -> Vec<u8> {
        format!("\0license=GPL\0depends={depends}\0retpoline=Y\0").into_bytes()
    }

    #[test]
    fn modules_follow_what_they_need() {
        let mut available = BTreeMap::from([
            ("virtio_pci".to_owned(), module("virtio,virtio-ring")),
            ("virtio".to_owned(), module("")),
            ("virtio_ring".to_owned(), module("virtio,virtio_pci")),
            ("other".to_owned(), module("")),
        ]);
        let order = with_dependencies(&["virtio_pci", "built_in", "virtio"], &mut available);
        let names: Vec<_> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci"]);
    }

    #[test]
    fn the_archive_holds_init_busybox_and_modules() {
        let modules = [Module { name: "evdev".into(), contents: b"module".to_vec() }];
        let mut packed = Vec::new();
        pack(b"busybox!", &modules, &mut packed).unwrap();
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut plain).unwrap();
        let mut rest = plain.as_slice();
        let mut found = BTreeMap::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            found.insert(name, (mode, contents));
            rest = reader.finish().unwrap();
        }
        assert_eq!(found["bin/busybox"], (0o100755, b"busybox!".to_vec()));
        assert_eq!(found["modules/order"].1, b"evdev\n");
        assert_eq!(found["modules/evdev.ko"].1, b"module");
        assert_eq!(found["init"].0, 0o100755);
        assert_eq!(found["dev/console"].0, 0o020600);
    }
}
