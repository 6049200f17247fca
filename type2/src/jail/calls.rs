//! The system calls that each thread may make. A machine's threads meet in its devices: a virtual processor's thread
//! carries a frame into a socket, a disk's thread raises an interrupt. So most have what devices do in common.

use std::collections::BTreeMap;

use bivisor_backends::thread::Role;
use bivisor_kvm::ioctls as kvm;
use libc::c_long;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{BackendError, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::Needs;

/// What any thread needs: memory that can't be executed, locks, clocks, descriptors that are open, and its own end.
const BASIC: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    // Standard error may be a log of bounded size: who writes to it makes it shorter.
    libc::SYS_fstat,
    libc::SYS_pread64,
    libc::SYS_ftruncate,
    // The handlers of signals, on whatever thread, tell the thread for signals by a socket.
    libc::SYS_sendto,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_geteuid,
    libc::SYS_sched_getaffinity,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_membarrier,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Disks, and files that are written to the end.
const FILES: &[c_long] = &[
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fstat,
];

/// Sockets that are open.
const SOCKETS: &[c_long] = &[
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
];

const EPOLL: &[c_long] =
    &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_epoll_ctl];

/// What starting a thread needs besides `clone`.
const NEW_THREAD: &[c_long] =
    &[libc::SYS_clone3, libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_seccomp];

/// What a new machine needs: the translator maps its context several times.
const NEW_MACHINE: &[c_long] = &[libc::SYS_memfd_create];

/// Settings of a terminal: every thread restores them when it has to end the process.
/// (Linux, include/uapi/asm-generic/ioctls.h: TCGETS to TCSETSF, TCFLSH, and TCGETS2 to TCSETSF2.)
const TERMINAL: &[u32] =
    &[0x5401, 0x5402, 0x5403, 0x5404, 0x540b, 0x802c_542a, 0x402c_542b, 0x402c_542c, 0x402c_542d];
/// TUNSETOFFLOAD (Linux, include/uapi/linux/if_tun.h).
const TAP: &[u32] = &[0x4004_54d0];
/// FIONBIO, by which a socket is made not to wait.
const NONBLOCKING: &[u32] = &[0x5421];

/// What fcntl may do to a descriptor. Of the others, some send signals to any process.
const DESCRIPTOR_COMMANDS: &[i32] =
    &[libc::F_GETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC, libc::F_OFD_SETLK];

/// What a call is tested for: argument number, comparison, value.
type Test = (u8, SeccompCmpOp, u64);

/// The calls that a thread may make.
#[derive(Default)]
pub struct Calls {
    /// By number; without a rule, whatever the arguments.
    rules: BTreeMap<i64, Vec<SeccompRule>>,
}

impl Calls {
    /// The calls of a thread of this role.
    ///
    /// # Errors
    /// A test names an argument that no call has.
    pub fn of(role: Role, needs: &Needs) -> Result<Self, BackendError> {
        let mut calls = Self::default();
        calls.basic()?;
        match role {
            Role::Main => calls.main(needs)?,
            Role::Vcpu => {
                calls.guest(needs)?;
                if needs.kvm {
                    calls.ioctls(&kvm::STATE)?;
                    calls.ioctls(&kvm::EVENTS)?;
                }
            }
            Role::Timer => calls.guest(needs)?,
            Role::Disk => calls.any(FILES),
            Role::NetLimit => calls.network(needs)?,
            Role::NetUser => {
                calls.network(needs)?;
                calls.any(EPOLL);
                calls.any(&[libc::SYS_accept4]);
            }
            Role::NetSwitch => {
                calls.any(SOCKETS);
                calls.any(EPOLL);
                calls.any(&[libc::SYS_accept4]);
            }
            Role::Vsock => {
                calls.any(SOCKETS);
                calls.any(&[libc::SYS_accept4, libc::SYS_connect]);
                calls.socket(libc::AF_UNIX)?;
                calls.ioctls(NONBLOCKING)?;
            }
            Role::ConsoleIn | Role::Control => calls.server()?,
            Role::Debugger => {
                calls.server()?;
                if needs.kvm {
                    calls.ioctls(&kvm::STATE)?;
                }
            }
            Role::ConsoleOut | Role::Signals => calls.any(SOCKETS),
            Role::NetTap | Role::Log => {}
        }
        Ok(calls)
    }

    /// The rules, by number of the call.
    pub fn into_rules(self) -> BTreeMap<i64, Vec<SeccompRule>> {
        self.rules
    }

    fn basic(&mut self) -> Result<(), BackendError> {
        self.any(BASIC);
        let executable = libc::PROT_EXEC as u64;
        self.only(libc::SYS_mmap, &[(2, MaskedEq(executable), 0)])?;
        self.only(libc::SYS_mprotect, &[(2, MaskedEq(executable), 0)])?;
        // Signals to this process only: a thread that ends it in its own way, or stops it as the terminal asks.
        let process = u64::from(std::process::id());
        self.only(libc::SYS_tgkill, &[(0, Eq, process)])?;
        self.only(libc::SYS_kill, &[(0, Eq, process)])?;
        // What catches refused calls stays.
        self.only(libc::SYS_rt_sigaction, &[(0, Ne, libc::SIGSYS as u64)])?;
        for command in DESCRIPTOR_COMMANDS {
            self.only(libc::SYS_fcntl, &[(1, Eq, *command as u64)])?;
        }
        self.ioctls(TERMINAL)
    }

