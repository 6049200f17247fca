//! Running commands as steps of a task, counting what passed and what failed.
use anyhow::{Context, Result};
use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Instant,
};

/// What a task has done so far.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Checks that passed.
    pub passed: u64,
    /// Checks that failed.
    pub failed: u64,
    /// Names of steps with a failure.
    pub failed_steps: Vec<String>,
}

/// Says what is about to be done.
pub fn progress(what: &str) {
    println!("==> {what}");
}

impl Tally {
    /// Counts a check.
    pub fn count(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.failed_steps.push(name.to_owned());
        }
    }

    /// Does one check: passed if it comes to a good end, of which it may say more in words that follow the time.
    pub fn check(&mut self, name: &str, what: impl FnOnce() -> Result<String>) {
        progress(name);
        let start = Instant::now();
        let result = what();
        match &result {
            Ok(words) => println!("    {name}: ok in {:.1?}{words}", start.elapsed()),
            Err(error) => println!("    {name}: FAILED: {error:#}"),
        }
        self.count(name, result.is_ok());
    }

    /// Runs a command as one check: passed if its status is 0.
    ///
    /// # Errors
    /// If the command cannot be started.
    pub fn step(&mut self, name: &str, command: &mut Command) -> Result<()> {
        progress(name);
        let start = Instant::now();
        let status = command.status().with_context(|| format!("{name}: could not start {command:?}"))?;
        println!("    {name}: {} in {:.0?}", if status.success() { "ok" } else { "FAILED" }, start.elapsed());
        self.count(name, status.success());
        Ok(())
    }

    /// Runs `cargo test` and counts the tests that it reports; if it reports no failure but fails, that counts as one.
    ///
    /// # Errors
    /// If the command cannot be started or its output cannot be read.
    pub fn cargo_test(&mut self, name: &str, command: &mut Command) -> Result<()> {
        progress(name);
        let mut child =
            command.stdout(Stdio::piped()).spawn().with_context(|| format!("could not start {command:?}"))?;
        let failed_before = self.failed;
        if let Some(output) = child.stdout.take() {
            for line in BufReader::new(output).split(b'\n') {
                let line = String::from_utf8_lossy(&line?).into_owned();
                println!("{line}");
                if let Some((passed, failed)) = test_result(&line) {
                    self.passed += passed;
                    self.failed += failed;
                }
            }
        }
        if !child.wait()?.success() {
            self.failed += u64::from(self.failed == failed_before);
            self.failed_steps.push(name.to_owned());
        }
        Ok(())
    }

    /// Prints the closing line, and says whether all is well.
    pub fn close(&self) -> bool {
        if !self.failed_steps.is_empty() {
            println!("failed: {}", self.failed_steps.join(", "));
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        self.failed == 0
    }
}

/// Reads a line such as `test result: ok. 6 passed; 0 failed; 0 ignored; …`.
fn test_result(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count =
        |name: &str| counts.split("; ").find_map(|part| part.trim().strip_suffix(name)?.trim().parse().ok());
    Some((count("passed")?, count("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_results_are_read() {
        let line = "test result: FAILED. 6 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.06s";
        assert_eq!(test_result(line), Some((6, 2)));
        assert_eq!(test_result("running 6 tests"), None);
    }

    #[test]
    fn a_failed_step_is_counted_and_named() {
        let mut tally = Tally::default();
        tally.step("true", &mut Command::new("true")).expect("true runs");
        tally.step("false", &mut Command::new("false")).expect("false runs");
        assert_eq!(tally, Tally { passed: 1, failed: 1, failed_steps: vec!["false".into()] });
        assert!(tally.step("none", &mut Command::new("/nowhere/no-such-program")).is_err());
    }

    #[test]
    fn a_check_that_ends_in_an_error_is_counted_and_named() {
        let mut tally = Tally::default();
        tally.check("good", || Ok(", as it should".into()));
        tally.check("bad", || anyhow::bail!("wrong"));
        assert_eq!(tally, Tally { passed: 1, failed: 1, failed_steps: vec!["bad".into()] });
    }

    #[test]
    fn a_test_run_that_dies_without_a_result_counts_as_a_failure() {
        let mut tally = Tally::default();
        let script = "echo 'test result: ok. 3 passed; 0 failed; 0 ignored'; exit 101";
        tally.cargo_test("tests", Command::new("sh").args(["-c", script])).expect("sh runs");
        assert_eq!((tally.passed, tally.failed), (3, 1));
    }
}
