//! Every wrong input gets one sentence, a status, and leaves nothing behind.

mod common;

use common::{ECHO, Folder, stderr};
use std::path::Path;

/// Runs `bivisor` with these words: it must fail with this status and say this, in one sentence.
#[track_caller]
fn refused(folder: &Folder, words: &[&str], status: i32, sentence: &str) {
    let output = folder.bivisor(words).output().unwrap();
    let told = stderr(&output);
    assert!(told.starts_with("bivisor: ") && told.contains(sentence), "{words:?}: {told}");
    assert_eq!(output.status.code(), Some(status), "{words:?}: {told}");
    assert!(output.stdout.is_empty());
    if status != 2 {
        assert_eq!(told.lines().count(), 1, "one sentence: {told}");
    }
}

#[test]
fn command_lines() {
    let folder = Folder::new();
    refused(&folder, &["walk"], 2, "unrecognized subcommand 'walk'");
    refused(&folder, &["run", "--speed", "9"], 2, "unexpected argument '--speed'");
    refused(&folder, &["run", "--cpus", "0"], 2, "0 is not in 1..=64");
    refused(&folder, &["run", "--cpus", "65"], 2, "65 is not in 1..=64");
    refused(&folder, &["run", "--memory", "0M"], 2, "'0M' is too little memory");
    refused(&folder, &["run", "--memory", "0"], 2, "'0' has no unit");
    refused(&folder, &["run", "--memory", "much"], 2, "'much' is no size of memory");
    refused(&folder, &["run", "--memory", "99999999999G"], 2, "more memory than a machine can have");
    refused(&folder, &["run", "--memory", "3000K"], 2, "not a whole number of MiB: say 3M");
    refused(&folder, &["run", "--engine", "warp"], 2, "invalid value 'warp'");
    refused(&folder, &["run", "--console", "telepathy"], 2, "say stdio, pty, file=PATH or unix=PATH");
    refused(&folder, &["run", "--disk", "d,colour=red"], 2, "a disk has no option 'colour'");
    refused(&folder, &["run", "--net", "wire"], 2, "'wire' is no network");
    refused(&folder, &["run", "--virtio-console", "telepathy"], 2, "say stdio, pty, file=PATH or unix=PATH");
    refused(&folder, &["run", "--gdb", "1234"], 2, "say :PORT or unix=PATH");
    refused(&folder, &["run", "--gdb", ":70000"], 2, "'70000' is no TCP port");
}

#[test]
fn what_can_not_be_had() {
    let folder = Folder::new();
    let kernel = folder.kernel(ECHO);
    let kernel = kernel.to_str().unwrap();
    refused(&folder, &["run", "--kernel", kernel, "--memory", "60T"], 4, "this host has only");
    refused(&folder, &["run", "nosuch"], 4, "there is no image nosuch");
    refused(&folder, &["run", "--initrd", kernel], 4, "an initrd needs a kernel");
    refused(&folder, &["run", "hello", "--kernel", kernel], 4, "both the image 'hello' and a kernel");
    let console = format!("file={}", folder.path().display());
    refused(&folder, &["run", "--kernel", kernel, "--console", &console], 6, "cannot write the console file");
    let console = format!("unix={kernel}");
    refused(&folder, &["run", "--kernel", kernel, "--console", &console], 6, "exists and is not a socket");
    refused(&folder, &["run", "--kernel", kernel, "--vsock", kernel], 6, "something else is there");
    refused(&folder, &["run", "--kernel", kernel, "--disk", "no"], 4, "there is no disk no");
    refused(&folder, &["run", "--kernel", kernel, "--virtio-console", "stdio"], 4, "only one console can be");
    let mut many = vec!["run", "--kernel", kernel];
    many.extend(["--net", "user"].repeat(32));
    refused(&folder, &many, 4, "more than the 31 that a machine can have");
    refused(&folder, &["run", "--kernel", kernel, "--trace", "no/t"], 6, "cannot write the trace no/t");
    refused(&folder, &["run", "--kernel", kernel, "--gdb", &console], 6, "exists and is not a socket");
}

