//! Frames for the guest: headers written around a payload, without moving it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bivisor_machine::packet::{Offload, PortFeatures, Segment, SegmentKind};
use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol, IPV4_HEADER_LEN, IPV6_HEADER_LEN,
    IpProtocol, Ipv4Packet, Ipv6Packet, TCP_HEADER_LEN, TcpPacket, TcpSeqNumber, UDP_HEADER_LEN, UdpPacket,
    checksum,
};

/// Room before a payload for the longest headers: Ethernet, IPv6, TCP without options.
pub const HEADROOM: usize = ETHERNET_HEADER_LEN + IPV6_HEADER_LEN + TCP_HEADER_LEN;

/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u16 = 16;

/// Length of the header of a piece in IPv6.
const FRAGMENT_HEADER: usize = 8;

/// Hops that the guest's packets seem to have left.
const HOP_LIMIT: u8 = 64;

/// A frame on its way to the guest. TCP data is shared with the flow, which keeps it until it is acknowledged.
#[derive(Clone, Debug)]
pub struct Frame {
    buffer: Arc<Vec<u8>>,
    start: usize,
    end: usize,
    offload: Offload,
}

impl Frame {
    fn plain(buffer: Vec<u8>, start: usize) -> Self {
        let end = buffer.len();
        Self { buffer: Arc::new(buffer), start, end, offload: Offload::default() }
    }

    /// The bytes, Ethernet header first.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// What is left to the guest.
    pub fn offload(&self) -> &Offload {
        &self.offload
    }

    /// The buffer, if nobody else holds it.
    pub fn into_buffer(self) -> Option<Vec<u8>> {
        Arc::into_inner(self.buffer)
    }
}

/// The two ends of the wire.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The network's address.
    pub ours: EthernetAddress,
    /// The guest's.
    pub guest: EthernetAddress,
}

/// What a TCP header says beside ports and checksum (RFC 9293, section 3.1).
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpFields {
    pub seq: TcpSeqNumber,
    /// The ACK flag goes with it.
    pub ack: Option<TcpSeqNumber>,
    /// As on the wire: already shifted.
    pub window: u16,
    pub syn: bool,
    pub fin: bool,
    pub rst: bool,
    pub psh: bool,
    /// Length of the options, in bytes, at the start of what is given as payload.
    pub options: usize,
    /// The largest payload of a piece, in bytes.
    pub mss: usize,
}

/// A buffer for a payload of up to this many bytes, with room for headers before it.
pub fn buffer(payload: usize) -> Vec<u8> {
    let mut buffer = Vec::with_capacity(HEADROOM + payload);
    buffer.resize(HEADROOM, 0);
    buffer
}

/// A buffer with this payload.
pub fn buffer_with(payload: &[u8]) -> Vec<u8> {
    let mut buffer = buffer(payload.len());
    buffer.extend_from_slice(payload);
    buffer
}

