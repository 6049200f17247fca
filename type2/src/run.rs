//! `bivisor run`: makes the machine, supervises it, and tells how it ended.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::available_parallelism;

use bivisor_backends::console::{Command, Console, ConsoleEvent};
use bivisor_backends::terminal::{self, message};
use bivisor_machine::host::MachineEvent;
use bivisor_machine::sync::set_yield;

use crate::backends::Backends;
use crate::cli::RunArgs;
use crate::config::VmConfig;
use crate::debugger::{Debugger, Stop};
use crate::error::Failure;
use crate::guest::{self, Guest};
use crate::host::clock::LinuxClock;
use crate::host::log::Log;
use crate::host::{memory, signals};
use crate::jail::{Jail, Probe};
use crate::perf_map::PerfMap;
use crate::trace::TraceFile;
use crate::vm::counters::Counters;
use crate::vm::vcpu::VcpuEvent;
use crate::vm::{Event, Parts, Session, inspect};
use crate::{engines, status};

/// How a machine ended.
pub struct Ending {
    /// The exit status.
    pub status: u8,
    /// What is told; nothing after an orderly power-off.
    pub sentence: String,
}

/// Takes orders, hands on what happens by them, and tells what is counted.
pub type Control = dyn FnOnce(Sender<Event>, Arc<Counters>) -> io::Result<()>;

/// What a machine has that the supervisor has started.
pub struct Managed {
    /// Called when everything is open and the guest is about to run.
    pub ready: Box<dyn FnOnce()>,
    /// Starts to take orders.
    pub control: Box<Control>,
}

impl Ending {
    fn new(status: u8, sentence: impl Into<String>) -> Self {
        Self { status, sentence: sentence.into() }
    }
}

/// `bivisor run`: runs a machine to its end; returns the exit status.
pub fn run(args: &RunArgs, verbose: bool) -> Result<u8, Failure> {
    let config = VmConfig::new(args).map_err(Failure::configuration)?;
    guest::make_missing_image(&config).map_err(Failure::configuration)?;
    let ending = machine(config, verbose, None, args.jail_probe)?;
    if !ending.sentence.is_empty() {
        message(&format!("bivisor: {}\n", ending.sentence));
    }
    Ok(ending.status)
}

/// Runs a machine to its end.
pub fn machine(
    mut config: VmConfig,
    verbose: bool,
    managed: Option<Managed>,
    probe: Option<Probe>,
) -> Result<Ending, Failure> {
    config.check_memory(memory::host_memory()).map_err(Failure::configuration)?;
    let chosen = engines::choose(&config).map_err(Failure::configuration)?;
    // What else depends on the engine asks the configuration.
    config.engine = chosen.into();
    let guest = Guest::find(&config).map_err(Failure::configuration)?;
    let clock = Arc::new(LinuxClock::start());
    set_yield(|| {
        rustix::thread::sched_yield();
    });

    let processors = available_parallelism().map_or(1, usize::from);
    let jail =
        (!config.no_jail).then(|| Jail::begin(&config, processors)).transpose().map_err(Failure::host)?;

    let (events, happenings) = channel();
    let log = Arc::new(Log::start(verbose).map_err(Failure::host)?);
    let on_signal = events.clone();
    let _watch = signals::watch(move |signal| {
        // The supervisor is only gone at the end.
        let _ = on_signal.send(Event::Signal(signal));
    })
    .map_err(Failure::host)?;
    let console_events = events.clone();
    let mut console = Console::open(
        &config.console,
        Arc::new(move |event| {
            let _ = console_events.send(Event::Console(event));
        }),
    )
    .map_err(Failure::host)?;
    if managed.is_some() {
        console.copy_to_stderr().map_err(Failure::host)?;
    }
    let debugger = config.gdb.as_ref().map(|spec| Debugger::start(spec, events.clone()));
    let debugger = debugger.transpose().map_err(Failure::host)?;
    let trace = config.trace.as_ref().map(|path| TraceFile::create(path, events.clone()));
    let trace = trace.transpose().map_err(Failure::host)?;
    let perf_map = config.perf_map.then(PerfMap::create).transpose().map_err(Failure::host)?;
    let backends = Backends::open(&config, &guest)?;
    let engine = engines::Source::open(chosen).map_err(Failure::configuration)?;
    let (disks, networks) = backends.traffic();
    let counters = Arc::new(Counters::new(&config, disks, networks));
    let mut ready = None;
    if let Some(managed) = managed {
        (managed.control)(events.clone(), counters.clone()).map_err(Failure::host)?;
        ready = Some(managed.ready);
    }
    if let Some(probe) = probe {
        probe.before_close();
    }
    if let Some(jail) = jail {
        jail.close().map_err(Failure::host)?;
    }
    if let Some(probe) = probe {
        probe.after_close();
    }
    let parts = Parts {
        config,
        guest,
        engine,
        clock,
        processors,
        console,
        backends,
        trace,
        perf_map,
        counters,
        log,
        events,
    };
    let ending = supervise(&parts, &happenings, debugger.as_ref(), ready);

    if let (Some(debugger), Ok(ending)) = (&debugger, &ending) {
        debugger.ended(ending.status);
    }
    let lost = parts.console.close();
    if lost > 0 {
        message(&format!("bivisor: {lost} bytes of console output could not be delivered\n"));
    }
    let traced = parts.trace.as_ref().map_or(Ok(()), |trace| trace.finish());
    let mapped = parts.perf_map.as_ref().map_or(Ok(()), PerfMap::write);
    let ending = ending?;
    traced.map_err(Failure::host)?;
    mapped.map_err(Failure::host)?;
    Ok(ending)
}

