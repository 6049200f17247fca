//! Rate limits of one interface, around any port: what the guest sends too fast waits here, up to a bound, as in a
//! network card's queue; what comes for it too fast is refused for a while, so that it waits where it is.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};

use super::NetError;
use crate::rate::{RateLimit, RateLimiter};
use crate::thread::{Role, spawn};

/// What waits to be sent, at most: in bytes, and in frames.
const QUEUE_BYTES: usize = 1 << 20;
const QUEUE_FRAMES: usize = 1000;

/// A port that is kept to a rate. Dropping it loses what waits to be sent.
pub struct LimitedPort {
    inner: Arc<dyn PacketPort>,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What the guest sends.
    out: RateLimiter,
    queue: VecDeque<(Vec<u8>, Offload)>,
    queued: usize,
    /// The thread is sending a frame that stood in the queue.
    sending: bool,
    /// What the guest gets.
    to_guest: RateLimiter,
    /// The frame that comes next has been counted, and found no room.
    paid: bool,
    /// When the port may try again, if it was refused for its rate.
    again: Option<Instant>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LimitedPort {
    /// Keeps what the guest sends to `out` and what it gets to `to_guest`.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn new(inner: Arc<dyn PacketPort>, out: RateLimit, to_guest: RateLimit) -> Result<Self, NetError> {
        let now = Instant::now();
        let state = State {
            out: RateLimiter::new(out, now),
            queue: VecDeque::new(),
            queued: 0,
            sending: false,
            to_guest: RateLimiter::new(to_guest, now),
            paid: false,
            again: None,
            ended: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (thread, port) = (shared.clone(), inner.clone());
        spawn(Role::NetLimit, "net-limit", move || run(&thread, &*port)).map_err(NetError::Start)?;
        Ok(Self { inner, shared })
    }
}

impl Drop for LimitedPort {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
    }
}

impl PacketPort for LimitedPort {
    fn features(&self) -> PortFeatures {
        self.inner.features()
    }

    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures) {
        let mut state = self.shared.lock();
        state.queue.clear();
        state.queued = 0;
        state.paid = false;
        drop(state);
        let receiver = receiver.map(|inner| {
            let gate: Arc<dyn PacketReceiver> = Arc::new(Gate { inner, shared: self.shared.clone() });
            gate
        });
        self.inner.attach(receiver, accepted);
    }

    fn send(&self, frame: &[u8], offload: &Offload) {
        let mut state = self.shared.lock();
        let waits = state.sending
            || !state.queue.is_empty()
            || state.out.take(frame.len() as u64, Instant::now()).is_err();
        if !waits {
            drop(state);
            self.inner.send(frame, offload);
        } else if state.queued + frame.len() <= QUEUE_BYTES && state.queue.len() < QUEUE_FRAMES {
            state.queued += frame.len();
            state.queue.push_back((frame.to_vec(), *offload));
            self.shared.changed.notify_one();
        }
    }

    fn ready(&self) {
        self.inner.ready();
    }
}

/// The guest's side, as the port sees it.
struct Gate {
    inner: Arc<dyn PacketReceiver>,
    shared: Arc<Shared>,
}

impl PacketReceiver for Gate {
    fn receive(&self, frame: &[u8], offload: &Offload) -> bool {
        let mut state = self.shared.lock();
        if !state.paid {
            let now = Instant::now();
            if let Err(wait) = state.to_guest.take(frame.len() as u64, now) {
                state.again = Some(now + wait);
                self.shared.changed.notify_one();
                return false;
            }
        }
        drop(state);
        let taken = self.inner.receive(frame, offload);
        self.shared.lock().paid = !taken;
        taken
    }
}

