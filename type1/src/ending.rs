//! How the hypervisor itself ends.

use core::fmt::Arguments;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::console::println;
use crate::processor::{halt, port};

/// Word of the command line: end QEMU by its isa-debug-exit device, or Bochs. For tests.
const DEBUG_EXIT_OPTION: &str = "debug-exit";
/// Port of that device.
const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Port at which Bochs waits for [`BOCHS_WORD`], byte by byte; it has no status.
const BOCHS_PORT: u16 = 0x8900;
const BOCHS_WORD: &[u8] = b"Shutdown";
/// What makes QEMU's status 33: all went well.
const GOOD: u32 = 0x10;
/// What makes QEMU's status 35: something failed.
const BAD: u32 = 0x11;

static DEBUG_EXIT: AtomicBool = AtomicBool::new(false);

/// Takes note of what a command line, the loader's or the machines', says about the end.
pub(crate) fn set_options(command_line: &str) {
    if command_line.split_whitespace().any(|word| word == DEBUG_EXIT_OPTION) {
        DEBUG_EXIT.store(true, Ordering::Relaxed);
    }
}

fn end(status: u32) -> ! {
    if DEBUG_EXIT.load(Ordering::Relaxed) {
        port::outl(DEBUG_EXIT_PORT, status);
        BOCHS_WORD.iter().for_each(|byte| port::outb(BOCHS_PORT, *byte));
    }
    halt()
}

/// Nothing is left to be done.
pub(crate) fn power_off() -> ! {
    println!("bivisor: the machine can be switched off");
    end(GOOD)
}

/// The hypervisor can't go on.
pub(crate) fn give_up(why: Arguments<'_>) -> ! {
    println!("bivisor: {why}");
    end(BAD)
}

/// A mistake of the hypervisor's own.
pub fn panic(info: &PanicInfo<'_>) -> ! {
    give_up(format_args!("{info}"))
}
