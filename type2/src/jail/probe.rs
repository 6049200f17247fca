//! `--jail-probe ROLE:ATTEMPT`, for tests: a thread of a role tries from inside what the jail must refuse.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::str::FromStr;

use bivisor_backends::terminal::message;
use bivisor_backends::thread::{self, Role};
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Pid, Signal, getppid, kill_process};

use crate::status;

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Attempt {
    Open,
    Create,
    UnixSocket,
    InetSocket,
    NetlinkSocket,
    Listen,
    Execute,
    Fork,
    Trace,
    Kill,
    ExecutableMemory,
    Kvm,
}

/// A thread that tries something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    role: Role,
    attempt: Attempt,
    /// The process that started this one.
    parent: Pid,
}

impl FromStr for Probe {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (role, attempt) = text.split_once(':').ok_or("say ROLE:ATTEMPT")?;
        let role = match role {
            "main" => Role::Main,
            "vcpu" => Role::Vcpu,
            "disk" => Role::Disk,
            "net-user" => Role::NetUser,
            "console-in" => Role::ConsoleIn,
            "log" => Role::Log,
            _ => return Err(format!("'{role}' is no role of a thread that can be probed")),
        };
        let parent = getppid().ok_or("the parent is in another namespace")?;
        Ok(Self { role, attempt: clap::ValueEnum::from_str(attempt, false)?, parent })
    }
}

impl Probe {
    /// While the process is being confined: threads that the main thread starts before it is inside itself.
    pub fn before_close(self) {
        if !matches!(self.role, Role::Main | Role::Vcpu) {
            self.start();
        }
    }

    /// When it is.
    pub fn after_close(self) {
        match self.role {
            Role::Main => self.run(),
            Role::Vcpu => self.start(),
            _ => {}
        }
    }

    fn start(self) {
        match thread::spawn(self.role, "probe", move || self.run()) {
            // It ends the process.
            Ok(thread) => drop(thread.join()),
            Err(error) => message(&format!("bivisor: no thread for the probe: {error}\n")),
        }
    }

    /// Ends the process, if the attempt itself doesn't.
    fn run(self) {
        let (status, told) = match self.attempt.make(self.parent) {
            Ok(()) => (status::SUCCESS, "the jail let it happen".into()),
            Err(error) => (status::JAIL, format!("the jail let it fail: {error}")),
        };
        message(&format!("bivisor: probe: {told}\n"));
        std::process::exit(status.into());
    }
}

impl Attempt {
    fn make(self, parent: Pid) -> io::Result<()> {
        match self {
            Self::Open => fs::read("/etc/passwd").map(drop),
            Self::Create => fs::write("jail-probe", "x"),
            Self::UnixSocket => UnixDatagram::unbound().map(drop),
            Self::InetSocket => Ok(socket(AddressFamily::INET, SocketType::STREAM, None).map(drop)?),
            Self::NetlinkSocket => Ok(socket(AddressFamily::NETLINK, SocketType::RAW, None).map(drop)?),
            Self::Listen => TcpListener::bind(("127.0.0.1", 0)).map(drop),
            Self::Execute => Err(Command::new("/bin/true").exec()),
            Self::Fork => fork(),
            Self::Trace => trace(parent),
            Self::Kill => Ok(kill_process(parent, Signal::CONT)?),
            Self::ExecutableMemory => executable_memory(),
            Self::Kvm => kvm(),
        }
    }
}

/// Asks for a virtual machine, of a descriptor that has none to give.
fn kvm() -> io::Result<()> {
    // SAFETY: the request has no argument in memory.
    match unsafe { libc::ioctl(libc::STDERR_FILENO, bivisor_kvm::ioctls::MAKING[0].into(), 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn fork() -> io::Result<()> {
    // SAFETY: a child ends at once.
    match unsafe { libc::fork() } {
        // SAFETY: see above.
        0 => unsafe { libc::_exit(0) },
        1.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn trace(process: Pid) -> io::Result<()> {
    // SAFETY: reads and writes nothing of ours.
    let result = unsafe { libc::ptrace(libc::PTRACE_SEIZE, process.as_raw_pid(), 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Memory that can be written and executed.
fn executable_memory() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping just made, which nobody uses.
    let result = unsafe { libc::mprotect(page, 4096, protection | libc::PROT_EXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
