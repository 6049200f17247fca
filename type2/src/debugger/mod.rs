//! A debugger at the machine: gdb's remote protocol over a TCP port of the loopback address or a Unix socket.
//!
//! The protocol is spoken by a thread of its own. The supervisor tells it what stopped the machine; it pauses and
//! resumes the machine itself.

mod registers;
mod target;

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use bivisor_backends::console::{ConsoleError, SocketFile, listen_at};
use bivisor_backends::terminal::message;
use bivisor_backends::thread::{Role, spawn};
use bivisor_machine::engine::{DebugControl, EngineError};
use gdbstub::conn::ConnectionExt;
use gdbstub::stub::{DisconnectReason, GdbStub};

use crate::config::GdbSpec;
use crate::vm::{Event, Session};
use target::{EventLoop, Target};

/// How long the end of the program waits for the debugger to hear of the machine's end.
const FAREWELL: Duration = Duration::from_millis(500);

/// What a debugger is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A vCPU came to a breakpoint or made its step.
    Debug(u32),
    /// A vCPU crashed, and may be looked at.
    Crash(u32),
    /// The machine ended with this status.
    Exited(u8),
}

/// Why no debugger can be waited for.
#[derive(Debug, thiserror::Error)]
pub enum DebuggerError {
    /// The port is taken, or not ours to take.
    #[error("cannot wait for a debugger at port {0} ({1}): choose another port")]
    Port(u16, #[source] io::Error),
    /// The socket can't be made.
    #[error(transparent)]
    Socket(#[from] ConsoleError),
    /// No thread.
    #[error("cannot start a thread for the debugger")]
    Thread(#[source] io::Error),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, #[expect(dead_code, reason = "held until the end")] SocketFile),
}

type Connection = Box<dyn ConnectionExt<Error = io::Error>>;

impl Listener {
    fn accept(&self) -> io::Result<Connection> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept()?.0),
            Self::Unix(listener, _) => Box::new(listener.accept()?.0),
        })
    }
}

/// What the supervisor and the debugger's thread share.
#[derive(Default)]
struct Shared {
    /// The machine's current run.
    session: Mutex<Option<Arc<Session>>>,
    /// A debugger is connected.
    attached: AtomicBool,
    /// The machine executes, as far as the debugger is concerned.
    running: AtomicBool,
    /// Linear addresses at which it stops.
    breakpoints: Mutex<Vec<u64>>,
}

impl Shared {
    fn session(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The supervisor's side of a debugger.
pub struct Debugger {
    shared: Arc<Shared>,
    stops: Sender<Stop>,
    farewell: Receiver<()>,
}

impl Debugger {
    /// Listens, and starts the thread.
    pub fn start(spec: &GdbSpec, events: Sender<Event>) -> Result<Self, DebuggerError> {
        let (listener, place) = match spec {
            GdbSpec::Port(port) => {
                let failed = |error| DebuggerError::Port(*port, error);
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).map_err(failed)?;
                let place = listener.local_addr().map_err(failed)?.to_string();
                (Listener::Tcp(listener), place)
            }
            GdbSpec::Unix(path) => {
                let (listener, file) = listen_at(path)?;
                (Listener::Unix(listener, file), path.display().to_string())
            }
        };
        message(&format!("bivisor: waiting for a debugger: gdb -ex 'target remote {place}'\n"));
        let shared = Arc::new(Shared::default());
        let (stops, hear) = channel();
        let (done, farewell) = channel();
        let target = Target::new(shared.clone(), hear);
        spawn(Role::Debugger, "gdb", move || serve(&listener, target, &events, &done))
            .map_err(DebuggerError::Thread)?;
        Ok(Self { shared, stops, farewell })
    }

    /// A new run of the machine: the first one waits for the debugger, the others go on as the last one did.
    pub fn session_started(&self, session: &Arc<Session>) -> Result<(), EngineError> {
        let mut current = self.shared.session();
        *current = Some(session.clone());
        drop(current);
        if self.shared.running.load(Ordering::SeqCst) {
            let breakpoints = self.shared.breakpoints.lock().unwrap_or_else(PoisonError::into_inner).clone();
            session.set_debug(|_| DebugControl { single_step: false, breakpoints: breakpoints.clone() })?;
            session.resume();
        }
        Ok(())
    }

    /// Whether somebody would hear of a stop.
    pub fn attached(&self) -> bool {
        self.shared.attached.load(Ordering::SeqCst)
    }

    /// The machine stopped.
    pub fn stopped(&self, stop: Stop) {
        // The thread ends only with the program.
        let _ = self.stops.send(stop);
    }

    /// The machine has ended for good: lets a connected debugger know.
    pub fn ended(&self, status: u8) {
        *self.shared.session() = None;
        if self.attached() {
            self.stopped(Stop::Exited(status));
            // Late is as good as never.
            let _ = self.farewell.recv_timeout(FAREWELL);
        }
    }
}

/// Serves one debugger after the other.
fn serve(listener: &Listener, mut target: Target, events: &Sender<Event>, done: &Sender<()>) {
    loop {
        let Ok(connection) = listener.accept() else {
            // Out of descriptors, or the client left at once.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        target.attach();
        let reason = GdbStub::new(connection).run_blocking::<EventLoop>(&mut target);
        target.detach();
        match reason {
            Ok(DisconnectReason::Kill) => {
                // The supervisor is only gone at the end.
                let _ = events.send(Event::Killed);
            }
            Ok(DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_)) => {
                let _ = done.send(());
            }
            // A debugger that detached or broke off leaves the machine running.
            Ok(DisconnectReason::Disconnect) => target.resume_freely(),
            Err(error) => {
                message(&format!("bivisor: the debugger is gone: {error}\n"));
                target.resume_freely();
            }
        }
    }
}
