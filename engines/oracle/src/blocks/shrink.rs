//! Makes a trial with a difference as small as it can be: fewer runs, fewer instructions, simpler states.

use std::time::{Duration, Instant};

use bivisor_x86::registers::Rflags;
use bivisor_x86::state::XsaveArea;

use super::code::without;
use super::layout::Input;
use super::trial::Trial;

/// Attempts at most.
const ATTEMPTS: usize = 3000;
/// No attempt is begun after this: sequences that do not end take long.
const TIME: Duration = Duration::from_secs(60);

/// A trial that is being made smaller.
struct Shrinker<'a> {
    smallest: Trial,
    /// Whether a trial still has a difference; if so, in which run.
    differs: &'a mut dyn FnMut(&Trial) -> Option<usize>,
    attempts: usize,
    start: Instant,
}

/// The smallest trial that has a difference, made from one that has.
pub fn shrink(trial: &Trial, differs: &mut dyn FnMut(&Trial) -> Option<usize>) -> Trial {
    let mut shrinker = Shrinker { smallest: trial.clone(), differs, attempts: 0, start: Instant::now() };
    shrinker.runs();
    shrinker.items();
    shrinker.states();
    // What the states needed may be needed no more.
    shrinker.runs();
    shrinker.items();
    shrinker.smallest
}

impl Shrinker<'_> {
    /// Takes a smaller trial if it still has a difference. What comes after that is cut off.
    fn attempt(&mut self, mut trial: Trial) -> bool {
        if self.attempts >= ATTEMPTS || self.start.elapsed() > TIME {
            return false;
        }
        self.attempts += 1;
        let Some(run) = (self.differs)(&trial) else { return false };
        trial.runs.truncate(run + 1);
        self.smallest = trial;
        true
    }

    fn runs(&mut self) {
        let last = self.smallest.runs.len().saturating_sub(1);
        let alone = Trial { runs: self.smallest.runs[last..].to_vec(), ..self.smallest.clone() };
        if self.attempt(alone) {
            return;
        }
        let mut run = 0;
        while run + 1 < self.smallest.runs.len() {
            let mut fewer = self.smallest.clone();
            fewer.runs.remove(run);
            if !self.attempt(fewer) {
                run += 1;
            }
        }
    }

    /// Drops items, many at a time first.
    fn items(&mut self) {
        let mut size = self.smallest.items.len().div_ceil(2);
        loop {
            let mut dropped = false;
            let mut start = 0;
            while start < self.smallest.items.len() {
                let gone = start..start + size;
                if self.attempt(keeping(&self.smallest, |number| !gone.contains(&number))) {
                    dropped = true;
                } else {
                    start += size;
                }
            }
            match size {
                1 if !dropped => break,
                1 => {}
                _ => size = size.div_ceil(2),
            }
        }
    }

    fn states(&mut self) {
        self.attempt(Trial { hot: false, ..self.smallest.clone() });
        for run in 0..self.smallest.runs.len() {
            self.simpler(run, |input| input.xsave = XsaveArea::default().bytes);
            self.simpler(run, |input| input.rflags = (Rflags::IF | Rflags::FIXED).bits());
            self.simpler(run, |input| input.image = 0);
            for number in 0..16 {
                self.simpler(run, |input| input.gpr[number] = 0);
            }
            for number in 1..8 {
                self.simpler(run, |input| input.control[number] = 0);
            }
        }
    }

    fn simpler(&mut self, run: usize, change: impl Fn(&mut Input)) {
        let mut simpler = self.smallest.clone();
        if let Some((_, input)) = simpler.runs.get_mut(run) {
            change(input);
            self.attempt(simpler);
        }
    }
}

/// The trial with these items only.
fn keeping(trial: &Trial, keep: impl Fn(usize) -> bool) -> Trial {
    let (items, numbers) = without(&trial.items, keep);
    let entries = trial.entries.iter().map(|&entry| numbers[entry.min(trial.items.len())]).collect();
    Trial { items, entries, ..trial.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::code::Item;
    use crate::blocks::trial::trial;

    #[test]
    fn what_does_not_matter_goes() {
        let model = crate::host_model();
        let trial = (0..).map(|number| trial(1, number, &model, false)).find(|trial| trial.items.len() > 20);
        let trial = trial.expect("trials are long");
        // References to others change.
        let fixed = trial.items.iter().filter(|item| matches!(item, Item::Instruction { field: None, .. }));
        let needed: Vec<Item> = fixed.step_by(4).take(2).cloned().collect();
        let rax = trial.runs[1].1.gpr[0] | 1;
        let mut differs = |trial: &Trial| {
            let run = trial.runs.iter().position(|(_, input)| input.gpr[0] | 1 == rax)?;
            needed.iter().all(|item| trial.items.contains(item)).then_some(run)
        };
        let small = shrink(&trial, &mut differs);
        assert!(small.items.len() <= 4, "{} items", small.items.len());
        assert_eq!(small.runs.len(), 1);
        assert_eq!(small.runs[0].1.gpr[1..], [0; 15]);
    }
}
