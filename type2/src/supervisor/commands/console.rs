//! `bivisor console`: the user's terminal at the console of a machine in the background.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bivisor_backends::console::{Command, Escape};
use bivisor_backends::terminal::{self, RawTerminal, message};

use super::super::places::{MachinePlaces, Places};
use super::super::process;
use super::running;
use crate::error::Failure;
use crate::host::signals;
use crate::status;

const HELP: &str = "\n\
    Ctrl-A x       leave the console; the machine goes on\n\
    Ctrl-A b       press the power button\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest (or Ctrl-A a)\n\
    Ctrl-A h       this help\n";

/// The user has left, so the end of the line is no news.
static LEFT: AtomicBool = AtomicBool::new(false);

pub(super) fn run(name: &str) -> Result<u8, Failure> {
    let places = Places::find()?;
    running(&places, name)?;
    let machine = places.machine(name);
    let line = UnixStream::connect(machine.console()).map_err(|error| {
        let sentence = match error.kind() {
            io::ErrorKind::NotFound => format!(
                "the console of {name} is where its file says (`console`), which `bivisor logs {name}` may tell"
            ),
            _ => format!("the console of {name} can't be reached: {error}"),
        };
        Failure::new(status::CONFIGURATION, sentence)
    })?;
    let _watch = signals::watch(|signal| {
        terminal::restore_and_discard_input();
        std::process::exit(status::of_signal(signal).into());
    })
    .map_err(Failure::host)?;
    let raw = RawTerminal::enter().map_err(Failure::host)?;
    if raw.is_some() {
        message(&format!(
            "bivisor: this is the console of {name}; Ctrl-A x leaves it, Ctrl-A h tells more\n"
        ));
    }
    let writer = line.try_clone().map_err(Failure::host)?;
    let keyboard = thread::Builder::new().name("keyboard".into());
    keyboard.spawn(move || type_to(&writer, &machine)).map_err(Failure::host)?;
    show(&line);
    drop(raw);
    if LEFT.load(Ordering::SeqCst) {
        message(&format!("bivisor: {name} goes on; `bivisor console {name}` comes back\n"));
    } else {
        message(&format!("bivisor: the console of {name} has ended\n"));
    }
    Ok(status::SUCCESS)
}

/// Shows what comes until nothing more does.
fn show(mut line: &UnixStream) {
    let (mut buffer, mut stdout) = ([0; 4096], io::stdout().lock());
    loop {
        match line.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if stdout.write_all(&buffer[..count]).and_then(|()| stdout.flush()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Sends what is typed. At the end of an input that is no terminal, what the guest says goes on.
fn type_to(mut line: &UnixStream, machine: &MachinePlaces) {
    let (mut escape, mut buffer, mut stdin) = (Escape::default(), [0; 4096], io::stdin());
    let is_terminal = stdin.is_terminal();
    loop {
        let count = match stdin.read(&mut buffer) {
            Ok(0) if is_terminal => return leave(line),
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return leave(line),
        };
        let mut keys = Vec::with_capacity(count);
        for &byte in &buffer[..count] {
            if !is_terminal {
                keys.push(byte);
                continue;
            }
            match escape.key(byte, &mut keys) {
                None => {}
                Some(Command::Quit) => return leave(line),
                Some(Command::PowerButton) => process::press_power_button(machine),
                Some(Command::Help) => message(HELP),
            }
        }
        if line.write_all(&keys).is_err() {
            return;
        }
    }
}

fn leave(line: &UnixStream) {
    LEFT.store(true, Ordering::SeqCst);
    // It may have ended by itself.
    let _ = line.shutdown(Shutdown::Both);
}
