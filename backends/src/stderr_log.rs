//! Standard error as a log file of bounded size, for processes that nobody watches: when it has grown too long, its
//! older half goes. It stays the same open file, so a process that may open nothing any more can do it.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{fstat, ftruncate};
use rustix::io::pread;

/// Bytes of the log at most; 0: it is not bounded.
static LIMIT: AtomicU64 = AtomicU64::new(0);

const GONE_BEFORE: &str = "[the first ";
const GONE_AFTER: &str = " bytes of this log are gone]\n";

/// Keeps standard error below a size in bytes. It must be a file that is open to be read and to be appended to.
pub fn bound(limit: u64) {
    LIMIT.store(limit, Ordering::Relaxed);
}

/// Writes to standard error. Nobody is told if that fails.
pub fn write(bytes: &[u8]) {
    // Whoever holds it is the only one who writes, and who makes the log shorter.
    let mut stderr = io::stderr().lock();
    let limit = LIMIT.load(Ordering::Relaxed);
    if limit > 0 {
        let _ = make_room(&mut stderr, limit, bytes.len() as u64);
    }
    let _ = stderr.write_all(bytes);
}

/// What a log has lost, from its first bytes: how many bytes, and how many the line takes that says so.
pub fn lost(start: &[u8]) -> (u64, u64) {
    let line = start.split_inclusive(|&byte| byte == b'\n').next().and_then(|line| str::from_utf8(line).ok());
    let number = line.and_then(|line| line.strip_prefix(GONE_BEFORE)?.strip_suffix(GONE_AFTER)?.parse().ok());
    number.map_or((0, 0), |number| (number, line.map_or(0, str::len) as u64))
}

fn make_room(file: &mut (impl AsFd + Write), limit: u64, more: u64) -> io::Result<()> {
    let size = u64::try_from(fstat(&*file)?.st_size).unwrap_or(0);
    if size + more <= limit {
        return Ok(());
    }
    let mut start = [0; 64];
    let count = pread(&*file, &mut start, 0)?;
    let (gone, note) = lost(&start[..count]);
    let mut kept = vec![0; usize::try_from((limit / 2).min(size - note)).unwrap_or(0)];
    let from = size - kept.len() as u64;
    let count = pread(&*file, &mut kept, from)?;
    kept.truncate(count);
    // From the beginning of a line, if there are lines.
    let cut = kept.iter().position(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let gone = gone + (from - note) + cut as u64;
    let mut text = format!("{GONE_BEFORE}{gone}{GONE_AFTER}").into_bytes();
    text.extend_from_slice(&kept[cut..]);
    ftruncate(&*file, 0)?;
    file.write_all(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn a_log_keeps_its_end_and_says_what_it_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).unwrap();
        let mut all = Vec::new();
        for number in 0..10_000 {
            let line = format!("line {number}\n");
            make_room(&mut file, 4096, line.len() as u64).unwrap();
            file.write_all(line.as_bytes()).unwrap();
            all.extend(line.into_bytes());
            let text = std::fs::read(&path).unwrap();
            assert!(text.len() <= 4096);
            let (gone, note) = lost(&text);
            assert_eq!(all[gone as usize..], text[note as usize..], "line {number}");
        }
        assert!(std::fs::read(&path).unwrap().len() >= 2000);
    }

    #[test]
    fn only_a_whole_note_counts() {
        assert_eq!(lost(b"[the first 12 bytes of this log are gone]\nx"), (12, 42));
        for text in ["", "line\n", "[the first 12 bytes", "[the first x bytes of this log are gone]\n"] {
            assert_eq!(lost(text.as_bytes()), (0, 0), "{text}");
        }
    }
}
