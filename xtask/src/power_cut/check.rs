//! What must be on a disk whose machine was killed.
use anyhow::{Context, Result, ensure};
use bivisor_backends::disk::{DiskSpec, Format, Reader};
use std::{fs, fs::File, os::unix::fs::FileExt, path::Path, process::Command};

/// As in guests/linux/power_cut.c: bytes of a record, records in the log, files that are kept, bytes of a file at most.
/// The guest is ahead of what is seen of it: what it says stands in the console's queue when its process is killed.
const RECORD: usize = 512;
const SLOTS: u64 = 4096;
const KEPT: u64 = 128;
const LARGEST: u64 = 96 << 10;
/// Records that the guest may be ahead by: what is being overwritten, or removed, is not looked for.
const AHEAD: u64 = 512;

/// The numbers up to which the guest has said that all is safe. 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Safe {
    /// Records of the log.
    pub log: u64,
    /// Files, every eighth number.
    pub file: u64,
}

impl Safe {
    /// Takes in what the guest has printed: whole lines, among others of the kernel's and the shell's.
    pub fn read(&mut self, text: &str) {
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            let number = |what| line.trim_end().strip_prefix(what)?.parse::<u64>().ok();
            self.log = self.log.max(number("log ").unwrap_or(0));
            self.file = self.file.max(number("file ").unwrap_or(0));
        }
    }
}

/// The bytes of a number, as the guest makes them.
fn content(number: u64, size: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        bytes.extend_from_slice(&state.to_le_bytes());
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    }
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn size_of_file(number: u64) -> usize {
    (8 + number.wrapping_mul(7919) % (LARGEST / 8) * 8).min(LARGEST) as usize
}

/// Checks a disk in a folder for temporary files: the image by its own tables, the file system, and all that is safe.
///
/// # Errors
/// What is wrong or lost.
pub fn check(disk: &Path, format: Format, safe: Safe, folder: &Path) -> Result<()> {
    let copy = folder.join("copy");
    copy_out(disk, format, &copy)?;
    // As a machine that starts again would: the journal first.
    run("e2fsck", &["-y", "-E", "journal_only"], &copy, &[0, 1])?;
    run("e2fsck", &["-f", "-n"], &copy, &[0])?;
    let (log, files) = (folder.join("log"), folder.join("f"));
    // What an earlier check left here is not to be taken for this disk's.
    let _ = (fs::remove_file(&log), fs::remove_dir_all(&files));
    for request in [format!("dump /log {}", log.display()), format!("rdump /f {}", folder.display())] {
        run("debugfs", &["-R", &request], &copy, &[0])?;
    }
    if safe.log > 0 {
        check_log(&fs::read(&log).context("the log is gone")?, safe.log)?;
    }
    check_files(&files, safe.file)
}

/// Copies what the image holds, by the reader that has checked all of its tables.
fn copy_out(disk: &Path, format: Format, to: &Path) -> Result<()> {
    let spec = DiskSpec { read_only: true, format: Some(format), ..DiskSpec::new(disk) };
    let reader = Reader::open(&spec)?;
    let file = File::create(to)?;
    file.set_len(reader.size())?;
    let mut buffer = vec![0; 1 << 20];
    for offset in (0..reader.size()).step_by(buffer.len()) {
        let size = (reader.size() - offset).min(buffer.len() as u64) as usize;
        reader.read(offset, &mut buffer[..size])?;
        if buffer[..size].iter().any(|byte| *byte != 0) {
            file.write_all_at(&buffer[..size], offset)?;
        }
    }
    Ok(())
}

/// A program of e2fsprogs; an ordinary user's path doesn't lead to it.
pub fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin");
    command
}

fn run(program: &str, words: &[&str], disk: &Path, good: &[i32]) -> Result<()> {
    let output = tool(program)
        .args(words)
        .arg(disk)
        .output()
        .with_context(|| format!("{program} could not be started (Debian: apt-get install e2fsprogs)"))?;
    let said = [&output.stdout[..], &output.stderr].concat();
    let status = output.status.code().unwrap_or(-1);
    ensure!(good.contains(&status), "{program} {words:?}: {status}: {}", String::from_utf8_lossy(&said));
    Ok(())
}

/// Each slot holds the last safe record of its own, or one that followed.
fn check_log(log: &[u8], safe: u64) -> Result<()> {
    for number in safe.saturating_sub(SLOTS - 1 - AHEAD).max(1)..=safe {
        let slot = (number % SLOTS) as usize * RECORD;
        let record = log
            .get(slot..slot + RECORD)
            .with_context(|| format!("record {number} lies behind the log's end"))?;
        let found = u64::from_le_bytes(record[..8].try_into()?);
        if found > safe {
            continue;
        }
        ensure!(
            found == number && record == content(number, RECORD),
            "record {number} was safe, but {found} is there"
        );
    }
    Ok(())
}

fn check_files(folder: &Path, safe: u64) -> Result<()> {
    let first = (safe + AHEAD).saturating_sub(KEPT * 8) / 8 * 8 + 8;
    for number in (first..=safe).step_by(8) {
        let bytes =
            fs::read(folder.join(number.to_string())).with_context(|| format!("file {number} was safe"))?;
        ensure!(
            bytes == content(number, size_of_file(number)),
            "file {number} was safe, but holds something else"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_of_the_guests_count() {
        let mut safe = Safe::default();
        safe.read("# mount\nlog 7\r\nfile 8\r\n[  1.0] kernel log 99\nlog 9\r\nlog 10");
        assert_eq!(safe, Safe { log: 9, file: 8 });
        safe.read("log 3\n");
        assert_eq!(safe.log, 9);
    }

    #[test]
    fn a_lost_record_and_a_lost_file_are_found() {
        let mut log = vec![0; 12 * RECORD];
        for number in 1..=11 {
            let slot = number as usize * RECORD;
            log[slot..slot + RECORD].copy_from_slice(&content(number, RECORD));
        }
        check_log(&log, 11).unwrap();
        assert!(check_log(&log, 12).unwrap_err().to_string().contains("record 12"));
        log[5 * RECORD + 100] ^= 1;
        assert!(check_log(&log, 11).unwrap_err().to_string().contains("record 5 was safe"));

        let folder = tempfile::tempdir().unwrap();
        for number in [8u64, 16, 24] {
            fs::write(folder.path().join(number.to_string()), content(number, size_of_file(number))).unwrap();
        }
        check_files(folder.path(), 24).unwrap();
        fs::write(folder.path().join("24"), b"short").unwrap();
        assert!(check_files(folder.path(), 24).unwrap_err().to_string().contains("holds something else"));
        assert!(check_files(folder.path(), 32).is_err());
    }
}
