//! Disks as their users see them: random operations against a vector of bytes, and what happens when the host fails.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bivisor_machine::block::{BlockError, BlockOperation, BlockStore};

use super::content::Content;
use super::store::{Policy, Store};
use super::*;
use crate::rate::RateLimit;

pub(super) type Outcome = (Result<(), BlockError>, Vec<u8>);

pub(super) fn submit(store: &dyn BlockStore, operation: BlockOperation) -> Receiver<Outcome> {
    let (tell, hear) = channel();
    store.submit(operation, Box::new(move |result, buffer| tell.send((result, buffer)).unwrap()));
    hear
}

fn wait(store: &dyn BlockStore, operation: BlockOperation) -> Outcome {
    submit(store, operation).recv_timeout(Duration::from_secs(20)).expect("the request ends")
}

fn read(store: &dyn BlockStore, offset: u64, length: usize) -> Vec<u8> {
    let (result, buffer) = wait(store, BlockOperation::Read { offset, buffer: vec![0xee; length] });
    assert_eq!(result, Ok(()));
    buffer
}

pub(super) fn write(store: &dyn BlockStore, offset: u64, buffer: Vec<u8>) {
    assert_eq!(wait(store, BlockOperation::Write { offset, buffer }).0, Ok(()));
}

/// Events that nobody expects.
fn silent() -> DiskEvents {
    Arc::new(|event| panic!("unexpected: {event}"))
}

pub(super) fn open_text(text: &str) -> Result<Arc<dyn BlockStore>, DiskError> {
    open(&text.parse().unwrap(), silent())
}

pub(super) fn error_of(text: &str) -> String {
    match open_text(text) {
        Ok(_) => panic!("{text} was opened"),
        Err(error) => error.to_string(),
    }
}

fn raw_file(folder: &Path, size: u64) -> PathBuf {
    let path = folder.join("disk.img");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// Does random things to a disk and to a vector, several at once where they don't touch, and compares.
pub(super) fn check_against_model(store: &dyn BlockStore, model: &mut [u8], seed: u64, rounds: usize) {
    let mut random = fastrand::Rng::with_seed(seed);
    let sectors = model.len() / 512;
    for round in 0..rounds {
        let mut taken = vec![false; sectors];
        let mut pending = Vec::new();
        for _ in 0..random.usize(1..8) {
            let start = random.usize(..sectors);
            let most = if random.bool() { 8 } else { 400 };
            let length = 1 + random.usize(..most.min(sectors - start));
            if taken[start..start + length].contains(&true) {
                continue;
            }
            taken[start..start + length].fill(true);
            let (offset, range) = ((start * 512) as u64, start * 512..(start + length) * 512);
            let length = range.len() as u64;
            let operation = match random.u8(..10) {
                0..4 => BlockOperation::Read { offset, buffer: vec![0x5a; range.len()] },
                4..8 => {
                    let buffer = vec![random.u8(1..); range.len()];
                    model[range.clone()].copy_from_slice(&buffer);
                    BlockOperation::Write { offset, buffer }
                }
                8 => {
                    model[range.clone()].fill(0);
                    BlockOperation::WriteZeroes { offset, length, unmap: random.bool() }
                }
                _ => BlockOperation::Flush,
            };
            let reads = matches!(operation, BlockOperation::Read { .. });
            pending.push((submit(store, operation), reads.then_some(range)));
        }
        for (outcome, range) in pending {
            let (result, buffer) = outcome.recv_timeout(Duration::from_secs(20)).expect("the request ends");
            assert_eq!(result, Ok(()), "seed {seed} round {round}");
            if let Some(range) = range {
                assert!(buffer == model[range.clone()], "seed {seed} round {round}: {range:?} differs");
            }
        }
    }
    assert!(read(store, 0, model.len()) == *model, "seed {seed}: the disk differs at the end");
}

#[test]
fn a_raw_disk_is_its_file() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, cache) in (0..).zip(["writeback", "none", "writethrough", "unsafe"]) {
        let path = raw_file(folder.path(), 1 << 20);
        let disk = open_text(&format!("{},cache={cache}", path.display())).unwrap();
        let mut model = vec![0; 1 << 20];
        check_against_model(&*disk, &mut model, seed, 150);
        disk.drain();
        assert!(std::fs::read(&path).unwrap() == model, "{cache}");
    }
}

