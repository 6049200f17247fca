//! What a machine is doing as a whole.

/// A machine's phase of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    /// Made, or reset, and never started since.
    Created,
    /// Its processors execute.
    Running,
    /// Its processors stand still between two instructions.
    Paused,
    /// Ended for good.
    Stopped,
}

/// What may be asked of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Let the processors execute for the first time.
    Start,
    /// Let them stand still.
    Pause,
    /// Let them go on.
    Resume,
    /// Bring the machine back to where it was when made.
    Reset,
    /// End it.
    Stop,
}

/// This can't be done in this phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a machine that is {from:?} can't do {transition:?}")]
pub struct TransitionError {
    /// The phase.
    pub from: Lifecycle,
    /// What was asked.
    pub transition: Transition,
}

impl Lifecycle {
    /// The phase after a transition.
    pub fn after(self, transition: Transition) -> Result<Self, TransitionError> {
        match (self, transition) {
            (Self::Created, Transition::Start) | (Self::Paused, Transition::Resume) => Ok(Self::Running),
            (Self::Running, Transition::Pause) => Ok(Self::Paused),
            (Self::Created | Self::Paused, Transition::Reset) => Ok(Self::Created),
            (_, Transition::Stop) => Ok(Self::Stopped),
            (from, transition) => Err(TransitionError { from, transition }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life() {
        use Transition::{Pause, Reset, Resume, Start, Stop};
        let end = [Start, Pause, Resume, Pause, Reset, Start, Stop]
            .into_iter()
            .try_fold(Lifecycle::Created, Lifecycle::after);
        assert_eq!(end, Ok(Lifecycle::Stopped));
    }

    #[test]
    fn nothing_follows_the_end_and_a_running_machine_is_not_reset() {
        for transition in [Transition::Start, Transition::Pause, Transition::Resume, Transition::Reset] {
            assert!(Lifecycle::Stopped.after(transition).is_err());
        }
        assert!(Lifecycle::Running.after(Transition::Reset).is_err());
        assert!(Lifecycle::Running.after(Transition::Start).is_err());
        assert!(Lifecycle::Created.after(Transition::Resume).is_err());
    }
}
