//! A block store over a content whose calls wait: a few worker threads, an order among requests that touch, limits,
//! and what happens when the host has no room.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bivisor_machine::block::{BlockDone, BlockError, BlockOperation, BlockStore};

use super::content::Content;
use super::spec::{CacheMode, OnFull};
use crate::rate::{RateLimit, RateLimiter};
use crate::thread::{Role, spawn};

/// Requests that run at once.
const WORKERS: usize = 4;
/// How often a write is tried again for which there was no room.
const RETRY: Duration = Duration::from_secs(1);
/// How often a failing disk is told of.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Something that a user must know of a disk.
#[derive(Debug)]
pub enum DiskEvent {
    /// There is no room; what the guest writes waits.
    Full,
    /// There is room again; what waited goes on.
    RoomAgain,
    /// The guest got an error.
    Failed(io::Error),
}

impl fmt::Display for DiskEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => {
                f.write_str("the host has no room for what the guest writes, which waits: make room")
            }
            Self::RoomAgain => f.write_str("the host has room again, and the guest's writes go on"),
            Self::Failed(error) => write!(f, "a request of the guest failed: {error}"),
        }
    }
}

/// Told of a disk's events, by any thread.
pub type DiskEvents = Arc<dyn Fn(DiskEvent) + Send + Sync>;

/// How a store treats its requests.
pub(super) struct Policy {
    pub(super) read_only: bool,
    pub(super) can_discard: bool,
    pub(super) cache: CacheMode,
    pub(super) on_full: OnFull,
    pub(super) limit: RateLimit,
}

/// The range that a request holds while it waits or runs.
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    end: u64,
    changes: bool,
}

impl Range {
    fn of(operation: &BlockOperation, granularity: u64) -> Self {
        let (offset, length, changes) = match operation {
            BlockOperation::Read { offset, buffer } => (*offset, buffer.len() as u64, false),
            BlockOperation::Write { offset, buffer } => (*offset, buffer.len() as u64, true),
            BlockOperation::Discard { offset, length }
            | BlockOperation::WriteZeroes { offset, length, .. } => (*offset, *length, true),
            BlockOperation::Flush => (0, 0, false),
        };
        Self {
            start: offset - offset % granularity,
            end: (offset + length).next_multiple_of(granularity),
            changes,
        }
    }

    fn disturbs(&self, other: &Self) -> bool {
        (self.changes || other.changes) && self.start < other.end && other.start < self.end
    }
}

struct Request {
    operation: BlockOperation,
    done: BlockDone,
    range: Range,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    /// Requests that found no room; they hold their ranges in `running`.
    parked: VecDeque<Request>,
    running: Vec<Range>,
    /// When parked requests are tried again, while there is no room.
    retry: Option<Instant>,
    limiter: Option<RateLimiter>,
    workers: Vec<JoinHandle<()>>,
    /// Parked requests fail instead of waiting.
    draining: bool,
    stop: bool,
    reported: Option<Instant>,
}

/// What a worker does next.
enum Next {
    Run(Request),
    /// Wait for a change, or this long.
    Wait(Option<Duration>),
    Stop,
}

impl State {
    fn next(&mut self, now: Instant) -> Next {
        if !self.parked.is_empty() && (self.draining || self.retry.is_none_or(|at| now >= at)) {
            // One by one: the next try is due when this one ends.
            self.retry = self.retry.map(|_| now + RETRY);
            if let Some(request) = self.parked.pop_front() {
                return Next::Run(request);
            }
        }
        let mut wait =
            self.retry.filter(|_| !self.parked.is_empty()).map(|at| at.saturating_duration_since(now));
        for index in 0..self.waiting.len() {
            let range = self.waiting[index].range;
            let earlier = self.waiting.iter().take(index).map(|request| &request.range);
            if self.running.iter().chain(earlier).any(|other| range.disturbs(other)) {
                continue;
            }
            if let Some(limiter) = &mut self.limiter
                && let Err(limited) = limiter.take(tokens(&self.waiting[index].operation), now)
            {
                wait = Some(wait.map_or(limited, |wait| wait.min(limited)));
                break;
            }
            if let Some(request) = self.waiting.remove(index) {
                self.running.push(range);
                return Next::Run(request);
            }
        }
        if self.stop && self.waiting.is_empty() && self.parked.is_empty() {
            return Next::Stop;
        }
        Next::Wait(wait)
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Gives back the range of a request that has ended.
    fn release(&mut self, range: Range) {
        let held = |other: &Range| {
            (other.start, other.end, other.changes) == (range.start, range.end, range.changes)
        };
        if let Some(index) = self.running.iter().position(held) {
            self.running.swap_remove(index);
        }
    }
}

/// Bytes that a request counts against the limit.
fn tokens(operation: &BlockOperation) -> u64 {
    match operation {
        BlockOperation::Read { buffer, .. } | BlockOperation::Write { buffer, .. } => buffer.len() as u64,
        BlockOperation::Flush | BlockOperation::Discard { .. } | BlockOperation::WriteZeroes { .. } => 0,
    }
}

struct Shared {
    content: Box<dyn Content>,
    policy: Policy,
    events: DiskEvents,
    state: Mutex<State>,
    /// There may be something to do for a worker.
    work: Condvar,
    /// A request has ended.
    ended: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(self: &Arc<Self>) {
        let mut state = self.lock();
        loop {
            match state.next(Instant::now()) {
                Next::Run(request) => {
                    drop(state);
                    self.run(request);
                    state = self.lock();
                }
                Next::Stop => {
                    self.work.notify_all();
                    return;
                }
                Next::Wait(limit) => {
                    state = match limit {
                        None => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
                        Some(limit) => {
                            self.work.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
                        }
                    };
                }
            }
        }
    }

