//! Filters of system calls, as the kernel takes them (seccomp(2)).
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bivisor_backends::thread::Role;
use libc::{c_long, sock_fprog};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

use super::Needs;
use super::calls::Calls;

/// The filters of a machine's threads, each made when a thread first needs it.
#[derive(Default)]
pub struct Filters(Mutex<Vec<(Role, Arc<BpfProgram>)>>);

impl Filters {
    /// Puts the current thread under the filter of its role. The process must have given up new privileges.
    ///
    /// # Errors
    /// The kernel has no such filters.
    pub fn install(&self, role: Role, needs: &Needs) -> io::Result<()> {
        if role == Role::Main {
            // Its arguments are in memory, where a filter can't look: the C library then takes clone.
            answer(libc::SYS_clone3, libc::ENOSYS)?;
        }
        if needs.user_network && !needs.paths_confined {
            // It would open any file. The network goes on with the name servers that it knows.
            answer(libc::SYS_openat, libc::EACCES)?;
        }
        load(&*self.of(role, needs)?)
    }

    fn of(&self, role: Role, needs: &Needs) -> io::Result<Arc<BpfProgram>> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, program)) = made.iter().find(|(other, _)| *other == role) {
            return Ok(program.clone());
        }
        let rules = Calls::of(role, needs).map_err(io::Error::other)?.into_rules();
        let program = Arc::new(compile(rules, SeccompAction::Trap, SeccompAction::Allow)?);
        made.push((role, program.clone()));
        Ok(program)
    }
}

/// Lets a call fail that the filter of the role allows.
fn answer(call: c_long, error: i32) -> io::Result<()> {
    let rules = BTreeMap::from([(call, Vec::new())]);
    load(&compile(rules, SeccompAction::Allow, SeccompAction::Errno(error as u32))?)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> io::Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64);
    filter.and_then(BpfProgram::try_from).map_err(io::Error::other)
}

fn load(program: &BpfProgram) -> io::Result<()> {
    let program = sock_fprog {
        len: program.len().try_into().map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // Kernels before 5.16 would otherwise take speculative loads from the thread, which costs a translator much; what a
    // guest can read by them of its own process is its own.
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    // SAFETY: the program is an array of that many `struct sock_filter`, which the kernel reads and doesn't keep.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
