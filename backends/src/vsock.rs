//! The host's side of a guest's socket device: Unix sockets, by the convention of Firecracker's.
//!
//! A program of the host's that wants port P of the guest connects to the socket at PATH and says `CONNECT P` and a line
//! feed; when the guest has accepted, it is answered `OK Q` and a line feed, and from then on has the connection. What the
//! guest wants of the host's port P goes to the socket at PATH_P, if a program listens there.
//!
//! All sockets belong to one thread, which waits for them by poll(2).

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bivisor_machine::virtio::vsock::{Connection, VsockGuest, VsockHost};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::console::{ConsoleError, SocketFile, listen_at};
use crate::thread::{Role, spawn};

/// Bytes that are read of a socket at once.
const PIECE: usize = 64 << 10;
/// Bytes of the line that a program of the host's says, at most.
const LINE: usize = 32;
/// Programs that have connected and not yet said what they want, at most.
const HANDSHAKES: usize = 64;
/// Connections that are over but whose last bytes have not been read, at most.
const LINGERING: usize = 256;
/// The host's ports of connections that programs of the host's want.
const FIRST_PORT: u32 = 1 << 30;

/// Why there is no host's side.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The socket can't be made.
    #[error("cannot listen at the socket {path} of --vsock: {cause}", path = .path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// The host has no descriptors or threads to give.
    #[error("cannot start the sockets of --vsock: {0}")]
    Start(#[source] io::Error),
}

/// What the device says, for the thread.
enum Command {
    Attach(Option<Arc<dyn VsockGuest>>),
    Connect(Connection),
    Accepted(Connection),
    Receive(Connection, Vec<u8>),
    EndOfInput(Connection),
    Closed(Connection),
    Ready,
    Stop,
}

struct Shared {
    commands: Mutex<Vec<Command>>,
    wake: OwnedFd,
}

impl Shared {
    fn say(&self, command: Command) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        // Full: it is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// The host's side. Dropping it ends its thread and removes its socket.
pub struct VsockSockets {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    _file: SocketFile,
}

impl VsockSockets {
    /// Listens at a path.
    ///
    /// # Errors
    /// The path is taken or can't be used, or the host has no thread to give.
    pub fn open(path: &Path) -> Result<Self, VsockError> {
        let (listener, file) = listen_at(path).map_err(|error| {
            let cause = match error {
                ConsoleError::Socket(_, error) => error.to_string(),
                ConsoleError::SocketInUse(_) => "another process listens there: choose another path".into(),
                _ => "something else is there: choose another path".into(),
            };
            VsockError::Socket { path: path.to_owned(), cause }
        })?;
        listener.set_nonblocking(true).map_err(VsockError::Start)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| VsockError::Start(error.into()))?;
        let shared = Arc::new(Shared { commands: Mutex::default(), wake });
        let mut server = Server {
            shared: shared.clone(),
            listener,
            path: path.to_owned(),
            guest: None,
            handshakes: Vec::new(),
            links: BTreeMap::new(),
            lingering: VecDeque::new(),
            next_port: FIRST_PORT,
        };
        let thread =
            spawn(Role::Vsock, "vsock", move || while server.turn() {}).map_err(VsockError::Start)?;
        Ok(Self { shared, thread: Some(thread), _file: file })
    }
}

impl Drop for VsockSockets {
    fn drop(&mut self) {
        self.shared.say(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has already been reported.
            let _ = thread.join();
        }
    }
}

impl VsockHost for VsockSockets {
    fn attach(&self, guest: Option<Arc<dyn VsockGuest>>) {
        self.shared.say(Command::Attach(guest));
    }
    fn connect(&self, connection: Connection) {
        self.shared.say(Command::Connect(connection));
    }
    fn accepted(&self, connection: Connection) {
        self.shared.say(Command::Accepted(connection));
    }
    fn receive(&self, connection: Connection, bytes: Vec<u8>) {
        self.shared.say(Command::Receive(connection, bytes));
    }
    fn end_of_input(&self, connection: Connection) {
        self.shared.say(Command::EndOfInput(connection));
    }
    fn closed(&self, connection: Connection) {
        self.shared.say(Command::Closed(connection));
    }
    fn ready(&self) {
        self.shared.say(Command::Ready);
    }
}

/// A program that has not yet said what it wants.
struct Handshake {
    stream: UnixStream,
    line: Vec<u8>,
}