    fn run(&self, mut request: Request) {
        let result = self.execute(&mut request.operation);
        if let Err(error) = &result
            && is_full(error)
            && self.policy.on_full == OnFull::Pause
        {
            let mut state = self.lock();
            if !state.draining {
                let first = state.retry.is_none();
                state.retry = Some(Instant::now() + RETRY);
                state.parked.push_back(request);
                drop(state);
                if first {
                    (self.events)(DiskEvent::Full);
                }
                return;
            }
        }
        let outcome = result.as_ref().map(drop).map_err(kind);
        let changed = result.is_ok() && !matches!(request.operation, BlockOperation::Read { .. });
        let buffer = match request.operation {
            BlockOperation::Read { buffer, .. } | BlockOperation::Write { buffer, .. } => buffer,
            _ => Vec::new(),
        };
        let room_again = self.settle(request.range, changed);
        if let Err(error) = result {
            self.report(error);
        }
        if room_again {
            (self.events)(DiskEvent::RoomAgain);
        }
        (request.done)(outcome, buffer);
    }

    /// Ends a request's hold on its range; says whether there is room again where there was none. `changed`: it
    /// wrote, and well.
    fn settle(&self, range: Range, changed: bool) -> bool {
        let mut state = self.lock();
        state.release(range);
        let room_again = changed && state.parked.is_empty() && state.retry.take().is_some();
        if changed && !state.parked.is_empty() {
            state.retry = Some(Instant::now());
        }
        // Others may have waited for this range, and `drain` for the end of all.
        if !state.waiting.is_empty() || !state.parked.is_empty() {
            self.work.notify_one();
        }
        self.ended.notify_all();
        room_again
    }

    fn execute(&self, operation: &mut BlockOperation) -> io::Result<()> {
        let content = &*self.content;
        match operation {
            BlockOperation::Read { offset, buffer } => return content.read(*offset, buffer),
            BlockOperation::Write { offset, buffer } => content.write(*offset, buffer)?,
            BlockOperation::Discard { offset, length } => content.discard(*offset, *length)?,
            BlockOperation::WriteZeroes { offset, length, unmap } => {
                content.write_zeroes(*offset, *length, *unmap && self.policy.can_discard)?;
            }
            BlockOperation::Flush if self.policy.cache == CacheMode::Unsafe => {}
            BlockOperation::Flush => content.flush()?,
        }
        if self.policy.cache == CacheMode::Writethrough && *operation != BlockOperation::Flush {
            content.flush()?;
        }
        Ok(())
    }

    /// Tells of an error, but not of each when there are many.
    fn report(&self, error: io::Error) {
        let now = Instant::now();
        let mut state = self.lock();
        if state.reported.is_none_or(|last| now - last >= REPORT_INTERVAL) {
            state.reported = Some(now);
            drop(state);
            (self.events)(DiskEvent::Failed(error));
        }
    }

