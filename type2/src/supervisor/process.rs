//! The processes of machines as the supervisor sees them: started, found again, told to end.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bivisor_backends::runtime;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::places::MachinePlaces;
use super::record::{self, Ending, ProcessRecord};
use crate::host::signals;
use crate::vm::counters::Statistics;

/// What the process says on its standard output when the guest is about to run.
pub const READY: &str = "ready\n";
/// What the control socket understands: press the power button.
pub const POWER_BUTTON: &str = "power-button\n";
/// And: tell what the machine has counted, in a line of JSON.
pub const STATISTICS: &str = "statistics\n";
/// What an answer to that may be long, in bytes.
const LONGEST_ANSWER: u64 = 1 << 20;
/// What it may take.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// A process of a machine, which can't be mistaken for another one that later has the same number.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    handle: Arc<OwnedFd>,
}

/// What is found of a machine's process.
pub enum Found {
    /// It is gone.
    Nobody,
    /// It is there, but has not said yet which one it is, or is about to go.
    Nameless,
    /// This one.
    Process(Process),
}

/// What a process lets its supervisor know, in this order.
pub enum News {
    /// Its guest runs.
    Ready,
    /// It is gone.
    Ended(Ending),
}

impl Process {
    fn open(pid: i32) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { pid, handle: Arc::new(pidfd_open(raw, PidfdFlags::empty())?) })
    }

    /// Starts a process for the machine of a folder; `news` is called by a thread that waits for it.
    ///
    /// # Errors
    /// The host does not let us; or one runs already.
    pub fn start(
        places: &MachinePlaces,
        folder: &Path,
        log: &Path,
        news: impl Fn(News) + Send + 'static,
    ) -> io::Result<Self> {
        let Some(lock) = runtime::lock(&places.lock(), Duration::ZERO)? else {
            return Err(io::Error::other("a process of this machine is still there"));
        };
        for stale in [places.process(), places.ending()] {
            match fs::remove_file(&stale) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let log = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(log)?;
        let mut child = this_program()
            .arg("machine")
            .arg(places.folder())
            .current_dir(folder)
            // The lock goes on with the process, so there is no moment at which nobody holds it.
            .stdin(lock)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        match Self::open(child.id().cast_signed()) {
            Ok(process) => {
                let ending = places.ending();
                let watch = move || watch_child(child, &ending, &news);
                if let Err(error) = thread::Builder::new().name("watch".into()).spawn(watch) {
                    process.signal(Signal::KILL);
                    return Err(error);
                }
                Ok(process)
            }
            Err(error) => {
                // Nobody could end it later.
                let _ = child.kill().and_then(|()| child.wait());
                Err(error)
            }
        }
    }

    /// Looks for the process that another supervisor has started.
    ///
    /// # Errors
    /// The host does not let us.
    pub fn find(places: &MachinePlaces, news: impl Fn(News) + Send + 'static) -> io::Result<Found> {
        if runtime::lock(&places.lock(), Duration::ZERO)?.is_some() {
            return Ok(Found::Nobody);
        }
        let record: Option<ProcessRecord> = record::read(&places.process());
        // First the handle, then the comparison: what it names now, it names for ever.
        let process = record.and_then(|record| {
            let process = Self::open(record.pid).ok()?;
            (start_time(record.pid).ok()? == record.start).then_some(process)
        });
        let Some(process) = process else { return Ok(Found::Nameless) };
        let (watched, ending) = (process.clone(), places.ending());
        thread::Builder::new().name("watch".into()).spawn(move || {
            watched.wait();
            news(News::Ended(told(&ending, None)));
        })?;
        Ok(Found::Process(process))
    }

    fn wait(&self) {
        loop {
            match poll(&mut [PollFd::from_borrowed_fd((*self.handle).as_fd(), PollFlags::IN)], None) {
                Err(Errno::INTR) => {}
                _ => return,
            }
        }
    }

    /// Sends a signal. That the process is gone already is no failure.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&*self.handle, signal);
    }
}

/// This program, even if another version of it has taken its place.
pub fn this_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("bivisor");
    command
}

/// Presses the power button. A process that does not listen will hear of it in another way.
pub fn press_power_button(places: &MachinePlaces) {
    let _ = UnixStream::connect(places.control()).and_then(|mut stream| {
        stream.set_write_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(POWER_BUTTON.as_bytes())
    });
}

/// What a machine's process has counted.
///
/// # Errors
/// It is gone, or of a version that does not count.
pub fn statistics(places: &MachinePlaces) -> io::Result<Statistics> {
    let mut stream = UnixStream::connect(places.control())?;
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    stream.set_read_timeout(Some(ANSWER_TIME))?;
    stream.write_all(STATISTICS.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST_ANSWER)).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::Error::other("it says nothing, as a machine that an older bivisor has started does"));
    }
    Ok(serde_json::from_str(&line)?)
}

/// Memory of the host's that a process has, in bytes (proc_pid_statm(5), the second field).
///
/// # Errors
/// There is no such process.
pub fn resident(pid: i32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages = text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    let pages = pages.ok_or(io::ErrorKind::InvalidData)?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// When a process was started, in clock ticks since the host's start (proc_pid_stat(5), field 22).
///
/// # Errors
/// There is no such process.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses, which may contain anything.
    let fields = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    let start = fields.and_then(|mut fields| fields.nth(19)?.parse().ok());
    start.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn watch_child(mut child: Child, ending: &Path, news: &impl Fn(News)) {
    if let Some(output) = child.stdout.take() {
        let mut output = BufReader::new(output);
        let mut line = String::new();
        if output.by_ref().take(64).read_line(&mut line).is_ok() && line == READY {
            news(News::Ready);
        }
        // Open as long as the process lives.
        let _ = io::copy(&mut output, &mut io::sink());
    }
    news(News::Ended(told(ending, child.wait().ok())));
}

/// How a process ended: what it wrote itself, or else what the host knows.
fn told(path: &Path, status: Option<ExitStatus>) -> Ending {
    if let Some(ending) = record::read(path) {
        return ending;
    }
    match status.and_then(|status| status.signal()) {
        Some(signal) => Ending::now(None, format!("its process was ended by {}", signals::name(signal))),
        None => {
            let code = status.and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
            Ending::now(code, "its process ended without a word")
        }
    }
}

/// How a process ended that nobody watched.
pub fn ending_of_unwatched(places: &MachinePlaces) -> Ending {
    told(&places.ending(), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory() {
        let own = resident(std::process::id().cast_signed()).unwrap();
        assert!((1 << 20..1 << 40).contains(&own), "{own}");
        assert!(resident(i32::MAX).is_err());
    }

    #[test]
    fn a_process_has_one_start_time() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        let start = start_time(pid).unwrap();
        assert_eq!(start_time(pid).unwrap(), start);
        assert!(start >= start_time(std::process::id().cast_signed()).unwrap());
        let process = Process::open(pid).unwrap();
        process.signal(Signal::KILL);
        process.wait();
        child.wait().unwrap();
        assert!(start_time(pid).is_err());
        process.signal(Signal::KILL);
    }
}
