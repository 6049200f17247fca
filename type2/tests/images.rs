//! Images with disks: imported, listed, booted, shared, removed.

mod common;

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Folder, stderr};

fn has(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped: {program} is not installed (Debian: apt-get install {package})");
    }
    found
}

/// A disk with an MBR and an ext4 partition that holds two kernels.
fn cloud_image(folder: &Folder) -> PathBuf {
    const START: u64 = 1 << 20;
    const SIZE: u64 = 8 << 20;
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("boot")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/os-release"), "ID=test\n").unwrap();
    let kernel = fs::read(folder.kernel(common::TEST_EXIT)).unwrap();
    fs::write(root.join("boot/vmlinuz-1.10.0"), kernel).unwrap();
    fs::write(root.join("boot/initrd.img-1.10.0"), "initrd").unwrap();
    fs::write(root.join("boot/vmlinuz-1.9.0"), "not a kernel").unwrap();
    fs::write(root.join("boot/initrd.img-1.9.0"), "old").unwrap();
    fs::write(root.join("boot/vmlinuz-1.11.0"), "without an initramfs").unwrap();
    let system = folder.path().join("system.ext4");
    fs::File::create(&system).unwrap().set_len(SIZE).unwrap();
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&system).status().unwrap();
    assert!(made.success());

    let disk = folder.path().join("cloud.img");
    let file = fs::File::create(&disk).unwrap();
    file.set_len(START + SIZE).unwrap();
    file.write_all_at(&fs::read(&system).unwrap(), START).unwrap();
    let mut entry = [0; 16];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&((START / 512) as u32).to_le_bytes());
    entry[12..].copy_from_slice(&((SIZE / 512) as u32).to_le_bytes());
    file.write_all_at(&entry, 446).unwrap();
    file.write_all_at(&[0x55, 0xaa], 510).unwrap();
    disk
}

fn run(folder: &Folder, words: &[&str]) -> (bool, String, String) {
    let output = folder.bivisor(words).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
}

/// The image boots its own kernel: the test kernel ends with status 33.
fn boots(folder: &Folder, words: &[&str]) {
    let mut command = folder.bivisor(&["run"]);
    let output = command.args(words).args(["--memory", "16M", "--testdev"]).output().unwrap();
    assert_eq!(output.status.code(), Some(33), "{}", stderr(&output));
}

fn import(folder: &Folder, disk: &Path, name: &str, more: &[&str]) {
    let words = [&["image", "import", disk.to_str().unwrap(), name], more].concat();
    let (good, told, error) = run(folder, &words);
    assert!(good && told.contains(&format!("bivisor run {name}")), "{error}");
}

#[test]
fn a_cloud_image_is_imported_booted_and_removed() {
    if !has("mke2fs", "e2fsprogs") {
        return;
    }
    let folder = Folder::new();
    let disk = cloud_image(&folder);
    let key = folder.file("key.pub", "ssh-ed25519 AAAA me\n");
    import(&folder, &disk, "web", &["--size", "32M", "--ssh-key", key.to_str().unwrap()]);
    let image = folder.path().join("data/bivisor/images/web");
    assert_eq!(fs::metadata(image.join("disk.raw")).unwrap().len(), 32 << 20);
    assert_eq!(fs::read(image.join("initrd.img")).unwrap(), b"initrd");
    let manifest = fs::read_to_string(image.join("image.toml")).unwrap();
    assert!(manifest.contains("root=UUID=") && manifest.contains("seed.img"), "{manifest}");
    boots(&folder, &["web"]);
    boots(&folder, &["web", "--snapshot"]);

    let (good, listed, _) = run(&folder, &["image", "ls"]);
    assert!(good && listed.contains("web") && listed.contains("1.10.0"), "{listed}");
    let (good, _, error) = run(&folder, &["image", "import", disk.to_str().unwrap(), "web"]);
    assert!(!good && error.contains("image rm web"), "{error}");
    let (good, _, error) = run(&folder, &["image", "rm", "web", "none"]);
    assert!(!good && error.contains("there is no image none"), "{error}");
    assert!(!image.exists());
    let left = fs::read_dir(image.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), [".lock"]);
}

#[test]
fn a_qcow2_image_stays_one_and_is_found_in_use() {
    if !has("mke2fs", "e2fsprogs") || !has("qemu-img", "qemu-utils") {
        return;
    }
    let folder = Folder::new();
    let disk = cloud_image(&folder);
    let packed = folder.path().join("cloud.qcow2");
    let made =
        Command::new("qemu-img").args(["convert", "-c", "-O", "qcow2"]).arg(&disk).arg(&packed).status();
    assert!(made.unwrap().success());
    import(&folder, &packed, "packed", &["--size", "1G"]);
    boots(&folder, &["packed"]);

    let kernel = folder.kernel(common::STAY);
    let copy = folder.path().join("data/bivisor/images/packed/disk.qcow2");
    let mut words = vec!["run", "--kernel", kernel.to_str().unwrap(), "--memory", "16M", "--disk"];
    words.push(copy.to_str().unwrap());
    let mut machine = folder.bivisor(&words).stdout(Stdio::piped()).spawn().unwrap();
    // A guest that prints has its disks: another must not be the first to open them.
    machine.stdout.as_mut().unwrap().read_exact(&mut [0]).expect("the guest prints");
    let (good, _, used) = run(&folder, &["run", "packed", "--memory", "16M", "--testdev"]);
    assert!(!good && used.contains("is in use by"), "{used}");
    assert!(used.contains(&format!("bivisor (process {})", machine.id())), "{used}");
    let (good, _, error) = run(&folder, &["image", "rm", "packed"]);
    assert!(!good && error.contains("is in use by") && copy.exists(), "{error}");
    machine.kill().unwrap();
    machine.wait().unwrap();
    assert!(run(&folder, &["image", "rm", "packed"]).0);
}

#[test]
fn what_cannot_be_imported_is_refused_and_leaves_nothing() {
    let folder = Folder::new();
    let empty = folder.file("empty.img", vec![0; 1 << 20]);
    let empty = empty.to_str().unwrap();
    for (words, part) in [
        (vec![empty, "web"], "no kernel with an initramfs"),
        (vec![empty, ".hidden"], "no name for an image"),
        (vec!["nowhere.img", "web"], "there is no disk"),
        (vec![empty, "web", "--ssh-key", empty], "no public ssh key"),
        (vec![empty, "web", "--host-name", "a b"], "no host name"),
    ] {
        let (good, _, error) = run(&folder, &[vec!["image", "import"], words.clone()].concat());
        assert!(!good && error.contains(part), "{words:?}: {error}");
    }
    let left = fs::read_dir(folder.path().join("data/bivisor/images")).unwrap();
    assert!(left.map(|entry| entry.unwrap().file_name()).all(|name| name == ".lock"));
    for (words, part) in [
        (vec!["--size", "1G"], "2G"),
        (vec!["--packages=-x"], "no name of a Debian package"),
        (vec!["--suite", "no suite"], "no release"),
    ] {
        let all = [vec!["image", "build", "debian"], words.clone()].concat();
        let (good, _, error) = run(&folder, &all);
        assert!(!good && error.contains(part), "{words:?}: {error}");
    }
}