    /// Whoever comes to a socket.
    fn server(&mut self) -> Result<(), BackendError> {
        self.any(SOCKETS);
        self.any(&[libc::SYS_accept4]);
        self.ioctls(NONBLOCKING)
    }

    /// What the guest makes its devices do.
    fn guest(&mut self, needs: &Needs) -> Result<(), BackendError> {
        self.any(FILES);
        self.only(libc::SYS_prctl, &[(0, Eq, libc::PR_SET_TIMERSLACK as u64)])?;
        self.network(needs)
    }

    /// Sending frames.
    fn network(&mut self, needs: &Needs) -> Result<(), BackendError> {
        if needs.tap {
            self.ioctls(TAP)?;
        }
        if needs.switch || needs.user_network {
            self.any(SOCKETS);
            self.any(&[libc::SYS_epoll_ctl]);
        }
        if needs.user_network {
            self.socket(libc::AF_INET)?;
            self.socket(libc::AF_INET6)?;
            self.any(&[libc::SYS_connect]);
            // The host's name servers are looked up again when its file of them changes.
            self.any(&[libc::SYS_statx, libc::SYS_newfstatat]);
            self.only(libc::SYS_openat, &[(2, Eq, (libc::O_RDONLY | libc::O_CLOEXEC) as u64)])?;
        }
        Ok(())
    }

    /// The supervisor's. Threads that it starts have its filter besides their own, so it may do what they may.
    fn main(&mut self, needs: &Needs) -> Result<(), BackendError> {
        self.guest(needs)?;
        self.any(NEW_THREAD);
        self.any(NEW_MACHINE);
        self.only(libc::SYS_prctl, &[(0, Eq, libc::PR_SET_NAME as u64)])?;
        let thread =
            (libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD)
                as u64;
        self.only(libc::SYS_clone, &[(0, MaskedEq(thread), thread)])?;
        // Code is written through another mapping: none is ever both.
        let code = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        self.only(libc::SYS_mprotect, &[(2, Eq, code)])?;
        if needs.switch || needs.vsock {
            self.any(SOCKETS);
        }
        if needs.kvm {
            self.ioctls(&kvm::MAKING)?;
            self.ioctls(&kvm::STATE)?;
            self.ioctls(&kvm::EVENTS)?;
        }
        if needs.socket_files {
            self.any(&[libc::SYS_unlink, libc::SYS_unlinkat, libc::SYS_statx, libc::SYS_newfstatat]);
        } else {
            let empty_path = libc::AT_EMPTY_PATH as u64;
            self.only(libc::SYS_newfstatat, &[(3, MaskedEq(empty_path), empty_path)])?;
            self.only(libc::SYS_statx, &[(2, MaskedEq(empty_path), empty_path)])?;
        }
        Ok(())
    }

    fn socket(&mut self, family: i32) -> Result<(), BackendError> {
        self.only(libc::SYS_socket, &[(0, Eq, family as u64)])
    }

    fn ioctls(&mut self, requests: &[u32]) -> Result<(), BackendError> {
        requests.iter().try_for_each(|&request| self.only(libc::SYS_ioctl, &[(1, Eq, request.into())]))
    }

    /// Allows calls with any arguments.
    fn any(&mut self, calls: &[c_long]) {
        for &call in calls {
            self.rules.insert(call, Vec::new());
        }
    }

    /// Allows a call whose arguments pass all tests. Only the lower 32 bits are looked at: all that are tested are `int`.
    fn only(&mut self, call: c_long, tests: &[Test]) -> Result<(), BackendError> {
        // Nothing is added to a call that is allowed whatever its arguments.
        if self.rules.get(&call).is_some_and(Vec::is_empty) {
            return Ok(());
        }
        let conditions = tests.iter().map(|(argument, operator, value)| {
            SeccompCondition::new(*argument, Dword, operator.clone(), *value)
        });
        let rule = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
        self.rules.entry(call).or_default().push(rule);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of KVM's requests that a thread may make.
    fn requests(role: Role, kvm: bool) -> Vec<u32> {
        let rules = Calls::of(role, &Needs { kvm, ..Needs::default() }).unwrap().into_rules();
        let allowed = |request: &u32| {
            let condition = SeccompCondition::new(1, Dword, Eq, (*request).into()).unwrap();
            rules[&libc::SYS_ioctl].contains(&SeccompRule::new(vec![condition]).unwrap())
        };
        let all = kvm::MAKING.into_iter().chain(kvm::STATE).chain(kvm::EVENTS);
        all.filter(allowed).collect()
    }

    const ROLES: [Role; 15] = [
        Role::Main,
        Role::Vcpu,
        Role::Timer,
        Role::Disk,
        Role::NetUser,
        Role::NetTap,
        Role::NetSwitch,
        Role::NetLimit,
        Role::Vsock,
        Role::ConsoleIn,
        Role::ConsoleOut,
        Role::Signals,
        Role::Log,
        Role::Debugger,
        Role::Control,
    ];

    #[test]
    fn kvm_is_for_those_who_make_and_execute_a_machine() {
        let (making, state, events) = (&kvm::MAKING[..], &kvm::STATE[..], &kvm::EVENTS[..]);
        for role in ROLES {
            let expected = match role {
                Role::Main => [making, state, events].concat(),
                Role::Vcpu => [state, events].concat(),
                Role::Debugger => state.to_vec(),
                _ => Vec::new(),
            };
            assert_eq!(requests(role, true), expected, "{role:?}");
            assert_eq!(requests(role, false), [0; 0], "{role:?}, on another engine");
        }
    }
}
