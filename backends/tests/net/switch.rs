//! The switch between machines.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bivisor_backends::net::SwitchPort;
use bivisor_machine::packet::{Offload, PacketPort, PortFeatures, Segment, SegmentKind};
use smoltcp::socket::tcp;
use smoltcp::wire::{Ipv4Address, Ipv4Packet, TcpPacket};

use crate::guest::{Guest, Queue};

fn address(number: u8) -> Ipv4Address {
    Ipv4Address::new(10, 0, 0, number)
}

fn join(folder: &Path) -> Arc<SwitchPort> {
    Arc::new(SwitchPort::join_in(folder, "test").unwrap())
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a datagram from one guest to another and sees that it arrives.
fn talks(from: &mut Guest, to: &mut Guest, to_number: u8, port: u16) {
    talks_again(from, to, to_number, port, Duration::MAX);
}

/// The same, with one more datagram each time that this has passed and none has arrived.
fn talks_again(from: &mut Guest, to: &mut Guest, to_number: u8, port: u16, patience: Duration) {
    let sending = from.udp(port);
    let receiving = to.udp(port);
    let mut sent: Option<Instant> = None;
    to.until("a datagram from another guest", |to| {
        if sent.is_none_or(|sent| sent.elapsed() > patience) {
            let datagram = port.to_le_bytes();
            from.udp_socket(sending).send_slice(&datagram, (address(to_number), port)).unwrap();
            sent = Some(Instant::now());
        }
        from.poll();
        matches!(to.udp_socket(receiving).recv(), Ok((bytes, _)) if bytes == port.to_le_bytes())
    });
}

#[test]
fn three_guests_see_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("net");
    let mut one = Guest::numbered(join(&folder), 1);
    let mut two = Guest::numbered(join(&folder), 2);
    let mut three = Guest::numbered(join(&folder), 3);
    talks(&mut one, &mut two, 2, 1001);
    talks(&mut two, &mut three, 3, 1002);
    talks(&mut three, &mut one, 1, 1003);
    drop(two);
    talks(&mut one, &mut three, 3, 1004);
    // Whoever knew the first one's address sends at once, before the second one has met all.
    let mut two = Guest::numbered(join(&folder), 2);
    talks_again(&mut three, &mut two, 2, 1005, Duration::from_millis(200));
}

#[test]
fn a_transfer_between_guests() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("net");
    let mut one = Guest::numbered(join(&folder), 1);
    let mut two = Guest::numbered(join(&folder), 2);
    let (client, server) = (one.tcp(1 << 16), two.tcp(1 << 16));
    two.tcp_socket(server).listen(80).unwrap();
    one.sockets
        .get_mut::<tcp::Socket<'_>>(client)
        .connect(one.interface.context(), (address(2), 80), 40000)
        .unwrap();
    let total = 8 << 20;
    let (mut sent, mut got) = (0usize, 0usize);
    two.until("the transfer", |two| {
        one.poll();
        let socket = one.tcp_socket(client);
        if socket.can_send() && sent < total {
            let piece: Vec<u8> = (sent..sent + 4096).map(|at| (at % 251) as u8).collect();
            sent += socket.send_slice(&piece[..piece.len().min(total - sent)]).unwrap();
        }
        let socket = two.tcp_socket(server);
        while socket.can_recv() {
            let count = socket
                .recv(|bytes| {
                    assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == ((got + at) % 251) as u8));
                    (bytes.len(), bytes.len())
                })
                .unwrap();
            got += count;
        }
        got == total
    });
}