#[test]
fn a_snapshot_leaves_the_image_alone_and_reads_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    // Not a whole number of units.
    let mut model: Vec<u8> = (0..(1 << 19) + 1536).map(|i| (i / 7) as u8).collect();
    std::fs::write(&path, &model).unwrap();
    let before = model.clone();
    let disk = open_text(&format!("{},snapshot", path.display())).unwrap();
    check_against_model(&*disk, &mut model, 7, 200);
    disk.drain();
    drop(disk);
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn overlapping_writes_leave_one_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = raw_file(folder.path(), 1 << 20);
    let disk = open_text(&format!("{},snapshot", path.display())).unwrap();
    for round in 0..50u64 {
        let pending: Vec<_> = (1..9u8)
            .map(|value| {
                let operation =
                    BlockOperation::Write { offset: 512 * (round % 5), buffer: vec![value; 64 << 10] };
                submit(&*disk, operation)
            })
            .collect();
        for outcome in pending {
            assert_eq!(outcome.recv().unwrap().0, Ok(()));
        }
        let bytes = read(&*disk, 512 * (round % 5), 64 << 10);
        assert!(bytes.iter().all(|&byte| byte == bytes[0] && byte != 0), "round {round}");
    }
}

#[test]
fn requests_that_cannot_be_are_refused_with_their_buffer() {
    let folder = tempfile::tempdir().unwrap();
    let path = raw_file(folder.path(), 1 << 20);
    let disk = open_text(&format!("{},readonly", path.display())).unwrap();
    assert!(disk.read_only() && !disk.can_discard());
    assert_eq!(disk.size(), 1 << 20);
    let refused = |operation| wait(&*disk, operation);
    let buffer = vec![7; 512];
    assert_eq!(
        refused(BlockOperation::Write { offset: 0, buffer: buffer.clone() }),
        (Err(BlockError::ReadOnly), buffer.clone())
    );
    for offset in [1 << 20, u64::MAX - 511] {
        let operation = BlockOperation::Read { offset, buffer: buffer.clone() };
        assert_eq!(refused(operation), (Err(BlockError::OutOfRange), buffer.clone()));
    }
    let odd = BlockOperation::Read { offset: 1, buffer: buffer.clone() };
    assert_eq!(refused(odd).0, Err(BlockError::Unsupported));
    let zeroes = BlockOperation::WriteZeroes { offset: 0, length: u64::MAX, unmap: true };
    assert_eq!(refused(zeroes).0, Err(BlockError::OutOfRange));
    assert_eq!(refused(BlockOperation::Discard { offset: 0, length: 512 }).0, Err(BlockError::ReadOnly));
    assert_eq!(refused(BlockOperation::Flush).0, Ok(()));
}

#[test]
fn discarded_room_is_given_back() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let path = raw_file(folder.path(), 4 << 20);
    let disk = open_text(path.to_str().unwrap()).unwrap();
    write(&*disk, 0, vec![1; 4 << 20]);
    disk.drain();
    let full = std::fs::metadata(&path).unwrap().blocks();
    assert_eq!(wait(&*disk, BlockOperation::Discard { offset: 1 << 20, length: 2 << 20 }).0, Ok(()));
    assert!(std::fs::metadata(&path).unwrap().blocks() < full);
    assert_eq!(read(&*disk, (1 << 20) - 512, 512), [1; 512]);
}

#[test]
fn what_cannot_be_a_disk_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    assert!(error_of(&path("none")).contains("there is no disk"));
    assert!(error_of(folder.path().to_str().unwrap()).contains("neither a file nor a block device"));
    assert!(error_of("/dev/null,readonly").contains("neither a file nor a block device"));
    for size in [0, 1000] {
        std::fs::write(path("odd"), vec![0; size]).unwrap();
        assert!(error_of(&path("odd")).contains("whole number of 512-byte sectors"));
    }
    raw_file(folder.path(), 512);
    let used = open_text(&path("disk.img")).unwrap();
    assert!(error_of(&path("disk.img")).contains("is in use by"));
    drop(used);
    open_text(&path("disk.img")).unwrap();
}

