//! Whose turn it is on a processor that several virtual ones share: whoever has used least of it.

use alloc::collections::BTreeMap;

use bivisor_machine::host::Nanos;

/// How long a virtual processor executes while others wait, about.
pub(crate) const SLICE: Nanos = 5_000_000;
/// Whoever executes goes on until he has used this much more than another one, so that turns don't get short.
const LEAD: Nanos = SLICE / 2;

/// A virtual processor: machine and number.
pub(crate) type Place = (usize, usize);

/// What everybody has used.
#[derive(Default)]
pub(crate) struct Turns {
    used: BTreeMap<Place, Nanos>,
    current: Option<Place>,
    /// What whoever executed last had used: who sleeps saves up no more than a turn.
    level: Nanos,
}

impl Turns {
    /// Who of those that have something to execute is next.
    pub(crate) fn next(&mut self, runnable: impl Iterator<Item = Place>) -> Option<Place> {
        let least = self.level.saturating_sub(SLICE);
        let next = runnable.min_by_key(|place| {
            let used = self.used.get(place).copied().unwrap_or_default().max(least);
            if self.current == Some(*place) { used.saturating_sub(LEAD) } else { used }
        })?;
        let used = self.used.entry(next).or_default();
        *used = (*used).max(least);
        self.current = Some(next);
        Some(next)
    }

    /// Whoever was next has executed for so long.
    pub(crate) fn charge(&mut self, span: Nanos) {
        if let Some(used) = self.current.and_then(|place| self.used.get_mut(&place)) {
            *used += span;
            self.level = self.level.max(*used);
        }
    }

    /// A machine is gone.
    pub(crate) fn remove(&mut self, machine: usize) {
        self.used.retain(|place, _| place.0 != machine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Place = (0, 0);
    const B: Place = (0, 1);
    const C: Place = (1, 0);
    const TICK: Nanos = 250_000;

    /// Lets those execute for so many ticks; how many each had, and how often the turn changed.
    fn execute(turns: &mut Turns, places: &[Place], ticks: usize) -> (BTreeMap<Place, usize>, usize) {
        let (mut had, mut changes, mut last) = (BTreeMap::new(), 0, None);
        for _ in 0..ticks {
            let next = turns.next(places.iter().copied()).unwrap();
            changes += usize::from(last != Some(next));
            last = Some(next);
            *had.entry(next).or_insert(0) += 1;
            turns.charge(TICK);
        }
        (had, changes)
    }

    #[test]
    fn everybody_gets_the_same_in_turns_of_some_length() {
        let mut turns = Turns::default();
        let (had, changes) = execute(&mut turns, &[A, B, C], 3000);
        assert!(had.values().all(|count| (980..=1020).contains(count)), "{had:?}");
        assert!((100..=320).contains(&changes), "{changes}");
    }

    #[test]
    fn who_wakes_up_is_next_but_has_not_saved_up_more_than_a_turn() {
        let mut turns = Turns::default();
        execute(&mut turns, &[A, B], 40);
        execute(&mut turns, &[A], 4000);
        assert_eq!(turns.next([A, B].into_iter()), Some(B));
        let (had, _) = execute(&mut turns, &[A, B], 100);
        assert!(had[&A] >= 30, "{had:?}");
        // Somebody new as well.
        assert_eq!(turns.next([A, B, C].into_iter()), Some(C));
        turns.remove(1);
        assert_eq!(turns.next(core::iter::empty()), None);
    }
}
