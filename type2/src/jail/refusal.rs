//! The end of a process one of whose threads made a system call that the jail refuses.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io::{self, Write};

use bivisor_backends::terminal;
use bivisor_backends::thread::Role;
use syscalls::x86_64::Sysno;

use crate::status;

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Main) };
}

/// Says what the current thread does.
pub fn set_role(role: Role) {
    ROLE.set(role);
}

/// What `struct siginfo` holds of a refused call (Linux, include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct Refused {
    signal: c_int,
    error: c_int,
    code: c_int,
    address: *const c_void,
    call: c_int,
    architecture: u32,
}

/// Sets the handler of SIGSYS.
///
/// # Errors
/// The host refuses.
pub fn install() -> io::Result<()> {
    // SAFETY: sigaction is a plain C structure, for which all zeroes are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as extern "C" fn(c_int, *const Refused, *mut c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the structure is valid; the handler does only what is allowed in one.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Async-signal-safe: atomics, tcsetattr, formatting into an array, write and _exit.
extern "C" fn handle(_: c_int, information: *const Refused, _: *mut c_void) {
    // SAFETY: with SA_SIGINFO the second argument points to a `struct siginfo`, which for SIGSYS begins like this.
    let call = unsafe { (*information).call };
    terminal::restore();
    let mut text = [0; 400];
    let mut rest = &mut text[..];
    // What doesn't fit is left out.
    let _ = sentence(&mut rest, ROLE.get(), call);
    let left = rest.len();
    let _ = rustix::io::write(rustix::stdio::stderr(), &text[..text.len() - left]);
    // SAFETY: ends the process; nothing of it is used any more.
    unsafe { libc::_exit(status::JAIL.into()) };
}

fn sentence(to: &mut impl Write, role: Role, call: i32) -> io::Result<()> {
    let name = usize::try_from(call).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    writeln!(
        to,
        "bivisor: the jail refused the system call {name} ({call}) of the thread for {}, so the machine was ended: \
         its guest may have broken out, or this is a bug in bivisor; please report it (--no-jail runs without the jail)",
        role.name()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_named_and_unknown_ones_numbered() {
        let told = |call| {
            let mut text = Vec::new();
            sentence(&mut text, Role::Disk, call).unwrap();
            assert!(text.len() < 400, "fits into the handler's buffer");
            String::from_utf8(text).unwrap()
        };
        assert!(told(libc::SYS_execve as i32).contains("call execve (59) of the thread for a disk,"));
        assert!(told(100_000).contains("call unknown (100000)"));
        assert!(told(-1).contains("call unknown (-1)"));
    }
}
