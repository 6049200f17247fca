//! The one place that picks an engine.

use std::time::Duration;

use bivisor_dbt::{SoftwareEngine, host_can_translate};
use bivisor_kvm::probe::{ASKED_FOR, CHOOSING, Measured};
use bivisor_kvm::{Device, KvmEngine, Unusable, probe};
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
    /// KVM does not tell what is executed.
    #[error("the engine kvm can't write {0}: say --engine dbt or leave --engine away")]
    Untraced(&'static str),
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

impl From<Chosen> for EngineChoice {
    fn from(chosen: Chosen) -> Self {
        match chosen {
            Chosen::Kvm => Self::Kvm,
            Chosen::Dbt => Self::Dbt,
            Chosen::Interp => Self::Interp,
        }
    }
}

/// Decides which engine is to be taken, by a look at what the host's KVM does: `auto` becomes kvm where that is hardware,
/// else one of the software engines.
///
/// # Errors
/// The one that is asked for can't be had.
pub fn choose(config: &VmConfig) -> Result<Chosen, EngineUnavailable> {
    choose_by(config, probe, host_can_translate())
}

fn choose_by(
    config: &VmConfig,
    probe: impl Fn(Duration) -> Result<Measured, Unusable>,
    can_translate: bool,
) -> Result<Chosen, EngineUnavailable> {
    let told = match (&config.trace, config.perf_map) {
        (Some(_), _) => Some("a trace"),
        (None, true) => Some("a map of translated code"),
        (None, false) => None,
    };
    match (config.engine, told) {
        (EngineChoice::Auto, None) if probe(CHOOSING).is_ok() => Ok(Chosen::Kvm),
        (EngineChoice::Auto, _) if can_translate => Ok(Chosen::Dbt),
        (EngineChoice::Auto | EngineChoice::Interp, _) => Ok(Chosen::Interp),
        (EngineChoice::Dbt, _) => Ok(Chosen::Dbt),
        (EngineChoice::Kvm, Some(what)) => Err(EngineUnavailable::Untraced(what)),
        (EngineChoice::Kvm, None) => probe(ASKED_FOR).map(|_| Chosen::Kvm).map_err(EngineUnavailable::Kvm),
    }
}

/// What engines are made of: opened before the process is confined, and kept over resets.
pub enum Source {
    /// KVM.
    Kvm(Device),
    /// The translator.
    Translator,
    /// The interpreter.
    Interpreter,
}

impl Source {
    /// For the engine that [`choose`] gave.
    ///
    /// # Errors
    /// KVM can't be opened any more.
    pub fn open(chosen: Chosen) -> Result<Self, EngineUnavailable> {
        Ok(match chosen {
            Chosen::Kvm => Self::Kvm(Device::open().map_err(EngineUnavailable::Kvm)?),
            Chosen::Dbt => Self::Translator,
            Chosen::Interp => Self::Interpreter,
        })
    }

    /// An engine for one run of a machine.
    pub fn engine(&self) -> Box<dyn Engine> {
        match self {
            Self::Kvm(device) => Box::new(KvmEngine::new(device)),
            Self::Translator => Box::new(SoftwareEngine::translator()),
            Self::Interpreter => Box::new(SoftwareEngine::interpreter()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::RunArgs;

    const FAST: Measured = Measured { guest: Duration::from_micros(20), whole: Duration::from_millis(4) };

    fn config(engine: EngineChoice) -> VmConfig {
        VmConfig { engine, ..VmConfig::new(&RunArgs::default()).unwrap() }
    }

    #[test]
    fn hardware_is_taken_and_what_is_none_is_not() {
        let auto = config(EngineChoice::Auto);
        assert_eq!(choose_by(&auto, |_| Ok(FAST), true), Ok(Chosen::Kvm));
        assert_eq!(choose_by(&auto, |_| Err(Unusable::Missing), true), Ok(Chosen::Dbt));
        assert_eq!(choose_by(&auto, |_| Err(Unusable::Missing), false), Ok(Chosen::Interp));
        let limit = |limit| {
            assert!(limit <= Duration::from_millis(50));
            Err(Unusable::Late(limit))
        };
        assert_eq!(choose_by(&auto, limit, true), Ok(Chosen::Dbt));
    }

    #[test]
    fn what_is_asked_for_is_taken_or_refused_with_the_reason() {
        let kvm = config(EngineChoice::Kvm);
        assert_eq!(choose_by(&kvm, |_| Ok(FAST), true), Ok(Chosen::Kvm));
        let slow = Unusable::Slow(Duration::from_millis(22));
        let refusal = choose_by(&kvm, |_| Err(slow.clone()), true).unwrap_err();
        assert_eq!(refusal, EngineUnavailable::Kvm(slow));
        assert!(refusal.to_string().contains("22.0ms on it, so it is software"), "{refusal}");
        let never = |_| panic!("nobody has asked for it");
        assert_eq!(choose_by(&config(EngineChoice::Dbt), never, true), Ok(Chosen::Dbt));
    }

    #[test]
    fn who_wants_to_see_code_gets_the_engine_that_shows_it() {
        let mut traced = config(EngineChoice::Auto);
        traced.trace = Some("t".into());
        assert_eq!(choose_by(&traced, |_| Ok(FAST), true), Ok(Chosen::Dbt));
        traced.engine = EngineChoice::Kvm;
        assert_eq!(choose_by(&traced, |_| Ok(FAST), true), Err(EngineUnavailable::Untraced("a trace")));
    }
}
