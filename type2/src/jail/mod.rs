//! The jail of a machine's process: what an engine or a device that the guest has taken over may still ask of the host.
//!
//! All files, sockets and networks are opened first. Each thread enters the jail when it starts, the main thread before
//! it reads the guest's kernel. From then on a thread may make the system calls of its role only (seccomp, [`calls`]),
//! and what calls with a path are left reach the machine's own files only (Landlock, [`paths`]). A call that is refused
//! ends the process ([`refusal`]). docs/jail.md tells what is allowed, and against whom it helps.

mod calls;
mod filter;
mod paths;
mod probe;
mod refusal;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bivisor_backends::console::ConsoleSpec;
use bivisor_backends::net::{NetworkSpec, SwitchPort};
use bivisor_backends::runtime;
use bivisor_backends::thread::{self, Role};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::{EngineChoice, GdbSpec, VmConfig};
use filter::Filters;
use paths::Paths;
pub use paths::Support;
pub use probe::Probe;

/// The host can't confine the process.
#[derive(Debug, thiserror::Error)]
#[error(
    "this host can't confine the machine's process ({step}: {source}): \
     `bivisor doctor` tells more, and --no-jail runs the machine without"
)]
pub struct JailError {
    step: &'static str,
    source: io::Error,
}

impl JailError {
    fn new(step: &'static str, source: impl Into<io::Error>) -> Self {
        Self { step, source: source.into() }
    }
}

/// What a machine's devices need of the host, and so its threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Needs {
    /// A user-mode network.
    user_network: bool,
    /// A network of the host's kernel.
    tap: bool,
    /// A network between machines.
    switch: bool,
    /// Stream sockets of the guest's.
    vsock: bool,
    /// The host's KVM.
    kvm: bool,
    /// Sockets in the file system, to be removed at the end.
    socket_files: bool,
    /// Landlock holds back calls with a path.
    paths_confined: bool,
}

impl Needs {
    fn of(config: &VmConfig, socket_folders: &[PathBuf]) -> Self {
        let any = |wanted: fn(&NetworkSpec) -> bool| config.nets.iter().any(|net| wanted(&net.network));
        Self {
            user_network: any(|network| matches!(network, NetworkSpec::User(_))),
            tap: any(|network| matches!(network, NetworkSpec::Tap(_))),
            switch: any(|network| matches!(network, NetworkSpec::Switch(_))),
            vsock: config.vsock.is_some(),
            kvm: config.engine == EngineChoice::Kvm,
            socket_files: !socket_folders.is_empty(),
            paths_confined: false,
        }
    }
}

/// The folders of sockets that are removed when the machine ends.
fn socket_folders(config: &VmConfig) -> Vec<PathBuf> {
    let console = |spec: &ConsoleSpec| match spec {
        ConsoleSpec::Unix(path) => Some(path.clone()),
        _ => None,
    };
    let debugger = config.gdb.as_ref().and_then(|spec| match spec {
        GdbSpec::Unix(path) => Some(path.clone()),
        GdbSpec::Port(_) => None,
    });
    let virtio_console = config.virtio_console.as_ref().and_then(console);
    let paths = [console(&config.console), virtio_console, config.vsock.clone(), debugger];
    let folders = paths.into_iter().flatten().filter_map(|path| match path.parent()? {
        folder if folder.as_os_str().is_empty() => Some(".".into()),
        folder => Some(folder.to_owned()),
    });
    let switches = config.nets.iter().filter_map(|net| match &net.network {
        NetworkSpec::Switch(name) => {
            let folder = SwitchPort::folder(name).ok()?;
            // A rule needs a folder that is there. What is wrong with it is told by who joins.
            let _ = runtime::private(&folder);
            Some(folder)
        }
        _ => None,
    });
    folders.chain(switches).collect()
}

/// A jail whose threads enter it one by one.
pub struct Jail {
    needs: Needs,
    paths: Paths,
    filters: Filters,
    /// The main thread is inside, and so are all threads that it starts from now on.
    closed: AtomicBool,
}

impl Jail {
    /// Begins to confine the process, which may use that many of the host's processors at once: threads that are started
    /// from now on are in the jail.
    ///
    /// # Errors
    /// The host can't.
    pub fn begin(config: &VmConfig, processors: usize) -> Result<Arc<Self>, JailError> {
        settle_heaps(processors);
        rustix::thread::set_no_new_privs(true).map_err(|error| JailError::new("no new privileges", error))?;
        refusal::install().map_err(|error| JailError::new("a handler for SIGSYS", error))?;
        let folders = socket_folders(config);
        let mut needs = Needs::of(config, &folders);
        let landlock = |error| JailError::new("Landlock", error);
        let paths = Paths::new(&needs, &folders).map_err(landlock)?;
        let support = paths::support().map_err(landlock)?;
        needs.paths_confined = matches!(support, Support::Full | Support::Partial);
        let jail =
            Arc::new(Self { needs, paths, filters: Filters::default(), closed: AtomicBool::new(false) });
        let entered = jail.clone();
        thread::on_entry(move |role| {
            // A thread that can't enter must not run.
            if let Err(error) = entered.enter(role) {
                panic!("a thread can't be confined: {error}");
            }
        });
        Ok(jail)
    }

    /// Confines the main thread, when all is open.
    ///
    /// # Errors
    /// The host can't.
    pub fn close(&self) -> Result<(), JailError> {
        limit_resources().map_err(|error| JailError::new("resource limits", error))?;
        self.enter(Role::Main)?;
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Confines the current thread.
    fn enter(&self, role: Role) -> Result<(), JailError> {
        refusal::set_role(role);
        if !self.closed.load(Ordering::SeqCst) {
            self.paths.confine().map_err(|error| JailError::new("Landlock", error))?;
        }
        self.filters.install(role, &self.needs).map_err(|error| JailError::new("seccomp", error))
    }
}

/// Tries what a jail needs, in a thread that ends then: a host without seccomp is an error.
///
/// # Errors
/// The host can't confine a process.
pub fn try_out() -> Result<Support, JailError> {
    rustix::thread::set_no_new_privs(true).map_err(|error| JailError::new("no new privileges", error))?;
    let support = paths::support().map_err(|error| JailError::new("Landlock", error))?;
    let tried = try_in_thread(|| Filters::default().install(Role::Log, &Needs::default()));
    tried.map_err(|error| JailError::new("seccomp", error))?;
    Ok(support)
}

/// Confines a thread that ends then: what confines one is never taken away again.
fn try_in_thread<T: Send + 'static>(
    confine: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let tried = std::thread::spawn(confine).join();
    tried.unwrap_or_else(|_| Err(io::Error::other("the thread that tries it has failed")))
}

/// As many heaps for threads as the C library would settle for by itself: it would ask /sys for the number of processors
/// when some thread needs one more.
#[allow(unsafe_code)]
fn settle_heaps(processors: usize) {
    let heaps = processors.saturating_mul(8).try_into().unwrap_or(i32::MAX);
    // SAFETY: sets a number. That it is refused does no harm here.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, heaps) };
}

/// No core dumps, which would hold the guest's memory, and no more descriptors than are asked for by now.
fn limit_resources() -> rustix::io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.current, maximum: limit.current })
}