/// Tells what a user must know to use the console.
fn greet(parts: &Parts) {
    if let Some(address) = parts.backends.console_address() {
        message(&format!("bivisor: the virtio console is at {address}\n"));
    }
    if terminal::is_raw() {
        message("bivisor: Ctrl-A x ends the machine, Ctrl-A h tells more\n");
    } else if let Some(address) = parts.console.address() {
        message(&format!("bivisor: the console is at {address}\n"));
    }
}

/// Runs the machine, again after every reset, until something ends it.
fn supervise(
    parts: &Parts,
    happenings: &Receiver<Event>,
    debugger: Option<&Debugger>,
    mut ready: Option<Box<dyn FnOnce()>>,
) -> Result<Ending, Failure> {
    let mut greeted = false;
    loop {
        let session = Arc::new(Session::new(parts)?);
        if !std::mem::replace(&mut greeted, true) {
            greet(parts);
        }
        if let Some(ready) = ready.take() {
            ready();
        }
        match debugger {
            Some(debugger) => debugger.session_started(&session).map_err(Failure::engine)?,
            None => session.resume(),
        }
        let ending = wait_for_end(&session, parts, happenings, debugger);
        session.stop();
        // Nobody may hold the machine at its end: what is opened for it is closed when the last one lets go.
        parts.console.input().disconnect();
        parts.backends.disconnect();
        if parts.config.stats {
            message(&session.statistics());
        }
        if let Some(ending) = ending {
            return Ok(ending);
        }
        // What this machine still had to say must not be taken for the next one's.
        while let Ok(event) = happenings.try_recv() {
            if let Some(ending) = outside_event(event, &session) {
                return Ok(ending);
            }
        }
    }
}

/// Waits for the machine's end (`Some`) or reset (`None`).
fn wait_for_end(
    session: &Session,
    parts: &Parts,
    happenings: &Receiver<Event>,
    debugger: Option<&Debugger>,
) -> Option<Ending> {
    let mut crash_shown = false;
    loop {
        // The senders live as long as `parts`.
        let event = happenings.recv().ok()?;
        match event {
            Event::Machine(MachineEvent::PowerOff) => return Some(Ending::new(status::SUCCESS, "")),
            Event::Machine(MachineEvent::Reset) if parts.config.no_reboot => {
                return Some(Ending::new(
                    status::RESET,
                    "the guest reset the machine, which ends it (--no-reboot)",
                ));
            }
            Event::Machine(MachineEvent::Reset) => return None,
            Event::Machine(MachineEvent::TestExit(code)) => {
                let status = code as u8;
                return Some(Ending::new(status, format!("the guest ended its test with status {status}")));
            }
            Event::Vcpu(VcpuEvent::Debug { cpu }) => {
                if let Some(debugger) = debugger {
                    debugger.stopped(Stop::Debug(cpu));
                }
            }
            // The debugger may look at the crash; when it lets the machine go on, that ends.
            Event::Vcpu(VcpuEvent::Crash { cpu, state, code }) => {
                if let Some(debugger) = debugger.filter(|debugger| !crash_shown && debugger.attached()) {
                    crash_shown = true;
                    debugger.stopped(Stop::Crash(cpu));
                    continue;
                }
                let dump = inspect::dump(&state, &code);
                return Some(Ending::new(
                    status::CRASH,
                    format!(
                        "the guest crashed: triple fault of CPU {cpu}, whose registers are\n{}",
                        dump.trim_end()
                    ),
                ));
            }
            Event::Vcpu(VcpuEvent::Engine { cpu, error }) => {
                return Some(Ending::new(
                    status::ENGINE,
                    format!("the engine could not go on with CPU {cpu}: {error}"),
                ));
            }
            other => {
                if let Some(ending) = outside_event(other, session) {
                    return Some(ending);
                }
            }
        }
    }
}

/// What users and the host do to a machine; machines' own events are passed over.
fn outside_event(event: Event, session: &Session) -> Option<Ending> {
    match event {
        Event::Signal(signal) => Some(Ending::new(
            status::of_signal(signal),
            format!("the machine was ended by {}", signals::name(signal)),
        )),
        Event::Console(ConsoleEvent::Lost(error)) => Some(Ending::new(
            status::CONSOLE_LOST,
            format!("the console is gone ({error}), so the machine was ended"),
        )),
        Event::Console(ConsoleEvent::Command(Command::Quit)) => {
            Some(Ending::new(status::QUIT, "the machine was ended by Ctrl-A x"))
        }
        Event::TraceLost(error) => {
            Some(Ending::new(status::HOST, format!("{error}, so the machine was ended")))
        }
        Event::Killed => Some(Ending::new(status::QUIT, "the machine was ended by the debugger")),
        Event::Console(ConsoleEvent::Command(Command::PowerButton)) => {
            session.machine().power_button();
            None
        }
        Event::Console(ConsoleEvent::Command(Command::Help)) | Event::Machine(_) | Event::Vcpu(_) => None,
    }
}
