//! Bivisor as a Linux program: a type 2 hypervisor.

mod cli;
mod config;
mod engines;
mod error;
mod guest;
mod host;
mod image;
mod run;
mod status;
mod vm;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command, ImageCommand, Recipe};
use error::Failure;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match &cli.command {
        Command::Run(args) => run::run(args, cli.verbose),
        Command::Image(ImageCommand::Build(Recipe::Debian)) => {
            image::build_debian().map(|_| 0).map_err(Failure::configuration)
        }
        Command::Image(ImageCommand::Ls) => Ok(0),
        Command::Doctor => Ok(0),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            bivisor_backends::terminal::message(&failure.report(cli.verbose));
            ExitCode::from(failure.status)
        }
    }
}

/// Help and version go to standard output; a wrong command line is told like every other error.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A closed standard output needs no help.
        let _ = error.print();
        return ExitCode::from(status::SUCCESS);
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    bivisor_backends::terminal::message(&format!("bivisor: {text}"));
    ExitCode::from(status::USAGE)
}