    /// Why a request can't be begun.
    fn refusal(&self, operation: &BlockOperation) -> Option<BlockError> {
        let (offset, length) = match operation {
            BlockOperation::Read { offset, buffer } | BlockOperation::Write { offset, buffer } => {
                (*offset, buffer.len() as u64)
            }
            BlockOperation::Discard { offset, length }
            | BlockOperation::WriteZeroes { offset, length, .. } => (*offset, *length),
            BlockOperation::Flush => return None,
        };
        if offset.checked_add(length).is_none_or(|end| end > self.content.size()) {
            return Some(BlockError::OutOfRange);
        }
        if (offset | length) % 512 != 0 {
            return Some(BlockError::Unsupported);
        }
        let reads = matches!(operation, BlockOperation::Read { .. });
        if self.policy.read_only && !reads {
            return Some(BlockError::ReadOnly);
        }
        let discards = matches!(operation, BlockOperation::Discard { .. });
        (discards && !self.policy.can_discard).then_some(BlockError::Unsupported)
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn kind(error: &io::Error) -> BlockError {
    if is_full(error) {
        return BlockError::NoSpace;
    }
    match error.kind() {
        io::ErrorKind::Unsupported => BlockError::Unsupported,
        _ => BlockError::Io,
    }
}

/// A block store served by worker threads.
pub(super) struct Store {
    shared: Arc<Shared>,
}

impl Store {
    /// A store with its workers: a thread of a confined process that carries out requests may start none.
    pub(super) fn start(content: Box<dyn Content>, policy: Policy, events: DiskEvents) -> io::Result<Self> {
        let limiter = (!policy.limit.is_unlimited()).then(|| RateLimiter::new(policy.limit, Instant::now()));
        let shared = Arc::new(Shared {
            content,
            policy,
            events,
            state: Mutex::new(State { limiter, ..State::default() }),
            work: Condvar::new(),
            ended: Condvar::new(),
        });
        let store = Self { shared };
        for _ in 0..WORKERS {
            let shared = store.shared.clone();
            let worker = spawn(Role::Disk, "disk", move || shared.work())?;
            store.shared.lock().workers.push(worker);
        }
        Ok(store)
    }

    /// Serves a read from the host's memory if that is possible now.
    fn read_at_once(&self, operation: &mut BlockOperation, range: Range) -> bool {
        let BlockOperation::Read { offset, buffer } = operation else { return false };
        {
            let mut state = self.shared.lock();
            let waiting = state.waiting.iter().map(|request| &request.range);
            let disturbed = state.running.iter().chain(waiting).any(|other| range.disturbs(other));
            if state.limiter.is_some() || disturbed {
                return false;
            }
            state.running.push(range);
        }
        let served = self.shared.content.read_at_once(*offset, buffer);
        self.shared.settle(range, false);
        served
    }
}

impl BlockStore for Store {
    fn size(&self) -> u64 {
        self.shared.content.size()
    }

    fn read_only(&self) -> bool {
        self.shared.policy.read_only
    }

    fn can_discard(&self) -> bool {
        self.shared.policy.can_discard
    }

    fn submit(&self, mut operation: BlockOperation, done: BlockDone) {
        let refusal = self.shared.refusal(&operation);
        let range = match refusal {
            None => Range::of(&operation, self.shared.content.granularity()),
            Some(_) => Range { start: 0, end: 0, changes: false },
        };
        let nothing_to_do = operation == BlockOperation::Flush && self.shared.policy.read_only;
        if refusal.is_some() || nothing_to_do || self.read_at_once(&mut operation, range) {
            let buffer = match operation {
                BlockOperation::Read { buffer, .. } | BlockOperation::Write { buffer, .. } => buffer,
                _ => Vec::new(),
            };
            return done(refusal.map_or(Ok(()), Err), buffer);
        }
        let mut state = self.shared.lock();
        state.waiting.push_back(Request { operation, done, range });
        drop(state);
        self.shared.work.notify_one();
    }

    fn drain(&self) {
        let mut state = self.shared.lock();
        state.draining = true;
        self.shared.work.notify_all();
        while !state.is_idle() {
            state = self.shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.draining = false;
        drop(state);
        if !self.shared.policy.read_only
            && let Err(error) = self.shared.content.flush()
        {
            self.shared.report(error);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let workers = {
            let mut state = self.shared.lock();
            state.stop = true;
            state.draining = true;
            std::mem::take(&mut state.workers)
        };
        self.shared.work.notify_all();
        for worker in workers {
            // What a request's end dropped last may be this store itself.
            if worker.thread().id() != thread::current().id() {
                // A worker that panicked has ended the program.
                let _ = worker.join();
            }
        }
    }
}
