//! A panic leaves the terminal as it was.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use bivisor_backends::terminal::{RawTerminal, is_raw};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

const CHILD: &str = "BIVISOR_TEST_PANIC";

fn terminal() -> (OwnedFd, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let slave = OpenOptions::new().read(true).write(true).open(name).unwrap();
    (master, slave.into())
}

/// In the child process of the next test: panics with the terminal raw, and without a guard that is dropped.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let raw = RawTerminal::enter().unwrap().expect("standard input is a terminal");
    assert!(is_raw());
    std::mem::forget(raw);
    panic!("as planned");
}

#[test]
fn the_panic_hook_restores_the_terminal() {
    let (_master, slave) = terminal();
    let before = tcgetattr(&slave).unwrap();
    assert!(before.local_modes.contains(LocalModes::ECHO));
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::from(slave.try_clone().unwrap()))
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("as planned"));
    let after = tcgetattr(&slave).unwrap();
    assert_eq!(after.local_modes, before.local_modes);
    assert_eq!(after.output_modes, before.output_modes);
}
