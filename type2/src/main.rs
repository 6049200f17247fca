//! Bivisor as a Linux program: a type 2 hypervisor.

mod backends;
mod cli;
mod config;
mod debugger;
mod doctor;
mod engines;
mod error;
mod guest;
mod host;
mod image;
mod jail;
mod metal;
mod perf_map;
mod run;
mod status;
mod supervisor;
mod trace;
mod vm;

use std::io::Write;
use std::process::ExitCode;

use bivisor_backends::terminal;
use clap::Parser;

use cli::{Cli, Command, ImageCommand, Recipe};
use error::Failure;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        terminal::restore();
        terminal::message(&format!("bivisor: a bug in bivisor ended it; please report it: {info}\n"));
        supervisor::tell_ending(status::INTERNAL, &format!("a bug in bivisor ended it: {info}"));
        // Nothing that a vCPU's or a device's thread left half-done may go on.
        std::process::exit(status::INTERNAL.into());
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match &cli.command {
        Command::Run(args) => run::run(args, cli.verbose),
        Command::Background(command) => supervisor::run(command, cli.verbose),
        Command::Image(command) => manage_images(command),
        Command::Metal(command) => metal::run(command),
        Command::Doctor => {
            let (report, status) = doctor::run();
            say(&report);
            Ok(status)
        }
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            terminal::message(&failure.report(cli.verbose));
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
    terminal::message(&format!("bivisor: {text}"));
    ExitCode::from(status::USAGE)
}

/// Prints to standard output. Who closes it, as `head` does, wants no more.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn manage_images(command: &ImageCommand) -> Result<u8, Failure> {
    let made = match command {
        ImageCommand::Build(Recipe::Debian(recipe)) if recipe.is_asked_for() => {
            image::build_debian_disk(recipe)
        }
        ImageCommand::Build(Recipe::Debian(_)) => image::build_debian(),
        ImageCommand::Import(request) => image::import(request),
        ImageCommand::Ls => return list_images(),
        ImageCommand::Rm { names } => {
            for name in names {
                image::remove(name).map_err(Failure::configuration)?;
            }
            return Ok(status::SUCCESS);
        }
    };
    let image = made.map_err(Failure::configuration)?;
    say(&format!(
        "image {} ({}): start it with `bivisor run {}`\n",
        image.name, image.manifest.description, image.name
    ));
    Ok(status::SUCCESS)
}

/// Prints one line per image; a damaged one makes the status that of an unusable input.
fn list_images() -> Result<u8, Failure> {
    let mut status = status::SUCCESS;
    for image in image::list().map_err(Failure::configuration)? {
        match image {
            Ok(image) => {
                let size = image.size().div_ceil(1 << 20);
                say(&format!("{:<16} {size:>5} MiB  {}\n", image.name, image.manifest.description));
            }
            Err(error) => {
                terminal::message(&format!("bivisor: {error}\n"));
                status = status::CONFIGURATION;
            }
        }
    }
    Ok(status)
}
