//! Unpacks the kernel inside a bzImage. The packers are those that Linux offers; the kernel's build puts the
//! unpacked size behind the packed data as four bytes (gzip has it there by itself).

use alloc::vec::Vec;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::Fields;

/// No kernel is larger than this when unpacked; Linux itself can't be (its image has 1 GiB of addresses).
const LARGEST: u64 = 1 << 30;
/// Unpacked bytes of a block in LZ4's legacy frame, except for the last one.
const LZ4_BLOCK: usize = 8 << 20;

/// What xz may take for its dictionary: Linux packs with one of 128 MiB.
const XZ_MEMORY_KIB: u32 = 160 << 10;

/// Why packed data can't be unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// A packer that is not known here.
    #[error("packed in an unknown way")]
    Unknown,
    /// It would be larger than it may be, or than it says.
    #[error("too large when unpacked")]
    TooLarge,
    /// The data is damaged.
    #[error("damaged")]
    Damaged,
}

/// Unpacks data to at most `limit` bytes.
pub fn unpack(packed: &[u8], limit: u64) -> Result<Vec<u8>, UnpackError> {
    if packed.starts_with(b"\x7fELF") {
        return Ok(packed.to_vec());
    }
    let (data, size) = packed.split_last_chunk::<4>().ok_or(UnpackError::Damaged)?;
    let size = u32::from_le_bytes(*size);
    if u64::from(size) > limit.min(LARGEST) {
        return Err(UnpackError::TooLarge);
    }
    let unpacker: fn(&[u8], &mut [u8]) -> Result<usize, UnpackError> = match data {
        [0x1f, 0x8b, ..] => gzip,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => xz,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => zstd,
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4,
        _ => return Err(UnpackError::Unknown),
    };
    let mut unpacked = Vec::new();
    unpacked.try_reserve_exact(size as usize).map_err(|_| UnpackError::TooLarge)?;
    unpacked.resize(size as usize, 0);
    match unpacker(data, &mut unpacked)? {
        length if length == unpacked.len() => Ok(unpacked),
        _ => Err(UnpackError::Damaged),
    }
}

/// gzip (RFC 1952) without its last field.
fn gzip(data: &[u8], to: &mut [u8]) -> Result<usize, UnpackError> {
    let (data, crc) = data.split_last_chunk::<4>().ok_or(UnpackError::Damaged)?;
    let deflated = data.get(gzip_header(data).ok_or(UnpackError::Damaged)?..).ok_or(UnpackError::Damaged)?;
    let mut state = alloc::boxed::Box::<DecompressorOxide>::default();
    let (status, _, length) =
        decompress(&mut state, deflated, to, 0, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF);
    match status {
        TINFLStatus::Done if crc32fast::hash(to.get(..length).unwrap_or(&[])) == u32::from_le_bytes(*crc) => {
            Ok(length)
        }
        TINFLStatus::HasMoreOutput => Err(UnpackError::TooLarge),
        _ => Err(UnpackError::Damaged),
    }
}

/// Length of gzip's header, whose flags say which optional fields follow.
fn gzip_header(data: &[u8]) -> Option<usize> {
    const CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const STRINGS: [u8; 2] = [8, 16];
    let flags = data.u8_at(3)?;
    let mut at = 10;
    if flags & EXTRA != 0 {
        at += 2 + usize::from(data.u16_at(at)?);
    }
    for string in STRINGS {
        if flags & string != 0 {
            at += data.get(at..)?.iter().position(|&b| b == 0)? + 1;
        }
    }
    if flags & CRC != 0 {
        at += 2;
    }
    Some(at)
}

/// xz, in the kernel's case with the x86 filter.
fn xz(data: &[u8], to: &mut [u8]) -> Result<usize, UnpackError> {
    use lzma_rust2::{Action, Status, XzStream};
    let mut stream = XzStream::new_mem_limit(false, XZ_MEMORY_KIB);
    let (mut taken, mut done) = (0, 0);
    loop {
        let packed = data.get(taken..).unwrap_or(&[]);
        let room = to.get_mut(done..).unwrap_or(&mut []);
        let full = room.is_empty();
        let step = stream.process(packed, room, Action::Finish).map_err(|_| UnpackError::Damaged)?;
        taken += step.bytes_consumed;
        done += step.bytes_produced;
        if step.status == Status::StreamEnd {
            return Ok(done);
        }
        if step.bytes_consumed == 0 && step.bytes_produced == 0 {
            return Err(if full { UnpackError::TooLarge } else { UnpackError::Damaged });
        }
    }
}

fn zstd(data: &[u8], to: &mut [u8]) -> Result<usize, UnpackError> {
    use ruzstd::decoding::FrameDecoder;
    use ruzstd::decoding::errors::FrameDecoderError;
    FrameDecoder::new().decode_all(data, to).map_err(|e| match e {
        FrameDecoderError::TargetTooSmall => UnpackError::TooLarge,
        _ => UnpackError::Damaged,
    })
}

/// LZ4's legacy frame: blocks, each after its packed size.
fn lz4(data: &[u8], to: &mut [u8]) -> Result<usize, UnpackError> {
    let mut rest = data.get(4..).unwrap_or(&[]);
    let mut done = 0;
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        let (block, next) = after.split_at_checked(size).ok_or(UnpackError::Damaged)?;
        let room = to.get_mut(done..).unwrap_or(&mut []);
        let length = room.len().min(LZ4_BLOCK);
        let room = room.get_mut(..length).unwrap_or(&mut []);
        done += lz4_flex::block::decompress_into(block, room).map_err(|e| match e {
            lz4_flex::block::DecompressError::OutputTooSmall { .. } => UnpackError::TooLarge,
            _ => UnpackError::Damaged,
        })?;
        rest = next;
    }
    if rest.is_empty() { Ok(done) } else { Err(UnpackError::Damaged) }
}
