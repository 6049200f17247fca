//! `--perf-map`: the file by which perf names translated code, `/tmp/perf-PID.map`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Seek, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bivisor_machine::engine::CodeMap;

/// The map can't be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the map for perf {path}: {source}", path = .path.display())]
pub struct PerfMapError {
    path: PathBuf,
    source: io::Error,
}

/// Names of host code by address. Of what has stood at an address at different times, the last is known.
#[derive(Default)]
struct Names(BTreeMap<u64, (u64, String)>);

impl Names {
    fn insert(&mut self, address: u64, size: u64, name: String) {
        let end = address.saturating_add(size);
        while let Some((&start, &(length, _))) = self.0.range(..end).next_back()
            && start.saturating_add(length) > address
        {
            self.0.remove(&start);
        }
        self.0.insert(address, (size, name));
    }

    fn text(&self) -> String {
        self.0.iter().map(|(address, (size, name))| format!("{address:x} {size:x} {name}\n")).collect()
    }
}

struct Shared {
    path: PathBuf,
    file: File,
    names: Names,
}

impl Shared {
    fn write(&mut self) -> io::Result<()> {
        let text = self.names.text();
        self.file.rewind()?;
        self.file.write_all(text.as_bytes())?;
        self.file.set_len(text.len() as u64)
    }
}

/// The map of all vCPUs of all sessions.
#[derive(Clone)]
pub struct PerfMap(Arc<Mutex<Shared>>);

impl PerfMap {
    /// Makes the file for this process.
    ///
    /// # Errors
    /// It can't be made.
    pub fn create() -> Result<Self, PerfMapError> {
        let path = PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()));
        // An old process may have had this number. What others put there as a trap is not followed.
        let _ = fs::remove_file(&path);
        match File::create_new(&path) {
            Ok(file) => Ok(Self(Arc::new(Mutex::new(Shared { path, file, names: Names::default() })))),
            Err(source) => Err(PerfMapError { path, source }),
        }
    }

    /// What a vCPU tells of its code.
    pub fn code_map(&self) -> Box<dyn CodeMap> {
        Box::new(self.clone())
    }

    /// Writes what is known.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self) -> Result<(), PerfMapError> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.write().map_err(|source| PerfMapError { path: shared.path.clone(), source })
    }
}

impl CodeMap for PerfMap {
    fn made(&mut self, address: u64, size: u64, name: String) {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.names.insert(address, size, name);
    }

    fn cleared(&mut self) {
        // At the end it is tried again, and an error told.
        let _ = self.write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_name_of_an_address_is_kept() {
        let mut names = Names::default();
        for (address, size, name) in [(0x100, 0x20, "a"), (0x120, 0x20, "b"), (0x140, 0x20, "c")] {
            names.insert(address, size, name.into());
        }
        names.insert(0x110, 0x18, "d".into());
        assert_eq!(names.text(), "110 18 d\n140 20 c\n");
        names.insert(0x128, 0x18, "e".into());
        assert_eq!(names.text(), "110 18 d\n128 18 e\n140 20 c\n");
    }

    #[test]
    fn a_shorter_map_leaves_nothing_behind() {
        let file = tempfile::tempfile().unwrap();
        let mut shared = Shared { path: PathBuf::new(), file, names: Names::default() };
        shared.names.insert(0x100, 1, "long".into());
        shared.write().unwrap();
        shared.names.insert(0x100, 1, "s".into());
        shared.write().unwrap();
        assert_eq!(shared.file.metadata().unwrap().len(), "100 1 s\n".len() as u64);
    }
}
