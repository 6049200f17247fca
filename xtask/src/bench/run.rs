//! One run: a machine is started, its console read, and what it says kept.
use super::{
    guest::Row,
    host::{Watch, wait_until_quiet},
    peer::{Machine, Peer},
    record::{BOOT, Figure, Log, Note, Record, Run},
};
use anyhow::{Context, Result};
use indicatif::ProgressBar;
use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// What a run may take besides its rows, and for each of its rows.
const RUN_LIMIT: Duration = Duration::from_secs(120);
const ROW_LIMIT: Duration = Duration::from_secs(10);

/// What all runs have in common.
pub struct Options<'a> {
    /// The repeat, from 0.
    pub repeat: u32,
    /// Where consoles are kept.
    pub out: &'a Path,
    /// How long to wait at most for a quiet host.
    pub patience: Duration,
}

/// What the benchmark program says in a line.
#[derive(Debug, PartialEq)]
enum Said<'a> {
    /// The first line from user space.
    First,
    /// The rows of a group follow.
    Group(&'a str),
    /// A row's name, figure and unit.
    Result(&'a str, f64, &'a str),
    /// A row that came out wrong.
    Bad(&'a str),
    /// A row that can't be measured here.
    Skip(&'a str),
    /// Everything was measured.
    Last,
}

impl<'a> Said<'a> {
    /// Consoles end lines with carriage returns; the kernel's own lines say nothing.
    fn parse(line: &'a str) -> Option<Self> {
        let line = line.trim_end();
        if line == "FIRST LINE" {
            return Some(Self::First);
        }
        if line == "LAST LINE" {
            return Some(Self::Last);
        }
        let (word, rest) = line.split_once(' ')?;
        match word {
            "GROUP" => Some(Self::Group(rest)),
            "BAD" => Some(Self::Bad(rest)),
            "SKIP" => Some(Self::Skip(rest)),
            "RESULT" => {
                let mut words = rest.split(' ');
                let (name, value, unit) = (words.next()?, words.next()?.parse::<f64>().ok()?, words.next()?);
                (words.next().is_none() && value.is_finite()).then_some(Self::Result(name, value, unit))
            }
            _ => None,
        }
    }
}

/// What became of a run.
struct Outcome {
    /// Rows with a figure, or said to be wrong or impossible.
    rows: usize,
    first_line: bool,
    failure: Option<String>,
    seconds: f64,
}

/// Runs the rows on a peer once, after waiting for a quiet host.
///
/// # Errors
/// If the peer can't be started, or what it says can't be kept.
pub fn measure(
    peer: &mut Peer,
    machine: &Machine,
    rows: &[Row],
    options: &Options<'_>,
    log: &mut Log,
    bar: &ProgressBar,
) -> Result<()> {
    let before = bar.position();
    loop {
        bar.set_message(format!("{}: waiting for a quiet host", peer.label));
        wait_until_quiet(options.patience);
        let watch = Watch::start();
        let outcome = execute(peer, machine, rows.len(), options, log, bar)?;
        let foreign_load = watch.foreign_load();
        bar.set_position(before + rows.len() as u64);
        let Outcome { rows: told, seconds, failure, .. } = &outcome;
        let ending = failure.as_ref().map_or(String::new(), |failure| format!("; {failure}"));
        bar.suspend(|| {
            println!(
                "    {} {}: {told} of {} rows in {seconds:.1} s, {} CPUs, others kept {foreign_load:.2} CPUs busy{ending}",
                options.repeat + 1,
                peer.label,
                rows.len(),
                machine.cpus,
            );
        });
        if failure.is_some()
            && !outcome.first_line
            && let Some(text) = peer.try_otherwise()
        {
            log.write(&Record::Note(Note {
                peer: peer.label.clone(),
                repeat: options.repeat,
                wrong: false,
                text: text.to_owned(),
            }))?;
            continue;
        }
        return log.write(&Record::Run(Run {
            peer: peer.label.clone(),
            repeat: options.repeat,
            cpus: machine.cpus,
            seconds: outcome.seconds,
            foreign_load,
            failure: outcome.failure,
        }));
    }
}

fn execute(
    peer: &Peer,
    machine: &Machine,
    rows: usize,
    options: &Options<'_>,
    log: &mut Log,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let name = format!("{}-{}cpu.{}.log", peer.label.replace(' ', "-"), machine.cpus, options.repeat);
    let mut console = File::create(options.out.join(name)).context("making the console's file")?;
    let start = Instant::now();
    let mut child = start_piped(&mut peer.command(machine), &console)?;
    let deadline = start + RUN_LIMIT + ROW_LIMIT * rows as u32;
    let lines = lines(child.stdout.take().context("no standard output")?);
    let mut listener = Listener {
        peer,
        repeat: options.repeat,
        cpus: machine.cpus,
        group: String::new(),
        rows: 0,
        first: false,
        last: false,
    };
    let mut failure = None;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((at, line)) => {
                console.write_all(&line).context("writing the console's file")?;
                listener.hear(&String::from_utf8_lossy(&line), at - start, log, bar)?;
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                // It may have ended by itself.
                let _ = child.kill();
                failure = Some(format!("still running after {} s", start.elapsed().as_secs()));
                break;
            }
        }
    }
    let status = child.wait()?;
    if failure.is_none() && !status.success() {
        failure = Some(format!("ended with {status}"));
    }
    if failure.is_none() && peer.boots() && !listener.last {
        failure = Some("the machine ended before its work was done".to_owned());
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Outcome { rows: listener.rows, first_line: listener.first, failure, seconds })
}