impl Link {
    /// A TCP segment from `source` to `dest`; the payload, of the length given, begins at [`HEADROOM`]. The buffer may
    /// be longer.
    pub fn tcp(
        &self,
        source: SocketAddr,
        dest: SocketAddr,
        fields: &TcpFields,
        (mut buffer, payload): (Vec<u8>, usize),
        accepted: PortFeatures,
    ) -> Frame {
        let at = HEADROOM - TCP_HEADER_LEN;
        let end = HEADROOM + payload;
        let length = end - at;
        let mut tcp = TcpPacket::new_unchecked(&mut buffer[at..end]);
        tcp.set_src_port(source.port());
        tcp.set_dst_port(dest.port());
        tcp.set_seq_number(fields.seq);
        tcp.set_ack_number(fields.ack.unwrap_or_default());
        tcp.clear_flags();
        tcp.set_header_len((TCP_HEADER_LEN + fields.options) as u8);
        tcp.set_ack(fields.ack.is_some());
        tcp.set_syn(fields.syn);
        tcp.set_fin(fields.fin);
        tcp.set_rst(fields.rst);
        tcp.set_psh(fields.psh);
        tcp.set_window_len(fields.window);
        tcp.set_urgent_at(0);
        let mut offload = Offload::default();
        if accepted.gives_partial_checksums {
            tcp.set_checksum(checksum::pseudo_header(
                &source.ip().into(),
                &dest.ip().into(),
                IpProtocol::Tcp,
                length as u32,
            ));
        } else {
            tcp.fill_checksum(&source.ip().into(), &dest.ip().into());
        }
        let start = self.ip(source.ip(), dest.ip(), IpProtocol::Tcp, &mut buffer[..end], at);
        if accepted.gives_partial_checksums {
            offload.checksum = Some(((at - start) as u16, TCP_CHECKSUM));
        }
        if payload - fields.options > fields.mss {
            offload.segment = Some(Segment {
                kind: if source.is_ipv4() { SegmentKind::Tcp4 } else { SegmentKind::Tcp6 },
                size: fields.mss as u16,
                header: (HEADROOM - start) as u16,
                ecn: false,
            });
        }
        Frame { buffer: Arc::new(buffer), start, end, offload }
    }

    /// A UDP datagram; the payload begins at [`HEADROOM`].
    pub fn udp(&self, source: SocketAddr, dest: SocketAddr, mut buffer: Vec<u8>) -> Frame {
        let at = HEADROOM - UDP_HEADER_LEN;
        let length = buffer.len() - at;
        let mut udp = UdpPacket::new_unchecked(&mut buffer[at..]);
        udp.set_src_port(source.port());
        udp.set_dst_port(dest.port());
        udp.set_len(length as u16);
        udp.fill_checksum(&source.ip().into(), &dest.ip().into());
        let start = self.ip(source.ip(), dest.ip(), IpProtocol::Udp, &mut buffer, at);
        Frame::plain(buffer, start)
    }

    /// A UDP datagram as [`Link::udp`], in as many pieces as packets of up to `mtu` bytes take. `ident` tells them from
    /// those of other datagrams.
    pub fn datagram(
        &self,
        source: SocketAddr,
        dest: SocketAddr,
        buffer: Vec<u8>,
        mtu: usize,
        ident: u32,
    ) -> Vec<Frame> {
        let ip = if source.is_ipv4() { IPV4_HEADER_LEN } else { IPV6_HEADER_LEN };
        let whole = self.udp(source, dest, buffer);
        let bytes = whole.bytes();
        if bytes.len() - ETHERNET_HEADER_LEN <= mtu {
            return vec![whole];
        }
        let bytes = &bytes[ETHERNET_HEADER_LEN + ip..];
        let piece = if source.is_ipv4() { mtu - ip } else { mtu - ip - FRAGMENT_HEADER } & !7;
        let pieces = bytes.chunks(piece).enumerate().map(|(number, bytes)| {
            let at = number * piece;
            let more = at + bytes.len() < whole.bytes().len() - ETHERNET_HEADER_LEN - ip;
            self.fragment(source.ip(), dest.ip(), (at, more, ident), bytes)
        });
        pieces.collect()
    }

    /// A piece of a UDP datagram: where it lies, whether more follows, and what all pieces have in common.
    fn fragment(
        &self,
        source: IpAddr,
        dest: IpAddr,
        (at, more, ident): (usize, bool, u32),
        bytes: &[u8],
    ) -> Frame {
        if source.is_ipv6() {
            // RFC 8200, section 4.5.
            let mut head = [u8::from(IpProtocol::Udp), 0, 0, 0, 0, 0, 0, 0];
            head[2..4].copy_from_slice(&(at as u16 | u16::from(more)).to_be_bytes());
            head[4..].copy_from_slice(&ident.to_be_bytes());
            let mut buffer = buffer_with(&head);
            buffer.extend_from_slice(bytes);
            return self.packet(source, dest, IpProtocol::Ipv6Frag, buffer);
        }
        let mut buffer = buffer_with(bytes);
        let start = self.ip(source, dest, IpProtocol::Udp, &mut buffer, HEADROOM);
        let mut packet = Ipv4Packet::new_unchecked(&mut buffer[start + ETHERNET_HEADER_LEN..]);
        packet.clear_flags();
        packet.set_ident(ident as u16);
        packet.set_more_frags(more);
        packet.set_frag_offset(at as u16);
        packet.fill_checksum();
        Frame::plain(buffer, start)
    }

