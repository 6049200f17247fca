//! Every way in which a machine ends has its status and its sentence.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{COUNT, ECHO, Folder, LONG_OUTPUT, RESET, TEST_EXIT, TRIPLE_FAULT, stderr};
use rustix::process::{Pid, Signal, kill_process};

fn wait(child: &mut Child) -> i32 {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn power_off_of_the_built_in_guest_is_success() {
    let folder = Folder::new();
    let mut child = folder
        .bivisor(&["run", "hello", "--memory", "32M"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // What is typed before the guest has set up its serial port is lost, as on a real machine.
    let mut prompt = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    child.stdin.take().unwrap().write_all(b"poweroff\r").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stderr(&output), "", "nothing is to be said");
}

#[test]
fn a_triple_fault_shows_the_registers() {
    let output = Folder::new().run(TRIPLE_FAULT, &[]);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(8), "{told}");
    assert!(told.starts_with("bivisor: the guest crashed: triple fault of CPU 0"), "{told}");
    for part in ["protected mode", "RIP 000000000010002c", "RBX 0000000012345678", "CS ", "CR0", "0f 0b"] {
        assert!(told.contains(part), "{part} in {told}");
    }
}

#[test]
fn a_reset_ends_only_on_request() {
    let folder = Folder::new();
    let output = folder.run(RESET, &["--no-reboot"]);
    assert_eq!(output.status.code(), Some(10), "{}", stderr(&output));
    assert!(stderr(&output).contains("the guest reset the machine"));
    assert_eq!(output.stdout, b"A");

    let mut child =
        folder.run_command(RESET, &["--console", "file=out"]).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while std::fs::read(folder.path().join("out")).unwrap_or_default().len() < 3 {
        assert!(start.elapsed() < Duration::from_secs(30) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(wait(&mut child), 143);
}

#[test]
fn signals_end_a_busy_machine() {
    for (signal, status, name) in
        [(Signal::TERM, 143, "SIGTERM"), (Signal::INT, 130, "SIGINT"), (Signal::HUP, 129, "SIGHUP")]
    {
        let folder = Folder::new();
        let mut child = folder
            .run_command(ECHO, &["--cpus", "2"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        assert_eq!(first, *b">", "it runs on although standard input is at its end");
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status));
        assert_eq!(stderr(&output), format!("bivisor: the machine was ended by {name}\n"));
    }
}

#[test]
fn test_devices_give_their_status() {
    let output = Folder::new().run(TEST_EXIT, &["--testdev"]);
    assert_eq!(output.status.code(), Some(0x21), "{}", stderr(&output));
}

#[test]
fn output_is_complete_at_the_end() {
    let folder = Folder::new();
    let output = folder.run(LONG_OUTPUT, &["--testdev"]);
    assert_eq!((output.stdout.len(), output.status.code()), (100_000, Some(1)), "{}", stderr(&output));
    let output = folder.run(LONG_OUTPUT, &["--testdev", "--console", "file=out"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(std::fs::read(folder.path().join("out")).unwrap().len(), 100_000);
}

#[test]
fn a_console_that_is_gone_ends_the_machine() {
    let folder = Folder::new();
    let mut child = folder
        .run_command(ECHO, &[])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    child.stdin.take().unwrap().write_all(b"x").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(14), "{}", stderr(&output));
    assert!(stderr(&output).contains("the console is gone"));
}

#[test]
fn a_full_disk_ends_the_machine() {
    let output = Folder::new().run(ECHO, &["--console", "file=/dev/full"]);
    assert_eq!(output.status.code(), Some(14), "{}", stderr(&output));
    assert!(stderr(&output).contains("No space left on device"), "{}", stderr(&output));
}

#[test]
fn pasted_input_arrives_whole_through_a_socket() {
    let folder = Folder::new();
    let mut child =
        folder.run_command(ECHO, &["--console", "unix=line"]).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let mut line = loop {
        match UnixStream::connect(folder.path().join("line")) {
            Ok(line) => break line,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(30), "{error}"),
        }
    };
    let text: Vec<u8> = (0..20_000).map(|i| b' ' + (i % 90) as u8).collect();
    let mut typist = line.try_clone().unwrap();
    let typed = text.clone();
    let typing = std::thread::spawn(move || typist.write_all(&typed).unwrap());
    let mut seen = vec![0; text.len() + 1];
    line.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    line.read_exact(&mut seen).unwrap();
    typing.join().unwrap();
    assert!(seen[0] == b'>' && seen[1..] == text);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(wait(&mut child), 143);
    assert!(!folder.path().join("line").exists());
}

#[test]
fn sixty_four_processors_start_and_end() {
    let folder = Folder::new();
    let words = ["--cpus", "64", "--console", "pty"];
    let mut child = folder.run_command(COUNT, &words).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = [0; 28];
    child.stderr.as_mut().unwrap().read_exact(&mut told).unwrap();
    assert_eq!(&told, b"bivisor: the console is at /");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(wait(&mut child), 143);
}

#[test]
fn doctor_and_image_list_need_nothing() {
    let folder = Folder::new();
    let output = folder.bivisor(&["doctor"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
    for part in ["engine interp", "engine dbt", "engine kvm", "time-stamp counter", "cache folder"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let output = folder.bivisor(&["image", "ls"]).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
}

#[test]
fn a_reader_that_wants_no_more_is_no_bug() {
    let folder = Folder::new();
    let mut child =
        folder.bivisor(&["doctor"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
}

/// Whatever this host has: the engine kvm runs or is refused, and a choice is made at once.
#[test]
fn a_kvm_that_is_none_is_refused_and_the_choice_takes_no_time() {
    let folder = Folder::new();
    let report = folder.bivisor(&["doctor"]).output().unwrap();
    let report = String::from_utf8_lossy(&report.stdout).into_owned();
    let why = report.lines().find_map(|line| line.strip_prefix("--  engine kvm         not usable: "));
    let start = Instant::now();
    let output = folder.run(TEST_EXIT, &["--testdev", "--engine", "kvm"]);
    assert!(start.elapsed() < Duration::from_secs(10));
    match why {
        Some(why) => {
            assert_eq!(output.status.code(), Some(4), "{report}");
            assert!(stderr(&output).contains(why), "{why:?} in {}", stderr(&output));
        }
        None => assert_eq!(output.status.code(), Some(33), "{report}"),
    }
    assert_eq!(folder.run(TEST_EXIT, &["--testdev"]).status.code(), Some(33), "auto");
}
