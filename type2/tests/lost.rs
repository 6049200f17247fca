//! Guests that lose their machine: a triple fault is their crash, and one that hangs ends at the first signal.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use bivisor_guests::{HANGS, LOST, TRIPLE_FAULTS};
use common::{Folder, stderr};
use rustix::process::{Pid, Signal, kill_process};

const ENGINES: [&str; 2] = ["interp", "dbt"];

/// Starts the guest in a folder, chooses its way, and waits until it says that it goes it.
fn start(folder: &Folder, engine: &str, key: &str) -> Child {
    let image = folder.file("lost", LOST.image);
    let words = ["run", "--memory", "64M", "--engine", engine, "--kernel", image.to_str().unwrap()];
    let mut child = folder
        .bivisor(&words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("lost: waits"));
    child.stdin.as_mut().unwrap().write_all(key.as_bytes()).unwrap();
    let way = lines.next().unwrap().unwrap();
    assert!(way.starts_with("lost: by "), "{way}");
    child
}

/// Waits for its end; its status, and what was said on standard error.
fn end(mut child: Child) -> (Option<i32>, String) {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code(), stderr(&output))
}

#[test]
fn every_triple_fault_is_a_crash_of_the_guest() {
    let folder = Folder::new();
    for (engine, key) in ENGINES.iter().flat_map(|engine| TRIPLE_FAULTS.map(|key| (engine, key))) {
        let (status, told) = end(start(&folder, engine, key));
        assert_eq!(status, Some(8), "{engine}, way {key}: {told}");
        assert!(told.starts_with("bivisor: the guest crashed: triple fault of CPU 0"), "{told}");
    }
}

#[test]
fn a_guest_that_hangs_is_ended_by_a_signal() {
    let folder = Folder::new();
    for (engine, key) in ENGINES.iter().flat_map(|engine| HANGS.map(|key| (engine, key))) {
        let mut child = start(&folder, engine, key);
        // Long enough to be in the middle of it.
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none(), "{engine}, way {key}: it ended by itself");
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let (status, told) = end(child);
        assert_eq!(status, Some(143), "{engine}, way {key}: {told}");
        assert_eq!(told, "bivisor: the machine was ended by SIGTERM\n");
    }
}
