//! `bivisor up`.

use std::path::Path;

use super::super::protocol::Request;
use super::super::record::Spec;
use super::done;
use crate::config::{Boot, ConfigError, Described, read_set};
use crate::error::Failure;
use crate::host::memory;
use crate::{engines, guest, image, status};

pub(super) fn run(file: &Path, verbose: bool) -> Result<u8, Failure> {
    let file = file
        .canonicalize()
        .map_err(|source| Failure::configuration(ConfigError::Read { path: file.to_owned(), source }))?;
    let machines = read_set(&file).map_err(Failure::configuration)?;
    for machine in &machines {
        check(machine)
            .map_err(|failure| Failure::new(failure.status, format!("{}: {failure}", machine.name)))?;
    }
    let specs = machines.into_iter().map(|machine| Spec {
        name: machine.name,
        file: file.clone(),
        text: machine.text,
        restart: machine.config.restart,
        verbose,
    });
    done("up", &Request::Up(specs.collect()))
}

/// What can be found out without starting it; an image that is missing is made, which takes its time.
fn check(machine: &Described) -> Result<(), Failure> {
    let config = &machine.config;
    config.check_memory(memory::host_memory()).map_err(Failure::configuration)?;
    engines::choose(config).map_err(Failure::configuration)?;
    if config.virtio_console == Some(bivisor_backends::console::ConsoleSpec::Stdio) {
        let text =
            "a machine in the background has no terminal: say virtio-console = \"pty\" or \"unix=PATH\"";
        return Err(Failure::new(status::CONFIGURATION, text));
    }
    if config.boot == Boot::Default {
        // Without it the machine starts the built-in guest, and says so in its log.
        let _ = image::default_image();
    }
    guest::make_missing_image(config).map_err(Failure::configuration)
}
