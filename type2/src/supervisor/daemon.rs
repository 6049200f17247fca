//! The supervisor's process.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use bivisor_backends::console::{accept, listen_at};
use bivisor_backends::runtime;
use rustix::process::{setsid, umask};

use super::core::{Core, Message};
use super::places::Places;
use super::protocol::{self, Reply};
use crate::error::Failure;
use crate::status;

/// How long one supervisor waits for the end of another.
const SUCCESSION: Duration = Duration::from_secs(2);
/// How long an answer may take to be written when the supervisor ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Holds the machines of a user until there are none. If another supervisor does, there is nothing to do.
pub fn run() -> Result<u8, Failure> {
    let inherited = runtime::close_inherited();
    // Not the session, terminal and folder of whoever happened to start it; what it makes is its user's alone.
    let _ = setsid();
    let _ = rustix::thread::set_name(c"biv-supervisor");
    umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    inherited.map_err(Failure::host)?;
    let places = Places::find()?;
    let failed =
        |error: std::io::Error| Failure::new(status::HOST, format!("{}: {error}", places.lock().display()));
    let Some(_lock) = runtime::lock(&places.lock(), SUCCESSION).map_err(failed)? else {
        return Ok(status::SUCCESS);
    };
    let (messages, hear) = channel();
    let core = Core::new(&places, messages.clone());
    let (listener, file) = listen_at(&places.socket()).map_err(Failure::host)?;
    let busy = Arc::new(AtomicUsize::new(0));
    let talking = busy.clone();
    thread::Builder::new()
        .name("listen".into())
        .spawn(move || listen(&listener, &messages, &talking))
        .map_err(failed)?;
    core.run(&hear);
    // From here on a command finds nobody and starts the next supervisor.
    drop(file);
    let end = Instant::now();
    while busy.load(Ordering::SeqCst) > 0 && end.elapsed() < LAST_WORDS {
        thread::sleep(Duration::from_millis(1));
    }
    Ok(status::SUCCESS)
}

fn listen(listener: &UnixListener, messages: &Sender<Message>, busy: &Arc<AtomicUsize>) {
    loop {
        let stream = accept(listener);
        let (messages, ours) = (messages.clone(), busy.clone());
        busy.fetch_add(1, Ordering::SeqCst);
        let spawned = thread::Builder::new().name("answer".into()).spawn(move || {
            protocol::answer(&stream, |request| {
                let (reply, hear) = channel();
                let asked = messages.send(Message::Request(request, reply));
                let heard = asked.ok().and_then(|()| hear.recv().ok());
                heard.unwrap_or_else(|| Reply::refused("the supervisor has just ended: try again"))
            });
            ours.fetch_sub(1, Ordering::SeqCst);
        });
        if spawned.is_err() {
            busy.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