/// The thread: sends what waits when it may go, and tells the port when the guest may get more.
fn run(shared: &Shared, port: &dyn PacketPort) {
    let mut state = shared.lock();
    while !state.ended {
        let now = Instant::now();
        if state.again.is_some_and(|again| again <= now) {
            state.again = None;
            drop(state);
            port.ready();
            state = shared.lock();
            continue;
        }
        let length = state.queue.front().map(|(frame, _)| frame.len());
        let next = match length.map(|length| state.out.take(length as u64, now)) {
            Some(Ok(())) => {
                if let Some((frame, offload)) = state.queue.pop_front() {
                    state.queued -= frame.len();
                    state.sending = true;
                    drop(state);
                    port.send(&frame, &offload);
                    state = shared.lock();
                    state.sending = false;
                }
                continue;
            }
            Some(Err(wait)) => Some(wait),
            None => None,
        };
        let again = state.again.map(|again| again.saturating_duration_since(now));
        state = match next.into_iter().chain(again).min() {
            // A little longer than asked, so that a rounded time does not make a round more.
            Some(wait) => {
                let wait = wait + Duration::from_micros(50);
                shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
            }
            None => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A port that counts what is sent, and offers its receiver as many frames as it takes.
    #[derive(Default)]
    struct Counter {
        sent: Mutex<Vec<u8>>,
        given: AtomicUsize,
        receiver: Mutex<Option<Arc<dyn PacketReceiver>>>,
    }

    impl PacketPort for Counter {
        fn features(&self) -> PortFeatures {
            PortFeatures { checksum: true, ..PortFeatures::default() }
        }
        fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, _: PortFeatures) {
            *self.receiver.lock().unwrap() = receiver;
        }
        fn send(&self, frame: &[u8], _: &Offload) {
            self.sent.lock().unwrap().push(frame[0]);
        }
        fn ready(&self) {
            let receiver = self.receiver.lock().unwrap().clone().unwrap();
            while receiver.receive(&[0; 1000], &Offload::default()) {
                self.given.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    struct Taker(AtomicUsize);

    impl PacketReceiver for Taker {
        fn receive(&self, frame: &[u8], _: &Offload) -> bool {
            self.0.fetch_add(frame.len(), Ordering::Relaxed);
            true
        }
    }

    fn port(out: RateLimit, to_guest: RateLimit) -> (Arc<Counter>, LimitedPort) {
        let counter = Arc::new(Counter::default());
        let limited = LimitedPort::new(counter.clone(), out, to_guest).unwrap();
        (counter, limited)
    }

    #[test]
    fn what_is_sent_keeps_to_the_rate_and_its_order() {
        let out = RateLimit { bytes: None, operations: Some(100) };
        let (counter, limited) = port(out, RateLimit::default());
        let began = Instant::now();
        for number in 0..150u8 {
            limited.send(&[number; 60], &Offload::default());
        }
        assert!(counter.sent.lock().unwrap().len() <= 110, "a second's worth goes at once");
        while counter.sent.lock().unwrap().len() < 150 {
            assert!(began.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(began.elapsed() > Duration::from_millis(450), "{:?}", began.elapsed());
        assert!(counter.sent.lock().unwrap().iter().copied().eq(0..150));
    }

    #[test]
    fn what_waits_has_a_bound() {
        let out = RateLimit { bytes: Some(1000), operations: None };
        let (counter, limited) = port(out, RateLimit::default());
        for _ in 0..10_000 {
            limited.send(&[0; 1500], &Offload::default());
        }
        let state = limited.shared.lock();
        assert!(state.queued <= QUEUE_BYTES && state.queue.len() <= QUEUE_FRAMES);
        assert!(counter.sent.lock().unwrap().len() <= 2);
    }

    #[test]
    fn what_is_received_keeps_to_the_rate() {
        let to_guest = RateLimit { bytes: Some(100_000), operations: None };
        let (counter, limited) = port(RateLimit::default(), to_guest);
        let taker = Arc::new(Taker(AtomicUsize::new(0)));
        limited.attach(Some(taker.clone()), PortFeatures::default());
        let began = Instant::now();
        limited.ready();
        while began.elapsed() < Duration::from_millis(1500) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // A second's worth at once, and half a second's since.
        let (taken, given) = (taker.0.load(Ordering::Relaxed), counter.given.load(Ordering::Relaxed));
        assert!((200_000..=290_000).contains(&taken), "{taken}");
        assert!(taken.abs_diff(given * 1000) <= 1000);
    }
}
