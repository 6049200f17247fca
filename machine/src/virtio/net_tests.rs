//! The network device, driven through rings of every format.

use alloc::vec;

use super::*;
use crate::virtio::testing::{Bench, Driver};

/// Records what is sent; gives frames when told.
#[derive(Default)]
struct Port {
    features: PortFeatures,
    sent: Mutex<Vec<(Vec<u8>, Offload)>>,
    receiver: Mutex<Option<Arc<dyn PacketReceiver>>>,
    accepted: Mutex<PortFeatures>,
    ready: Mutex<u32>,
}

impl PacketPort for Port {
    fn features(&self) -> PortFeatures {
        self.features
    }
    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures) {
        *self.receiver.lock() = receiver;
        *self.accepted.lock() = accepted;
    }
    fn send(&self, frame: &[u8], offload: &Offload) {
        self.sent.lock().push((frame.to_vec(), *offload));
    }
    fn ready(&self) {
        *self.ready.lock() += 1;
    }
}

impl Port {
    fn give(&self, frame: &[u8], offload: &Offload) -> bool {
        let receiver = self.receiver.lock().clone();
        receiver.unwrap().receive(frame, offload)
    }
}

struct Rig {
    port: Arc<Port>,
    device: Arc<Net>,
    queues: [Arc<Virtqueue>; 2],
    receive: Driver,
    send: Driver,
}

const ALL: PortFeatures =
    PortFeatures { checksum: true, segments: true, gives_partial_checksums: true, gives_segments: true };
const EVERYTHING: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_SEGMENTS
    | feature::HOST_SEGMENTS
    | feature::MRG_RXBUF
    | feature::MAC
    | feature::STATUS;

fn rigs(features: u64) -> [Rig; 3] {
    Bench::all_kinds(features).map(|bench| {
        let port = Arc::new(Port { features: ALL, ..Port::default() });
        let device = Net::new(port.clone(), [2, 0, 0, 0, 0, 1], None);
        let (receive_queue, receive) = bench.queue(RECEIVE, 16);
        let (send_queue, send) = bench.queue(SEND, 16);
        device.activate(bench.features, &[Some(receive_queue.clone()), Some(send_queue.clone())]);
        Rig { port, device, queues: [receive_queue, send_queue], receive, send }
    })
}

/// A TCP segment of this payload behind Ethernet, IPv4 and TCP headers.
fn segment(payload: usize) -> Vec<u8> {
    let mut frame = vec![0; 14 + 20 + 20 + payload];
    frame[34 + 12] = 5 << 4;
    frame
}

#[test]
fn frames_are_sent_as_they_are_cut() {
    for mut rig in rigs(feature::MRG_RXBUF) {
        rig.send.offer(&[&[0; 12], b"frame"], &[]);
        rig.send.offer(&[&[0; 7], &[0; 5], b"an", b"other"], &[]);
        rig.send.offer(&[&[0; 11]], &[]);
        rig.device.notify(&rig.queues[1]);
        let plain = Offload::default();
        assert_eq!(*rig.port.sent.lock(), [(b"frame".to_vec(), plain), (b"another".to_vec(), plain)]);
        for _ in 0..3 {
            assert_eq!(rig.send.expect().written, 0);
        }
    }
}

#[test]
fn what_is_left_to_do_is_told_and_checked() {
    for mut rig in rigs(EVERYTHING) {
        let frame = segment(5000);
        let mut header = [0; 12];
        header[0] = NEEDS_CHECKSUM;
        header[1] = SEGMENT_TCP4 | SEGMENT_ECN;
        // The driver's length of the headers is wrong.
        header[2..4].copy_from_slice(&900u16.to_le_bytes());
        header[4..6].copy_from_slice(&1448u16.to_le_bytes());
        header[6..8].copy_from_slice(&34u16.to_le_bytes());
        header[8..10].copy_from_slice(&16u16.to_le_bytes());
        rig.send.offer(&[&header, &frame], &[]);
        // A checksum outside of the frame; no size of pieces; no checksum; a short header; an unknown kind.
        for (at, value) in [(7, 0xff), (5, 0), (0, 0), (1, 9)] {
            let mut wrong = header;
            wrong[at] = value;
            wrong[4] = if at == 5 { 0 } else { wrong[4] };
            rig.send.offer(&[&wrong, &frame], &[]);
        }
        let mut short = frame.clone();
        short[34 + 12] = 4 << 4;
        rig.send.offer(&[&header, &short], &[]);
        rig.device.notify(&rig.queues[1]);
        let kind = SegmentKind::Tcp4;
        let expected = Offload {
            checksum: Some((34, 16)),
            checksum_valid: false,
            segment: Some(Segment { kind, size: 1448, header: 54, ecn: true }),
        };
        assert_eq!(*rig.port.sent.lock(), [(frame, expected)]);
        assert_eq!(*rig.port.accepted.lock(), ALL);
    }
}

