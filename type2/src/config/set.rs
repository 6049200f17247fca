//! Files that describe several machines: a table `[vm.NAME]` for each, with the words of a file for one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Parser;
use serde::Deserialize;
use toml::Spanned;

use super::{ConfigError, FileConfig, Settings, Source, VmConfig, in_words, one_line};
use crate::image::DiskRecipe;

/// The longest name of a machine: paths of sockets have a limit.
const LONGEST_NAME: usize = 32;

/// A machine of a file.
#[derive(Clone, Debug)]
pub struct Described {
    /// Its name.
    pub name: String,
    /// What it is made of.
    pub config: VmConfig,
    /// Its part of the file, as a file of its own.
    pub text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSet {
    vm: BTreeMap<Spanned<String>, FileConfig>,
}

/// The names of the machines in a text that describes several.
pub(super) fn names(text: &str) -> Option<Vec<String>> {
    let machines = machines(text)?;
    Some(machines.as_table()?.keys().cloned().collect())
}

/// What a text that describes several machines says of them.
fn machines(text: &str) -> Option<toml::Value> {
    toml::from_str::<toml::Table>(text).ok()?.remove("vm")
}

/// Reads a file with one machine, which is named after the file, or several.
///
/// # Errors
/// The file can't be read, or something in it means nothing.
pub fn read_set(path: &Path) -> Result<Vec<Described>, ConfigError> {
    let text = Source::read(path)?;
    let source = Source { path, text: &text };
    let Some(tables) = machines(&text) else {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = check_name(&name).map_err(|message| source.error(0, message))?;
        let config = VmConfig::from_text(&text, path)?;
        return Ok(vec![Described { name, config, text }]);
    };
    let set: FileSet = source.parse()?;
    let mut machines = Vec::new();
    for (name, file) in set.vm {
        let at = name.span().start;
        let name = check_name(name.get_ref()).map_err(|message| source.error(at, message))?;
        let (settings, image) = Settings::of_file(file, &source)?;
        let config = VmConfig::of_settings(settings, image)
            .map_err(|error| source.error(at, format!("vm.{name}: {error}")))?;
        let own = tables.get(&name).and_then(toml::Value::as_table);
        let text = own.map(ToString::to_string).unwrap_or_default();
        machines.push(Described { name, config, text });
    }
    if machines.is_empty() {
        return Err(source.error(0, "there is no machine in this file: add a table [vm.NAME]".into()));
    }
    Ok(machines)
}

impl VmConfig {
    /// A machine from its part of the file at `path`, to whose folder paths are relative.
    ///
    /// # Errors
    /// Something in the text means nothing; the error names `path`.
    pub fn from_text(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let source = Source { path, text };
        let (settings, image) = Settings::of_file(source.parse()?, &source)?;
        Self::of_settings(settings, image)
    }
}

/// A name that can be one of a folder, and is easily typed.
fn check_name(name: &str) -> Result<String, String> {
    let good = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && name.len() <= LONGEST_NAME
        && !name.ends_with(".toml");
    if good {
        return Ok(name.to_owned());
    }
    Err(format!(
        "'{name}' is no name for a machine: say up to {LONGEST_NAME} letters, digits, hyphens, underscores and dots"
    ))
}

/// The words of `bivisor image build debian`.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct RecipeWords {
    #[command(flatten)]
    recipe: DiskRecipe,
}

/// The recipe for an image as a table: the options of `bivisor image build debian`.
pub(super) fn recipe(table: &toml::Table, folder: &Path) -> Result<DiskRecipe, String> {
    let mut words = Vec::new();
    for (key, value) in table {
        match value {
            toml::Value::Boolean(true) => words.push(format!("--{key}")),
            toml::Value::Boolean(false) => {}
            toml::Value::Array(items) => {
                let items: Vec<String> = items.iter().map(in_words).collect();
                words.push(format!("--{key}={}", items.join(",")));
            }
            other => words.push(format!("--{key}={}", in_words(other))),
        }
    }
    let parsed = RecipeWords::try_parse_from(words).map_err(|error| {
        let told = error.render().to_string();
        one_line(told.split("\n\n").next().unwrap_or_default()).replacen("error: ", "", 1)
    })?;
    let mut recipe = parsed.recipe;
    let who = &mut recipe.personality;
    let relative: [&mut Option<PathBuf>; 3] =
        [&mut recipe.files, &mut recipe.password_file, &mut who.ssh_key];
    for path in relative.into_iter().flatten().chain(&mut who.cloud_init) {
        *path = folder.join(&path);
    }
    Ok(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Boot, RestartPolicy};
    use std::fs;

    fn read(text: &str) -> Result<Vec<Described>, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("office.toml");
        fs::write(&file, text).unwrap();
        read_set(&file).map_err(|error| error.to_string().replace(&file.display().to_string(), "FILE"))
    }

    #[test]
    fn several_machines_have_the_words_of_one() {
        let text = "[vm.mail]\nimage = \"mail\"\nrestart = \"always\"\nbuild = { packages = [\"a\", \"b\"], size = \"3G\", \
                    ssh = true, files = \"more\" }\n[vm.web]\nkernel = \"k\"\n[[vm.web.disk]]\npath = \"/d\"\n";
        let machines = read(text).unwrap();
        assert_eq!(machines.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["mail", "web"]);
        let mail = &machines[0].config;
        assert_eq!((mail.restart, &mail.boot), (RestartPolicy::Always, &Boot::Image("mail".into())));
        let recipe = mail.build.as_ref().unwrap();
        assert_eq!((recipe.packages.join(" "), recipe.personality.ssh), ("a b".into(), true));
        assert!(recipe.files.as_ref().unwrap().is_absolute());
        assert_eq!(machines[1].config.disks.len(), 1);
        // The part of a machine says the same alone.
        for machine in &machines {
            let folder = recipe.files.as_ref().unwrap().parent().unwrap();
            let alone = VmConfig::from_text(&machine.text, &folder.join("x")).unwrap();
            assert_eq!(alone, machine.config);
        }
    }

    #[test]
    fn one_machine_is_named_after_its_file() {
        let machines = read("kernel = \"k\"\n").unwrap();
        assert_eq!((machines.len(), machines[0].name.as_str()), (1, "office"));
    }

    #[test]
    fn mistakes_have_a_place() {
        for (text, told) in [
            ("[vm.a]\nkernel = \"k\"\n[vm.\"a b\"]\n", "FILE:3:5: 'a b' is no name for a machine"),
            ("[vm.a]\nspeed = 1\n", "FILE:2:1: unknown field"),
            ("[vm.a]\ncpus = 99\n", "FILE:2:8: cpus: 99 is no number of CPUs"),
            ("memory = \"1G\"\n[vm.a]\n", "FILE:1:1: unknown field"),
            ("[vm.a]\nrestart = \"often\"\n", "FILE:2:11: restart: 'often' is no policy"),
            ("[vm.a]\ninitrd = \"i\"\n", "FILE:1:5: vm.a: an initrd needs a kernel"),
            (
                "[vm.a]\nimage = \"i\"\nbuild = { colour = 1 }\n",
                "FILE:3:9: build: unexpected argument '--colour'",
            ),
            ("[vm.a]\nbuild = { ssh = true }\n", "FILE:1:5: vm.a: 'build' says how an image is made"),
            ("[vm]\n", "FILE:1:1: there is no machine in this file"),
            ("[[vm]]\n", "FILE:1:1: invalid type: sequence"),
            ("[vm.a]\n[vm.a]\n", "FILE:2:5: duplicate key"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(told), "{text:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
