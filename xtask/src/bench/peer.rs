//! Who is measured: the host itself, Bivisor, and QEMUs; how each is started.
use super::{
    MEMORY,
    guest::Image,
    host, io,
    qemu::{self, Qemu},
    record::{PeerKind, PeerSetup},
};
use anyhow::{Context, Result};
use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

/// A machine, and what the benchmark program in it is told.
pub struct Machine {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// RAM in MiB.
    pub memory: u32,
    pub cpus: u32,
    /// Options of the benchmark program.
    pub options: Vec<String>,
}

impl Machine {
    /// The kernel's command line: what follows the two dashes is handed to the first process.
    fn append(&self) -> String {
        format!("console=ttyS0 quiet panic=-1 -- {}", self.options.join(" "))
    }
}

/// One that is measured.
pub struct Peer {
    /// Its name in the results.
    pub label: String,
    /// What it says of itself.
    pub version: String,
    way: Way,
}

enum Way {
    Native { bench: PathBuf, busybox: PathBuf },
    Bivisor { program: PathBuf, engine: String },
    Qemu { qemu: Qemu, cpu: &'static str },
}

impl Peer {
    /// The host itself.
    pub fn native(image: &Image) -> Self {
        Self {
            label: "native".into(),
            version: format!("Linux {}", host::kernel()),
            way: Way::Native { bench: image.bench.clone(), busybox: image.busybox.clone() },
        }
    }

    /// Bivisor.
    pub fn bivisor(program: PathBuf, engine: &str) -> Result<Self> {
        let version = host::output_of(Command::new(&program).arg("--version"))
            .with_context(|| format!("{} does not tell its version", program.display()))?;
        let version = format!("{version}, --engine {engine}");
        Ok(Self { label: "bivisor".into(), version, way: Way::Bivisor { program, engine: engine.into() } })
    }

    /// QEMUs, the oldest first; of those with the same version, the first.
    pub fn qemus(qemus: Vec<Qemu>) -> Result<Vec<Self>> {
        let mut peers = Vec::new();
        for qemu in qemus {
            let version = qemu.version()?;
            let label = qemu::label(&version)?;
            if !peers.iter().any(|peer: &Self| peer.label == label) {
                peers.push(Self { label, version, way: Way::Qemu { qemu, cpu: "max" } });
            }
        }
        peers.sort_by_key(|peer| qemu::number(&peer.label));
        Ok(peers)
    }

    /// For the results.
    pub fn describe(&self) -> PeerSetup {
        let kind = match self.way {
            Way::Native { .. } => PeerKind::Native,
            Way::Bivisor { .. } => PeerKind::Bivisor,
            Way::Qemu { .. } => PeerKind::Qemu,
        };
        PeerSetup { label: self.label.clone(), version: self.version.clone(), kind }
    }

    /// Whether its runs boot a machine.
    pub fn boots(&self) -> bool {
        !matches!(self.way, Way::Native { .. })
    }

    /// After a run in which the kernel did not even start its first process: how it is started from now on, if there
    /// is another way. Old QEMUs claim features with `max` that new kernels trip over.
    pub fn try_otherwise(&mut self) -> Option<&'static str> {
        match &mut self.way {
            Way::Qemu { cpu, .. } if *cpu == "max" => {
                *cpu = "qemu64";
                Some("started with -cpu qemu64, as the kernel does not start with max")
            }
            _ => None,
        }
    }

