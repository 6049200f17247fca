//! The jail: what a thread of a machine's process tries beyond its task is refused, and what its tasks need is not.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{ECHO, Folder, RESET, TEST_EXIT, stderr};

/// Status of a machine whose process the jail ended.
const JAIL: i32 = 20;

const ROLES: [&str; 6] = ["main", "vcpu", "disk", "net-user", "console-in", "log"];

fn probe(folder: &Folder, role: &str, attempt: &str, words: &[&str]) -> Output {
    let probe = format!("{role}:{attempt}");
    let mut all = vec!["run", "hello", "--memory", "16M", "--jail-probe", &probe];
    all.extend(words);
    folder.bivisor(&all).output().unwrap()
}

/// Every role tries this and is ended by the call.
fn refused(attempt: &str, call: &str, words: &[&str]) {
    let folder = Folder::new();
    for role in ROLES {
        let output = probe(&folder, role, attempt, words);
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(JAIL), "{role} {attempt}: {told}");
        assert!(
            told.starts_with(&format!("bivisor: the jail refused the system call {call} (")),
            "{role} {attempt}: {told}"
        );
    }
    assert!(!folder.path().join("jail-probe").exists());
}

#[test]
fn no_other_file_is_opened_or_made() {
    refused("open", "openat", &[]);
    refused("create", "openat", &[]);
    refused("create", "openat", &["--net", "user"]);
}

#[test]
fn no_socket_is_made_without_a_network_and_none_of_another_family_with_one() {
    refused("inet-socket", "socket", &[]);
    refused("unix-socket", "socket", &["--net", "user"]);
    refused("netlink-socket", "socket", &["--net", "user", "--vsock", "v"]);
}

#[test]
fn nothing_is_executed_and_nobody_is_touched() {
    refused("execute", "execve", &[]);
    refused("fork", "clone", &[]);
    refused("trace", "ptrace", &[]);
    refused("kill", "kill", &[]);
    refused("executable-memory", "mprotect", &[]);
}

/// A machine whose engine is another one has no business with KVM.
#[test]
fn kvm_is_asked_for_nothing_by_the_other_engines() {
    refused("kvm", "ioctl", &["--engine", "dbt"]);
}

/// The user-mode network reads the file of name servers, so opening for reading is left to Landlock, or to an error
/// where the kernel has none.
#[test]
fn with_a_user_mode_network_other_files_cannot_be_opened_either() {
    let folder = Folder::new();
    for role in ["main", "vcpu", "net-user"] {
        let output = probe(&folder, role, "open", &["--net", "user"]);
        assert_eq!(output.status.code(), Some(JAIL), "{role}: {}", stderr(&output));
        assert!(stderr(&output).contains("let it fail: Permission denied"), "{role}: {}", stderr(&output));
    }
}

#[test]
fn without_the_jail_all_that_happens() {
    let folder = Folder::new();
    for (role, attempt) in [("vcpu", "open"), ("main", "unix-socket"), ("disk", "fork"), ("log", "kill")] {
        let output = probe(&folder, role, attempt, &["--no-jail"]);
        assert_eq!(output.status.code(), Some(0), "{attempt}: {}", stderr(&output));
        assert!(stderr(&output).contains("the jail let it happen"), "{attempt}: {}", stderr(&output));
    }
    let config = folder.file("vm.toml", "image = \"hello\"\nno-jail = true\n");
    let words = ["run", config.to_str().unwrap(), "--memory", "16M", "--jail-probe", "vcpu:open"];
    assert_eq!(folder.bivisor(&words).output().unwrap().status.code(), Some(0));
}

/// What /proc tells of each thread of a machine that runs: its name and the kind of its filter.
#[test]
fn every_thread_of_a_machine_is_confined() {
    let folder = Folder::new();
    folder.file("disk", vec![0; 1 << 20]);
    let words = [
        "--cpus",
        "2",
        "--console",
        "unix=console",
        "--virtio-console",
        "pty",
        "--vsock",
        "vsock",
        "--gdb",
        "unix=gdb",
        "--disk",
        "disk",
        "--net",
        "user",
        "--net",
        "switch=jail-test,out-bytes=1M",
        "--rng",
        "--balloon",
        "--verbose",
        "--trace",
        "trace",
    ];
    let mut child = folder.run_command(ECHO, &words).stderr(Stdio::null()).spawn().unwrap();
    let threads = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        tasks
            .map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default())
            .collect()
    };
    let start = Instant::now();
    let mut seen: Vec<String> = Vec::new();
    while !seen.iter().any(|status| status.contains("vcpu1")) {
        assert!(start.elapsed() < Duration::from_secs(30), "no virtual processors: {seen:?}");
        sleep(Duration::from_millis(20));
        seen = threads();
    }
    // The last one may be on its way in.
    sleep(Duration::from_millis(50));
    seen = threads();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(seen.len() >= 18, "{}", seen.len());
    for status in seen {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        assert_eq!(field("NoNewPrivs:"), Some("1"), "{status}");
        assert_eq!(field("Seccomp:"), Some("2"), "{status}");
    }
}

#[test]
fn a_reset_makes_a_new_machine_in_the_jail() {
    let folder = Folder::new();
    for engine in ["dbt", "interp"] {
        let words = ["--engine", engine, "--cpus", "2", "--perf-map"];
        let mut child = folder.run_command(RESET, &words).stderr(Stdio::piped()).spawn().unwrap();
        sleep(Duration::from_millis(1500));
        assert_eq!(child.try_wait().unwrap(), None, "it goes on, reset after reset");
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(format!("/tmp/perf-{}.map", child.id())).unwrap();
    }
}

#[test]
fn sockets_are_removed_at_the_end_and_core_dumps_are_off() {
    let folder = Folder::new();
    let words =
        ["--testdev", "--console", "unix=console", "--virtio-console", "unix=second", "--vsock", "vsock"];
    let mut child = folder.run_command(ECHO, &words).spawn().unwrap();
    let paths = ["console", "second", "vsock"].map(|name| folder.path().join(name));
    let start = Instant::now();
    let mut client = loop {
        match UnixStream::connect(&paths[0]) {
            Ok(client) => break client,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(30), "{error}"),
        }
        sleep(Duration::from_millis(10));
    };
    client.write_all(b"x").unwrap();
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    let limits = fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    paths.iter().for_each(|path| assert!(path.exists(), "{}", path.display()));
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    paths.iter().for_each(|path| assert!(!path.exists(), "{}", path.display()));
}

#[test]
fn a_probe_that_means_nothing_is_refused() {
    let output = Folder::new().run(TEST_EXIT, &["--jail-probe", "nobody:open"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}
