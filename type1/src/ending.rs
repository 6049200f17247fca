//! How the hypervisor itself ends.

use core::fmt::Arguments;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use bivisor_machine::sync::Mutex;

use crate::acpi::SoftOff;
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
static SOFT_OFF: Mutex<Option<SoftOff>> = Mutex::new(None);

/// Takes note of how the machine is switched off.
pub(crate) fn set_soft_off(soft_off: Option<SoftOff>) {
    *SOFT_OFF.lock() = soft_off;
}

/// Takes note of what a command line, the loader's or the machines', says about the end.
pub(crate) fn set_options(command_line: &str) {
    if command_line.split_whitespace().any(|word| word == DEBUG_EXIT_OPTION) {
        DEBUG_EXIT.store(true, Ordering::Relaxed);
    }
}

fn end_debugging(status: u32) {
    if DEBUG_EXIT.load(Ordering::Relaxed) {
        port::outl(DEBUG_EXIT_PORT, status);
        BOCHS_WORD.iter().for_each(|byte| port::outb(BOCHS_PORT, *byte));
    }
}

/// Nothing is left to be done.
pub(crate) fn power_off() -> ! {
    end_debugging(GOOD);
    if let Some(soft_off) = &*SOFT_OFF.lock() {
        soft_off.execute();
    }
    println!("bivisor: the machine can be switched off");
    halt()
}

/// The hypervisor can't go on.
pub(crate) fn give_up(why: Arguments<'_>) -> ! {
    println!("bivisor: {why}");
    end_debugging(BAD);
    halt()
}

/// A mistake of the hypervisor's own.
pub fn panic(info: &PanicInfo<'_>) -> ! {
    give_up(format_args!("{info}"))
}
