//! The user-mode network under load: large transfers, many connections, guests that don't play along.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bivisor_backends::net::{NetSpec, Transport, UserConfig, UserNetwork};
use smoltcp::socket::tcp;
use smoltcp::wire::Ipv4Address;

use crate::guest::{Guest, forwarded};

const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);

/// Bytes of a transfer. What is sent repeats after a prime number of bytes, so that a piece that is lost, doubled or
/// out of place shows.
const TOTAL: usize = 256 << 20;
const PERIOD: usize = 65521;

fn stream() -> Vec<u8> {
    (0..2 * PERIOD as u32).map(|at| ((at % PERIOD as u32).wrapping_mul(2654435761) >> 13) as u8).collect()
}

/// Checks that `bytes` are what the stream has at `at`.
fn check(stream: &[u8], at: usize, bytes: &[u8]) {
    let mut at = at;
    for piece in bytes.chunks(PERIOD) {
        let begin = at % PERIOD;
        assert!(piece == &stream[begin..begin + piece.len()], "wrong bytes after {at}");
        at += piece.len();
    }
}

/// A guest whose device takes and gives large segments and leaves checksums to the port.
fn large(config: UserConfig) -> Guest {
    let config = UserConfig { host_loopback: true, mtu: 65520, ..config };
    Guest::with(Arc::new(UserNetwork::new(config).unwrap()), 65520, false).configured()
}

fn small(config: UserConfig) -> Guest {
    let config = UserConfig { host_loopback: true, ..config };
    Guest::new(Arc::new(UserNetwork::new(config).unwrap())).configured()
}

fn told(what: &str, bytes: usize, began: Instant) -> Duration {
    let took = began.elapsed();
    println!("{what}: {:.2} Gbit/s", bytes as f64 * 8.0 / took.as_secs_f64() / 1e9);
    took
}

/// The host's side of a connection that reads the stream, after a while, and tells how much came.
fn reader(pause: Duration) -> (u16, JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        thread::sleep(pause);
        let (stream, mut bytes, mut got) = (stream(), vec![0; 1 << 18], 0);
        loop {
            let count = peer.read(&mut bytes).unwrap();
            if count == 0 {
                return got;
            }
            check(&stream, got, &bytes[..count]);
            got += count;
        }
    });
    (port, server)
}

/// The host's side of a connection that writes so much of the stream.
fn writer(total: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let (stream, mut sent) = (stream(), 0);
        while sent < total {
            let count = PERIOD.min(total - sent);
            peer.write_all(&stream[sent % PERIOD..][..count]).unwrap();
            sent += count;
        }
    });
    port
}

/// A transfer of so many bytes, with the words that tell of it.
type Direction = fn(Guest, &str, usize) -> Duration;

/// Sends so much of the stream from the guest to a reader that waits a while first.
fn send(guest: &mut Guest, total: usize, pause: Duration) -> Instant {
    let (port, server) = reader(pause);
    let handle = guest.tcp(1 << 20);
    assert!(guest.connect(handle, (GATEWAY, port), 40000));
    let (stream, mut sent, began) = (stream(), 0, Instant::now());
    guest.until("the transfer", |guest| {
        let socket = guest.tcp_socket(handle);
        while sent < total && socket.can_send() {
            let count = PERIOD.min(total - sent);
            sent += socket.send_slice(&stream[sent % PERIOD..][..count]).unwrap();
        }
        if sent == total {
            socket.close();
        }
        server.is_finished()
    });
    assert_eq!(server.join().unwrap(), total);
    began
}

/// Takes what has come to a socket; `got`: how much came before.
fn receive(socket: &mut tcp::Socket<'_>, stream: &[u8], got: &mut usize) {
    while socket.can_recv() {
        *got += socket.recv(|bytes| (bytes.len(), (check(stream, *got, bytes), bytes.len()).1)).unwrap();
    }
}

fn to_host(mut guest: Guest, what: &str, total: usize) -> Duration {
    let began = send(&mut guest, total, Duration::ZERO);
    told(what, total, began)
}

fn from_host(mut guest: Guest, what: &str, total: usize) -> Duration {
    let port = writer(total);
    let handle = guest.tcp(1 << 20);
    assert!(guest.connect(handle, (GATEWAY, port), 40000));
    let (stream, mut got, began) = (stream(), 0, Instant::now());
    guest.until("the transfer", |guest| {
        let socket = guest.tcp_socket(handle);
        receive(socket, &stream, &mut got);
        socket.state() == tcp::State::CloseWait && !socket.can_recv()
    });
    assert_eq!(got, total);
    told(what, total, began)
}

