//! Tests in assembler language, as the project FEX has many: each file says in a comment for the assembler what memory
//! it needs and what registers must hold at its HLT.

pub mod config;
pub mod machine;

use std::fs;
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::state::CpuState;

use self::config::Config;
use crate::blocks::guest::EngineKind;
use crate::compare::NAMES;
use crate::host_model;

/// What stands before 32-bit tests; some know its length.
const START_32BIT: &str = "BITS 32\norg 10000h\nmov eax, 0x17\nmov ds, ax\nmov es, ax\n";
/// Lists of tests, in their folder, that a processor is not expected to pass.
const LISTS: [&str; 4] = ["Disabled_Tests", "Disabled_Tests_host", "Known_Failures", "Known_Failures_host"];

/// What a test came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All registers held what they should.
    Passed,
    /// What was wrong.
    Failed(String),
    /// Why it was not run.
    Skipped(String),
}

/// Files below a folder that end in `.asm`, in order.
///
/// # Errors
/// A folder can't be read.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "asm") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Runs tests on an engine.
pub struct Runner {
    engine: EngineKind,
    model: Arc<CpuModel>,
    /// Where included files are looked for.
    includes: Vec<PathBuf>,
    scratch: tempfile::TempDir,
    /// Tests that are listed, and where.
    listed: Vec<(String, &'static str)>,
}

impl Runner {
    /// For the tests of a folder.
    ///
    /// # Errors
    /// There is no place for what nasm makes.
    pub fn new(engine: EngineKind, folder: &Path) -> Result<Self> {
        let includes = vec![folder.to_owned(), folder.join("Includes")];
        let listed = LISTS.iter().flat_map(|&list| {
            let text = fs::read_to_string(folder.join(list)).unwrap_or_default();
            let names = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            names.map(|name| (name.to_owned(), list)).collect::<Vec<_>>()
        });
        let listed = listed.collect();
        Ok(Self { engine, model: Arc::new(host_model()), includes, scratch: tempfile::tempdir()?, listed })
    }

    /// Runs the test in a file.
    ///
    /// # Errors
    /// The file can't be read, or nasm can't be run.
    pub fn run(&self, file: &Path) -> Result<Verdict> {
        let name = file.display().to_string();
        // The lists put these before the path.
        let path = |listed: &str| listed.trim_start_matches("Test_").trim_start_matches("32Bit_").to_owned();
        let is_listed = |listed: &str| name.ends_with(&format!("/{}", path(listed)));
        if let Some((_, list)) = self.listed.iter().find(|(listed, _)| is_listed(listed)) {
            return Ok(Verdict::Skipped(format!("it stands in {list}")));
        }
        let text = String::from_utf8_lossy(&fs::read(file)?).into_owned();
        let config = match Config::read(&text, |set| self.model.offers(set)) {
            Ok(config) => config,
            Err(why) => return Ok(Verdict::Skipped(why)),
        };
        let code = match self.assemble(file, &text, config.is_32bit)? {
            Ok(code) => code,
            Err(why) => return Ok(Verdict::Skipped(format!("nasm: {why}"))),
        };
        Ok(match machine::execute(&self.engine.engine(), &self.model, &config, &code) {
            Ok(state) => compare(&config, &state),
            Err(verdict) => verdict,
        })
    }

    /// The test as machine code, or what the assembler says.
    fn assemble(
        &self,
        file: &Path,
        text: &str,
        is_32bit: bool,
    ) -> Result<std::result::Result<Vec<u8>, String>> {
        let (source, binary) = (self.scratch.path().join("test.asm"), self.scratch.path().join("test.bin"));
        let start = if is_32bit { START_32BIT } else { "BITS 64\n" };
        fs::write(&source, format!("{start}{text}\nret\n"))?;
        let mut nasm = Command::new("nasm");
        for folder in self.includes.iter().map(PathBuf::as_path).chain(file.parent()) {
            nasm.arg("-i").arg(format!("{}/", folder.display()));
        }
        let output = nasm.args(["-w-all", "-f", "bin", "-o"]).arg(&binary).arg(&source).output();
        let output = output.map_err(|error| Error::other(format!("nasm can't be started: {error}")))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            let first = message.lines().next().unwrap_or_default();
            return Ok(Err(first.rsplit_once("error: ").map_or(first, |(_, what)| what).to_owned()));
        }
        Ok(Ok(fs::read(binary)?))
    }
}

/// Whether registers hold what they should.
fn compare(config: &Config, state: &CpuState) -> Verdict {
    let mut wrong = Vec::new();
    for (name, expected) in &config.registers {
        let Some(actual) = register(state, name) else {
            return Verdict::Skipped(format!("it looks at {name}"));
        };
        for (i, (expected, actual)) in expected.iter().zip(actual).enumerate() {
            if *expected != actual {
                wrong.push(format!("{name}[{i}] is {actual:#x}, not {expected:#x}"));
            }
        }
    }
    if wrong.is_empty() { Verdict::Passed } else { Verdict::Failed(wrong.join("; ")) }
}

/// The words of a register by its name, least significant first.
fn register(state: &CpuState, name: &str) -> Option<Vec<u64>> {
    let area = &state.xsave.bytes;
    let word = |at: usize| area[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    if name == "RIP" {
        return Some(vec![state.rip]);
    }
    if let Some(number) = NAMES.iter().position(|other| other.eq_ignore_ascii_case(name)) {
        return Some(vec![state.gpr[number]]);
    }
    if let Some(number) = name.strip_prefix("XMM").and_then(|number| number.parse::<usize>().ok()) {
        let (low, high) = (160 + 16 * number, 576 + 16 * number);
        return (number < 16).then(|| vec![word(low), word(low + 8), word(high), word(high + 8)]);
    }
    // By their physical numbers; where the top of the stack is, the status word tells.
    let number = name.strip_prefix("MM")?.parse::<usize>().ok().filter(|&number| number < 8)?;
    let top = usize::from(area[3] >> 3 & 7);
    let at = 32 + 16 * ((number + 8 - top) % 8);
    Some(vec![word(at), word(at + 8) & 0xffff])
}