/// A large TCP segment with its checksum left undone.
fn large_segment(payload: usize) -> Vec<u8> {
    let mut frame = vec![0; 54 + payload];
    frame[..14].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1, 8, 0]);
    frame[14] = 0x45;
    let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_total_len((40 + payload) as u16);
    ip.set_hop_limit(64);
    ip.set_next_header(smoltcp::wire::IpProtocol::Tcp);
    ip.set_src_addr(address(1));
    ip.set_dst_addr(address(2));
    ip.fill_checksum();
    let mut tcp = TcpPacket::new_unchecked(&mut frame[34..]);
    tcp.set_header_len(20);
    let sum = smoltcp::wire::checksum::pseudo_header_v4(
        &address(1),
        &address(2),
        smoltcp::wire::IpProtocol::Tcp,
        (20 + payload) as u32,
    );
    tcp.set_checksum(sum);
    frame
}

#[test]
fn large_segments_reach_guests_as_they_take_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("net");
    let sender = join(&folder);
    let all = sender.features();
    let offload = Offload {
        checksum: Some((34, 16)),
        segment: Some(Segment { kind: SegmentKind::Tcp4, size: 1400, header: 54, ecn: false }),
        ..Offload::default()
    };
    for (accepted, frames) in [(all, 1), (PortFeatures::default(), 22)] {
        let receiver = join(&folder);
        let queue = Arc::new(Queue::default());
        receiver.attach(Some(queue.clone()), accepted);
        wait_for("the other member", || sender.others() == 1);
        sender.send(&large_segment(30_000), &offload);
        let mut got = Vec::new();
        wait_for("all frames", || {
            got.extend(queue.pop(&*receiver));
            got.len() == frames
        });
        let bytes: usize = got.iter().map(|frame| frame.len() - 54).sum();
        assert_eq!(bytes, 30_000);
        drop(receiver);
        wait_for("the other member's end", || sender.others() == 0);
    }
}

/// Not a test of its own: what the process of [`a_killed_member_leaves_the_others_connected`] does.
#[test]
fn member_in_a_process_of_its_own() {
    let Some(folder) = std::env::var_os("BIVISOR_TEST_SWITCH") else { return };
    let mut guest = Guest::numbered(join(Path::new(&folder)), 9);
    let handle = guest.udp(7);
    println!("joined");
    std::io::stdout().flush().unwrap();
    loop {
        guest.poll();
        let socket = guest.udp_socket(handle);
        if let Ok((bytes, from)) = socket.recv().map(|(bytes, from)| (bytes.to_vec(), from)) {
            socket.send_slice(&bytes, from.endpoint).unwrap();
        }
        guest.wire.queue.wait(Duration::from_millis(5));
    }
}

fn spawn_member(folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "switch::member_in_a_process_of_its_own", "--nocapture"])
        .env("BIVISOR_TEST_SWITCH", folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Sees that the other process's guest answers.
fn echoes(guest: &mut Guest, port: u16) {
    let handle = guest.udp(port);
    guest.until("an echo from the other process", |guest| {
        let socket = guest.udp_socket(handle);
        if socket.can_send() && socket.send_queue() == 0 {
            socket.send_slice(b"echo", (address(9), 7)).unwrap();
        }
        matches!(socket.recv(), Ok((b"echo", _)))
    });
}

#[test]
fn a_killed_member_leaves_the_others_connected() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("net");
    // The other process is there first: if any member were more than the others, it would be that one.
    let mut first = spawn_member(&folder);
    wait_for("the other process's socket", || {
        std::fs::read_dir(&folder)
            .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name() != "lock"))
    });
    let port = join(&folder);
    let mut one = Guest::numbered(port.clone(), 1);
    let mut two = Guest::numbered(join(&folder), 2);
    echoes(&mut one, 2001);
    talks(&mut one, &mut two, 2, 2002);
    first.kill().unwrap();
    first.wait().unwrap();
    talks(&mut one, &mut two, 2, 2003);
    talks(&mut two, &mut one, 1, 2004);
    wait_for("the killed member's end", || port.others() == 1);
    // Another one takes its place, and finds its socket dead.
    let mut second = spawn_member(&folder);
    wait_for("the new member", || port.others() == 2);
    echoes(&mut two, 2005);
    second.kill().unwrap();
    second.wait().unwrap();
}
