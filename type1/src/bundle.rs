//! The one file in which the virtual machines come to the bare machine: what each is made of, with its kernel and initrd.
//!
//! Little-endian: a magic number, a version, the number of machines; then for each one its strings and numbers, and its
//! files as they are.

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;

const MAGIC: [u8; 8] = *b"BIVISOR\x1a";
const VERSION: u32 = 2;
/// Most machines of a bundle.
pub const MAX_MACHINES: u32 = 64;

/// What happens when a guest's processor shuts down by a triple fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnCrash {
    /// The machine ends.
    Stop,
    /// It starts again.
    Restart,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Name of the switch that it is at.
    pub switch: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
}

/// A part of a disk that is not zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent<'a> {
    /// Where it is on the disk, in bytes.
    pub offset: u64,
    /// Its bytes.
    pub bytes: Cow<'a, [u8]>,
}

impl Extent<'_> {
    /// Where it ends on the disk.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes.len() as u64)
    }
}

/// A disk, whose content comes along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig<'a> {
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest may know it by.
    pub serial: String,
    /// What is not zeros, ascending, and apart from each other.
    pub extents: Vec<Extent<'a>>,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig<'a> {
    /// Its name.
    pub name: String,
    /// Its processors.
    pub cpus: u32,
    /// Bytes of its RAM.
    pub memory: u64,
    /// With QEMU's test devices.
    pub testdev: bool,
    /// With the paravirtual interface.
    pub pv: bool,
    /// What happens after a triple fault.
    pub on_crash: OnCrash,
    /// The kernel's command line.
    pub command_line: String,
    /// The kernel.
    pub kernel: Cow<'a, [u8]>,
    /// The initial RAM disk.
    pub initrd: Option<Cow<'a, [u8]>>,
    /// Network interfaces.
    pub nets: Vec<NetConfig>,
    /// Disks.
    pub disks: Vec<DiskConfig<'a>>,
}

/// All virtual machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle<'a> {
    /// Words for the hypervisor.
    pub command_line: String,
    /// In the order of the file.
    pub machines: Vec<MachineConfig<'a>>,
}

/// The file is no bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// Something else.
    #[error("it is no bundle of virtual machines: pack them with `bivisor metal bundle`")]
    Magic,
    /// Of another version of this program.
    #[error("it is of version {0}, this program reads version {VERSION}: pack it again")]
    Version(u32),
    /// It ends too early.
    #[error("it is truncated")]
    Truncated,
    /// It contradicts itself.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

impl<'a> Bundle<'a> {
    /// The bundle as a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.extend(VERSION.to_le_bytes());
        put(&mut file, self.command_line.as_bytes());
        file.extend((self.machines.len() as u32).to_le_bytes());
        for machine in &self.machines {
            put(&mut file, machine.name.as_bytes());
            file.extend(machine.cpus.to_le_bytes());
            file.extend(machine.memory.to_le_bytes());
            file.push(machine.testdev.into());
            file.push(machine.pv.into());
            file.push((machine.on_crash == OnCrash::Restart).into());
            put(&mut file, machine.command_line.as_bytes());
            put(&mut file, &machine.kernel);
            // No initrd has no bytes.
            put(&mut file, machine.initrd.as_deref().unwrap_or_default());
            file.extend((machine.nets.len() as u32).to_le_bytes());
            for net in &machine.nets {
                put(&mut file, net.switch.as_bytes());
                file.extend(net.mac);
            }
            file.extend((machine.disks.len() as u32).to_le_bytes());
            machine.disks.iter().for_each(|disk| put_disk(&mut file, disk));
        }
        file
    }

    /// Reads a file. Kernels and initrds stay where they are.
    ///
    /// # Errors
    /// It is no bundle.
    pub fn parse(file: &'a [u8]) -> Result<Self, BundleError> {
        let mut file = file.strip_prefix(&MAGIC).ok_or(BundleError::Magic)?;
        let version = u32::from_le_bytes(take_array(&mut file)?);
        if version != VERSION {
            return Err(BundleError::Version(version));
        }
        let command_line = text(&mut file)?;
        let count = u32::from_le_bytes(take_array(&mut file)?);
        if count == 0 || count > MAX_MACHINES {
            return Err(BundleError::Damaged("no sensible number of machines"));
        }
        let machines = (0..count).map(|_| machine(&mut file)).collect::<Result<_, _>>()?;
        Ok(Self { command_line, machines })
    }
}

fn machine<'a>(file: &mut &'a [u8]) -> Result<MachineConfig<'a>, BundleError> {
    let name = text(file)?;
    let cpus = u32::from_le_bytes(take_array(file)?);
    let memory = u64::from_le_bytes(take_array(file)?);
    let (testdev, pv) = (flag(file)?, flag(file)?);
    let on_crash = if flag(file)? { OnCrash::Restart } else { OnCrash::Stop };
    let command_line = text(file)?;
    let kernel = Cow::Borrowed(bytes(file)?);
    let initrd = Some(bytes(file)?).filter(|initrd| !initrd.is_empty()).map(Cow::Borrowed);
    let nets = list(file, |file| Ok(NetConfig { switch: text(file)?, mac: take_array(file)? }))?;
    let disks = list(file, disk)?;
    Ok(MachineConfig { name, cpus, memory, testdev, pv, on_crash, command_line, kernel, initrd, nets, disks })
}

