//! The user's terminal: raw while the guest has it, and as before whatever ended the machine.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{Background, ECHO, Folder, TEST_EXIT, TRIPLE_FAULT};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

/// A terminal with a machine at it.
struct Terminal {
    keys: File,
    slave: OwnedFd,
    before: Termios,
    screen: Receiver<Vec<u8>>,
    seen: String,
    child: Child,
}

impl Terminal {
    /// `bivisor run` with a kernel of this code and more words.
    fn start(folder: &Folder, code: &[u8], words: &[&str]) -> Self {
        Self::of(folder.run_command(code, words))
    }

    /// The console of the machine `vm` in the background.
    fn console(folder: &Folder) -> Self {
        Self::of(folder.bivisor(&["console", "vm"]))
    }

    fn of(mut command: Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(&name, flags, Mode::empty()).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let keys = File::from(master);
        let mut reader = keys.try_clone().unwrap();
        let (tell, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if tell.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keys, slave, before, screen, seen: String::new(), child }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen has shown this after all that was waited for before.
    #[track_caller]
    fn expect(&mut self, text: &str) {
        while !self.seen.contains(text) {
            match self.screen.recv_timeout(Duration::from_secs(30)) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("no {text:?} in {:?}", self.seen),
            }
        }
        let end = self.seen.find(text).unwrap() + text.len();
        self.seen.drain(..end);
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Waits for the end; the terminal must be as it was. Returns the exit status.
    #[track_caller]
    fn end(&mut self) -> Option<i32> {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > Duration::from_secs(30) {
                self.child.kill().unwrap();
                panic!("does not end: {:?}", self.seen);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let after = tcgetattr(&self.slave).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        assert_eq!(after.control_modes, self.before.control_modes);
        status.code()
    }
}

#[test]
fn keys_reach_the_guest_and_ctrl_a_x_ends_it() {
    let folder = Folder::new();
    let mut terminal = Terminal::start(&folder, ECHO, &[]);
    terminal.expect("Ctrl-A x ends the machine");
    terminal.expect(">");
    assert!(terminal.is_raw());
    terminal.press("\x03ls\x01a");
    terminal.expect("\x03ls\x01");
    terminal.press("\x01h");
    terminal.expect("press the power button");
    terminal.press("\x01x");
    terminal.expect("bivisor: the machine was ended by Ctrl-A x");
    assert_eq!(terminal.end(), Some(12));
}

#[test]
fn restored_when_the_guest_ends() {
    let folder = Folder::new();
    let mut terminal = Terminal::start(&folder, TEST_EXIT, &["--testdev"]);
    assert_eq!(terminal.end(), Some(0x21));
    let mut terminal = Terminal::start(&folder, TRIPLE_FAULT, &[]);
    terminal.expect("code at RIP:");
    assert_eq!(terminal.end(), Some(8));
}

#[test]
fn restored_by_signals_orderly_or_not() {
    for (signal, status) in [
        (Signal::TERM, Some(143)),
        (Signal::INT, Some(130)),
        (Signal::QUIT, Some(131)),
        (Signal::USR1, None),
        (Signal::ABORT, None),
        (Signal::SEGV, None),
    ] {
        let folder = Folder::new();
        let mut terminal = Terminal::start(&folder, ECHO, &[]);
        terminal.expect(">");
        assert!(terminal.is_raw());
        kill_process(Pid::from_child(&terminal.child), signal).unwrap();
        assert_eq!(terminal.end(), status, "{signal:?}");
    }
}

#[test]
fn the_terminal_is_the_users_while_stopped() {
    let folder = Folder::new();
    let mut terminal = Terminal::start(&folder, ECHO, &[]);
    terminal.expect(">");
    let process = Pid::from_child(&terminal.child);
    kill_process(process, Signal::TSTP).unwrap();
    let start = Instant::now();
    while terminal.is_raw() {
        assert!(start.elapsed() < Duration::from_secs(10), "still raw");
        std::thread::sleep(Duration::from_millis(5));
    }
    // It may not have stopped yet, and a SIGCONT that comes before is lost.
    while !terminal.is_raw() {
        assert!(start.elapsed() < Duration::from_secs(20), "not raw again");
        kill_process(process, Signal::CONT).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    terminal.press("on");
    terminal.expect("on");
    terminal.press("\x01x");
    assert_eq!(terminal.end(), Some(12));
}

#[test]
fn a_paste_larger_than_any_buffer_arrives_whole() {
    let folder = Folder::new();
    let mut terminal = Terminal::start(&folder, ECHO, &[]);
    terminal.expect(">");
    let text: String = (0..30_000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    terminal.press(&text);
    terminal.expect(&text);
    terminal.press("\x01x");
    assert_eq!(terminal.end(), Some(12));
}

#[test]
fn a_console_in_the_background_is_left_and_the_machine_goes_on() {
    let folder = Folder::new();
    folder.kernel(ECHO);
    let _background = Background(&folder);
    folder.file("vm.toml", "kernel = \"kernel\"\nmemory = \"16M\"\n");
    assert!(folder.bivisor(&["up", "vm.toml"]).output().unwrap().status.success());
    for keys in ["ls\x03", "again"] {
        let mut terminal = Terminal::console(&folder);
        terminal.expect("this is the console of vm; Ctrl-A x leaves it");
        assert!(terminal.is_raw());
        terminal.press(keys);
        terminal.expect(keys);
        let mut second = Terminal::console(&folder);
        second.expect("another client has this console");
        assert_eq!(second.end(), Some(0));
        terminal.press("\x01h");
        terminal.expect("leave the console; the machine goes on");
        terminal.press("\x01x");
        terminal.expect("bivisor: vm goes on");
        assert_eq!(terminal.end(), Some(0));
    }
    let mut terminal = Terminal::console(&folder);
    terminal.expect("Ctrl-A x leaves it");
    assert!(folder.bivisor(&["down", "--timeout", "0"]).output().unwrap().status.success());
    terminal.expect("bivisor: the console of vm has ended");
    assert_eq!(terminal.end(), Some(0));
}
