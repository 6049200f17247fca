//! The one place that picks an engine.

use bivisor_dbt::{SoftwareEngine, host_can_translate};
use bivisor_kvm::{KvmEngine, Unusable};
use bivisor_machine::engine::Engine;

use crate::config::{EngineChoice, VmConfig};

/// An engine that is not to be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineUnavailable {
    /// KVM is not there, or isn't what it seems.
    #[error(
        "the engine kvm is not usable: {0}; leave --engine away, and the best one is taken that works here"
    )]
    Kvm(#[source] Unusable),
    /// The jail's lists of system calls have none of KVM's yet.
    #[error("the engine kvm can't be run in the jail yet: add --no-jail, or leave --engine away")]
    KvmInJail,
}

/// An engine that works here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The processor's virtualization.
    Kvm,
    /// The translator.
    Dbt,
    /// The interpreter.
    Interp,
}

/// Decides which engine is to be taken: `auto` becomes one of the software engines. KVM is only taken where it is asked
/// for, since stock Linux only gets to a shell on it where the host is not busy, and after a look at what it does.
pub fn choose(config: &VmConfig) -> Result<Chosen, EngineUnavailable> {
    match config.engine {
        EngineChoice::Auto if host_can_translate() => Ok(Chosen::Dbt),
        EngineChoice::Auto | EngineChoice::Interp => Ok(Chosen::Interp),
        EngineChoice::Dbt => Ok(Chosen::Dbt),
        EngineChoice::Kvm => match bivisor_kvm::probe() {
            Err(why) => Err(EngineUnavailable::Kvm(why)),
            Ok(_) if !config.no_jail => Err(EngineUnavailable::KvmInJail),
            Ok(_) => Ok(Chosen::Kvm),
        },
    }
}

impl Chosen {
    /// Makes the engine.
    pub fn make(self) -> Result<Box<dyn Engine>, EngineUnavailable> {
        Ok(match self {
            Self::Kvm => Box::new(KvmEngine::new().map_err(EngineUnavailable::Kvm)?),
            Self::Dbt => Box::new(SoftwareEngine::translator()),
            Self::Interp => Box::new(SoftwareEngine::interpreter()),
        })
    }
}
