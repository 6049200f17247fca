//! `bivisor logs`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::thread;
use std::time::Duration;

use bivisor_backends::stderr_log;

use super::super::places::Places;
use super::machine;
use crate::error::Failure;
use crate::status;

/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(100);

pub(super) fn run(name: &str, follow: bool) -> Result<u8, Failure> {
    let places = Places::find()?;
    let path = places.log(name);
    // A name with slashes names no log; a machine's log stays when the machine goes.
    let log = if name.contains('/') { Err(io::ErrorKind::NotFound.into()) } else { File::open(&path) };
    let log = match log {
        Ok(log) => log,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            machine(&places, name)?;
            return Ok(status::SUCCESS);
        }
        Err(error) => return Err(failed(&path, &error)),
    };
    let folder = places.machine(name);
    let mut log = Log { file: log, seen: 0 };
    loop {
        let present = folder.folder().exists();
        let more = log.more().map_err(|error| failed(&path, &error))?;
        let mut stdout = io::stdout().lock();
        if stdout.write_all(&more).and_then(|()| stdout.flush()).is_err() || !follow || !present {
            // Who closes standard output wants no more.
            return Ok(status::SUCCESS);
        }
        thread::sleep(LOOK);
    }
}

fn failed(path: &std::path::Path, error: &io::Error) -> Failure {
    Failure::new(status::HOST, format!("cannot read the log {}: {error}", path.display()))
}

/// A log that grows, and loses its beginning.
struct Log {
    file: File,
    /// Bytes since the log's first, whether they are still there or not.
    seen: u64,
}

impl Log {
    /// What has come since the last time.
    fn more(&mut self) -> io::Result<Vec<u8>> {
        let mut start = [0; 64];
        self.file.rewind()?;
        let count = self.file.read(&mut start)?;
        let (gone, note) = stderr_log::lost(&start[..count]);
        let at = if self.seen >= gone && self.seen > 0 { note + (self.seen - gone) } else { 0 };
        let mut more = Vec::new();
        self.file.seek(SeekFrom::Start(at))?;
        self.file.read_to_end(&mut more)?;
        let new = (at + more.len() as u64).saturating_sub(note);
        self.seen = gone + new;
        Ok(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_shown_twice_when_a_log_becomes_shorter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        let mut log = Log { file: File::open(&path).unwrap(), seen: 0 };
        assert_eq!(log.more().unwrap(), b"one\ntwo\n");
        assert_eq!(log.more().unwrap(), b"");
        std::fs::write(&path, "[the first 4 bytes of this log are gone]\ntwo\nthree\n").unwrap();
        assert_eq!(log.more().unwrap(), b"three\n");
        std::fs::write(&path, "[the first 99 bytes of this log are gone]\nend\n").unwrap();
        assert_eq!(log.more().unwrap(), b"[the first 99 bytes of this log are gone]\nend\n");
    }
}
