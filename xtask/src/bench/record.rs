//! Raw results: one JSON object in a line each, so that tables can be made from them again.
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

/// The group of what the runner itself measures: seconds from a machine's start to its first line from user space.
pub const BOOT: &str = "boot";

/// A line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// What is measured, and on what; the first line.
    Setup(Setup),
    /// A figure.
    Figure(Figure),
    /// Something to be known of a peer: a row that came out wrong or was left out, another way of starting it.
    Note(Note),
    /// The end of a run.
    Run(Run),
}

/// What is measured, and on what.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// Year-month-day, UTC.
    pub date: String,
    /// Processor of the host.
    pub cpu: String,
    /// CPUs of the host.
    pub cpus: usize,
    /// Kernel of the host.
    pub kernel: String,
    /// Packages that the machines run.
    pub guest: Vec<String>,
    /// RAM of a machine in MiB.
    pub memory: u32,
    /// How often everything is measured.
    pub repeats: u32,
    /// Seconds that a row takes.
    pub seconds: f64,
    /// Commit of Bivisor.
    pub commit: String,
    /// Who is measured, in order.
    pub peers: Vec<PeerSetup>,
}

impl Setup {
    /// How often everything was measured, as the beginning of a sentence.
    pub fn repeats_in_words(&self) -> String {
        match self.repeats {
            0 | 1 => "Measured once".into(),
            repeats => format!("Medians of {repeats} repeats"),
        }
    }
}

/// One that is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerSetup {
    /// Its name in the results.
    pub label: String,
    /// What it says of itself.
    pub version: String,
    /// What it is.
    pub kind: PeerKind,
}

/// Kinds of peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerKind {
    /// The host itself.
    Native,
    /// What this project makes.
    Bivisor,
    /// QEMU's translator.
    Qemu,
}

/// A figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Whose it is.
    pub peer: String,
    /// In which repeat, from 0.
    pub repeat: u32,
    /// The row's group.
    pub group: String,
    /// The row.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// Its unit: the lower the better if it is one of time, else the higher.
    pub unit: String,
}

/// Something to be known of a peer: a row that came out wrong or was left out, another way of starting it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// Whose it is.
    pub peer: String,
    /// In which repeat, from 0.
    pub repeat: u32,
    /// It came out wrong.
    pub wrong: bool,
    /// The row and what was said.
    pub text: String,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Whose it is.
    pub peer: String,
    /// In which repeat, from 0.
    pub repeat: u32,
    /// CPUs of the machine.
    pub cpus: u32,
    /// Seconds from start to end.
    pub seconds: f64,
    /// CPUs that others kept busy meanwhile.
    pub foreign_load: f64,
    /// What went wrong, if something did.
    pub failure: Option<String>,
}

/// A file that records are appended to.
pub struct Log(File);

impl Log {
    /// A new file.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self(File::create(path).with_context(|| format!("making {}", path.display()))?))
    }

    /// Appends a record. It is in the file afterwards, whatever becomes of us.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_string(record)?;
        line.push('\n');
        self.0.write_all(line.as_bytes()).context("writing raw results")
    }
}

/// Reads the records of a file.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text).with_context(|| format!("{} holds no results", path.display()))
}

fn parse(text: &str) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (number, line) in text.lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            // A run that was ended leaves half a line.
            Err(error) if error.is_eof() && number + 1 == text.lines().count() => {}
            Err(error) => return Err(error).with_context(|| format!("line {}", number + 1)),
        }
    }
    Ok(records)
}

/// What went wrong, in words, each thing once.
pub fn troubles(records: &[Record]) -> Vec<String> {
    let mut troubles: Vec<String> = records
        .iter()
        .filter_map(|record| match record {
            Record::Note(note) if note.wrong => Some(format!("{}: wrong: {}", note.peer, note.text)),
            Record::Run(Run { peer, failure: Some(failure), .. }) => Some(format!("{peer}: {failure}")),
            _ => None,
        })
        .collect();
    troubles.sort();
    troubles.dedup();
    troubles
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        vec![
            Record::Setup(Setup {
                date: "2026-01-02".into(),
                peers: vec![PeerSetup { label: "a".into(), version: "1".into(), kind: PeerKind::Qemu }],
                ..Setup::default()
            }),
            Record::Figure(Figure {
                peer: "a".into(),
                repeat: 1,
                group: "g".into(),
                name: "n".into(),
                value: 1.5,
                unit: "ns".into(),
            }),
            Record::Note(Note { peer: "a".into(), repeat: 0, wrong: true, text: "n bad".into() }),
            Record::Run(Run {
                peer: "a".into(),
                repeat: 0,
                cpus: 2,
                seconds: 3.25,
                foreign_load: 0.5,
                failure: None,
            }),
        ]
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results");
        let mut log = Log::create(&path).unwrap();
        records().iter().for_each(|record| log.write(record).unwrap());
        assert_eq!(read(&path).unwrap(), records());
    }

    #[test]
    fn half_a_last_line_is_left_out_and_nonsense_is_not() {
        let line = serde_json::to_string(&records()[1]).unwrap();
        assert_eq!(parse(&format!("{line}\n{}", &line[..20])).unwrap(), records()[1..2]);
        assert!(parse(&format!("{}\n{line}\n", &line[..20])).is_err());
        assert!(parse("{\"unknown\":{}}\n").is_err());
    }

    #[test]
    fn troubles_are_told_once() {
        let mut twice = records();
        twice.extend(records());
        assert_eq!(troubles(&twice), ["a: wrong: n bad"]);
    }
}