/// A content in memory whose changes fail while the host is "full".
struct Fragile {
    bytes: Mutex<Vec<u8>>,
    full: Arc<AtomicBool>,
}

impl Fragile {
    fn change(&self) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Content for Fragile {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buffer.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.change()?;
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + buffer.len()].copy_from_slice(buffer);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.change()
    }
    fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        self.write(offset, &vec![0; length as usize])
    }
}

fn fragile(on_full: OnFull, limit: RateLimit) -> (Store, Arc<AtomicBool>, Receiver<String>) {
    let full = Arc::new(AtomicBool::new(false));
    let content = Fragile { bytes: Mutex::new(vec![0; 64 << 10]), full: full.clone() };
    let policy = Policy { read_only: false, can_discard: true, cache: CacheMode::Writeback, on_full, limit };
    let (tell, hear) = channel();
    let events: DiskEvents = Arc::new(move |event| tell.send(event.to_string()).unwrap());
    (Store::start(Box::new(content), policy, events).unwrap(), full, hear)
}

#[test]
fn without_room_writes_wait_and_reads_go_on() {
    let (store, full, events) = fragile(OnFull::Pause, RateLimit::default());
    full.store(true, Ordering::SeqCst);
    let pending: Vec<_> = (0..8u8)
        .map(|i| {
            submit(&store, BlockOperation::Write { offset: u64::from(i) * 512, buffer: vec![i + 1; 512] })
        })
        .collect();
    let flush = submit(&store, BlockOperation::Flush);
    assert!(events.recv_timeout(Duration::from_secs(5)).unwrap().contains("no room"));
    assert_eq!(read(&store, 32 << 10, 512), [0; 512]);
    assert!(pending.iter().all(|outcome| outcome.try_recv().is_err()));
    full.store(false, Ordering::SeqCst);
    for outcome in pending.into_iter().chain([flush]) {
        assert_eq!(outcome.recv_timeout(Duration::from_secs(5)).unwrap().0, Ok(()));
    }
    assert!(events.recv_timeout(Duration::from_secs(5)).unwrap().contains("room again"));
    for i in 0..8u8 {
        assert_eq!(read(&store, u64::from(i) * 512, 512), [i + 1; 512]);
    }
}

#[test]
fn without_room_the_guest_gets_an_error_if_so_asked_or_at_the_end() {
    let (store, full, events) = fragile(OnFull::Error, RateLimit::default());
    full.store(true, Ordering::SeqCst);
    let operation = || BlockOperation::Write { offset: 0, buffer: vec![1; 512] };
    assert_eq!(wait(&store, operation()), (Err(BlockError::NoSpace), vec![1; 512]));
    assert!(events.recv().unwrap().contains("failed"));
    full.store(false, Ordering::SeqCst);
    write(&store, 0, vec![2; 512]);

    let (store, full, _events) = fragile(OnFull::Pause, RateLimit::default());
    full.store(true, Ordering::SeqCst);
    let pending: Vec<_> = (0..6).map(|_| submit(&store, operation())).collect();
    store.drain();
    for outcome in pending {
        assert_eq!(outcome.try_recv().unwrap().0, Err(BlockError::NoSpace));
    }
}

#[test]
fn a_limit_slows_requests_down() {
    let limit = RateLimit { bytes: None, operations: Some(20) };
    let (store, _full, _events) = fragile(OnFull::Error, limit);
    let start = Instant::now();
    let pending: Vec<_> =
        (0..30).map(|_| submit(&store, BlockOperation::Read { offset: 0, buffer: vec![0; 512] })).collect();
    for outcome in pending {
        assert_eq!(outcome.recv().unwrap().0, Ok(()));
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(450) && took < Duration::from_secs(5), "{took:?}");
}
