//! What is on a disk, in any format that type 2 knows, as it comes along with a machine: without zeros.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::mpsc::channel;

use bivisor_backends::disk::{self, DiskSpec};
use bivisor_machine::block::{BlockError, BlockOperation, BlockStore};
use bivisor_metal::bundle::{DiskConfig, Extent};

use super::MetalError;

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;
/// Zeros are left out in multiples of this many bytes.
const BLOCK: usize = 4096;

/// Reads a disk.
///
/// # Errors
/// It can't be opened or read.
pub fn read(spec: &DiskSpec) -> Result<DiskConfig<'static>, MetalError> {
    let store = disk::open(&DiskSpec { read_only: true, snapshot: false, ..spec.clone() }, Arc::new(|_| {}))?;
    let extents =
        extents(&*store).map_err(|error| MetalError::ReadDisk { path: spec.path.clone(), error })?;
    Ok(DiskConfig { size: store.size(), read_only: spec.read_only, serial: spec.serial.clone(), extents })
}

fn extents(store: &dyn BlockStore) -> Result<Vec<Extent<'static>>, BlockError> {
    let mut extents: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut buffer = Vec::new();
    for offset in (0..store.size()).step_by(PIECE as usize) {
        let length = PIECE.min(store.size() - offset) as usize;
        buffer.resize(length, 0);
        let (send, ended) = channel();
        // Nobody waits any more only if this thread is gone.
        let done = Box::new(move |result, buffer| drop(send.send((result, buffer))));
        store.submit(BlockOperation::Read { offset, buffer }, done);
        let (result, read) = ended.recv().map_err(|_| BlockError::Io)?;
        result?;
        buffer = read;
        for (at, block) in (offset..).step_by(BLOCK).zip(buffer.chunks(BLOCK)) {
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            match extents.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == at => bytes.extend(block),
                _ => extents.push((at, block.to_vec())),
            }
        }
    }
    Ok(extents.into_iter().map(|(offset, bytes)| Extent { offset, bytes: Cow::Owned(bytes) }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn zeros_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let mut content = vec![0; (3 << 20) + 512];
        content[5 * BLOCK..7 * BLOCK].fill(1);
        content[(1 << 20) - 1] = 2;
        content[1 << 20] = 3;
        content[3 << 20] = 4;
        fs::write(&path, &content).unwrap();
        let spec = DiskSpec { snapshot: true, serial: "s".into(), ..DiskSpec::new(&path) };
        let disk = read(&spec).unwrap();
        assert_eq!((disk.size, disk.read_only, disk.serial.as_str()), (content.len() as u64, false, "s"));
        let found: Vec<_> =
            disk.extents.iter().map(|extent| (extent.offset as usize, extent.bytes.len())).collect();
        assert_eq!(found, [(5 * BLOCK, 2 * BLOCK), ((1 << 20) - BLOCK, 2 * BLOCK), (3 << 20, 512)]);
        let mut again = vec![0; content.len()];
        for extent in &disk.extents {
            again[extent.offset as usize..][..extent.bytes.len()].copy_from_slice(&extent.bytes);
        }
        assert_eq!(again, content);
    }
}
