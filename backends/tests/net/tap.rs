//! Taps, in a network namespace of the test's own. Needs root (or a user namespace) and `ip`; says so where it can't.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bivisor_backends::net::Tap;
use bivisor_machine::packet::PacketPort;
use smoltcp::socket::tcp;
use smoltcp::wire::{Ipv4Address, Ipv4Cidr};

use crate::guest::Guest;

const HOST: Ipv4Address = Ipv4Address::new(10, 9, 0, 1);
const GUEST: Ipv4Address = Ipv4Address::new(10, 9, 0, 2);

fn ip(words: &str) -> bool {
    Command::new("ip").args(words.split(' ')).status().is_ok_and(|status| status.success())
}

/// A tap in a namespace that this thread moves to; none: the host does not let us.
fn namespace() -> Option<Arc<Tap>> {
    #[allow(unsafe_code)]
    // SAFETY: a network namespace of its own does nothing to what other threads hold.
    let moved = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    if moved.is_err() || !ip("link set lo up") {
        println!("no network namespace of our own: not tested");
        return None;
    }
    let tap = Arc::new(Tap::open("tap-test").unwrap());
    assert!(ip("addr add 10.9.0.1/24 dev tap-test") && ip("link set tap-test up"));
    Some(tap)
}

fn guest(tap: Arc<Tap>, checksums: bool) -> Guest {
    let mut guest = Guest::with(tap, 1500, checksums);
    guest.set_address(Ipv4Cidr::new(GUEST, 24), HOST);
    guest
}

#[test]
fn a_guest_talks_to_the_host_through_a_tap() {
    let work = || {
        let Some(tap) = namespace() else { return };
        let mut guest = guest(tap, true);
        let handle = guest.tcp(1 << 16);
        guest.tcp_socket(handle).listen(80).unwrap();
        guest.poll();
        let (done, result) = std::sync::mpsc::channel();
        // A thread has the namespace of the one that starts it.
        thread::spawn(move || {
            let mut stream = TcpStream::connect("10.9.0.2:80").unwrap();
            let data: Vec<u8> = (0..1u32 << 20).map(|at| (at % 251) as u8).collect();
            stream.write_all(&data).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            done.send(answer).unwrap();
        });
        let mut got = Vec::new();
        guest.until("the data", |guest| {
            let socket = guest.tcp_socket(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
            }
            socket.state() == tcp::State::CloseWait && !socket.can_recv()
        });
        assert_eq!(got.len(), 1 << 20);
        assert!(got.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
        guest.tcp_socket(handle).send_slice(b"thanks").unwrap();
        guest.tcp_socket(handle).close();
        let mut answer = None;
        guest.until("the answer", |_| {
            answer = result.try_recv().ok();
            answer.is_some()
        });
        assert_eq!(answer.as_deref(), Some("thanks"));
    };
    thread::spawn(work).join().unwrap();
}

/// A guest that takes large segments gets them: the kernel does not cut what it need not.
#[test]
fn a_tap_gives_large_segments() {
    let work = || {
        let Some(tap) = namespace() else { return };
        let mut guest = guest(tap.clone(), false);
        let handle = guest.tcp(1 << 18);
        let listener = TcpListener::bind("10.9.0.1:8080").unwrap();
        thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let bytes = vec![7; 1 << 16];
            for _ in 0..64 {
                peer.write_all(&bytes).unwrap();
            }
        });
        assert!(guest.connect(handle, (HOST, 8080), 40000));
        let (mut got, end) = (0, Instant::now() + Duration::from_secs(10));
        while got < 64 << 16 && Instant::now() < end {
            guest.poll();
            let socket = guest.tcp_socket(handle);
            while socket.can_recv() {
                got += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
            }
            guest.wire.queue.wait(Duration::from_millis(1));
        }
        assert_eq!(got, 64 << 16);
        assert!(guest.wire.queue.largest() > 10_000, "{}", guest.wire.queue.largest());
        drop(tap);
    };
    thread::spawn(work).join().unwrap();
}

#[test]
fn a_tap_that_is_none_is_refused() {
    let work = || {
        if namespace().is_none() {
            return;
        }
        let Err(error) = Tap::open("lo") else { panic!("lo is no tap") };
        assert!(error.to_string().starts_with("cannot open the tap lo: "), "{error}");
        let one = Tap::open("tap-once").unwrap();
        let Err(error) = Tap::open("tap-once") else { panic!("it is taken") };
        assert!(error.to_string().contains("another program has it"), "{error}");
        assert!(one.features().segments);
    };
    thread::spawn(work).join().unwrap();
}
