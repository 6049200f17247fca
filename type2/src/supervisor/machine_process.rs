//! The process of one machine: what `bivisor run` does, with the console at a socket, everything that is told in a log,
//! and a socket for orders. All its files are open before the guest runs.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bivisor_backends::console::{Command, ConsoleEvent, ConsoleSpec, SocketFile, accept, listen_at};
use bivisor_backends::stderr_log;
use bivisor_backends::terminal::message;
use bivisor_backends::thread::{Role, spawn};

use super::places::MachinePlaces;
use super::process::{POWER_BUTTON, READY, STATISTICS, start_time};
use super::record::{self, Ending, ProcessRecord, Spec};
use crate::error::Failure;
use crate::run::{self, Managed};
use crate::status;
use crate::vm::Event;
use crate::vm::counters::{Counters, Statistics};

/// Bytes of a machine's log at most.
const LOG_SIZE: u64 = 4 << 20;

/// How long who gives an order may take to say it, and to hear the answer.
const ORDER_TIME: Duration = Duration::from_secs(1);

/// The file for how it ended, until that is written.
static ENDING: Mutex<Option<File>> = Mutex::new(None);

/// Writes down how this process ends, if it is a machine's. The first ending counts.
pub fn tell_ending(status: u8, sentence: &str) {
    let file = ENDING.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(mut file) = file
        && let Ok(text) = serde_json::to_vec(&Ending::now(Some(status), sentence))
    {
        // The supervisor knows what it means when nothing is there.
        let _ = file.write_all(&text);
    }
}

/// Runs the machine of a folder to its end; returns the exit status.
pub fn run(folder: &Path) -> Result<u8, Failure> {
    // It is nobody's child, terminal's or session's but its own.
    let _ = rustix::process::setsid();
    stderr_log::bound(LOG_SIZE);
    let places = MachinePlaces::at(folder);
    let written = |error: io::Error| {
        Failure::new(status::HOST, format!("cannot write in {}: {error}", folder.display()))
    };
    let ending = record::private_file(&places.ending()).map_err(written)?;
    *ENDING.lock().unwrap_or_else(PoisonError::into_inner) = Some(ending);
    let pid = std::process::id().cast_signed();
    let itself = ProcessRecord { pid, start: start_time(pid).map_err(written)? };
    record::write(&places.process(), &itself).map_err(written)?;

    let ended = begin(&places);
    match &ended {
        Ok(ending) => tell_ending(ending.status, &ending.sentence),
        Err(failure) => tell_ending(failure.status, &failure.to_string()),
    }
    Ok(ended?.status)
}

fn begin(places: &MachinePlaces) -> Result<run::Ending, Failure> {
    let spec = Spec::of(places)?;
    // What other programs show of it, and what a disk that is in use names.
    let name: Vec<u8> = format!("biv:{}", spec.name).into_bytes().into_iter().take(15).collect();
    if let Ok(name) = std::ffi::CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
    message(&format!("bivisor: {} starts\n", spec.name));
    let mut config = spec.config()?;
    if config.console == ConsoleSpec::Stdio {
        config.console = ConsoleSpec::Unix(places.console());
    }
    let control = listen_at(&places.control()).map_err(Failure::host)?;
    let managed = Managed {
        ready: Box::new(|| {
            // A supervisor that is gone needs no word.
            let _ = io::stdout().write_all(READY.as_bytes()).and_then(|()| io::stdout().flush());
        }),
        control: Box::new(move |events, counters| serve(control, events, counters)),
    };
    let ending = run::machine(config, spec.verbose, Some(managed), None)?;
    let told = if ending.sentence.is_empty() { "the guest powered off" } else { &ending.sentence };
    message(&format!("bivisor: {} has ended: {told}\n", spec.name));
    Ok(ending)
}

/// Takes orders, on a thread of its own.
fn serve(
    (listener, file): (UnixListener, SocketFile),
    events: Sender<Event>,
    counters: Arc<Counters>,
) -> io::Result<()> {
    let serve = move || {
        let _file = file;
        loop {
            let stream = accept(&listener);
            let mut order = String::new();
            // Nobody may keep others from giving orders.
            let _ = stream
                .set_read_timeout(Some(ORDER_TIME))
                .and_then(|()| stream.set_write_timeout(Some(ORDER_TIME)));
            if BufReader::new((&stream).take(64)).read_line(&mut order).is_err() {
                continue;
            }
            match order.as_str() {
                POWER_BUTTON => {
                    let button = Event::Console(ConsoleEvent::Command(Command::PowerButton));
                    if events.send(button).is_err() {
                        return;
                    }
                }
                STATISTICS => {
                    // Who has gone does not want them.
                    let _ = tell(&stream, &counters.statistics());
                }
                _ => {}
            }
        }
    };
    spawn(Role::Control, "control", serve).map(drop)
}

fn tell(mut stream: &UnixStream, statistics: &Statistics) -> io::Result<()> {
    let mut line = serde_json::to_vec(statistics)?;
    line.push(b'\n');
    stream.write_all(&line)
}
