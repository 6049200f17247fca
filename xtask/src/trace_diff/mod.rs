//! `cargo xtask trace-diff`: where the translator's trace leaves the interpreter's.
//!
//! The interpreter tells every instruction, the translator every block that it enters. Each line of the translator's must
//! therefore be found a few lines further on in the interpreter's. Interrupts come at other places in the two, and loops
//! that wait go round more or less often: what only one of them has of these is passed over, and told.

pub mod guests;
mod line;
mod loose;

use std::collections::{HashSet, VecDeque};
use std::path::Path;

use anyhow::{Result, bail};
use iced_x86::Mnemonic;
use line::{IF, Line, REGISTERS, Reader};
use loose::{Follower, Loose};

/// Instructions of the interpreter's among which the translator's next line is looked for: more than a block has.
const REACH: usize = 64;
/// Lines of an interrupt's handler, or of a loop that waits, at most.
const LONGEST_SKIP: usize = 200_000;
/// Lines that are shown before a difference.
const SHOWN: usize = 8;
/// Flags that are compared: all but RF, which only says how an instruction was come to.
const COMPARED_FLAGS: u64 = !(1 << 16);

/// The interpreter's trace, with what is loose in each line, and some of it read ahead.
struct Fine {
    reader: Reader,
    follower: Follower,
    ahead: VecDeque<(Line, Loose)>,
}

impl Fine {
    /// A line ahead, from 0.
    fn peek(&mut self, index: usize) -> Result<Option<&(Line, Loose)>> {
        while self.ahead.len() <= index {
            let Some(line) = self.reader.next()? else { return Ok(None) };
            let loose = self.follower.next(&line);
            self.ahead.push_back((line, loose));
        }
        Ok(self.ahead.get(index))
    }
}

/// The translator's trace, some of it read ahead.
struct Coarse {
    reader: Reader,
    ahead: VecDeque<Line>,
}

impl Coarse {
    fn peek(&mut self, index: usize) -> Result<Option<&Line>> {
        while self.ahead.len() <= index {
            let Some(line) = self.reader.next()? else { return Ok(None) };
            // Where no code is, nothing is executed: one engine may find out at the jump, the other at its target.
            if line.has_code() {
                self.ahead.push_back(line);
            }
        }
        Ok(self.ahead.get(index))
    }
}

/// Two traces, and how far they are compared.
struct Comparison {
    fine: Fine,
    coarse: Coarse,
    /// The last lines that agreed, and those of the interpreter's between them.
    before: VecDeque<Line>,
    /// The last line of the translator's that agreed.
    last: Option<Line>,
    /// Its last lines that agreed, with what was loose there.
    recent: VecDeque<(Line, Loose)>,
    compared: u64,
    skipped: Vec<Skipped>,
}

/// What only one trace has, at one or more places in a row.
struct Skipped {
    engine: &'static str,
    what: &'static str,
    first: u64,
    lines: usize,
    times: usize,
}

/// Registers in which two lines of one place differ, loose ones aside.
fn differing(fine: &Line, loose: Loose, coarse: &Line) -> Vec<String> {
    let mut names = Vec::new();
    let repeated = fine.instruction().is_some_and(|i| i.has_rep_prefix() || i.has_repne_prefix());
    for (number, name) in REGISTERS.iter().enumerate() {
        let (left, right) = (fine.registers[number], coarse.registers[number]);
        // Engines take up a repeated string instruction in pieces of different lengths.
        let passing = repeated && matches!(number, 1 | 6 | 7);
        if left != right && loose.registers & 1 << number == 0 && !passing {
            names.push(format!("{name}: {right:x}, interpreter {left:x}"));
        }
    }
    if (fine.flags ^ coarse.flags) & COMPARED_FLAGS & !loose.flags != 0 && !repeated {
        names.push(format!("RFLAGS: {:x}, interpreter {:x}", coarse.flags, fine.flags));
    }
    if fine.mode != coarse.mode {
        names.push(format!("mode: {:?}, interpreter {:?}", coarse.mode, fine.mode));
    }
    names
}

fn agree((fine, loose): &(Line, Loose), coarse: &Line) -> bool {
    fine.rip == coarse.rip && differing(fine, *loose, coarse).is_empty()
}

impl Comparison {
    fn new(fine: Reader, coarse: Reader) -> Self {
        Self {
            fine: Fine { reader: fine, follower: Follower::new(), ahead: VecDeque::new() },
            coarse: Coarse { reader: coarse, ahead: VecDeque::new() },
            before: VecDeque::new(),
            last: None,
            recent: VecDeque::new(),
            compared: 0,
            skipped: Vec::new(),
        }
    }

