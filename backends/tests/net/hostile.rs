//! Guests that send what they like: nothing panics, and what they cost has a bound.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bivisor_backends::net::{Transport, UserConfig, UserNetwork};
use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Address, Ipv4Packet,
    Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use crate::budget::rounds;
use crate::guest::{Guest, MAC, Queue, forward};

const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);

/// A port that remembers what the guest sends.
struct Recorder {
    port: UserNetwork,
    sent: Mutex<Vec<Vec<u8>>>,
}

impl PacketPort for Recorder {
    fn features(&self) -> PortFeatures {
        self.port.features()
    }
    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures) {
        self.port.attach(receiver, accepted);
    }
    fn send(&self, frame: &[u8], offload: &Offload) {
        self.sent.lock().unwrap().push(frame.to_vec());
        self.port.send(frame, offload);
    }
    fn ready(&self) {
        self.port.ready();
    }
}

/// Frames of all kinds, as a well-behaved guest sends them, and the ports of the servers that they are for.
fn samples(recorder: &Arc<Recorder>, tcp_port: u16, udp_port: u16) -> Vec<Vec<u8>> {
    let mut guest = Guest::new(recorder.clone());
    guest.dhcp();
    let mut guest = guest.configured();
    let handle = guest.tcp(4096);
    assert!(guest.connect(handle, (GATEWAY, tcp_port), 40000));
    guest.tcp_socket(handle).send_slice(b"some data for the server").unwrap();
    guest.until("echo", |guest| guest.tcp_socket(handle).can_recv());
    guest.tcp_socket(handle).close();
    let udp = guest.udp(5000);
    guest.udp_socket(udp).send_slice(b"a datagram", (GATEWAY, udp_port)).unwrap();
    guest
        .udp_socket(udp)
        .send_slice(
            &[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 1, 0, 1],
            (Ipv4Addr::new(10, 0, 2, 3), 53),
        )
        .unwrap();
    guest.poll();
    guest.poll();
    let mut sent = recorder.sent.lock().unwrap().clone();
    // An echo request, a router solicitation, a neighbour solicitation, an echo request over IPv6, and a fragment.
    let v4 = |protocol: u8, body: &[u8]| {
        let mut bytes = [2, 0x55, 10, 0, 2, 2].to_vec();
        bytes[0] = 0x52;
        bytes.extend(MAC);
        bytes.extend([
            8,
            0,
            0x45,
            0,
            0,
            20 + body.len() as u8,
            0,
            1,
            0x20,
            0,
            64,
            protocol,
            0,
            0,
            10,
            0,
            2,
            15,
            10,
            0,
            2,
            2,
        ]);
        bytes.extend(body);
        bytes
    };
    sent.push(v4(1, &[8, 0, 0xf7, 0xff, 0, 0, 0, 0]));
    sent.push(v4(17, &[0; 16]));
    let v6 = |body: &[u8]| {
        let mut bytes = vec![0x33, 0x33, 0, 0, 0, 2];
        bytes.extend(MAC);
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, body.len() as u8, 58, 255]);
        bytes.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        bytes.extend(body);
        bytes
    };
    sent.push(v6(&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6]));
    sent.push(v6(&[135, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]));
    sent.push(v6(&[128, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4]));
    sent
}

/// Keeps a frame's way to our own servers, so that a test never speaks to strangers, and makes its checksums right
/// as often as not.
fn tame(frame: &mut [u8], tcp_port: u16, udp_port: u16, mend: bool) {
    if frame.len() < 34 {
        return;
    }
    match [frame[12], frame[13]] {
        [8, 0] => {
            let own: [u8; 4] = if frame[33] & 1 == 0 { [10, 0, 2, 2] } else { [10, 0, 2, 3] };
            frame[30..34].copy_from_slice(&own);
            let at = 14 + usize::from(frame[14] & 15) * 4;
            let port = if frame[23] == 6 { tcp_port } else { udp_port };
            if own[3] == 2 && frame.len() >= at + 4 && (frame[23] == 6 || frame[at + 3] != 67) {
                frame[at + 2..at + 4].copy_from_slice(&port.to_be_bytes());
            }
            if mend && frame[14] & 15 >= 5 && frame.len() >= at {
                Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
            }
        }
        [0x86, 0xdd] if frame.len() >= 54 => {
            if frame[20] != 58 {
                frame[38..54].copy_from_slice(&[
                    0xfd, 0x62, 0x69, 0x76, 0x69, 0x73, 0x6f, 0x72, 0, 0, 0, 0, 0, 0, 0, 9,
                ]);
            } else if mend && frame[54..].len() >= 4 {
                frame[56..58].fill(0);
                let addresses: [[u8; 16]; 2] =
                    [frame[22..38].try_into().unwrap(), frame[38..54].try_into().unwrap()];
                let [from, to] = addresses.map(std::net::Ipv6Addr::from);
                smoltcp::wire::Icmpv6Packet::new_unchecked(&mut frame[54..]).fill_checksum(&from, &to);
                if frame[38] != 0xff {
                    frame[38..54].copy_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
                }
            }
        }
        _ => {}
    }
}

