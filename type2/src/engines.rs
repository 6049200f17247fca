//! The one place that picks an engine.

use bivisor_dbt::{SoftwareEngine, host_can_translate};
use bivisor_machine::engine::Engine;

use crate::config::EngineChoice;

/// An engine that is not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineUnavailable {
    /// The KVM engine does not exist yet.
    #[error(
        "the engine kvm is not built yet, whatever this host's /dev/kvm: leave --engine away, or say --engine interp"
    )]
    Kvm,
}

/// Makes the engine that was asked for.
pub fn make(choice: EngineChoice) -> Result<Box<dyn Engine>, EngineUnavailable> {
    match choice {
        EngineChoice::Auto if host_can_translate() => Ok(Box::new(SoftwareEngine::translator())),
        EngineChoice::Auto | EngineChoice::Interp => Ok(Box::new(SoftwareEngine::interpreter())),
        EngineChoice::Dbt => Ok(Box::new(SoftwareEngine::translator())),
        EngineChoice::Kvm => Err(EngineUnavailable::Kvm),
    }
}