    /// What runs the benchmark program with this machine's CPUs and options.
    pub fn command(&self, machine: &Machine) -> Command {
        let (memory, cpus) = (format!("{}M", machine.memory), machine.cpus.to_string());
        let mut command = match &self.way {
            Way::Native { bench, busybox } => {
                let mut command = Command::new(bench);
                command.arg("--busybox").arg(busybox).args(&machine.options);
                command
            }
            Way::Bivisor { program, engine } => {
                let mut command = Command::new(program);
                command.args([
                    "run",
                    "--no-reboot",
                    "--engine",
                    engine,
                    "--memory",
                    &memory,
                    "--cpus",
                    &cpus,
                ]);
                command.arg("--kernel").arg(&machine.kernel).arg("--initrd").arg(&machine.initrd);
                command.args(["--append", &machine.append()]);
                command
            }
            Way::Qemu { qemu, cpu } => {
                let mut command = qemu.command();
                command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", cpu]);
                command.args(["-m", &memory, "-smp", &cpus, "-no-reboot"]);
                command.args(["-nodefaults", "-display", "none", "-serial", "stdio"]);
                command.arg("-kernel").arg(&machine.kernel).arg("-initrd").arg(&machine.initrd);
                command.args(["-append", &machine.append()]);
                command
            }
        };
        command.stdin(Stdio::null());
        command
    }

    /// What runs a machine with disks and a network, whose console is standard input and output.
    pub fn io_command(&self, machine: &io::Machine<'_>) -> Command {
        let io::Machine { system, disk, port } = machine;
        let (memory, disk) = (format!("{MEMORY}M"), disk.display());
        let (root, forward) = (system.disk.display(), format!("hostfwd=tcp:127.0.0.1:{port}-:80"));
        let mut command = match &self.way {
            Way::Native { bench, .. } => Command::new(bench),
            Way::Bivisor { program, engine } => {
                let mut command = Command::new(program);
                command.args(["run", "--no-reboot", "--engine", engine, "--memory", &memory]);
                command.arg("--kernel").arg(&system.kernel).arg("--initrd").arg(&system.initrd);
                command.args(["--append", &system.append, "--disk", &format!("{root},format=raw,snapshot")]);
                command.args(["--disk", &format!("{disk},format=raw")]);
                command.args(["--net", &format!("user,host-loopback=on,{forward}")]);
                command
            }
            Way::Qemu { qemu, cpu } => {
                let mut command = qemu.command();
                command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", cpu, "-m", &memory]);
                command.args(["-no-reboot", "-nodefaults", "-display", "none", "-serial", "stdio"]);
                command.arg("-kernel").arg(&system.kernel).arg("-initrd").arg(&system.initrd);
                command.args(["-append", &system.append]);
                for (name, options) in
                    [("root", format!("file={root},snapshot=on")), ("disk", format!("file={disk}"))]
                {
                    command.args(["-drive", &format!("{options},if=none,format=raw,id={name}")]);
                    command.args(["-device", &format!("virtio-blk-pci,drive={name}")]);
                }
                command.args([
                    "-netdev",
                    &format!("user,id=net,{forward}"),
                    "-device",
                    "virtio-net-pci,netdev=net",
                ]);
                command
            }
        };
        command.stderr(Stdio::null());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &Command) -> Vec<String> {
        command.get_args().map(|word| word.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn each_is_given_the_same_machine() {
        let machine = Machine {
            kernel: "k".into(),
            initrd: "i".into(),
            memory: 512,
            cpus: 2,
            options: vec!["--seconds".into(), "1".into()],
        };
        let append = "console=ttyS0 quiet panic=-1 -- --seconds 1";
        let peer = |way| Peer { label: String::new(), version: String::new(), way };
        let bivisor = peer(Way::Bivisor { program: "b".into(), engine: "interp".into() });
        let mut qemu = peer(Way::Qemu { qemu: Qemu::at("q".as_ref()), cpu: "max" });
        for command in [bivisor.command(&machine), qemu.command(&machine)] {
            let words = words(&command);
            for expected in [append, "512M", "2", "k", "i"] {
                assert!(words.iter().any(|word| word == expected), "{expected:?} in {words:?}");
            }
        }
        assert!(qemu.try_otherwise().is_some() && qemu.try_otherwise().is_none());
        assert!(words(&qemu.command(&machine)).contains(&"qemu64".to_owned()));
        let native = peer(Way::Native { bench: "n".into(), busybox: "bb".into() });
        assert_eq!(words(&native.command(&machine)), ["--busybox", "bb", "--seconds", "1"]);
    }
}
