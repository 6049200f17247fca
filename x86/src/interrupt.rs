//! Delivery of exceptions, interrupts and events (SDM Vol. 3A, chapter 6; APM Vol. 2, chapter 8).

use crate::cpu::Cpu;
use crate::env::{Env, Event};
use crate::exception::Exception;

impl Cpu {
    /// Delivers an exception that the instruction at `state.rip` raised: a fault's return address is
    /// `state.rip`; a trap's caller has moved `state.rip` on. Faults on the way end in a double fault, and then
    /// in [`crate::state::Activity::Shutdown`].
    pub fn deliver_exception<E: Env>(&mut self, _env: &mut E, _exception: Exception) {
        todo!()
    }

    /// Takes an event between two instructions: an interrupt or NMI is delivered (and ends HLT), INIT resets,
    /// a SIPI starts a processor that waits for one. [`Event::Kick`] is not for the processor and does nothing.
    pub fn deliver_event<E: Env>(&mut self, _env: &mut E, _event: Event) {
        todo!()
    }
}
