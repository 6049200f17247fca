//! Runs a guest as a child process and compares what it printed with what is expected.
use crate::Guest;
use std::{
    io::{Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// All that the guest printed, with CR removed.
    pub output: String,
    /// What the virtual machine monitor said on its standard error.
    pub messages: String,
    /// The monitor's exit status; nothing if it had to be killed.
    pub status: Option<ExitStatus>,
    /// How long it ran.
    pub time: Duration,
}

/// The comparison of a run with the expectation.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Checks that said `ok`.
    pub passed: usize,
    /// Checks skipped by the guest because the machine lacks what they need.
    pub skipped: Vec<String>,
    /// What is not as expected, in words.
    pub differences: Vec<String>,
}

/// Runs `command`, types the guest's input once it has printed something, and waits until the command ends or
/// `limit` is over, when it is killed.
///
/// # Errors
/// If the command cannot be started.
pub fn run(guest: &Guest, command: &mut Command, limit: Duration) -> std::io::Result<Outcome> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (begun, first_output) = channel();
    let output = collect(child.stdout.take(), Some(begun));
    let messages = collect(child.stderr.take(), None);
    // Standard input stays open until the end: a monitor may take its end for a hang-up.
    let mut input = child.stdin.take();
    if let (Some(pipe), Ok(())) = (&mut input, first_output.recv_timeout(limit)) {
        // A guest that ended before it read everything is no error here.
        let _ = pipe.write_all(guest.input.as_bytes()).and_then(|()| pipe.flush());
    }
    let status = wait(&mut child, start + limit)?;
    drop(input);
    let text = |bytes: Receiver<Vec<u8>>| {
        let bytes = bytes.recv_timeout(Duration::from_secs(5)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    };
    Ok(Outcome { output: text(output), messages: text(messages), status, time: start.elapsed() })
}