    /// Compares to the end of one of the traces, or to the first difference, which is returned in words.
    fn run(&mut self) -> Result<Option<String>> {
        while let Some(coarse) = self.coarse.peek(0)?.cloned() {
            if let Some(found) = self.reachable(&coarse)? {
                self.advance(found, coarse);
            } else if self.fine.peek(0)?.is_none() {
                break;
            } else if !self.skip(&coarse)? {
                // Perhaps the interpreter was ended before it came here.
                if self.fine.peek(REACH)?.is_none() && self.place_in_reach(&coarse)?.is_none() {
                    break;
                }
                return self.difference(&coarse).map(Some);
            }
        }
        Ok(None)
    }

    /// The next of the interpreter's lines within reach that agrees.
    fn reachable(&mut self, coarse: &Line) -> Result<Option<usize>> {
        let (mut steps, mut index, mut place) = (0, 0, None);
        while steps < REACH && index < LONGEST_SKIP {
            let Some(fine) = self.fine.peek(index)? else { break };
            if agree(fine, coarse) {
                return Ok(Some(index));
            }
            // A repeated string instruction is one step, however often it is taken up.
            steps += usize::from(place.replace(fine.0.rip) != Some(fine.0.rip));
            index += 1;
        }
        Ok(None)
    }

    /// The translator's next line agrees with the interpreter's at this index.
    fn advance(&mut self, index: usize, coarse: Line) {
        let loose = self.fine.ahead.get(index).map_or(Loose::default(), |(_, loose)| *loose);
        self.before.extend(self.fine.ahead.drain(..=index).map(|(line, _)| line));
        self.before.drain(..self.before.len().saturating_sub(SHOWN));
        self.recent.push_back((coarse.clone(), loose));
        self.recent.drain(..self.recent.len().saturating_sub(REACH));
        self.coarse.ahead.pop_front();
        self.last = Some(coarse);
        self.compared += 1;
    }

    /// Passes over what only one of the two has to have. False where that does not explain the next line.
    fn skip(&mut self, coarse: &Line) -> Result<bool> {
        let known = self.place_in_reach(coarse)?.is_some();
        let interrupted =
            self.last.as_ref().is_some_and(|last| last.flags & IF != 0) && coarse.flags & IF == 0;
        if !known && interrupted && self.skip_coarse("an interrupt", |_| true)? {
            return Ok(true);
        }
        if self.skip_interrupt(coarse)? {
            return Ok(true);
        }
        // Where nothing but what is loose changes, it does nothing but wait.
        let recent = self.recent.clone();
        let waits = |line: &Line| recent.iter().any(|recent| agree(recent, line));
        if self.skip_coarse("a loop that waits", waits)? {
            return Ok(true);
        }
        if known {
            return Ok(false);
        }
        Ok(self.skip_loop(coarse)?
            || self.skip_coarse("a loop that counts", |line| counts_on(&recent, line))?)
    }

    /// The closest of the interpreter's lines within reach at the same instruction pointer.
    fn place_in_reach(&mut self, coarse: &Line) -> Result<Option<(Line, Loose)>> {
        self.fine.peek(REACH)?;
        let lines = self.fine.ahead.iter().take(REACH).filter(|(line, _)| line.rip == coarse.rip);
        Ok(lines.min_by_key(|(line, loose)| differing(line, *loose, coarse).len()).cloned())
    }

    /// Passes over lines of the translator's that may be, up to one that agrees again.
    fn skip_coarse(&mut self, what: &'static str, may_be: impl Fn(&Line) -> bool) -> Result<bool> {
        for index in 0..LONGEST_SKIP {
            let Some(line) = self.coarse.peek(index)?.cloned() else { break };
            // An event may have come after the line was told and before the instruction was executed.
            let again = self.last.as_ref().is_some_and(|last| line.is_same_state(last));
            if index > 0 && (again || self.reachable(&line)?.is_some()) {
                let skipped = index + usize::from(again);
                self.note("dbt", what, self.coarse.ahead[0].number, skipped);
                self.coarse.ahead.drain(..skipped);
                return Ok(true);
            }
            if !may_be(&line) {
                break;
            }
        }
        Ok(false)
    }

    /// Passes over an interrupt that the interpreter took within reach.
    fn skip_interrupt(&mut self, coarse: &Line) -> Result<bool> {
        let mut before = self.before.back().cloned();
        for start in 0..REACH {
            let Some((line, _)) = self.fine.peek(start)?.cloned() else { return Ok(false) };
            if before.is_some_and(|before| is_interrupt(&before, &line)) {
                return self.skip_fine("an interrupt", start, coarse, |_| true);
            }
            before = Some(line);
        }
        Ok(false)
    }

