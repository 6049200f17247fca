//! The files that a machine's process may still reach by their paths (Landlock): next to none, as all are open.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope,
};

use super::{Needs, try_in_thread};

/// The host's name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How much of Landlock the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// All that is asked for.
    Full,
    /// Files, but not all of networks and abstract sockets.
    Partial,
    /// It was not switched on when the kernel started.
    NotEnabled,
    /// The kernel is older, or was built without it.
    Missing,
}

/// The version whose rights are taken away where the kernel knows them.
const VERSION: ABI = ABI::V7;

/// What threads are confined to.
pub struct Paths(RulesetCreated);

impl Paths {
    /// For a machine with these needs, whose sockets lie in these folders.
    pub fn new(needs: &Needs, socket_folders: &[PathBuf]) -> io::Result<Self> {
        rules(needs, socket_folders).map(Self).map_err(io::Error::other)
    }

    /// Confines the current thread, as far as the kernel can.
    pub fn confine(&self) -> io::Result<()> {
        confine(self.0.try_clone()?).map(drop)
    }
}

fn confine(rules: RulesetCreated) -> io::Result<RestrictionStatus> {
    rules.restrict_self().map_err(io::Error::other)
}

/// What the kernel has of Landlock: tried by a thread that ends then. The process must have given up new privileges.
pub fn support() -> io::Result<Support> {
    let rules = rules(&Needs::default(), &[]).map_err(io::Error::other)?;
    let status = try_in_thread(move || confine(rules))?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, _) => Support::Full,
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Support::NotEnabled,
        (RulesetStatus::NotEnforced, _) => Support::Missing,
        (RulesetStatus::PartiallyEnforced, _) => Support::Partial,
    })
}

fn rules(needs: &Needs, socket_folders: &[PathBuf]) -> Result<RulesetCreated, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(VERSION))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::AbstractUnixSocket)?;
    if !needs.user_network {
        ruleset = ruleset.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut rules = ruleset.create()?.no_new_privs(false);
    if needs.user_network {
        for path in name_server_files() {
            rules = allow(rules, &path, AccessFs::ReadFile.into())?;
        }
    }
    // Landlock grants the removal of files by folder.
    for folder in socket_folders {
        rules = allow(rules, folder, AccessFs::RemoveFile.into())?;
    }
    Ok(rules)
}

/// A path that isn't there needs no rule.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(file) => rules.add_rule(PathBeneath::new(file, access)),
        Err(_) => Ok(rules),
    }
}

/// The file of name servers. What replaces it is another file: where it is kept in a folder of its own, that folder.
fn name_server_files() -> Vec<PathBuf> {
    let target = std::fs::canonicalize(RESOLV_CONF).unwrap_or_else(|_| RESOLV_CONF.into());
    let folder = target.parent().filter(|folder| *folder != Path::new("/etc")).map(Path::to_owned);
    std::iter::once(target.clone()).chain(folder).collect()
}
