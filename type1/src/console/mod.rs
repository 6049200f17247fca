//! The console: the first serial port, shared by the hypervisor and the guests' consoles.

mod keys;
mod mux;
pub(crate) mod serial;

use alloc::string::String;
use alloc::sync::Arc;

use bivisor_machine::host::ByteStream;
use bivisor_machine::sync::Mutex;

pub(crate) use keys::{HELP, Key, Keys};
use mux::Mux;

/// Prints a line of the hypervisor's own.
macro_rules! println {
    ($($arguments:tt)*) => {
        $crate::console::serial::line(format_args!($($arguments)*))
    };
}
pub(crate) use println;

/// The guests' consoles on one serial port.
pub(crate) struct Console(Mutex<Mux>);

impl Console {
    /// With nobody on it yet. A guest that is alone has it as it is.
    pub(crate) fn new(alone: bool) -> Self {
        Self(Mutex::new(Mux::new(alone)))
    }

    /// Adds a guest; the first one has the keyboard.
    pub(crate) fn add(self: &Arc<Self>, name: &str) -> Line {
        let index = self.0.lock().add(String::from(name));
        Line { console: self.clone(), index }
    }

    /// Who has the keyboard.
    pub(crate) fn focus(&self) -> usize {
        self.0.lock().focus()
    }

    /// Gives somebody the keyboard, and shows what he said last; false if there is nobody.
    pub(crate) fn set_focus(&self, index: usize) -> bool {
        self.0.lock().set_focus(index, &mut serial::write)
    }
}

/// One guest's end of the console.
pub(crate) struct Line {
    console: Arc<Console>,
    index: usize,
}

impl ByteStream for Line {
    fn write(&self, bytes: &[u8]) {
        self.console.0.lock().write(self.index, bytes, &mut serial::write);
    }
}
