//! A virtqueue as devices use it: a [`Ring`] with a lock, an interrupt, and an end.

use alloc::sync::Arc;
use core::fmt::Display;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::chain::{Chain, RingError, Token};
use super::ring::{Layout, Position, Ring};
use crate::dma::Dma;
use crate::sync::{Mutex, wait_until};

/// What devices tell the driver by, outside of rings.
pub trait Signal: Send + Sync {
    /// Chains of this queue were given back.
    fn used(&self, queue: u16);
    /// The device's configuration changed.
    fn config_changed(&self);
    /// The driver broke a rule: the device does nothing more until it is reset.
    fn broken(&self, why: &dyn Display);
}

/// What all queues of a device have in common from DRIVER_OK to the next reset.
#[derive(Clone)]
pub struct Shared {
    features: u64,
    dma: Dma,
    signal: Arc<dyn Signal>,
    closed: Arc<AtomicBool>,
}

impl Shared {
    /// For queues that are to be made. `features` were negotiated.
    pub fn new(features: u64, dma: Dma, signal: Arc<dyn Signal>) -> Self {
        Self { features, dma, signal, closed: Arc::default() }
    }
}

/// A queue between its driver's DRIVER_OK and the next reset.
pub struct Virtqueue {
    index: u16,
    features: u64,
    dma: Dma,
    ring: Mutex<Ring>,
    signal: Arc<dyn Signal>,
    /// No access to guest memory begins any more, for this queue and the others of its device.
    closed: Arc<AtomicBool>,
    /// How many are at work that access guest memory.
    users: AtomicU32,
    /// How often work was asked for since [`Virtqueue::run`] last looked.
    kicks: AtomicU32,
}

/// The right to access guest memory for a queue. While it lives, a reset waits: hold it briefly.
pub struct Lease<'a>(&'a Virtqueue);

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Virtqueue {
    /// A queue as the driver has set it up.
    pub fn new(index: u16, layout: &Layout, shared: &Shared) -> Result<Arc<Self>, RingError> {
        let Shared { features, dma, signal, closed } = shared.clone();
        let ring = Mutex::new(Ring::new(layout, features, &dma)?);
        Ok(Arc::new(Self {
            index,
            features,
            dma,
            ring,
            signal,
            closed,
            users: AtomicU32::new(0),
            kicks: AtomicU32::new(0),
        }))
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }
    /// Whether a feature was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
    /// Access to RAM.
    pub fn dma(&self) -> &Dma {
        &self.dma
    }

    /// The right to access guest memory; `None` after the end.
    pub fn lease(&self) -> Option<Lease<'_>> {
        self.users.fetch_add(1, Ordering::SeqCst);
        let lease = Lease(self);
        (!self.closed.load(Ordering::SeqCst)).then_some(lease)
    }

    /// Ends the queue; returns when nobody accesses guest memory for it any more. The caller must have no lease.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        wait_until(|| self.users.load(Ordering::SeqCst) == 0);
    }

    /// Calls `work` now, or lets the thread that is at it call it once more: by one thread at a time, and after every
    /// call of this.
    pub fn run(&self, mut work: impl FnMut()) {
        if self.kicks.fetch_add(1, Ordering::SeqCst) > 0 {
            return;
        }
        let mut seen = 1;
        loop {
            if let Some(_lease) = self.lease() {
                work();
            }
            match self.kicks.compare_exchange(seen, 0, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Takes the next chain. When there is none, the driver is asked to notify of the next.
    pub fn pop(&self) -> Option<Chain> {
        let mut ring = self.ring.lock();
        let result = loop {
            if self.closed.load(Ordering::SeqCst) {
                return None;
            }
            match ring.pop(&self.dma) {
                Ok(None) if ring.arm(&self.dma) => {}
                other => break other,
            }
        };
        drop(ring);
        result.unwrap_or_else(|error| {
            self.fail(&error);
            None
        })
    }

    /// Puts the chain that was taken last back.
    pub fn unpop(&self, chain: &Chain) {
        self.ring.lock().unpop(chain.token);
    }

    /// Gives a chain back, with the number of bytes that were written to it, and interrupts if the driver wants it.
    pub fn complete(&self, token: Token, written: u32) {
        self.complete_all(&[(token, written)]);
    }

    /// Gives chains back, all at once.
    pub fn complete_all(&self, chains: &[(Token, u32)]) {
        let mut ring = self.ring.lock();
        ring.push(&self.dma, chains);
        let wants = ring.wants_interrupt(&self.dma);
        drop(ring);
        if wants {
            self.signal.used(self.index);
        }
    }

    /// The driver broke a rule of the device's.
    pub fn fail(&self, why: &dyn Display) {
        self.closed.store(true, Ordering::SeqCst);
        self.signal.broken(&format_args!("queue {}: {why}", self.index));
    }

    /// How far it has got.
    pub fn position(&self) -> Position {
        self.ring.lock().position()
    }
    /// Goes on from a position. False: there is no such place.
    pub fn set_position(&self, position: Position) -> bool {
        self.ring.lock().set_position(position)
    }
}
