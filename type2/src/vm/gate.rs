//! The gate that every vCPU's thread passes before it executes guest code: open, closed for a while, or for good.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// For the vCPUs whose bits are set.
    Open(u64),
    Closed,
    /// Never to be opened again.
    Locked,
}

impl Position {
    fn admits(self, cpu: u32) -> bool {
        matches!(self, Self::Open(cpus) if cpus >> (cpu & 63) & 1 != 0)
    }
}

struct State {
    position: Position,
    /// Threads that are on the guest's side.
    inside: usize,
}

/// All vCPUs.
pub const ALL: u64 = u64::MAX;

/// The gate of one machine.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Self { state: Mutex::new(State { position: Position::Closed, inside: 0 }), changed: Condvar::new() }
    }

    /// Waits until the gate is open for this vCPU and goes through; false when it is locked.
    pub fn enter(&self, cpu: u32) -> bool {
        let state = self.lock();
        let mut state = self
            .changed
            .wait_while(state, |state| state.position != Position::Locked && !state.position.admits(cpu))
            .unwrap_or_else(PoisonError::into_inner);
        let open = state.position.admits(cpu);
        state.inside += usize::from(open);
        open
    }

    /// Comes back from the guest's side.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.inside -= 1;
        self.changed.notify_all();
    }

    /// Whether a thread inside may stay there.
    pub fn is_open(&self) -> bool {
        matches!(self.lock().position, Position::Open(_))
    }

    /// Opens the gate for the vCPUs whose bits are set, unless it is locked. Nobody may be inside.
    pub fn open(&self, cpus: u64) {
        self.set(Position::Open(cpus));
    }

    /// Closes the gate, unless it is locked. Threads inside must be told to come out.
    pub fn close(&self) {
        self.set(Position::Closed);
    }

    /// Locks the gate.
    pub fn lock_for_good(&self) {
        self.set(Position::Locked);
    }

    /// Waits until nobody is inside.
    pub fn wait_until_empty(&self) {
        let state = self.lock();
        drop(
            self.changed.wait_while(state, |state| state.inside > 0).unwrap_or_else(PoisonError::into_inner),
        );
    }

    fn set(&self, position: Position) {
        let mut state = self.lock();
        if state.position != Position::Locked {
            state.position = position;
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn closing_waits_for_those_inside() {
        let gate = Arc::new(Gate::new());
        let visitor = {
            let gate = gate.clone();
            thread::spawn(move || {
                let mut visits = 0;
                while gate.enter(1) {
                    visits += 1;
                    while gate.is_open() {
                        thread::yield_now();
                    }
                    gate.leave();
                }
                visits
            })
        };
        for _ in 0..3 {
            gate.open(ALL);
            while gate.lock().inside == 0 {
                thread::yield_now();
            }
            gate.close();
            gate.wait_until_empty();
        }
        gate.lock_for_good();
        gate.open(ALL);
        assert_eq!(visitor.join().unwrap(), 3);
    }

    #[test]
    fn only_those_named_are_admitted() {
        let gate = Gate::new();
        gate.open(0b101);
        assert!(gate.enter(0) && gate.enter(2));
        assert_eq!(gate.lock().inside, 2);
        assert!(!gate.lock().position.admits(1));
        gate.lock_for_good();
        assert!(!gate.enter(0));
    }
}