#[test]
fn fuzz_frames_of_the_user_network() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for peer in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                let mut peer = peer;
                let _ = peer.set_read_timeout(Some(Duration::from_secs(3)));
                while let Ok(count @ 1..) = peer.read(&mut bytes) {
                    if peer.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let udp_port = server.local_addr().unwrap().port();
    let config = UserConfig {
        host_loopback: true,
        resolvers: vec![server.local_addr().unwrap()],
        ..UserConfig::default()
    };
    let recorder = Arc::new(Recorder { port: UserNetwork::new(config).unwrap(), sent: Mutex::default() });
    let samples = samples(&recorder, tcp_port, udp_port);
    assert!(samples.len() > 12);
    let port = &recorder.port;
    for sample in &samples {
        for length in 0..sample.len() {
            let mut frame = sample[..length].to_vec();
            tame(&mut frame, tcp_port, udp_port, true);
            port.send(&frame, &Offload::default());
        }
    }
    rounds("packets", |random| {
        for _ in 0..4000 {
            let mut frame = samples[random.usize(..samples.len())].clone();
            for _ in 0..random.u8(1..7) {
                let at = random.usize(12..frame.len());
                frame[at] = match random.u8(..4) {
                    0 => 0,
                    1 => 0xff,
                    2 => frame[at] ^ 1 << random.u8(..8),
                    _ => random.u8(..),
                };
            }
            if random.u8(..4) == 0 {
                frame.truncate(random.usize(..=frame.len()));
            }
            tame(&mut frame, tcp_port, udp_port, random.u8(..8) != 0);
            port.send(&frame, &Offload::default());
        }
        // It is still there.
        let mut guest = Guest::new(recorder.clone());
        assert_eq!(guest.dhcp().router, Some(GATEWAY));
        let mut guest = guest.configured();
        let handle = guest.tcp(4096);
        assert!(guest.connect(handle, (GATEWAY, tcp_port), random.u16(50000..)));
        guest.tcp_socket(handle).abort();
        guest.poll();
        recorder.sent.lock().unwrap().clear();
    });
}

/// A TCP segment of the guest's.
fn segment(to: u16, from: u16, control: TcpControl, seq: i32, ack: Option<i32>, payload: &[u8]) -> Vec<u8> {
    let tcp = TcpRepr {
        src_port: from,
        dst_port: to,
        control,
        seq_number: TcpSeqNumber(seq),
        ack_number: ack.map(TcpSeqNumber),
        window_len: 0xffff,
        window_scale: (control == TcpControl::Syn).then_some(14),
        max_seg_size: (control == TcpControl::Syn).then_some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: GATEWAY,
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; 14 + 20 + tcp.buffer_len()];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(EthernetAddress(MAC));
    frame.set_dst_addr(EthernetAddress([0x52, 0x55, 10, 0, 2, 2]));
    frame.set_ethertype(EthernetProtocol::Ipv4);
    let capabilities = ChecksumCapabilities::default();
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[14..]), &capabilities);
    let (from, to) = (IpAddress::Ipv4(GUEST), IpAddress::Ipv4(GATEWAY));
    tcp.emit(&mut TcpPacket::new_unchecked(&mut bytes[34..]), &from, &to, &capabilities);
    bytes
}

fn network() -> (Arc<UserNetwork>, Arc<Queue>) {
    let config = UserConfig { host_loopback: true, ..UserConfig::default() };
    let port = Arc::new(UserNetwork::new(config).unwrap());
    let queue = Arc::new(Queue::default());
    port.attach(Some(queue.clone()), port.features());
    (port, queue)
}

/// Opens connections from these ports and says the sequence number that each next byte of the guest's has to
/// acknowledge.
fn open(port: &UserNetwork, queue: &Queue, to: u16, from: std::ops::Range<u16>) -> Vec<(u16, i32)> {
    let mut open = Vec::new();
    for from in from {
        port.send(&segment(to, from, TcpControl::Syn, 100, None, &[]), &Offload::default());
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            assert!(Instant::now() < end, "no answer to a SYN");
            queue.wait(Duration::from_millis(10));
            let Some(bytes) = queue.pop(port) else { continue };
            let Ok(tcp) = TcpPacket::new_checked(&bytes[34..]) else { continue };
            if tcp.syn() && tcp.dst_port() == from {
                let next = (tcp.seq_number() + 1).0;
                port.send(&segment(to, from, TcpControl::None, 101, Some(next), &[]), &Offload::default());
                open.push((from, next));
                break;
            }
        }
    }
    open
}