#[test]
fn kernel_files() {
    let folder = Folder::new();
    let run = |path: &str, sentence: &str| refused(&folder, &["run", "--kernel", path], 4, sentence);
    run("missing", "there is no kernel missing: check the path");
    run(".", "the kernel . is not a file");
    run("/dev/zero", "the kernel /dev/zero is not a file");
    folder.file("empty", "");
    run("empty", "the kernel empty is empty");
    folder.file("letter", "Dear reader, this is no kernel at all.");
    run("letter", "this is no kernel");
    let kernel = std::fs::read(folder.kernel(ECHO)).unwrap();
    folder.file("short", &kernel[..34]);
    folder.file("elf", [b"\x7fELF\x02\x01\x01".as_slice(), &[0; 100]].concat());
    run("elf", "elf: ");
    let mut bzimage = vec![0u8; 0x1000];
    bzimage[0x1f1] = 4;
    bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bzimage[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    bzimage[0x211] = 1;
    folder.file("bzimage", &bzimage[..0x300]);
    run("bzimage", "truncated");
}

#[test]
fn initrd_files() {
    let folder = Folder::new();
    let kernel = folder.kernel(ECHO);
    let run = |path: &str, sentence: &str| {
        refused(
            &folder,
            &["run", "--memory", "4M", "--kernel", kernel.to_str().unwrap(), "--initrd", path],
            4,
            sentence,
        );
    };
    run("missing", "there is no initrd missing");
    folder.file("empty", "");
    run("empty", "the initrd empty is empty");
    folder.file("larger", vec![0; 5 << 20]);
    run("larger", "does not fit into 4 MiB of memory");
    folder.file("large", vec![0; 7 << 19]);
    run("large", "fit");
}

#[test]
fn configuration_files() {
    let folder = Folder::new();
    let run = |text: &str, sentence: &str| {
        folder.file("vm.toml", text);
        refused(&folder, &["run", "vm.toml"], 4, sentence);
    };
    run("memory = ", "vm.toml:1:10: ");
    run("cpus = 1\nspeed = 9\n", "vm.toml:2:1: unknown field `speed`");
    run("memory = 512\n", "vm.toml:1:10: invalid type: integer `512`, expected a string");
    run("# größe\nmemory = \"0M\"\n", "vm.toml:2:10: memory: '0M' is too little");
    run("cpus = 65", "vm.toml:1:8: cpus: 65 is no number of CPUs: say 1 to 64");
    run("cpus = -1", "vm.toml:1:8: cpus: -1 is no number of CPUs");
    run("engine = \"warp\"", "vm.toml:1:10: engine: 'warp' is no engine");
    run("console = \"tty\"", "vm.toml:1:11: console: 'tty' is no console");
    run("append = \"a\\u0000b\"\nkernel = \"k\"", "contains a NUL character");
    run("kernel = \"sub/none\"", "there is no kernel sub/none");
    folder.file("latin.toml", b"append = \"gr\xfc\xdfe\"");
    refused(&folder, &["run", "latin.toml"], 4, "latin.toml:1:13: this is not UTF-8 text");
    refused(&folder, &["run", "missing.toml"], 4, "cannot read the configuration missing.toml: ");
    refused(&folder, &["run", "./"], 4, "cannot read the configuration ./: ");
}

#[test]
fn paths_in_a_configuration_count_from_it() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    folder.file("sub/letter", "no kernel");
    folder.file("sub/vm.toml", "kernel = \"letter\"\nmemory = \"4M\"\n");
    refused(&folder, &["run", "sub/vm.toml"], 4, "sub/letter: this is no kernel");
    folder.file("other", "no kernel");
    refused(&folder, &["run", "sub/vm.toml", "--kernel", "other"], 4, "other: this is no kernel");
}

#[test]
fn nothing_is_left_behind() {
    let folder = Folder::new();
    folder.file("letter", "no kernel");
    refused(&folder, &["run", "--kernel", "letter", "--console", "unix=console"], 4, "no kernel");
    let names = |folder: &Path| {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    // The folder for what runs is the tests' own.
    assert_eq!(names(folder.path()), ["letter", "run"]);
    assert!(names(&folder.path().join("run")).is_empty());
}
