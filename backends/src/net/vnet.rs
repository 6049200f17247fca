//! The header that goes before a frame between us and the kernel's taps, or another process of ours: virtio's
//! `virtio_net_hdr` in little-endian order (virtio 1.2, section 5.1.6), without the number of buffers.

use bivisor_machine::packet::{Offload, Segment, SegmentKind};

/// Its length, in bytes.
pub const HEADER: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const NONE: u8 = 0;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;
const ECN: u8 = 0x80;

/// Writes the header.
pub fn encode(offload: &Offload) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    if let Some((start, offset)) = offload.checksum {
        header[0] |= NEEDS_CHECKSUM;
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
    } else if offload.checksum_valid {
        header[0] |= DATA_VALID;
    }
    if let Some(segment) = offload.segment {
        header[1] = match segment.kind {
            SegmentKind::Tcp4 => TCP_V4,
            SegmentKind::Tcp6 => TCP_V6,
        } | if segment.ecn { ECN } else { 0 };
        header[2..4].copy_from_slice(&segment.header.to_le_bytes());
        header[4..6].copy_from_slice(&segment.size.to_le_bytes());
    }
    header
}

/// Reads the header; none: it says something that we did not agree to, or what lies outside the frame.
pub fn decode(header: &[u8; HEADER], frame: &[u8]) -> Option<Offload> {
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut offload = Offload { checksum_valid: header[0] & DATA_VALID != 0, ..Offload::default() };
    if header[0] & NEEDS_CHECKSUM != 0 {
        let (start, offset) = (half(6), half(8));
        if usize::from(start) + usize::from(offset) + 2 > frame.len() {
            return None;
        }
        offload.checksum = Some((start, offset));
    }
    let kind = match header[1] & !ECN {
        NONE => return Some(offload),
        TCP_V4 => SegmentKind::Tcp4,
        TCP_V6 => SegmentKind::Tcp6,
        _ => return None,
    };
    let (head, size) = (half(2), half(4));
    if size == 0 || usize::from(head) > frame.len() || offload.checksum.is_none() {
        return None;
    }
    offload.segment = Some(Segment { kind, size, header: head, ecn: header[1] & ECN != 0 });
    Some(offload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let frame = [0; 100];
        let segment = |kind, ecn| Some(Segment { kind, size: 1448, header: 66, ecn });
        for offload in [
            Offload::default(),
            Offload { checksum_valid: true, ..Offload::default() },
            Offload { checksum: Some((34, 16)), ..Offload::default() },
            Offload {
                checksum: Some((34, 16)),
                segment: segment(SegmentKind::Tcp4, false),
                ..Offload::default()
            },
            Offload {
                checksum: Some((54, 16)),
                segment: segment(SegmentKind::Tcp6, true),
                ..Offload::default()
            },
        ] {
            assert_eq!(decode(&encode(&offload), &frame), Some(offload));
        }
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let offload = Offload { checksum: Some((34, 16)), ..Offload::default() };
        assert_eq!(decode(&encode(&offload), &[0; 51]), None);
        assert_eq!(decode(&[0, 3, 0, 0, 1, 0, 0, 0, 0, 0], &[0; 60]), None, "UDP segments");
        assert_eq!(decode(&[1, 1, 0, 0, 0, 0, 34, 0, 16, 0], &[0; 60]), None, "pieces of nothing");
        assert_eq!(decode(&[1, 1, 61, 0, 1, 0, 34, 0, 16, 0], &[0; 60]), None, "headers beyond the frame");
    }
}