/// Reads a pipe to its end in a thread, and says when the first byte has come.
fn collect(pipe: Option<impl Read + Send + 'static>, begun: Option<Sender<()>>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = vec![0];
        if let Some(mut pipe) = pipe {
            // What came before a read error still counts; whoever waits may have given up.
            let first = pipe.read(&mut bytes).unwrap_or_default();
            bytes.truncate(first);
            begun.map(|begun| begun.send(()));
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

fn wait(child: &mut Child, deadline: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

impl Outcome {
    /// Compares the output with the guest's expected text. `excused` names checks that may fail, one a line.
    pub fn compare(&self, guest: &Guest, excused: &str) -> Verdict {
        let mut verdict = Verdict::default();
        if self.status.is_none() {
            verdict.differences.push(format!("did not end within {:.0?}", self.time));
        }
        let mut lines = self.output.lines().map(str::trim_end).peekable();
        let mut expected = guest.expected.lines().map(str::trim_end).peekable();
        while let Some(want) = expected.next() {
            if want == "..." {
                let until = expected.peek().copied();
                while lines.next_if(|line| until.is_none_or(|until| !fits(until, line))).is_some() {}
                continue;
            }
            let Some(line) = lines.next() else {
                verdict.differences.push(format!("the output ends where {want:?} is expected"));
                return verdict;
            };
            if !fits(want, line)
                && let Some((group, _)) = line.split_once(": skipped, ")
                && want.strip_prefix(group).is_some_and(|rest| rest.starts_with(": ") && rest != ": ok")
            {
                verdict.skipped.push(group.to_owned());
                while expected.next_if(|want| want.starts_with(&format!("{group}: "))).is_some() {}
                continue;
            }
            verdict.line(want, line, excused);
        }
        verdict.differences.extend(lines.map(|line| format!("after the expected end: {line:?}")));
        verdict
    }
}

impl Verdict {
    fn line(&mut self, want: &str, line: &str, excused: &str) {
        let check = want.strip_suffix(": ok");
        if fits(want, line) {
            self.passed += usize::from(check.is_some());
        } else if let Some(check) = check.filter(|check| line.starts_with(&format!("{check}: skipped, "))) {
            self.skipped.push(check.to_owned());
        } else if let Some(check) = check.filter(|check| excused.lines().any(|line| line == *check)) {
            self.skipped.push(check.to_owned());
        } else if !want.contains(": end, ") || self.skipped.is_empty() || !line.contains(": end, ") {
            // With checks left out, the guest's own count differs from the expected one as well.
            self.differences.push(format!("expected {want:?}, got {line:?}"));
        }
    }
}

/// Whether `line` fits `pattern`, in which `*` stands for any text.
fn fits(pattern: &str, line: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == line };
    let Some(rest) = line.strip_prefix(head) else { return false };
    (0..=rest.len()).any(|at| rest.get(at..).is_some_and(|rest| fits(tail, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(output: &str) -> Outcome {
        let status = Some(ExitStatus::default());
        Outcome { output: output.into(), messages: String::new(), status, time: Duration::ZERO }
    }

    fn compare(expected: &'static str, output: &str, excused: &str) -> Verdict {
        let guest = Guest { name: "test", image: &[], expected, input: "", qemu_differs: "" };
        outcome(output).compare(&guest, excused)
    }

    #[test]
    fn patterns() {
        assert!(fits("a*c", "abbc") && fits("*", "") && fits("a*b*c", "a b b c"));
        assert!(!fits("a*c", "abcd") && !fits("abc", "ab"));
    }

    #[test]
    fn equal_output_passes() {
        let verdict =
            compare("t: begin\none: ok\nt: end, 1 passed\n", "t: begin\none: ok\nt: end, 1 passed\n", "");
        assert_eq!(verdict, Verdict { passed: 1, ..Verdict::default() });
    }

    #[test]
    fn missing_failed_and_surplus_lines_are_differences() {
        assert_eq!(compare("one: ok\ntwo: ok\n", "one: ok\n", "").differences.len(), 1);
        assert_eq!(compare("one: ok\n", "one: FAILED, got 1, expected 2\n", "").differences.len(), 1);
        assert_eq!(compare("one: ok\n", "one: ok\nmore\n", "").differences.len(), 1);
    }

    #[test]
    fn skipped_and_excused_checks_are_reported_as_such() {
        let output = "one: skipped, no APIC\ntwo: FAILED, got 1, expected 2\nt: end, 0 passed, 1 failed\n";
        let verdict = compare("one: ok\ntwo: ok\nt: end, 2 passed, 0 failed\n", output, "two\n");
        assert_eq!(verdict.skipped, ["one", "two"]);
        assert!(verdict.differences.is_empty(), "{verdict:?}");
    }

    #[test]
    fn a_group_is_skipped_as_a_whole() {
        let expected = "a: ok\ngroup: one: ok\ngroup: two: ok\nz: ok\n";
        let verdict = compare(expected, "a: ok\ngroup: skipped, not offered\nz: ok\n", "");
        assert_eq!(verdict, Verdict { passed: 2, skipped: vec!["group".into()], differences: vec![] });
    }

    #[test]
    fn dots_stand_for_any_lines() {
        assert!(compare("a\n...\nz\n", "a\nb\nc\nz\n", "").differences.is_empty());
        assert!(compare("a\n...\n", "a\nb\n", "").differences.is_empty());
        assert_eq!(compare("a\n...\nz\n", "a\nb\n", "").differences.len(), 1);
    }

    #[test]
    fn a_run_over_its_limit_is_killed_and_said_so() {
        let guest = Guest { name: "test", image: &[], expected: "", input: "", qemu_differs: "" };
        let outcome =
            run(&guest, Command::new("sleep").arg("60"), Duration::from_millis(50)).expect("sleep runs");
        assert!(outcome.status.is_none());
        assert_eq!(outcome.compare(&guest, "").differences.len(), 1);
    }
}
