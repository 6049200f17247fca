//! The console on a Unix socket: we listen, one client at a time has the line.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use super::output::FarEnd;
use super::{Console, ConsoleError, Held, Input, Output};
use crate::thread::{Role, spawn};

/// Output kept for the next client while there is none.
const BACKLOG: usize = 64 << 10;

pub(super) fn open(
    path: &Path,
    input: Input,
    lost: impl FnOnce(io::Error) + Send + 'static,
) -> Result<Console, ConsoleError> {
    let (listener, file) = listen_at(path)?;
    let line = Arc::new(Line::default());
    let output = Output::start(SocketEnd(line.clone()), lost).map_err(ConsoleError::Thread)?;
    let sink = input.clone();
    spawn(Role::ConsoleIn, "console-in", move || serve(&listener, &line, &sink))
        .map_err(ConsoleError::Thread)?;
    let address = path.display().to_string();
    Ok(Console::new(output, input, Some(address), Duration::from_millis(500), Held::Socket { _file: file }))
}

/// Listens at a path, with a socket that only its owner can connect to. A socket that nobody listens at any more
/// is replaced; anything else is left alone. Dropping the second value removes the socket.
pub fn listen_at(path: &Path) -> Result<(UnixListener, SocketFile), ConsoleError> {
    let failed = |error: io::Error| ConsoleError::Socket(path.to_owned(), error);
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(ConsoleError::NotASocket(path.to_owned())),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Ok(_) => return Err(ConsoleError::SocketInUse(path.to_owned())),
            Err(error) => return Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    bind_private(path).map_err(failed)
}

/// Waits for the next client.
pub fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept() {
            Ok((client, _)) => return client,
            // Out of descriptors or the like: it may pass.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn bind_private(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On Linux the permissions of the socket file are those of the socket when it is bound (unix(7)), so there is
    // no moment at which others could connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    let inode = fs::symlink_metadata(path)?.ino();
    listen(&socket, 8)?;
    Ok((UnixListener::from(socket), SocketFile { path: path.to_owned(), inode }))
}

/// A socket in the file system, removed when dropped if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            // Nothing is lost by a socket that stays: the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The client that has the line, if any, and what was said while there was none.
#[derive(Default)]
struct Line {
    state: Mutex<LineState>,
}

#[derive(Default)]
struct LineState {
    client: Option<Arc<UnixStream>>,
    unseen: VecDeque<u8>,
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct SocketEnd(Arc<Line>);

impl FarEnd for SocketEnd {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let client = {
            let mut state = self.0.lock();
            match state.client.clone() {
                Some(client) => client,
                None => {
                    state.unseen.extend(bytes);
                    let excess = state.unseen.len().saturating_sub(BACKLOG);
                    state.unseen.drain(..excess);
                    return Ok(());
                }
            }
        };
        // A client that left loses what it did not read; the reader thread sees that it is gone.
        let _ = (&*client).write_all(bytes);
        Ok(())
    }
}

/// Accepts clients for ever: the first gets the line, others are told that it is taken.
fn serve(listener: &UnixListener, line: &Arc<Line>, input: &Input) {
    loop {
        serve_client(listener, line, input, accept(listener));
    }
}

fn serve_client(listener: &UnixListener, line: &Arc<Line>, input: &Input, client: UnixStream) {
    let client = Arc::new(client);
    {
        let mut state = line.lock();
        let unseen: Vec<u8> = state.unseen.drain(..).collect();
        // The socket's buffer is empty and larger than the backlog, so this does not wait while we hold the lock.
        let _ = (&*client).write_all(&unseen);
        state.client = Some(client.clone());
    }
    let mut buffer = [0; 4096];
    loop {
        let mut ready = [
            PollFd::from_borrowed_fd(client.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => break,
        }
        let (readable, newcomer) = (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
        if newcomer && let Ok((mut other, _)) = listener.accept() {
            let _ = other.write_all(b"bivisor: another client has this console\r\n");
        }
        if readable {
            match (&*client).read(&mut buffer) {
                Ok(0) => break,
                // A guest that takes nothing must not keep the line taken by a client that left.
                Ok(count) => {
                    let present = || !hung_up(&client);
                    if !input.deliver(&buffer[..count], &present) {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }
    line.lock().client = None;
}

fn hung_up(client: &UnixStream) -> bool {
    let mut state = [PollFd::from_borrowed_fd(client.as_fd(), PollFlags::empty())];
    poll(&mut state, Some(&rustix::event::Timespec::default())).is_ok()
        && state[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    use super::super::ConsoleSpec;
    use super::*;
    use bivisor_machine::host::ByteStream;
    use std::os::unix::fs::PermissionsExt;

    fn path(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("bivisor-console-{}-{name}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    fn open_console(path: &Path) -> Result<Console, ConsoleError> {
        Console::open(&ConsoleSpec::Unix(path.to_owned()), Arc::new(|_| ()))
    }

    #[test]
    fn a_late_client_sees_the_start_and_a_second_one_is_refused() {
        let path = path("late");
        let console = open_console(&path).unwrap();
        console.output().write(b"boot ");
        assert_eq!(console.output().flush(Duration::from_secs(5)), 0);
        let mut first = UnixStream::connect(&path).unwrap();
        first.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut seen = [0; 5];
        first.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"boot ");

        let mut told = String::new();
        let mut second = UnixStream::connect(&path).unwrap();
        second.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        second.read_to_string(&mut told).unwrap();
        assert_eq!(told, "bivisor: another client has this console\r\n");

        console.output().write(b"more");
        first.read_exact(&mut seen[..4]).unwrap();
        assert_eq!(&seen[..4], b"more");
        console.close();
        assert!(!path.exists(), "the socket is removed at the end");
    }

    #[test]
    fn the_socket_is_private() {
        let path = path("private");
        let console = open_console(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        console.close();
    }

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let path = path("stale");
        drop(UnixListener::bind(&path).unwrap());
        let console = open_console(&path).unwrap();
        assert!(matches!(open_console(&path), Err(ConsoleError::SocketInUse(_))));
        console.close();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(open_console(&path), Err(ConsoleError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
    }
}
