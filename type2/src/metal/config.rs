//! Virtual machines of the bare machine, from the same TOML as those of Linux, as far as the bare machine has what it names.

use std::borrow::Cow;
use std::path::Path;

use bivisor_backends::disk::DiskSpec;
use bivisor_backends::net::{NetSpec, NetworkSpec};
use bivisor_metal::bundle::{Bundle, MAX_MACHINES, MachineConfig, NetConfig, OnCrash};

use super::{MetalError, disk_content};
use crate::config::{Described, Paravirtual, RestartPolicy, read_set};
use crate::guest::{Guest, make_missing_image};

/// Words that a description may use.
const KNOWN: &[&str] = &[
    "image", "build", "kernel", "initrd", "append", "memory", "cpus", "pv", "net", "disk", "snapshot",
    "testdev", "restart",
];

/// Reads a description and everything that it names.
///
/// # Errors
/// Something in it is wrong, missing, or not there on the bare machine.
pub fn read(path: &Path, command_line: &str) -> Result<Bundle<'static>, MetalError> {
    let described = read_set(path)?;
    if described.len() > MAX_MACHINES as usize {
        return Err(MetalError::TooMany);
    }
    let refused: Vec<String> = described.iter().flat_map(refused).collect();
    if !refused.is_empty() {
        return Err(MetalError::Refused { path: path.to_owned(), keys: refused.join(", ") });
    }
    let machines = described
        .iter()
        .enumerate()
        .map(|(index, described)| machine(index, described))
        .collect::<Result<_, _>>()?;
    Ok(Bundle { command_line: command_line.into(), machines })
}

/// What a machine's part of the file says that the bare machine does not have.
fn refused(described: &Described) -> Vec<String> {
    let name = &described.name;
    // It was read before, so that it can be read again.
    let table: toml::Table = toml::from_str(&described.text).unwrap_or_default();
    let mut refused: Vec<String> = table
        .keys()
        .filter(|key| !KNOWN.contains(&key.as_str()))
        .map(|key| format!("vm.{name}.{key}"))
        .collect();
    let lasts = |disk: &DiskSpec| !forgets(disk) && !described.config.snapshot;
    let disks = described.config.disks.iter().enumerate().filter(|(_, disk)| lasts(disk));
    refused.extend(disks.map(|(index, _)| format!("vm.{name}.disk[{index}] without snapshot = true")));
    let nets = described.config.nets.iter().enumerate();
    refused.extend(
        nets.filter(|(_, net)| switch(net).is_none()).map(|(index, _)| format!("vm.{name}.net[{index}]")),
    );
    if described.config.restart == RestartPolicy::Always {
        refused.push(format!("vm.{name}.restart = \"always\""));
    }
    refused
}

/// Whether nothing is expected to last that the guest writes.
fn forgets(disk: &DiskSpec) -> bool {
    disk.snapshot || disk.read_only
}

/// The switch that an interface is at; `None` if it is at something else, or has limits.
fn switch(net: &NetSpec) -> Option<&str> {
    let unlimited = net.out.is_unlimited() && net.to_guest.is_unlimited();
    match &net.network {
        NetworkSpec::Switch(name) if unlimited => Some(name),
        _ => None,
    }
}

/// An interface's Ethernet address where the user says none: of no maker's, by the numbers of machine and interface.
fn default_mac(machine: usize, interface: usize) -> [u8; 6] {
    [0x02, b'b', b'v', 0, machine as u8, interface as u8]
}

fn machine(index: usize, described: &Described) -> Result<MachineConfig<'static>, MetalError> {
    let config = &described.config;
    make_missing_image(config)?;
    let guest = Guest::find(config)?;
    let own = guest
        .disks
        .iter()
        .map(|disk| DiskSpec { snapshot: disk.snapshot || config.snapshot, ..disk.clone() });
    if own.clone().any(|disk| !forgets(&disk)) {
        return Err(MetalError::Disk { name: described.name.clone() });
    }
    let disks = own
        .chain(config.disks.iter().cloned())
        .map(|disk| disk_content::read(&disk))
        .collect::<Result<_, _>>()?;
    let nets = config.nets.iter().enumerate().filter_map(|(interface, net)| {
        let mac = net.mac.unwrap_or_else(|| default_mac(index, interface));
        Some(NetConfig { switch: switch(net)?.into(), mac })
    });
    Ok(MachineConfig {
        nets: nets.collect(),
        disks,
        name: described.name.clone(),
        cpus: config.cpus,
        memory: config.memory.0,
        testdev: config.testdev,
        pv: config.pv == Paravirtual::On,
        on_crash: match config.restart {
            RestartPolicy::No => OnCrash::Stop,
            RestartPolicy::OnFailure | RestartPolicy::Always => OnCrash::Restart,
        },
        command_line: guest.command_line,
        kernel: guest.kernel.read()?,
        initrd: guest
            .initrd
            .as_ref()
            .map(|file| file.read())
            .transpose()?
            .map(|file| Cow::Owned(file.into_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn parse(text: &str) -> Result<Bundle<'static>, String> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("k"), "kernel").unwrap();
        fs::write(folder.path().join("i"), "initrd").unwrap();
        let file = folder.path().join("machines.toml");
        fs::write(&file, text).unwrap();
        read(&file, "quiet").map_err(|error| error.to_string())
    }

    #[test]
    fn machines_come_in_the_order_of_their_names() {
        let text = "[vm.b]\nkernel = \"k\"\npv = \"off\"\nnet = [\"switch=lan\", \"switch=wan,mac=52:54:00:00:00:01\"]\n[vm.a]\nkernel = \"k\"\ninitrd = \"i\"\nappend = \"quiet\"\n\
                    memory = \"64M\"\ncpus = 2\ntestdev = true\nrestart = \"on-failure\"\n";
        let bundle = parse(text).unwrap();
        let [a, b] = &bundle.machines[..] else { panic!("{bundle:?}") };
        assert_eq!((a.name.as_str(), a.cpus, a.memory, a.testdev, a.pv), ("a", 2, 64 << 20, true, true));
        assert_eq!((a.on_crash, a.command_line.as_str()), (OnCrash::Restart, "quiet"));
        assert_eq!((&*a.kernel, a.initrd.as_deref()), (&b"kernel"[..], Some(&b"initrd"[..])));
        assert_eq!((b.name.as_str(), b.cpus, b.memory, &b.initrd), ("b", 1, 512 << 20, &None));
        let nets: Vec<_> = b.nets.iter().map(|net| (net.switch.as_str(), net.mac)).collect();
        assert_eq!(nets, [("lan", [2, b'b', b'v', 0, 1, 0]), ("wan", [0x52, 0x54, 0, 0, 0, 1])]);
        assert_eq!((b.on_crash, b.pv, bundle.command_line.as_str()), (OnCrash::Stop, false, "quiet"));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = parse(
            "[vm.a]\nkernel = \"k\"\nrng = true\nnet = [\"switch=a\", \"user\"]\n[[vm.a.disk]]\npath = \"k\"\n[vm.b]\nkernel = \"k\"\ngdb = \":1\"\nrestart = \"always\"\n",
        )
        .unwrap_err();
        assert!(error.contains("vm.a.rng, vm.a.disk[0] without snapshot = true, vm.a.net[1], vm.b.gdb, vm.b.restart = \"always\""), "{error}");
        assert!(parse("[vm.a]\nkernel = \"nowhere\"\n").unwrap_err().contains("there is no kernel"));
    }
}