#[test]
fn large_segments_to_the_host() {
    to_host(large(UserConfig::default()), "guest to host, large segments", TOTAL);
}

#[test]
fn large_segments_from_the_host() {
    from_host(large(UserConfig::default()), "host to guest, large segments", TOTAL);
}

#[test]
fn plain_frames_to_the_host() {
    to_host(small(UserConfig::default()), "guest to host, plain frames", TOTAL / 8);
}

#[test]
fn plain_frames_from_the_host() {
    from_host(small(UserConfig::default()), "host to guest, plain frames", TOTAL / 8);
}

/// A guest that loses frames: they are sent again, by either side. What smoltcp sends is mended by its timer alone,
/// with longer and longer waits.
#[test]
fn losses_are_mended() {
    for (direction, total) in [(to_host as Direction, 512 << 10), (from_host, 8 << 20)] {
        let guest = small(UserConfig::default());
        guest.wire.queue.lose(397);
        direction(guest, "one of 397 frames lost", total);
    }
}

#[test]
fn rate_limits_hold_for_connections() {
    // A second's worth goes at once, so that the rest takes a second.
    let open = |limit: &str| {
        let spec: NetSpec = format!("user,host-loopback=on,{limit}").parse().unwrap();
        Guest::new(spec.open().unwrap()).configured()
    };
    let took = to_host(open("out-bytes=2M"), "2 MiB/s to the host", 4 << 20);
    assert!((900..5000).contains(&took.as_millis()), "{took:?}");
    let took = from_host(open("in-bytes=2M"), "2 MiB/s from the host", 4 << 20);
    assert!((900..5000).contains(&took.as_millis()), "{took:?}");
}

/// A guest that was started anew knows nothing of its connections, and may use their ports again.
#[test]
fn a_port_may_be_used_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = UserConfig { host_loopback: true, ..UserConfig::default() };
    let network = Arc::new(UserNetwork::new(config).unwrap());
    for _ in 0..2 {
        let mut guest = Guest::new(network.clone()).configured();
        let handle = guest.tcp(4096);
        assert!(guest.connect(handle, (GATEWAY, port), 40000));
        guest.tcp_socket(handle).send_slice(b"hello").unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        guest.poll();
        let mut bytes = [0; 5];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
    }
}

/// One that reads slowly, so that the guest must wait.
#[test]
fn a_slow_reader_slows_the_guest() {
    send(&mut large(UserConfig::default()), 24 << 20, Duration::from_millis(700));
}

/// A guest whose window closes, and which forgets to say when it opens: it is asked.
#[test]
fn a_slow_guest_slows_the_host() {
    let total = 8 << 20;
    let port = writer(total);
    let mut guest = small(UserConfig::default());
    let handle = guest.tcp(1 << 16);
    assert!(guest.connect(handle, (GATEWAY, port), 40000));
    let pause = Instant::now() + Duration::from_millis(1200);
    guest.until("a closed window", |_| Instant::now() > pause);
    let (stream, mut got) = (stream(), 0);
    guest.until("the transfer", |guest| {
        receive(guest.tcp_socket(handle), &stream, &mut got);
        got == total
    });
}

#[test]
fn a_thousand_connections() {
    const COUNT: usize = 1000;
    let (mut guest, address) = forwarded(Transport::Tcp, 80);
    let handles: Vec<_> = (0..COUNT).map(|_| guest.tcp(2048)).collect();
    for handle in &handles {
        guest.tcp_socket(*handle).listen(80).unwrap();
    }
    guest.poll();
    let done = Arc::new(AtomicUsize::new(0));
    let clients = {
        let done = done.clone();
        thread::spawn(move || {
            let mut peers: Vec<_> = (0..COUNT).map(|_| TcpStream::connect(address).unwrap()).collect();
            for (number, peer) in peers.iter_mut().enumerate() {
                peer.write_all(&(number as u32).to_le_bytes()).unwrap();
                peer.shutdown(Shutdown::Write).unwrap();
            }
            for (number, peer) in peers.iter_mut().enumerate() {
                let mut back = Vec::new();
                peer.read_to_end(&mut back).unwrap();
                assert_eq!(back, (number as u32).to_le_bytes());
                done.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    guest.until("all clients", |guest| {
        for handle in &handles {
            let socket = guest.tcp_socket(*handle);
            if socket.can_recv() {
                let bytes = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
                socket.send_slice(&bytes).unwrap();
            } else if socket.state() == tcp::State::CloseWait {
                socket.close();
            }
        }
        clients.is_finished()
    });
    clients.join().unwrap();
    assert_eq!(done.load(Ordering::Relaxed), COUNT);
}
