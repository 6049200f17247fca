//! gdb at a machine.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{COUNT, Folder, TEST_EXIT, TRIPLE_FAULT};

/// Runs a kernel under gdb with these commands; returns what gdb printed and the machine's exit status. `None`
/// without gdb.
fn debug(code: &[u8], words: &[&str], commands: &[&str]) -> Option<(String, Option<i32>)> {
    if Command::new("gdb").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: gdb is not installed (Debian: apt-get install gdb)");
        return None;
    }
    let folder = Folder::new();
    let mut machine = folder.run_command(code, &["--gdb", "unix=gdb"]);
    let mut machine = machine.args(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !folder.path().join("gdb").exists() {
        assert!(start.elapsed() < Duration::from_secs(30) && machine.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set confirm off", "-ex", "set tcp connect-timeout 30"]);
    gdb.args(["-ex", "set architecture i386:x86-64", "-ex", "target remote gdb"]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = gdb.current_dir(folder.path()).stdin(Stdio::null()).output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let start = Instant::now();
    let status = loop {
        match machine.try_wait().unwrap() {
            Some(status) => break status.code(),
            None if start.elapsed() > Duration::from_secs(30) => {
                machine.kill().unwrap();
                panic!("the machine does not end:\n{text}");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    Some((text, status))
}

/// The lines come in this order, among others.
#[track_caller]
fn in_order(text: &str, lines: &[&str]) {
    let mut rest = text;
    for line in lines {
        match rest.find(line) {
            Some(at) => rest = &rest[at + line.len()..],
            None => panic!("no {line:?} in the rest of\n{text}"),
        }
    }
}

#[test]
fn break_step_read_and_write() {
    let Some((text, status)) = debug(
        COUNT,
        &[],
        &[
            "echo start \\n",
            "print $pc",
            "break *0x100027",
            "continue",
            "print $eax",
            "continue",
            "stepi",
            "print $pc",
            "print $eax",
            "delete",
            "set var $eax = 41",
            "stepi",
            "x/1wx 0x200000",
            "set var *(int *)0x200000 = 0x1234",
            "x/1wx 0x200000",
            "monitor registers",
            "info threads",
            "kill",
        ],
    ) else {
        return;
    };
    in_order(
        &text,
        &[
            "start",
            "0x100020",
            "Breakpoint 1, 0x0000000000100027",
            "= 0",
            "Breakpoint 1, 0x0000000000100027",
            "0x100028",
            "= 2",
            "0x200000:\t0x00000029",
            "0x200000:\t0x00001234",
            "CPU 0",
            "RAX 0000000000000029",
            "code at RIP: 90 eb",
        ],
    );
    assert_eq!(status, Some(12), "{text}");
}

#[test]
fn code_that_the_debugger_changes_is_executed() {
    // The jump at +11 back to the loop becomes a jump to itself, then to the loop again.
    let Some((text, _)) = debug(
        COUNT,
        &[],
        &[
            "break *0x10002b",
            "continue",
            "delete",
            "set var *(unsigned char *)0x10002c = 0xfe",
            "stepi",
            "print $pc",
            "set var *(unsigned char *)0x10002c = 0xfa",
            "stepi",
            "print $pc",
            "kill",
        ],
    ) else {
        return;
    };
    in_order(&text, &["Breakpoint 1", "= (void (*)()) 0x10002b", "= (void (*)()) 0x100027"]);
}

#[test]
fn every_processor_is_a_thread() {
    let Some((text, _)) = debug(COUNT, &["--cpus", "3"], &["info threads", "kill"]) else { return };
    in_order(&text, &["* 1 ", "CPU 0", "CPU 1", "CPU 2"]);
}

#[test]
fn a_crash_can_be_looked_at() {
    let Some((text, status)) = debug(TRIPLE_FAULT, &[], &["continue", "print/x $ebx", "continue"]) else {
        return;
    };
    in_order(&text, &["SIGSEGV", "0x12345678"]);
    assert_eq!(status, Some(8), "{text}");
}

#[test]
fn the_debugger_hears_of_the_end() {
    let Some((text, status)) = debug(TEST_EXIT, &["--testdev"], &["continue"]) else { return };
    in_order(&text, &["exited with code 041"]);
    assert_eq!(status, Some(0x21), "{text}");
}

#[test]
fn a_machine_goes_on_when_the_debugger_detaches() {
    let Some((text, status)) = debug(TEST_EXIT, &["--testdev"], &["detach"]) else { return };
    assert_eq!(status, Some(0x21), "{text}");
}