/// A connection's socket.
struct Link {
    stream: UnixStream,
    /// Both sides have agreed.
    open: bool,
    /// From the guest, not yet taken by the socket.
    output: VecDeque<u8>,
    /// From the socket, not yet taken by the guest.
    input: Vec<u8>,
    /// The socket gives nothing more.
    input_ended: bool,
    /// The guest was told so.
    told_end: bool,
    /// The guest sends nothing more.
    output_ended: bool,
}

impl Link {
    fn new(stream: UnixStream, open: bool) -> Self {
        Self {
            stream,
            open,
            output: VecDeque::new(),
            input: Vec::new(),
            input_ended: false,
            told_end: false,
            output_ended: false,
        }
    }

    fn wants(&self) -> PollFlags {
        let mut wants = PollFlags::empty();
        if self.open && !self.input_ended && self.input.is_empty() {
            wants |= PollFlags::IN;
        }
        if !self.output.is_empty() {
            wants |= PollFlags::OUT;
        }
        wants
    }

    /// Writes what the socket takes; says how much.
    fn write(&mut self) -> io::Result<usize> {
        let mut written = 0;
        while !self.output.is_empty() {
            match self.stream.write(self.output.as_slices().0) {
                Ok(count) => {
                    self.output.drain(..count);
                    written += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.output.is_empty() && self.output_ended {
            // A far end that is gone needs no telling.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(written)
    }

    fn read(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; PIECE];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.input_ended = true,
            Ok(count) => {
                bytes.truncate(count);
                self.input = bytes;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// What a descriptor that poll(2) watches belongs to.
#[derive(Clone, Copy)]
enum Watched {
    Wake,
    Listener,
    Handshake(usize),
    Link(Connection),
    Lingering,
}

struct Server {
    shared: Arc<Shared>,
    listener: UnixListener,
    path: PathBuf,
    guest: Option<Arc<dyn VsockGuest>>,
    handshakes: Vec<Handshake>,
    links: BTreeMap<Connection, Link>,
    /// Connections that are over for the guest.
    lingering: VecDeque<Link>,
    next_port: u32,
}

impl Server {
    /// Waits until something happens, and does what follows. False: the end.
    fn turn(&mut self) -> bool {
        let happened = self.wait();
        // From the last on, as handshakes that end are removed.
        for watched in happened.into_iter().rev() {
            match watched {
                Watched::Wake => {
                    let mut count = [0; 8];
                    // Nothing to read: another turn has read it.
                    let _ = rustix::io::read(&self.shared.wake, &mut count);
                }
                Watched::Listener => self.accept(),
                Watched::Handshake(index) => self.shake_hands(index),
                Watched::Link(connection) => self.read(connection),
                Watched::Lingering => {}
            }
        }
        let commands =
            std::mem::take(&mut *self.shared.commands.lock().unwrap_or_else(PoisonError::into_inner));
        for command in commands {
            if matches!(command, Command::Stop) {
                return false;
            }
            self.obey(command);
        }
        let connections: Vec<Connection> = self.links.keys().copied().collect();
        connections.into_iter().for_each(|connection| self.advance(connection));
        self.lingering.retain_mut(|link| link.write().is_ok() && !link.output.is_empty());
        true
    }

    fn wait(&self) -> Vec<Watched> {
        let mut what = vec![Watched::Wake];
        let mut descriptors = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        if self.handshakes.len() < HANDSHAKES {
            what.push(Watched::Listener);
            descriptors.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        for (index, handshake) in self.handshakes.iter().enumerate() {
            what.push(Watched::Handshake(index));
            descriptors.push(PollFd::new(&handshake.stream, PollFlags::IN));
        }
        let links = self.links.iter().map(|(connection, link)| (Watched::Link(*connection), link));
        for (watched, link) in links.chain(self.lingering.iter().map(|link| (Watched::Lingering, link))) {
            // One of which nothing is wanted would only tell, again and again, that its far end is gone.
            if !link.wants().is_empty() {
                what.push(watched);
                descriptors.push(PollFd::from_borrowed_fd(link.stream.as_fd(), link.wants()));
            }
        }
        // Interrupted: nothing has happened.
        let _ = poll(&mut descriptors, None);
        let happened = what.into_iter().zip(&descriptors).filter(|(_, fd)| !fd.revents().is_empty());
        happened.map(|(watched, _)| watched).collect()
    }

    fn accept(&mut self) {
        if let Ok((stream, _)) = self.listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            self.handshakes.push(Handshake { stream, line: Vec::new() });
        }
    }

    /// Reads what a program wants, byte by byte: what follows the line is for the guest.
    fn shake_hands(&mut self, index: usize) {
        let Some(handshake) = self.handshakes.get_mut(index) else { return };
        let mut byte = [0];
        let complete = loop {
            match handshake.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break true,
                Ok(1) if handshake.line.len() < LINE => handshake.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break false,
            }
        };
        let Handshake { stream, line } = self.handshakes.swap_remove(index);
        let port = std::str::from_utf8(&line)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "))
            .and_then(|port| port.trim_end().parse().ok());
        if let (true, Some(guest_port)) = (complete, port) {
            self.ask_guest(stream, guest_port);
        }
    }

    fn ask_guest(&mut self, stream: UnixStream, guest_port: u32) {
        let connection = Connection { guest: guest_port, host: self.next_port };
        self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
        // A socket that is dropped tells the program that there is nobody.
        if let Some(guest) = &self.guest
            && guest.connect(connection)
        {
            self.links.insert(connection, Link::new(stream, false));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attach(guest) => self.guest = guest,
            Command::Connect(connection) => self.connect(connection),
            Command::Accepted(connection) => {
                if let Some(link) = self.links.get_mut(&connection) {
                    // Few bytes for an empty socket; a program that is gone is found out by reading.
                    let _ = link.stream.write_all(format!("OK {}\n", connection.host).as_bytes());
                    link.open = true;
                }
            }
            Command::Receive(connection, bytes) => {
                if let Some(link) = self.links.get_mut(&connection) {
                    link.output.extend(bytes);
                }
            }
            Command::EndOfInput(connection) => {
                if let Some(link) = self.links.get_mut(&connection) {
                    link.output_ended = true;
                }
            }
            Command::Closed(connection) => self.linger(connection),
            Command::Ready | Command::Stop => {}
        }
    }

    /// The guest wants a port of the host's.
    fn connect(&mut self, connection: Connection) {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{}", connection.host));
        match connect_at(Path::new(&path)) {
            Ok(stream) => {
                self.links.insert(connection, Link::new(stream, true));
                if let Some(guest) = &self.guest {
                    guest.accept(connection);
                }
            }
            Err(_) => {
                if let Some(guest) = &self.guest {
                    guest.close(connection);
                }
            }
        }
    }

    fn read(&mut self, connection: Connection) {
        let Some(link) = self.links.get_mut(&connection) else { return };
        if link.wants().contains(PollFlags::IN) && link.read().is_err() {
            self.close(connection);
        }
    }

    /// Moves a connection's bytes as far as both sides take them.
    fn advance(&mut self, connection: Connection) {
        let (Some(link), Some(guest)) = (self.links.get_mut(&connection), &self.guest) else { return };
        match link.write() {
            Ok(0) => {}
            Ok(count) => guest.consumed(connection, count as u32),
            Err(_) => return self.close(connection),
        }
        if !link.open {
            return;
        }
        if !link.input.is_empty() {
            let taken = guest.send(connection, &link.input);
            link.input.drain(..taken.min(link.input.len()));
        }
        if link.input_ended && link.input.is_empty() {
            if link.output_ended && link.output.is_empty() {
                return self.close(connection);
            }
            if !std::mem::replace(&mut link.told_end, true) {
                guest.end_of_output(connection);
            }
        }
    }

    /// The connection is over for the host.
    fn close(&mut self, connection: Connection) {
        self.links.remove(&connection);
        if let Some(guest) = &self.guest {
            guest.close(connection);
        }
    }

    /// The connection is over for the guest; what it has sent still goes on.
    fn linger(&mut self, connection: Connection) {
        if let Some(mut link) = self.links.remove(&connection) {
            (link.open, link.output_ended) = (false, true);
            self.lingering.push_back(link);
            if self.lingering.len() > LINGERING {
                self.lingering.pop_front();
            }
        }
    }
}

/// Connects without waiting: a program that does not accept is as good as none.
fn connect_at(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    /// What the guest hears.
    #[derive(Debug, PartialEq, Eq)]
    enum Heard {
        Connect(Connection),
        Accept(Connection),
        Data(Connection, Vec<u8>),
        Consumed(u32),
        End(Connection),
        Close(Connection),
    }

    /// A guest that takes at most so many bytes at a time.
    struct Guest(Sender<Heard>, Mutex<usize>);

    impl VsockGuest for Guest {
        fn connect(&self, connection: Connection) -> bool {
            self.0.send(Heard::Connect(connection)).is_ok()
        }
        fn accept(&self, connection: Connection) {
            self.0.send(Heard::Accept(connection)).unwrap();
        }
        fn send(&self, connection: Connection, bytes: &[u8]) -> usize {
            let mut room = self.1.lock().unwrap();
            let taken = bytes.len().min(*room);
            *room -= taken;
            if taken > 0 {
                self.0.send(Heard::Data(connection, bytes[..taken].to_vec())).unwrap();
            }
            taken
        }
        fn consumed(&self, _: Connection, bytes: u32) {
            self.0.send(Heard::Consumed(bytes)).unwrap();
        }
        fn end_of_output(&self, connection: Connection) {
            self.0.send(Heard::End(connection)).unwrap();
        }
        fn close(&self, connection: Connection) {
            self.0.send(Heard::Close(connection)).unwrap();
        }
    }

    struct Rig {
        folder: tempfile::TempDir,
        sockets: VsockSockets,
        guest: Arc<Guest>,
        heard: Receiver<Heard>,
    }

    fn rig() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let sockets = VsockSockets::open(&folder.path().join("s")).unwrap();
        let (sender, heard) = channel();
        let guest = Arc::new(Guest(sender, Mutex::new(usize::MAX)));
        sockets.attach(Some(guest.clone()));
        Rig { folder, sockets, guest, heard }
    }

    impl Rig {
        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }
        fn next(&self) -> Heard {
            self.heard.recv_timeout(Duration::from_secs(20)).unwrap()
        }
        fn silence(&self) {
            assert_eq!(self.heard.recv_timeout(Duration::from_millis(50)).ok(), None);
        }
    }

    #[test]
    fn a_program_of_the_hosts_reaches_the_guest() {
        let rig = rig();
        let mut client = UnixStream::connect(rig.path("s")).unwrap();
        client.write_all(b"CONNECT 52\nhello").unwrap();
        let c = Connection { guest: 52, host: FIRST_PORT };
        assert_eq!(rig.next(), Heard::Connect(c));
        rig.silence();
        rig.sockets.accepted(c);
        let mut reader = BufReader::new(client.try_clone().unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {FIRST_PORT}\n"));
        assert_eq!(rig.next(), Heard::Data(c, b"hello".to_vec()));
        rig.sockets.receive(c, b"answer".to_vec());
        assert_eq!(rig.next(), Heard::Consumed(6));
        rig.sockets.end_of_input(c);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "answer");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rig.next(), Heard::Close(c));
    }

    #[test]
    fn the_guest_reaches_a_program_and_waits_for_none() {
        let rig = rig();
        let nobody = Connection { guest: 1, host: 9 };
        rig.sockets.connect(nobody);
        assert_eq!(rig.next(), Heard::Close(nobody));
        let listener = UnixListener::bind(rig.path("s_80")).unwrap();
        let c = Connection { guest: 1, host: 80 };
        rig.sockets.connect(c);
        assert_eq!(rig.next(), Heard::Accept(c));
        let (mut server, _) = listener.accept().unwrap();
        // The guest has little room, then some more.
        *rig.guest.1.lock().unwrap() = 3;
        server.write_all(b"abcde").unwrap();
        assert_eq!(rig.next(), Heard::Data(c, b"abc".to_vec()));
        rig.silence();
        *rig.guest.1.lock().unwrap() = 9;
        rig.sockets.ready();
        assert_eq!(rig.next(), Heard::Data(c, b"de".to_vec()));
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rig.next(), Heard::End(c));
        // What the guest sent last arrives after its end.
        rig.sockets.receive(c, b"bye".to_vec());
        rig.sockets.closed(c);
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "bye");
    }

    #[test]
    fn who_says_something_else_is_hung_up_on() {
        let rig = rig();
        for said in ["HELLO\n", "CONNECT x\n", "CONNECT 5 with a line that has no end in sight at all"] {
            let mut client = UnixStream::connect(rig.path("s")).unwrap();
            client.write_all(said.as_bytes()).unwrap();
            let mut rest = Vec::new();
            // Hung up with bytes unread is a reset.
            let _ = client.read_to_end(&mut rest);
            assert!(rest.is_empty());
        }
        rig.silence();
        rig.sockets.attach(None);
        let mut client = UnixStream::connect(rig.path("s")).unwrap();
        client.write_all(b"CONNECT 5\n").unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_path_that_is_taken_is_refused() {
        let rig = rig();
        let error = |path: &Path| VsockSockets::open(path).err().unwrap().to_string();
        assert!(error(&rig.path("s")).contains("another process listens there"));
        std::fs::write(rig.path("file"), "x").unwrap();
        assert!(error(&rig.path("file")).contains("something else is there"));
        assert!(error(&rig.path("no/where")).contains("--vsock"));
    }
}
