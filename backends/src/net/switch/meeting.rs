//! How the members of a switch find each other: a folder with a socket for each, and a lock for who joins.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with, sockopt,
};

use crate::runtime;

/// Members that may wait to be accepted.
const BACKLOG: i32 = 128;

/// How long somebody else's joining may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes that may be on their way to one member.
const SEND_BUFFER: usize = 1 << 20;

/// What joining gives: our socket, and a connection to each member that was there before.
pub struct Meeting {
    pub listener: OwnedFd,
    pub file: PathBuf,
    pub members: Vec<OwnedFd>,
}

/// Joins those who meet in a folder.
pub fn join(folder: &Path) -> io::Result<Meeting> {
    runtime::private(folder)?;
    let lock = runtime::lock(&folder.join("lock"), PATIENCE)?.ok_or_else(|| {
        io::Error::new(io::ErrorKind::TimedOut, "another process has been joining it for seconds")
    })?;
    let file = own_name(folder);
    let listener = seqpacket()?;
    bind(&listener, &SocketAddrUnix::new(&file)?)?;
    listen(&listener, BACKLOG)?;
    let members = others(folder, &file)?;
    // The lock ends with its file.
    drop(lock);
    Ok(Meeting { listener, file, members })
}

/// No living process has the same, and one that died doesn't matter: its socket goes.
fn own_name(folder: &Path) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{}-{number}", process::id()));
        if fs::symlink_metadata(&path).is_err() {
            return path;
        }
    }
}

/// Connects to everybody else, and removes the sockets of those who are dead.
fn others(folder: &Path, own: &Path) -> io::Result<Vec<OwnedFd>> {
    let mut members = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path == own || path.file_name().is_none_or(|name| name == "lock") {
            continue;
        }
        let socket = seqpacket()?;
        match connect(&socket, &SocketAddrUnix::new(&path)?) {
            Ok(()) => {
                tune(&socket);
                members.push(socket);
            }
            Err(Errno::CONNREFUSED) => {
                // Whoever is quicker removes it.
                let _ = fs::remove_file(&path);
            }
            // Gone in this moment, or a member that doesn't get to accept; it won't hear us.
            Err(_) => {}
        }
    }
    Ok(members)
}

fn seqpacket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Lets more be on its way at once.
pub fn tune(socket: &OwnedFd) {
    // The system's limit holds, whatever is asked for.
    let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER);
}