fn disk<'a>(file: &mut &'a [u8]) -> Result<DiskConfig<'a>, BundleError> {
    let (size, read_only, serial) = (u64::from_le_bytes(take_array(file)?), flag(file)?, text(file)?);
    let extents: Vec<Extent<'a>> = list(file, |file| {
        let offset = u64::from_le_bytes(take_array(file)?);
        Ok(Extent { offset, bytes: Cow::Borrowed(bytes(file)?) })
    })?;
    let apart = extents.windows(2).all(|pair| pair[0].end() <= pair[1].offset);
    if !apart || extents.last().is_some_and(|last| last.end() > size) || size % 512 != 0 {
        return Err(BundleError::Damaged("parts of a disk lie on each other, or outside"));
    }
    Ok(DiskConfig { size, read_only, serial, extents })
}

fn put_disk(file: &mut Vec<u8>, disk: &DiskConfig<'_>) {
    file.extend(disk.size.to_le_bytes());
    file.push(disk.read_only.into());
    put(file, disk.serial.as_bytes());
    file.extend((disk.extents.len() as u32).to_le_bytes());
    for extent in &disk.extents {
        file.extend(extent.offset.to_le_bytes());
        put(file, &extent.bytes);
    }
}

/// A number and that many values.
fn list<'a, T>(
    file: &mut &'a [u8],
    mut value: impl FnMut(&mut &'a [u8]) -> Result<T, BundleError>,
) -> Result<Vec<T>, BundleError> {
    let count = u32::from_le_bytes(take_array(file)?);
    (0..count).map(|_| value(file)).collect()
}

/// A length and that many bytes.
fn put(file: &mut Vec<u8>, bytes: &[u8]) {
    file.extend((bytes.len() as u64).to_le_bytes());
    file.extend(bytes);
}

fn take<'a>(file: &mut &'a [u8], length: usize) -> Result<&'a [u8], BundleError> {
    let (taken, rest) = file.split_at_checked(length).ok_or(BundleError::Truncated)?;
    *file = rest;
    Ok(taken)
}

fn take_array<const N: usize>(file: &mut &[u8]) -> Result<[u8; N], BundleError> {
    take(file, N)?.try_into().map_err(|_| BundleError::Truncated)
}

fn bytes<'a>(file: &mut &'a [u8]) -> Result<&'a [u8], BundleError> {
    let length = u64::from_le_bytes(take_array(file)?);
    take(file, usize::try_from(length).map_err(|_| BundleError::Truncated)?)
}

fn text(file: &mut &[u8]) -> Result<String, BundleError> {
    let text = core::str::from_utf8(bytes(file)?).map_err(|_| BundleError::Damaged("a text is not UTF-8"))?;
    Ok(text.into())
}

fn flag(file: &mut &[u8]) -> Result<bool, BundleError> {
    match take_array(file)? {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(BundleError::Damaged("a flag is neither 0 nor 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn bundle() -> Bundle<'static> {
        let machine = MachineConfig {
            name: "a".into(),
            cpus: 2,
            memory: 64 << 20,
            testdev: true,
            pv: true,
            on_crash: OnCrash::Restart,
            command_line: "console=ttyS0".into(),
            kernel: Cow::Borrowed(b"kernel"),
            initrd: Some(Cow::Borrowed(b"initrd")),
            nets: vec![NetConfig { switch: "lan".into(), mac: [2, 0, 0, 0, 0, 1] }],
            disks: vec![DiskConfig {
                size: 4096,
                read_only: true,
                serial: "s".into(),
                extents: [512, 3584]
                    .map(|offset| Extent { offset, bytes: Cow::Borrowed(&[7; 512]) })
                    .to_vec(),
            }],
        };
        let other = MachineConfig {
            name: "b".into(),
            on_crash: OnCrash::Stop,
            testdev: false,
            pv: false,
            initrd: None,
            ..machine.clone()
        };
        Bundle { command_line: "quiet".into(), machines: vec![machine, other] }
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let file = bundle().encode();
        assert_eq!(Bundle::parse(&file), Ok(bundle()));
    }

    #[test]
    fn every_cut_is_noticed() {
        let file = bundle().encode();
        for length in 8..file.len() {
            assert_eq!(Bundle::parse(&file[..length]), Err(BundleError::Truncated), "{length}");
        }
        assert_eq!(Bundle::parse(b"BIVISOR"), Err(BundleError::Magic));
    }

    #[test]
    fn disks_that_can_not_be_are_refused() {
        for (offset, size) in [(600, 4096), (3585, 4096), (512, 4095)] {
            let mut bundle = bundle();
            let disk = &mut bundle.machines[0].disks[0];
            (disk.extents[1].offset, disk.size) = (offset, size);
            assert!(
                matches!(Bundle::parse(&bundle.encode()), Err(BundleError::Damaged(_))),
                "{offset} {size}"
            );
        }
    }

    #[test]
    fn other_files_are_refused() {
        let mut file = bundle().encode();
        file[8] = 9;
        assert_eq!(Bundle::parse(&file), Err(BundleError::Version(9)));
        file[8] = VERSION as u8;
        file[25..29].fill(0xff);
        assert!(matches!(Bundle::parse(&file), Err(BundleError::Damaged(_))));
        file[25..29].copy_from_slice(&1u32.to_le_bytes());
        file[29..37].fill(0xff);
        assert_eq!(Bundle::parse(&file), Err(BundleError::Truncated));
    }
}