    /// Passes over rounds of a loop that the interpreter went through more often. Nothing of the translator's is passed
    /// over by that, so the places are enough.
    fn skip_loop(&mut self, coarse: &Line) -> Result<bool> {
        let places: HashSet<u64> = self.fine.ahead.iter().take(REACH).map(|(line, _)| line.rip).collect();
        self.skip_fine("a loop that waits", 0, coarse, |line| places.contains(&line.rip))
    }

    /// Passes over lines of the interpreter's that may be, from an index on, up to one that agrees.
    fn skip_fine(
        &mut self,
        what: &'static str,
        start: usize,
        coarse: &Line,
        may_be: impl Fn(&Line) -> bool,
    ) -> Result<bool> {
        for index in start..start + LONGEST_SKIP {
            let Some(fine) = self.fine.peek(index)? else { break };
            if agree(fine, coarse) {
                self.note("interp", what, self.fine.ahead[start].0.number, index - start);
                self.fine.ahead.drain(start..index);
                return Ok(true);
            }
            if !may_be(&fine.0) {
                break;
            }
        }
        Ok(false)
    }

    fn note(&mut self, engine: &'static str, what: &'static str, first: u64, lines: usize) {
        match self.skipped.last_mut() {
            Some(last) if (last.engine, last.what) == (engine, what) => {
                last.lines += lines;
                last.times += 1;
            }
            _ => self.skipped.push(Skipped { engine, what, first, lines, times: 1 }),
        }
    }

    /// The translator's next line can't be explained.
    fn difference(&mut self, coarse: &Line) -> Result<String> {
        let mut text = String::from("interpreter, up to where both agree:\n");
        for line in &self.before {
            text.push_str(&format!("  {}\n", line.describe()));
        }
        let place = self.place_in_reach(coarse)?;
        text.push_str("interpreter, from there on:\n");
        let end = place.as_ref().map_or(u64::MAX, |(line, _)| line.number);
        for (line, _) in self.fine.ahead.iter().take(SHOWN).filter(|(line, _)| line.number <= end) {
            text.push_str(&format!("  {}\n", line.describe()));
        }
        text.push_str(&format!("dbt:\n  {}\n", coarse.describe()));
        match place {
            Some((line, loose)) => {
                text.push_str(&format!("compared with line {} of the interpreter's:\n", line.number));
                for register in differing(&line, loose, coarse) {
                    text.push_str(&format!("  {register}\n"));
                }
            }
            None => text.push_str("the interpreter does not come to this place\n"),
        }
        Ok(text)
    }
}

/// Whether a line goes on with a loop: of all registers, it changes only those that the round before it changed.
fn counts_on(recent: &VecDeque<(Line, Loose)>, line: &Line) -> bool {
    let mut rounds = recent.iter().rev().map(|(recent, _)| recent).filter(|recent| recent.rip == line.rip);
    let (Some(last), Some(before)) = (rounds.next(), rounds.next()) else { return false };
    let mut registers = last.registers.iter().zip(&before.registers).zip(&line.registers);
    last.mode == line.mode && registers.all(|((last, before), now)| last == now || last != before)
}

/// Whether an interrupt, rather than an instruction, led from one line to the next.
fn is_interrupt(before: &Line, line: &Line) -> bool {
    use Mnemonic::{Cli, Iretd, Iretq, Popf, Popfd, Popfq, Syscall, Sysret, Sysretq};
    let by_itself = before.instruction().is_some_and(|instruction| {
        matches!(
            instruction.mnemonic(),
            Cli | Popf | Popfd | Popfq | Iretd | Iretq | Syscall | Sysret | Sysretq
        )
    });
    before.flags & IF != 0 && line.flags & IF == 0 && !by_itself
}

/// Compares two traces of one processor; whether they show no difference.
///
/// # Errors
/// They can't be read, or none is the interpreter's.
pub fn run(a: &Path, b: &Path, cpu: u32) -> Result<bool> {
    let (a, b) = (Reader::open(a, cpu)?, Reader::open(b, cpu)?);
    let (fine, coarse) = match (a.engine.as_str(), b.engine.as_str()) {
        ("interp", _) => (a, b),
        (_, "interp") => (b, a),
        _ => bail!("one of the traces must be of --engine interp, which tells every instruction"),
    };
    let mut comparison = Comparison::new(fine, coarse);
    let difference = comparison.run()?;
    for Skipped { engine, what, first, lines, times } in &comparison.skipped {
        println!("{engine} alone has {what}: {lines} lines from line {first} on, at {times} places");
    }
    println!("{} lines of dbt agree with interp", comparison.compared);
    match difference {
        Some(text) => {
            println!("difference:\n{text}");
            Ok(false)
        }
        None => {
            println!("no difference");
            Ok(true)
        }
    }
}

#[cfg(test)]
mod tests;
