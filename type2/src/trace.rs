//! `--trace`: a file with a line for every place where the guest's execution is looked at.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use bivisor_machine::engine::Tracer;
use bivisor_x86::state::{CpuState, Mode};

use crate::vm::Event;

/// Bytes that are written at a time.
const BUFFER: usize = 1 << 20;
/// What the file's lines mean; the reader in `xtask` knows them, too.
const HEADER: &str = "# bivisor trace 1: cpu mode bits cpl rip rflags \
                      rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 code";

/// The trace can't be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the trace {path}: {source}", path = .path.display())]
pub struct TraceError {
    path: PathBuf,
    source: io::Error,
}

/// The file that all vCPUs of all sessions write to.
pub struct TraceFile {
    path: PathBuf,
    // Nothing once writing has failed.
    file: Mutex<Option<BufWriter<File>>>,
    events: Sender<Event>,
}

impl TraceFile {
    /// Makes the file. `events`: who hears that it can't be written any more.
    ///
    /// # Errors
    /// The file can't be made.
    pub fn create(path: &Path, events: Sender<Event>) -> Result<Arc<Self>, TraceError> {
        let file = File::create(path).map_err(|source| TraceError { path: path.into(), source })?;
        let file = Mutex::new(Some(BufWriter::with_capacity(BUFFER, file)));
        Ok(Arc::new(Self { path: path.into(), file, events }))
    }

    /// Tells that a machine starts, for the first time or after a reset.
    pub fn session(&self, engine: &str) {
        self.write(format!("{HEADER}\n# engine {engine}\n").as_bytes());
    }

    /// The tracer of a vCPU.
    pub fn tracer(self: &Arc<Self>, cpu: u32) -> Box<dyn Tracer> {
        Box::new(VcpuTracer { cpu, line: String::new(), file: Arc::clone(self) })
    }

    /// Writes what is still buffered.
    ///
    /// # Errors
    /// It can't be written, which nobody has heard yet.
    pub fn finish(&self) -> Result<(), TraceError> {
        match self.file.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(mut file) => file.flush().map_err(|source| TraceError { path: self.path.clone(), source }),
            None => Ok(()),
        }
    }

    fn write(&self, bytes: &[u8]) {
        let mut guard = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = guard.as_mut() else { return };
        if let Err(source) = file.write_all(bytes) {
            // What is buffered would fail again when it is dropped.
            if let Some(file) = guard.take() {
                let _ = file.into_parts();
            }
            // The supervisor is only gone at the end.
            let _ = self.events.send(Event::TraceLost(TraceError { path: self.path.clone(), source }));
        }
    }
}

struct VcpuTracer {
    cpu: u32,
    line: String,
    file: Arc<TraceFile>,
}

impl Tracer for VcpuTracer {
    fn about_to_execute(&mut self, state: &CpuState, code: &[u8]) {
        self.line.clear();
        // Writing to a string doesn't fail.
        let _ = write_line(&mut self.line, self.cpu, state, code);
        self.file.write(self.line.as_bytes());
    }
}

fn write_line(line: &mut String, cpu: u32, state: &CpuState, code: &[u8]) -> fmt::Result {
    let mode = match state.mode() {
        Mode::Real => "real",
        Mode::Virtual8086 => "v86",
        Mode::Protected => "prot",
        Mode::Compatibility => "compat",
        Mode::Long64 => "long",
    };
    let CpuState { cpl, rip, rflags, .. } = state;
    write!(line, "{cpu} {mode} {} {cpl} {rip:x} {rflags:x}", state.code_bits())?;
    for register in state.gpr {
        write!(line, " {register:x}")?;
    }
    line.push(' ');
    if code.is_empty() {
        line.push('-');
    }
    for byte in code {
        write!(line, "{byte:02x}")?;
    }
    line.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_line_tells_the_registers_and_the_code() {
        let mut state = CpuState::default();
        state.gpr[3] = 0xabc;
        let mut line = String::new();
        write_line(&mut line, 1, &state, &[0x0f, 0xa2]).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words.len(), HEADER.split_once(": ").unwrap().1.split(' ').count());
        assert_eq!(words[..6], ["1", "real", "16", "0", "fff0", "2"]);
        assert_eq!((words[9], words[22]), ("abc", "0fa2"));
    }

    #[test]
    fn a_full_disk_is_told_once() {
        let (events, happenings) = channel();
        let trace = TraceFile::create(Path::new("/dev/full"), events).unwrap();
        let text = vec![b'x'; BUFFER + 1];
        trace.write(&text);
        trace.write(&text);
        let told: Vec<Event> = happenings.try_iter().collect();
        assert!(matches!(&told[..], [Event::TraceLost(error)] if error.to_string().contains("/dev/full")));
        assert!(trace.finish().is_ok(), "told already");
    }
}