#[test]
fn what_was_not_negotiated_is_not_believed() {
    for mut rig in rigs(0) {
        let mut header = [0; 12];
        header[0] = NEEDS_CHECKSUM;
        rig.send.offer(&[&header, b"x"], &[]);
        header[1] = SEGMENT_TCP6;
        rig.send.offer(&[&header, &segment(9)], &[]);
        rig.device.notify(&rig.queues[1]);
        assert_eq!(*rig.port.sent.lock(), [(b"x".to_vec(), Offload::default())]);
        assert_eq!(*rig.port.accepted.lock(), PortFeatures::default());
    }
}

#[test]
fn a_large_frame_takes_several_buffers() {
    for mut rig in rigs(EVERYTHING) {
        for _ in 0..4 {
            rig.receive.offer(&[], &[100]);
        }
        let frame: Vec<u8> = (0..250).map(|i| i as u8).collect();
        let offload = Offload {
            checksum: Some((34, 16)),
            checksum_valid: false,
            segment: Some(Segment { kind: SegmentKind::Tcp6, size: 1400, header: 74, ecn: false }),
        };
        assert!(rig.port.give(&frame, &offload));
        let parts: Vec<_> = (0..3).map(|_| rig.receive.expect()).collect();
        assert_eq!(parts.iter().map(|part| part.written).collect::<Vec<_>>(), [100, 100, 62]);
        let all: Vec<u8> = parts.iter().flat_map(|p| p.data[..p.written as usize].to_vec()).collect();
        assert_eq!(all[..12], [1, 4, 74, 0, 0x78, 5, 34, 0, 16, 0, 3, 0]);
        assert_eq!(all[12..], frame);
        assert!(rig.port.give(b"x", &Offload { checksum_valid: true, ..Offload::default() }));
        assert_eq!(rig.receive.expect().data[..13], [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, b'x']);
    }
}

#[test]
fn without_room_the_port_keeps_the_frame_until_it_hears() {
    for mut rig in rigs(EVERYTHING) {
        rig.receive.offer(&[], &[100]);
        rig.device.notify(&rig.queues[0]);
        assert_eq!(*rig.port.ready.lock(), 0);
        assert!(!rig.port.give(&[7; 150], &Offload::default()));
        rig.receive.offer(&[], &[100]);
        assert!(rig.receive.must_notify(1));
        rig.device.notify(&rig.queues[0]);
        rig.device.notify(&rig.queues[0]);
        assert_eq!(*rig.port.ready.lock(), 1);
        assert!(rig.port.give(&[7; 150], &Offload::default()));
        assert_eq!((rig.receive.expect().written, rig.receive.expect().written), (100, 62));
    }
}

#[test]
fn without_mergeable_buffers_a_frame_that_fits_into_none_is_lost() {
    for mut rig in rigs(0) {
        rig.receive.offer(&[], &[20]);
        assert!(rig.port.give(&[7; 9], &Offload::default()));
        assert_eq!(rig.receive.returned(), None);
        assert!(rig.port.give(&[7; 8], &Offload::default()));
        let returned = rig.receive.expect();
        assert_eq!((returned.written, returned.data[10]), (20, 1));
    }
}

#[test]
fn nothing_comes_in_while_the_machine_stands_still_or_after_a_reset() {
    for mut rig in rigs(0) {
        rig.receive.offer(&[], &[200]);
        rig.device.drain();
        assert!(!rig.port.give(b"x", &Offload::default()));
        rig.device.resume();
        assert_eq!(*rig.port.ready.lock(), 1);
        let receiver = rig.port.receiver.lock().clone().unwrap();
        rig.queues.iter().for_each(|queue| queue.close());
        rig.device.reset();
        assert!(rig.port.receiver.lock().is_none());
        assert!(receiver.receive(b"x", &Offload::default()));
        assert_eq!(rig.receive.returned(), None);
    }
}

#[test]
fn only_what_the_port_can_do_is_offered() {
    let features =
        |features| Net::new(Arc::new(Port { features, ..Port::default() }), [0; 6], None).features();
    assert_eq!(features(ALL), EVERYTHING);
    let plain = feature::MAC | feature::STATUS | feature::MRG_RXBUF;
    assert_eq!(features(PortFeatures::default()), plain);
    // Segments are cut by their checksums.
    let segments = PortFeatures { segments: true, gives_segments: true, ..PortFeatures::default() };
    assert_eq!(features(segments), plain);
    let with_mtu = Net::new(Arc::new(Port::default()), [2, 3, 4, 5, 6, 7], Some(0x5dc));
    assert_eq!(with_mtu.features(), plain | feature::MTU);
    let mut config = [0xee; 14];
    with_mtu.config_read(0, &mut config);
    assert_eq!(config, [2, 3, 4, 5, 6, 7, 1, 0, 1, 0, 0xdc, 5, 0xee, 0xee]);
}