    /// A packet whose IP payload begins at [`HEADROOM`].
    pub fn packet(&self, source: IpAddr, dest: IpAddr, protocol: IpProtocol, mut buffer: Vec<u8>) -> Frame {
        let start = self.ip(source, dest, protocol, &mut buffer, HEADROOM);
        Frame::plain(buffer, start)
    }

    /// A frame whose Ethernet payload begins at [`HEADROOM`].
    pub fn ethernet(&self, dest: EthernetAddress, kind: EthernetProtocol, mut buffer: Vec<u8>) -> Frame {
        let start = HEADROOM - ETHERNET_HEADER_LEN;
        self.ethernet_header(dest, kind, &mut buffer[start..]);
        Frame::plain(buffer, start)
    }

    fn ethernet_header(&self, dest: EthernetAddress, kind: EthernetProtocol, buffer: &mut [u8]) {
        let mut frame = EthernetFrame::new_unchecked(buffer);
        frame.set_dst_addr(dest);
        frame.set_src_addr(self.ours);
        frame.set_ethertype(kind);
    }

    /// Writes the IP and Ethernet headers before `at`; returns where the frame begins.
    fn ip(&self, source: IpAddr, dest: IpAddr, protocol: IpProtocol, buffer: &mut [u8], at: usize) -> usize {
        let length = buffer.len() - at;
        let (start, kind) = match (source, dest) {
            (IpAddr::V4(source), IpAddr::V4(dest)) => {
                let start = at - IPV4_HEADER_LEN;
                let mut packet = Ipv4Packet::new_unchecked(&mut buffer[start..]);
                packet.set_version(4);
                packet.set_header_len(IPV4_HEADER_LEN as u8);
                packet.set_dscp(0);
                packet.set_ecn(0);
                packet.set_total_len((IPV4_HEADER_LEN + length) as u16);
                packet.set_ident(0);
                packet.clear_flags();
                packet.set_dont_frag(true);
                packet.set_frag_offset(0);
                packet.set_hop_limit(HOP_LIMIT);
                packet.set_next_header(protocol);
                packet.set_src_addr(source);
                packet.set_dst_addr(dest);
                packet.fill_checksum();
                (start, EthernetProtocol::Ipv4)
            }
            (source, dest) => {
                let start = at - IPV6_HEADER_LEN;
                let mut packet = Ipv6Packet::new_unchecked(&mut buffer[start..]);
                packet.set_version(6);
                packet.set_traffic_class(0);
                packet.set_flow_label(0);
                packet.set_payload_len(length as u16);
                packet.set_next_header(protocol);
                // Neighbour discovery must not have come through a router (RFC 4861, section 7.1).
                packet.set_hop_limit(if protocol == IpProtocol::Icmpv6 { 255 } else { HOP_LIMIT });
                packet.set_src_addr(v6(source));
                packet.set_dst_addr(v6(dest));
                (start, EthernetProtocol::Ipv6)
            }
        };
        let start = start - ETHERNET_HEADER_LEN;
        let to = match dest {
            IpAddr::V6(dest) if dest.is_multicast() => multicast_mac(dest.octets()),
            _ => self.guest,
        };
        self.ethernet_header(to, kind, &mut buffer[start..]);
        start
    }
}

/// RFC 2464, section 7.
fn multicast_mac(address: [u8; 16]) -> EthernetAddress {
    EthernetAddress([0x33, 0x33, address[12], address[13], address[14], address[15]])
}

fn v6(address: IpAddr) -> std::net::Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}
