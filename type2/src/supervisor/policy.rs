//! When a machine that has ended is started again.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::RestartPolicy;

/// A machine that ran for this long has not failed to start.
const STABLE: Duration = Duration::from_secs(60);
/// Restarts in a row, of machines that did not run for long, before it is given up.
const LIMIT: u32 = 5;
/// The wait before the first restart in a row; it doubles with each.
const FIRST_DELAY: Duration = Duration::from_millis(250);

/// What the policy remembers of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restarts {
    /// Restarts since the user started it.
    pub total: u64,
    /// Those in a row.
    in_a_row: u32,
}

/// What follows from an ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays as it is.
    Stay,
    /// It is started again after this time.
    Again(Duration),
    /// It ended too often.
    GiveUp,
}

impl Restarts {
    /// Judges the end of a machine that ran for so long, with success or not.
    pub fn judge(&mut self, policy: RestartPolicy, success: bool, ran: Duration) -> Verdict {
        let again = match policy {
            RestartPolicy::No => false,
            RestartPolicy::OnFailure => !success,
            RestartPolicy::Always => true,
        };
        if !again {
            return Verdict::Stay;
        }
        if ran >= STABLE {
            self.in_a_row = 0;
        }
        if self.in_a_row == LIMIT {
            return Verdict::GiveUp;
        }
        let delay = FIRST_DELAY * (1 << self.in_a_row);
        self.in_a_row += 1;
        self.total += 1;
        Verdict::Again(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(1);

    #[test]
    fn policies_say_what_their_names_say() {
        let judge = |policy, success| Restarts::default().judge(policy, success, SHORT);
        assert_eq!(judge(RestartPolicy::No, false), Verdict::Stay);
        assert_eq!(judge(RestartPolicy::OnFailure, true), Verdict::Stay);
        assert_eq!(judge(RestartPolicy::OnFailure, false), Verdict::Again(FIRST_DELAY));
        assert_eq!(judge(RestartPolicy::Always, true), Verdict::Again(FIRST_DELAY));
    }

    #[test]
    fn who_ends_again_and_again_is_given_up() {
        let mut restarts = Restarts::default();
        let mut waited = Duration::ZERO;
        for _ in 0..LIMIT {
            match restarts.judge(RestartPolicy::OnFailure, false, SHORT) {
                Verdict::Again(delay) => waited += delay,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(waited, FIRST_DELAY * 31);
        assert_eq!(restarts.judge(RestartPolicy::OnFailure, false, SHORT), Verdict::GiveUp);
        assert_eq!(restarts.total, 5);
    }

    #[test]
    fn a_long_run_is_a_new_start() {
        let mut restarts = Restarts::default();
        for _ in 0..20 {
            let verdict = restarts.judge(RestartPolicy::OnFailure, false, STABLE);
            assert_eq!(verdict, Verdict::Again(FIRST_DELAY));
        }
        assert_eq!(restarts.total, 20);
    }
}