/// The next TCP segment for the guest.
fn next_segment(port: &UserNetwork, queue: &Queue) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        assert!(Instant::now() < end, "no segment");
        queue.wait(Duration::from_millis(10));
        if let Some(bytes) = queue.pop(port)
            && bytes.get(23) == Some(&6)
        {
            return bytes[34..].to_vec();
        }
    }
}

/// A guest that waits out an earlier connection (TIME-WAIT) acknowledges that one's bytes: it is freed from it.
#[test]
fn a_guest_that_remembers_an_earlier_connection_gets_the_new_one() {
    let config = UserConfig { forwards: vec![forward(Transport::Tcp, 80)], ..UserConfig::default() };
    let port = Arc::new(UserNetwork::new(config).unwrap());
    let queue = Arc::new(Queue::default());
    port.attach(Some(queue.clone()), PortFeatures::default());
    let _client = TcpStream::connect(port.forwarded()[0]).unwrap();
    let syn = next_segment(&port, &queue);
    let syn = TcpPacket::new_checked(&syn).unwrap();
    assert!(syn.syn() && !syn.ack());
    let earlier = syn.seq_number() + 100_000;
    let answer = segment(syn.src_port(), 80, TcpControl::None, 5, Some(earlier.0), &[]);
    let asked = Instant::now();
    port.send(&answer, &Offload::default());
    let reset = next_segment(&port, &queue);
    let reset = TcpPacket::new_checked(&reset).unwrap();
    assert!(reset.rst() && reset.seq_number() == earlier);
    let again = next_segment(&port, &queue);
    let again = TcpPacket::new_checked(&again).unwrap();
    assert!(again.syn() && again.seq_number() == syn.seq_number());
    assert!(asked.elapsed() < Duration::from_millis(200), "at once, not by the timer");
}

/// What keeps a connection alive that is idle: the guest asks with an old sequence number, and is answered.
#[test]
fn a_guest_that_asks_whether_we_are_there_is_answered() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().port();
    let (port, queue) = network();
    let (from, ack) = open(&port, &queue, to, 30000..30001)[0];
    thread::sleep(Duration::from_millis(50));
    while queue.pop(&*port).is_some() {}
    port.send(&segment(to, from, TcpControl::None, 100, Some(ack), &[]), &Offload::default());
    let answer = next_segment(&port, &queue);
    let tcp = TcpPacket::new_checked(&answer).unwrap();
    assert_eq!((tcp.ack_number(), tcp.payload().len(), tcp.rst()), (TcpSeqNumber(101), 0, false));
}

fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Connections of the two tests below: together they would take far more than the network holds for all of them.
const MANY: u16 = 300;
const BOUND: usize = 160 << 20;
/// Held by the test whose memory is measured: it is the process's, and each would count the others'.
static MEASURED: Mutex<()> = Mutex::new(());

#[test]
fn a_guest_that_never_acknowledges_costs_little() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for peer in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut peer = peer;
                let bytes = vec![7; 1 << 16];
                while peer.write_all(&bytes).is_ok() {}
            });
        }
    });
    let (port, queue) = network();
    let before = resident();
    open(&port, &queue, to, 20000..20000 + MANY);
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        queue.wait(Duration::from_millis(1));
        while queue.pop(&*port).is_some() {}
    }
    let grown = resident().saturating_sub(before);
    println!("{MANY} connections, {} MiB", grown >> 20);
    assert!(grown < BOUND, "{} MiB for {MANY} connections", grown >> 20);
}

#[test]
fn a_server_that_never_reads_costs_little() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let peers: Vec<_> = listener.incoming().flatten().take(usize::from(MANY)).collect();
        thread::sleep(Duration::from_secs(60));
        drop(peers);
    });
    let (port, queue) = network();
    let before = resident();
    let open = open(&port, &queue, to, 20000..20000 + MANY);
    let payload = vec![7; 32768];
    for round in 0..200 {
        for (from, ack) in &open {
            let seq = 101 + round * payload.len() as i32;
            port.send(&segment(to, *from, TcpControl::None, seq, Some(*ack), &payload), &Offload::default());
        }
        while queue.pop(&*port).is_some() {}
    }
    let grown = resident().saturating_sub(before);
    println!("{MANY} connections, {} MiB", grown >> 20);
    assert!(grown < BOUND, "{} MiB for {MANY} connections", grown >> 20);
}

#[test]
fn a_flood_of_requests_is_bounded() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    // Nobody accepts: the connections wait in the backlog, or stay unanswered.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().port();
    let (port, queue) = network();
    let before = resident();
    for number in 0..200_000u32 {
        let from = 1024 + (number % 60_000) as u16;
        port.send(&segment(to, from, TcpControl::Syn, number as i32, None, &[]), &Offload::default());
        while queue.pop(&*port).is_some() {}
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < 6000, "{open} descriptors");
    assert!(resident().saturating_sub(before) < BOUND);
}
