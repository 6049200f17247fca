//! The way into the guest that all ports share: who receives, and whether it has room.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bivisor_machine::packet::{Offload, PacketReceiver};
use rustix::event::{EventfdFlags, eventfd};

/// A receiver that may be full, and the event that wakes the port's thread.
pub struct Outlet {
    receiver: Mutex<Option<Arc<dyn PacketReceiver>>>,
    stalled: AtomicBool,
    wake: OwnedFd,
}

impl Outlet {
    /// One that leads nowhere yet.
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { receiver: Mutex::default(), stalled: AtomicBool::new(false), wake })
    }

    /// Leads to another receiver, or nowhere.
    pub fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>) {
        let mut current = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        *current = receiver;
        self.stalled.store(false, Ordering::SeqCst);
        drop(current);
        self.wake();
    }

    /// Who receives now.
    pub fn receiver(&self) -> Option<Arc<dyn PacketReceiver>> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Delivers a frame. False: there is no room, and [`Outlet::ready`] will wake the thread.
    pub fn deliver(&self, receiver: &dyn PacketReceiver, frame: &[u8], offload: &Offload) -> bool {
        if receiver.receive(frame, offload) {
            return true;
        }
        {
            let current = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
            // Another one has come meanwhile, which has had room all the time and so would never say that it has.
            if current.as_ref().is_none_or(|current| !ptr::addr_eq(&**current, receiver)) {
                return false;
            }
            self.stalled.store(true, Ordering::SeqCst);
        }
        // Once more after saying so: room that came in between was not told of.
        let taken = receiver.receive(frame, offload);
        if taken {
            self.stalled.store(false, Ordering::SeqCst);
        }
        taken
    }

    /// There was no room, and nobody has said since that there is.
    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::SeqCst)
    }

    /// The receiver has room.
    pub fn ready(&self) {
        if self.stalled.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Wakes the thread.
    pub fn wake(&self) {
        // Fails only where the counter is full, which wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The event.
    pub fn wake_fd(&self) -> &OwnedFd {
        &self.wake
    }

    /// The thread is awake.
    pub fn woken(&self) {
        // How often it was woken says nothing.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

impl AsFd for Outlet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has no room, and is replaced while it says so.
    struct Replaced(Arc<Outlet>);

    impl PacketReceiver for Replaced {
        fn receive(&self, _: &[u8], _: &Offload) -> bool {
            self.0.attach(Some(Arc::new(Full)));
            false
        }
    }

    struct Full;

    impl PacketReceiver for Full {
        fn receive(&self, _: &[u8], _: &Offload) -> bool {
            false
        }
    }

    #[test]
    fn one_that_had_no_room_does_not_stall_its_successor() {
        let outlet = Arc::new(Outlet::new().unwrap());
        let receivers: [Arc<dyn PacketReceiver>; 2] = [Arc::new(Replaced(outlet.clone())), Arc::new(Full)];
        for (receiver, stalled) in receivers.into_iter().zip([false, true]) {
            outlet.attach(Some(receiver.clone()));
            assert!(!outlet.deliver(&*receiver, &[], &Offload::default()));
            assert_eq!(outlet.is_stalled(), stalled);
        }
    }
}
