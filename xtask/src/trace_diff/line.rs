//! Reading the lines of a trace. What they mean stands in docs/debugging.md.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};

/// The general registers in the order of the lines.
pub const REGISTERS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
    "R15",
];
/// RFLAGS.IF.
pub const IF: u64 = 1 << 9;
/// How a trace begins.
const MAGIC: &str = "# bivisor trace 1: ";

/// A processor about to execute an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Number in the file, from 1.
    pub number: u64,
    /// The processor.
    pub cpu: u32,
    /// Mode, size of code and privilege level.
    pub mode: (Mode, u32, u8),
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub flags: u64,
    /// General registers.
    pub registers: [u64; 16],
    /// Bytes at the instruction pointer.
    code: [u8; 15],
    length: u8,
}

/// Mode of a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Real,
    V86,
    Prot,
    Compat,
    Long,
}

impl Line {
    /// Reads a line; `None` where it is none.
    pub fn parse(number: u64, text: &str) -> Option<Self> {
        let hex = |word: Option<&str>| u64::from_str_radix(word?, 16).ok();
        let mut words = text.split(' ');
        let cpu = words.next()?.parse().ok()?;
        let mode = match words.next()? {
            "real" => Mode::Real,
            "v86" => Mode::V86,
            "prot" => Mode::Prot,
            "compat" => Mode::Compat,
            "long" => Mode::Long,
            _ => return None,
        };
        let bits = words.next()?.parse().ok().filter(|bits| matches!(bits, 16 | 32 | 64))?;
        let mode = (mode, bits, words.next()?.parse().ok()?);
        let (rip, flags) = (hex(words.next())?, hex(words.next())?);
        let mut registers = [0; 16];
        for register in &mut registers {
            *register = hex(words.next())?;
        }
        let bytes = words.next()?.trim_end_matches('-');
        let mut line = Self { number, cpu, mode, rip, flags, registers, code: [0; 15], length: 0 };
        for (byte, digits) in line.code.iter_mut().zip(bytes.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
            line.length += 1;
        }
        words.next().is_none().then_some(line)
    }

    /// Whether the processor was in the same state at another line.
    pub fn is_same_state(&self, other: &Self) -> bool {
        let state = |line: &Self| (line.mode, line.rip, line.flags, line.registers);
        state(self) == state(other)
    }

    /// Whether there was something to execute.
    pub fn has_code(&self) -> bool {
        self.length > 0
    }

    /// The instruction, where its bytes are in the trace.
    pub fn instruction(&self) -> Option<Instruction> {
        let code = &self.code[..self.length.into()];
        let instruction = Decoder::with_ip(self.mode.1, code, self.rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Where the line stands and what it executes, in words.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        match self.instruction() {
            Some(instruction) => NasmFormatter::new().format(&instruction, &mut text),
            None => text.push_str("(no instruction)"),
        }
        format!("line {:<9} {:016x}  {text}", self.number, self.rip)
    }
}

/// Reads a trace line by line.
pub struct Reader {
    path: PathBuf,
    lines: std::io::Split<BufReader<File>>,
    number: u64,
    cpu: u32,
    /// The engine that wrote it.
    pub engine: String,
}

impl Reader {
    /// Opens a trace, of which one processor is of interest.
    ///
    /// # Errors
    /// It can't be read, or is no trace.
    pub fn open(path: &Path, cpu: u32) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = BufReader::with_capacity(1 << 20, file).split(b'\n');
        let mut reader = Self { path: path.into(), lines, number: 0, cpu, engine: String::new() };
        let first = reader.text()?.unwrap_or_default();
        let second = reader.text()?.unwrap_or_default();
        match second.strip_prefix("# engine ") {
            Some(engine) if first.starts_with(MAGIC) => engine.clone_into(&mut reader.engine),
            _ => bail!("{} is no trace that this version can read", path.display()),
        }
        Ok(reader)
    }

    fn text(&mut self) -> Result<Option<String>> {
        let Some(line) = self.lines.next() else { return Ok(None) };
        self.number += 1;
        let line = line.with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(Some(String::from_utf8_lossy(&line).into_owned()))
    }

    /// The next line of the processor, if there is one.
    pub fn next(&mut self) -> Result<Option<Line>> {
        while let Some(text) = self.text()? {
            if text.starts_with('#') {
                continue;
            }
            let Some(line) = Line::parse(self.number, &text) else {
                bail!("{}:{}: this is no line of a trace", self.path.display(), self.number)
            };
            if line.cpu == self.cpu {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}
