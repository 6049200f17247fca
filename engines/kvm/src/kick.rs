//! Getting a vCPU out of guest code from another thread.
//!
//! KVM looks at `immediate_exit` before it enters the guest, and a signal makes it leave: who sets the one and then sends the
//! other can't come too late or too early.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use bivisor_machine::host::Waker;

/// Where `immediate_exit` is, while the vCPU exists.
struct Place(NonNull<u8>);

// SAFETY: it leads into memory that is shared with the kernel, and is only used for atomic stores.
unsafe impl Send for Place {}

/// Kicks one vCPU.
pub struct Kick {
    place: Mutex<Option<Place>>,
    /// The vCPU's thread is at or in KVM_RUN.
    inside: AtomicBool,
    /// That thread.
    thread: AtomicI32,
}

/// A signal that nothing else in the program uses, and that is ignored but for what it interrupts.
fn signal() -> i32 {
    libc::SIGRTMIN()
}

impl Kick {
    /// For the vCPU whose `immediate_exit` is here.
    ///
    /// # Safety
    /// The byte is mapped until [`Kick::forget`] is called, and nobody accesses it but the kernel and this value.
    pub unsafe fn new(immediate_exit: NonNull<u8>) -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: the handler does nothing, so it may interrupt anything. If it can't be installed, which happens for
            // no valid signal, kicks end the program instead of being lost.
            let _ = unsafe { signal_hook_registry::register(signal(), || {}) };
        });
        Self {
            place: Mutex::new(Some(Place(immediate_exit))),
            inside: AtomicBool::new(false),
            thread: AtomicI32::new(0),
        }
    }

    /// The vCPU goes away.
    pub fn forget(&self) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn set_immediate_exit(&self, value: u8) {
        if let Some(place) = &*self.place.lock().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: the byte is mapped while it is not forgotten, and accessed atomically only.
            unsafe { AtomicU8::from_ptr(place.0.as_ptr()) }.store(value, Ordering::SeqCst);
        }
    }

    /// Has the next KVM_RUN only complete what the last exit left to do.
    pub fn leave_at_once(&self) {
        self.set_immediate_exit(1);
    }

    /// The calling thread is about to enter the guest, unless what it looks for after this call keeps it from that.
    pub fn enter(&self) {
        // SAFETY: the call has no preconditions.
        self.thread.store(unsafe { libc::gettid() }, Ordering::Relaxed);
        self.set_immediate_exit(0);
        self.inside.store(true, Ordering::SeqCst);
    }

    /// It is back.
    pub fn leave(&self) {
        self.inside.store(false, Ordering::SeqCst);
    }
}

impl Waker for Kick {
    fn wake(&self) {
        if !self.inside.load(Ordering::SeqCst) {
            return;
        }
        self.leave_at_once();
        let thread = self.thread.load(Ordering::Relaxed);
        // SAFETY: it names a thread of this process, or none any more, to which a signal is sent whose handler does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
    }
}
