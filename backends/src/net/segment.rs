//! What a guest left undone in a frame, done for one that does not take it so: checksums, and large segments cut to
//! size.

use bivisor_machine::packet::{Offload, PortFeatures, Segment, SegmentKind};
use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetFrame, IPV6_HEADER_LEN, Ipv4Packet, Ipv6Packet, TCP_HEADER_LEN, TcpPacket,
    checksum,
};

/// Whether a receiver takes the frame as it is.
pub fn fits(offload: &Offload, accepted: PortFeatures) -> bool {
    (offload.segment.is_none() || accepted.gives_segments)
        && (offload.checksum.is_none() || accepted.gives_partial_checksums)
}

/// The frames that say the same with nothing left undone. None: the frame is not what its offload says.
pub fn finish(frame: &[u8], offload: &Offload) -> Option<Vec<Vec<u8>>> {
    if let Some(segment) = &offload.segment {
        return cut(frame, segment);
    }
    let mut frame = frame.to_vec();
    if let Some((start, offset)) = offload.checksum {
        let (start, at) = (usize::from(start), usize::from(start) + usize::from(offset));
        // The field holds the pseudo-header's sum: it counts.
        let sum = match !checksum::data(frame.get(start..)?) {
            0 => 0xffff,
            sum => sum,
        };
        frame.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    }
    Some(vec![frame])
}

/// Cuts a large TCP segment (as hosts do whose network cards can't).
fn cut(frame: &[u8], segment: &Segment) -> Option<Vec<Vec<u8>>> {
    let packet = EthernetFrame::new_checked(frame).ok()?.payload();
    let ip = match segment.kind {
        SegmentKind::Tcp4 => usize::from(Ipv4Packet::new_checked(packet).ok()?.header_len()),
        SegmentKind::Tcp6 => {
            Ipv6Packet::new_checked(packet).ok()?;
            IPV6_HEADER_LEN
        }
    };
    let tcp_at = ETHERNET_HEADER_LEN + ip;
    let tcp = TcpPacket::new_checked(frame.get(tcp_at..)?).ok()?;
    let head = tcp_at + usize::from(tcp.header_len());
    if tcp.header_len() < TCP_HEADER_LEN as u8 {
        return None;
    }
    let payload = &frame[head..];
    let pieces = payload.chunks(usize::from(segment.size));
    let count = pieces.len();
    let cut = pieces.enumerate().map(|(number, bytes)| {
        let mut piece = Vec::with_capacity(head + bytes.len());
        piece.extend_from_slice(&frame[..head]);
        piece.extend_from_slice(bytes);
        let offset = number * usize::from(segment.size);
        mend(&mut piece, segment.kind, tcp_at, number, offset, number + 1 == count);
        piece
    });
    Some(cut.collect())
}

/// Makes the headers of a piece its own.
fn mend(piece: &mut [u8], kind: SegmentKind, tcp_at: usize, number: usize, offset: usize, last: bool) {
    let length = piece.len() - ETHERNET_HEADER_LEN;
    let (ip, tcp) = piece[ETHERNET_HEADER_LEN..].split_at_mut(tcp_at - ETHERNET_HEADER_LEN);
    let mut tcp = TcpPacket::new_unchecked(tcp);
    tcp.set_seq_number(tcp.seq_number() + offset);
    if !last {
        tcp.set_fin(false);
        tcp.set_psh(false);
    }
    if number > 0 {
        tcp.set_cwr(false);
    }
    match kind {
        SegmentKind::Tcp4 => {
            let mut ip = Ipv4Packet::new_unchecked(ip);
            ip.set_total_len(length as u16);
            ip.set_ident(ip.ident().wrapping_add(number as u16));
            ip.fill_checksum();
            tcp.fill_checksum(&ip.src_addr().into(), &ip.dst_addr().into());
        }
        SegmentKind::Tcp6 => {
            let mut ip = Ipv6Packet::new_unchecked(ip);
            ip.set_payload_len((length - IPV6_HEADER_LEN) as u16);
            tcp.fill_checksum(&ip.src_addr().into(), &ip.dst_addr().into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{IpAddress, IpProtocol, Ipv4Address, Ipv4Repr, TcpControl, TcpRepr, TcpSeqNumber};

    const FROM: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
    const TO: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);

    fn large(payload: &[u8]) -> Vec<u8> {
        let tcp = TcpRepr {
            src_port: 1,
            dst_port: 2,
            control: TcpControl::Fin,
            seq_number: TcpSeqNumber(-100),
            ack_number: Some(TcpSeqNumber(7)),
            window_len: 100,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        let ip = Ipv4Repr {
            src_addr: FROM,
            dst_addr: TO,
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let mut frame = vec![0; 34 + tcp.buffer_len()];
        frame[12] = 8;
        let capabilities = ChecksumCapabilities::default();
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[14..]), &capabilities);
        let mut packet = TcpPacket::new_unchecked(&mut frame[34..]);
        tcp.emit(&mut packet, &IpAddress::Ipv4(FROM), &IpAddress::Ipv4(TO), &capabilities);
        packet.set_checksum(checksum::pseudo_header_v4(&FROM, &TO, IpProtocol::Tcp, tcp.buffer_len() as u32));
        frame
    }

    fn offload(size: u16) -> Offload {
        let segment = Segment { kind: SegmentKind::Tcp4, size, header: 54, ecn: false };
        Offload { checksum: Some((34, 16)), segment: Some(segment), ..Offload::default() }
    }

    #[test]
    fn pieces_together_are_the_segment() {
        let payload: Vec<u8> = (0..5000u32).map(|at| (at * 7) as u8).collect();
        let pieces = finish(&large(&payload), &offload(1400)).unwrap();
        assert_eq!(pieces.len(), 4);
        let mut joined = Vec::new();
        for (number, piece) in pieces.iter().enumerate() {
            let ip = Ipv4Packet::new_checked(&piece[14..]).unwrap();
            assert!(ip.verify_checksum());
            let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
            assert!(tcp.verify_checksum(&IpAddress::Ipv4(FROM), &IpAddress::Ipv4(TO)));
            assert_eq!(tcp.seq_number(), TcpSeqNumber(-100) + joined.len());
            assert_eq!(tcp.fin(), number == 3);
            joined.extend_from_slice(tcp.payload());
        }
        assert!(joined == payload);
    }

    #[test]
    fn a_partial_checksum_is_made_whole() {
        let offload = Offload { segment: None, ..offload(1400) };
        let pieces = finish(&large(b"odd"), &offload).unwrap();
        let tcp = TcpPacket::new_checked(&pieces[0][34..]).unwrap();
        assert!(tcp.verify_checksum(&IpAddress::Ipv4(FROM), &IpAddress::Ipv4(TO)));
    }

    #[test]
    fn what_is_no_segment_is_refused() {
        let frame = large(b"some bytes");
        for length in 0..54 {
            assert_eq!(finish(&frame[..length], &offload(4)), None, "{length}");
        }
        let mut short = frame.clone();
        short[34 + 12] = 0x10;
        assert_eq!(finish(&short, &offload(4)), None);
    }
}
