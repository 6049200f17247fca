//! Faults that the host raises in translated code: a division by zero, a misaligned vector access. The signal
//! handler makes the code leave as if by an exit of its own; what the guest gets is then decided by the interpreter.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// Site number of an exit that the signal handler made; [`Running::fault_address`] tells where.
pub const FAULT_SITE: u32 = u32::MAX;

/// What the handler must know of the code that this thread executes.
#[derive(Clone, Copy)]
pub struct Running {
    /// First address of translated code.
    pub start: u64,
    /// Behind its last address.
    pub end: u64,
    /// The way out.
    pub exit: u64,
    /// The context's site number.
    pub site: *mut u32,
    /// Written by the handler: the faulting instruction's address.
    pub fault_address: *mut u64,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
}

/// Signals that an instruction may raise.
const SIGNALS: [c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

/// What handled a signal before us.
static PREVIOUS: OnceLock<[libc::sigaction; 4]> = OnceLock::new();

/// Sets the handlers, once per process.
pub fn install() {
    PREVIOUS.get_or_init(|| SIGNALS.map(install_one));
}

fn install_one(signal: c_int) -> libc::sigaction {
    // SAFETY: sigaction is a plain C structure, for which all zeroes are valid.
    let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    new.sa_sigaction = handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both structures are valid; the handler only does what is allowed in one.
    unsafe { libc::sigaction(signal, &raw const new, &raw mut old) };
    old
}

/// Lets the handler know what this thread is about to execute, or that it is back.
pub fn set_running(running: Option<Running>) {
    RUNNING.set(running);
}

extern "C" fn handle(signal: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the third argument points to a ucontext_t.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = &mut registers[libc::REG_RIP as usize];
    if let Some(running) = RUNNING.get()
        && (running.start..running.end).contains(&(*rip as u64))
    {
        // SAFETY: the engine keeps both alive while the thread is marked as running.
        unsafe {
            *running.fault_address = *rip as u64;
            *running.site = FAULT_SITE;
        }
        *rip = running.exit as i64;
        return;
    }
    give_back(signal);
}

/// Not ours: the earlier handler is put back and gets the signal, which may have been sent by another process.
fn give_back(signal: c_int) {
    let Some(index) = SIGNALS.iter().position(|&s| s == signal) else { return };
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: a structure that sigaction filled in itself.
        unsafe { libc::sigaction(signal, &raw const previous[index], std::ptr::null_mut()) };
        // SAFETY: allowed in a handler; the signal is blocked until this one returns.
        unsafe { libc::raise(signal) };
    }
}
