//! Runs trials in a process of their own: an engine that makes the host crash ends a process, not the search. What
//! crashed is found, made small and reported by the process that waits.
#![allow(unsafe_code)]

use std::io::{Error, Result};
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bivisor_x86::cpuid::CpuModel;

use super::check::Checker;
use super::layout::{Image, images};
use super::report::{listing, title};
use super::shrink::shrink;
use super::trial::{Trial, trial};
use super::{Against, Blocks, Difference, Listener, Options, Totals};
use crate::host_model;

/// Seconds that one trial may take.
const PATIENCE: u32 = 10;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// With this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

/// Runs `work` in a child process, which ends with the status it returns, or by SIGALRM after so many seconds unless
/// they are 0. The calling process must have one thread.
fn in_child(seconds: u32, work: impl FnOnce() -> i32) -> Result<Ended> {
    // SAFETY: the caller has one thread, so that the child finds no lock held by another.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: both calls concern this process only, which ends here.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::alarm(seconds);
                libc::_exit(work())
            }
        }
        child if child > 0 => {
            let mut status = 0;
            // SAFETY: the child is ours; the call writes the status.
            while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
                let error = Error::last_os_error();
                if error.raw_os_error() != Some(libc::EINTR) {
                    return Err(error);
                }
            }
            let by_signal = libc::WIFSIGNALED(status);
            let (signal, status) = (libc::WTERMSIG(status), libc::WEXITSTATUS(status));
            Ok(if by_signal { Ended::Signal(signal) } else { Ended::Status(status) })
        }
        _ => Err(Error::last_os_error()),
    }
}

/// What the process that runs trials tells the one that waits.
#[repr(C)]
#[derive(Default)]
struct Board {
    /// Trials that are being run: first, and behind the last.
    first: AtomicU64,
    end: AtomicU64,
    /// Instructions executed.
    instructions: AtomicU64,
}

/// A board in memory that child processes share.
fn board() -> Result<&'static Board> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe { libc::mmap(null_mut(), size_of::<Board>(), protection, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    // SAFETY: zeroed memory, aligned to a page, is a valid board; it is never unmapped.
    Ok(unsafe { &*memory.cast::<Board>() })
}

/// Passes on what it hears, and notes it on the board.
struct Noting<'a, L> {
    board: &'a Board,
    /// Instructions executed by processes before this one.
    before: u64,
    listener: &'a mut L,
}

impl<L: Listener> Listener for Noting<'_, L> {
    fn starting(&mut self, trials: Range<u64>) {
        self.board.first.store(trials.start, Ordering::SeqCst);
        self.board.end.store(trials.end, Ordering::SeqCst);
        self.listener.starting(trials);
    }
    fn found(&mut self, difference: Difference) {
        self.listener.found(difference);
    }
    fn progress(&mut self, totals: &Totals) {
        self.board.instructions.store(self.before + totals.instructions, Ordering::SeqCst);
        self.listener.progress(totals);
    }
}

/// Runs trials until `count` instructions were executed, in processes of their own. `finished` hears the totals of
/// each. Returns whether there was no difference. The calling process must have one thread.
///
/// # Errors
/// The host gives no memory or process, or can't run the engine.
pub fn run<L: Listener>(
    mut options: Options,
    count: u64,
    listener: &mut L,
    finished: impl Fn(&mut L, &Totals),
) -> Result<bool> {
    let board = board()?;
    let mut agrees = true;
    loop {
        let before = board.instructions.load(Ordering::SeqCst);
        let ended = in_child(0, || {
            let run = Blocks::new(options).and_then(|mut blocks| {
                let mut noting = Noting { board, before, listener };
                blocks.run(count.saturating_sub(before), &mut noting)
            });
            match run {
                Ok(totals) => {
                    finished(listener, &totals);
                    i32::from(totals.differences > 0)
                }
                Err(error) => {
                    eprintln!("oracle: {error}");
                    2
                }
            }
        })?;
        match ended {
            Ended::Status(0) => return Ok(agrees),
            Ended::Status(1) => return Ok(false),
            Ended::Status(_) => return Err(Error::other("the trials could not be run")),
            Ended::Signal(signal) => {
                agrees = false;
                let trials = board.first.load(Ordering::SeqCst)..board.end.load(Ordering::SeqCst);
                options.first = trials.end;
                listener.found(explain(options, trials, signal));
            }
        }
    }
}

/// Whether a trial ends the process that runs it by this signal.
fn crashes(
    options: Options,
    model: &Arc<CpuModel>,
    images: &Arc<[Image]>,
    trial: &Trial,
    signal: i32,
) -> bool {
    // The other side is not asked.
    let options = Options { against: Against::Interp, ..options };
    let ended = in_child(PATIENCE, || match Checker::new(options, model, images) {
        Ok(checker) => {
            checker.execute_only(trial);
            0
        }
        Err(_) => 1,
    });
    matches!(ended, Ok(Ended::Signal(by)) if by == signal)
}

/// Finds which of these trials made the process crash, and makes it small.
fn explain(options: Options, trials: Range<u64>, signal: i32) -> Difference {
    let model = Arc::new(host_model());
    let images: Arc<[Image]> = images().into();
    let crashes = |trial: &Trial| crashes(options, &model, &images, trial, signal);
    let found =
        trials.clone().find(|&number| crashes(&trial(options.seed, number, &model, options.is_privileged())));
    let Some(number) = found else {
        let title = format!("the engine crashed by signal {signal}, but by no single trial");
        return Difference { trial: trials.start, title, report: format!("trials {trials:?}\n") };
    };
    let whole = trial(options.seed, number, &model, options.is_privileged());
    let last = |trial: &Trial| trial.runs.len().saturating_sub(1);
    let small = shrink(&whole, &mut |trial| crashes(trial).then(|| last(trial)));
    let (assembled, inputs) = small.assemble(0);
    let lines = [format!("{}: crashed by signal {signal}", options.names()[1])];
    let title = title(&small, &lines);
    let report = match inputs.get(last(&small)) {
        Some(input) => super::report::report(&small, &assembled, last(&small), input, &lines),
        None => listing(&small, &assembled),
    };
    Difference { trial: number, title, report }
}
