//! What a user is told when something fails: one sentence, and its causes when asked.

use std::error::Error;
use std::fmt;

use crate::status;

/// A failure that ends the program.
#[derive(Debug)]
pub struct Failure {
    /// The exit status.
    pub status: u8,
    sentence: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    /// A failure with this status, said in this sentence.
    pub fn new(status: u8, sentence: impl Into<String>) -> Self {
        Self { status, sentence: sentence.into(), source: None }
    }

    /// A failure of an input: status 4.
    pub fn configuration(error: impl Error + Send + Sync + 'static) -> Self {
        Self::caused(status::CONFIGURATION, error)
    }

    /// A failure of the host: status 6.
    pub fn host(error: impl Error + Send + Sync + 'static) -> Self {
        Self::caused(status::HOST, error)
    }

    /// A failure of the engine: status 16.
    pub fn engine(error: impl Error + Send + Sync + 'static) -> Self {
        Self::caused(status::ENGINE, error)
    }

    /// A failure whose sentence is that of an error, with that error's causes.
    fn caused(status: u8, error: impl Error + Send + Sync + 'static) -> Self {
        Self { status, sentence: error.to_string(), source: Some(Box::new(error)) }
    }

    /// What is printed: `bivisor: …`, and with `verbose` one line per cause.
    pub fn report(&self, verbose: bool) -> String {
        let mut text = format!("bivisor: {}\n", self.sentence);
        let mut cause = self.source.as_deref().and_then(Error::source);
        while verbose && let Some(error) = cause {
            text.push_str(&format!("  because: {error}\n"));
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the pot")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_are_told_when_asked() {
        let failure = Failure::host(Outer(std::io::Error::other("the lid is stuck")));
        assert_eq!(failure.status, 6);
        assert_eq!(failure.report(false), "bivisor: cannot open the pot\n");
        assert_eq!(failure.report(true), "bivisor: cannot open the pot\n  because: the lid is stuck\n");
    }
}