fn start_piped(command: &mut Command, errors: &File) -> Result<Child> {
    let errors = errors.try_clone().context("opening the console's file")?;
    command
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .with_context(|| format!("{} could not be started", command.get_program().display()))
}

/// The lines of a stream, each with the moment at which it was read.
fn lines(stream: impl Read + Send + 'static) -> Receiver<(Instant, Vec<u8>)> {
    let (send, receive) = channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            if send.send((Instant::now(), std::mem::take(&mut line))).is_err() {
                break;
            }
        }
    });
    receive
}

/// Keeps what the benchmark program says.
struct Listener<'a> {
    peer: &'a Peer,
    repeat: u32,
    cpus: u32,
    group: String,
    rows: usize,
    first: bool,
    last: bool,
}

impl Listener<'_> {
    fn hear(&mut self, line: &str, at: Duration, log: &mut Log, bar: &ProgressBar) -> Result<()> {
        match Said::parse(line) {
            Some(Said::First) if !self.first => {
                self.first = true;
                let name = format!("first_line_{}cpu", self.cpus);
                log.write(&self.figure((BOOT, &name), at.as_secs_f64(), "s"))
            }
            Some(Said::Group(group)) => {
                self.group = group.to_owned();
                bar.set_message(format!("{}: {group}", self.peer.label));
                Ok(())
            }
            Some(Said::Result(name, value, unit)) => {
                self.count(bar);
                log.write(&self.figure((&self.group, name), value, unit))
            }
            Some(Said::Bad(text)) => {
                self.count(bar);
                log.write(&self.note(text, true))
            }
            Some(Said::Skip(text)) => {
                self.count(bar);
                log.write(&self.note(text, false))
            }
            Some(Said::Last) => {
                self.last = true;
                Ok(())
            }
            Some(Said::First) | None => Ok(()),
        }
    }

    fn count(&mut self, bar: &ProgressBar) {
        self.rows += 1;
        bar.inc(1);
    }

    fn figure(&self, (group, name): (&str, &str), value: f64, unit: &str) -> Record {
        Record::Figure(Figure {
            peer: self.peer.label.clone(),
            repeat: self.repeat,
            group: group.to_owned(),
            name: name.to_owned(),
            value,
            unit: unit.to_owned(),
        })
    }

    fn note(&self, text: &str, wrong: bool) -> Record {
        Record::Note(Note {
            peer: self.peer.label.clone(),
            repeat: self.repeat,
            wrong,
            text: text.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        assert_eq!(Said::parse("RESULT sieve 577.25 /s\r\n"), Some(Said::Result("sieve", 577.25, "/s")));
        assert_eq!(Said::parse("RESULT x 1e+06 M/s"), Some(Said::Result("x", 1e6, "M/s")));
        assert_eq!(Said::parse("FIRST LINE\r\n"), Some(Said::First));
        assert_eq!(Said::parse("GROUP float\n"), Some(Said::Group("float")));
        assert_eq!(Said::parse("BAD sort ended by signal 11\n"), Some(Said::Bad("sort ended by signal 11")));
        assert_eq!(Said::parse("SKIP aes no AES"), Some(Said::Skip("aes no AES")));
        for nonsense in [
            "",
            "[    0.1] Linux",
            "RESULT",
            "RESULT a b c",
            "RESULT a 1",
            "RESULT a 1 /s x",
            "RESULT a inf /s",
        ] {
            assert_eq!(Said::parse(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn lines_come_with_the_moment_they_were_written() {
        let script = "echo one; sleep 0.3; printf two";
        let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let lines: Vec<_> = lines(child.stdout.take().unwrap()).iter().collect();
        child.wait().unwrap();
        assert_eq!(
            lines.iter().map(|(_, line)| line.as_slice()).collect::<Vec<_>>(),
            [b"one\n".as_slice(), b"two"]
        );
        assert!(lines[1].0 - lines[0].0 >= Duration::from_millis(250));
    }
}
