//! Whether this host's KVM is usable: that it is there is no proof. Some are software, which executes a guest's kernel a
//! thousand times slower than the processor does or hangs whoever tries, so a small guest is measured.
#![allow(unsafe_code)]

use std::arch::x86_64::__cpuid_count;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use bivisor_machine::engine::{EmptyBus, Engine, EngineError, Exit, VcpuSetup};
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::registers::Cr0;
use bivisor_x86::registers::gpr::RCX;
use bivisor_x86::state::{CpuState, SegReg, Segment};
use kvm_ioctls::{Cap, Kvm};

use crate::engine::KvmEngine;

/// KVM's device.
pub const DEVICE: &str = "/dev/kvm";
/// KVM's one version of its interface.
const API_VERSION: i32 = 12;
/// Rounds of the guest's loop. A processor takes some 20 µs for them, and 0.6 ms if it is emulated by QEMU itself.
const ROUNDS: u64 = 40_000;
/// So often it is tried: on a busy host the thread may have to wait for a processor meanwhile.
const TRIES: u32 = 3;
/// What the guest may take.
const LIMIT: Duration = Duration::from_millis(8);
/// What all may take where nobody has asked for KVM, its making of the guest included: some 5 ms on hardware.
pub const CHOOSING: Duration = Duration::from_millis(50);
/// What all may take where somebody has: the kernel may be slow to make a guest, as it is on a processor that is itself
/// emulated, and still execute it well.
pub const ASKED_FOR: Duration = Duration::from_secs(5);
/// Where the guest's code is.
const CODE: u64 = 0x1000;

/// Why KVM is not to be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// No device.
    #[error("there is no {DEVICE}: no virtualization hardware, or its driver is not loaded")]
    Missing,
    /// The user may not.
    #[error("{DEVICE} may not be opened by you: join the group kvm")]
    Permission,
    /// It can't be opened or isn't what it should be.
    #[error("{DEVICE} {0}")]
    Device(String),
    /// The processor has no virtualization.
    #[error(
        "{DEVICE} is there, but this CPU shows neither VMX nor SVM, so {module} behind it is no virtualization by hardware"
    )]
    NoHardware {
        /// What the kernel calls it.
        module: String,
    },
    /// Another module than those for hardware.
    #[error("{DEVICE} is there, but neither kvm_intel nor kvm_amd is behind it: it is {0}")]
    Module(String),
    /// Something is missing.
    #[error("this host's KVM has no {0}: it needs Linux 5.16 or newer")]
    Capability(&'static str),
    /// The guest did not do what it should.
    #[error("a small guest failed on it: {0}")]
    Failed(String),
    /// The guest took too long.
    #[error("a small guest that hardware executes in 20 µs took {0:.1?} on it, so it is software")]
    Slow(Duration),
    /// The guest did not come back.
    #[error("a small guest was not done within {} ms on it, so it is software, or hangs", .0.as_millis())]
    Late(Duration),
}

/// What KVM must have.
const CAPABILITIES: [(Cap, &str); 10] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::UserNmi, "KVM_CAP_USER_NMI"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
];

/// KVM, open and with all that the engine needs. Machines can be made of it when no file can be opened any more.
#[derive(Clone)]
pub struct Device(Arc<Kvm>);

impl Device {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, not the user's, or too old.
    pub fn open() -> Result<Self, Unusable> {
        look_at(Path::new(DEVICE))?;
        let kvm = Kvm::new().map_err(|error| opening(&io::Error::from_raw_os_error(error.errno())))?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            let text = format!("has version {version} of its interface, not {API_VERSION}");
            return Err(Unusable::Device(text));
        }
        match CAPABILITIES.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            Some((_, name)) => Err(Unusable::Capability(name)),
            None => Ok(Self(Arc::new(kvm))),
        }
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.0
    }
}

fn opening(error: &io::Error) -> Unusable {
    match error.kind() {
        io::ErrorKind::NotFound => Unusable::Missing,
        io::ErrorKind::PermissionDenied => Unusable::Permission,
        _ => Unusable::Device(format!("can't be opened: {error}")),
    }
}

/// Whether the device can be opened, without asking anything of it.
fn look_at(device: &Path) -> Result<(), Unusable> {
    let metadata = fs::metadata(device).map_err(|error| opening(&error))?;
    if !metadata.file_type().is_char_device() {
        return Err(Unusable::Device("is not a device".into()));
    }
    File::options().read(true).write(true).open(device).map(drop).map_err(|error| opening(&error))
}

/// The host's CPUID: EAX, EBX, ECX, EDX.
fn cpuid(leaf: u32, sub_leaf: u32) -> [u32; 4] {
    let answer = __cpuid_count(leaf, sub_leaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// CPUID 1 ECX bit 5 (Intel VMX) and 8000_0001h ECX bit 2 (AMD SVM).
fn has_virtualization(cpuid: impl Fn(u32) -> [u32; 4]) -> bool {
    let vmx = cpuid(1)[2] & 1 << 5 != 0;
    let svm = cpuid(0x8000_0000)[0] >= 0x8000_0001 && cpuid(0x8000_0001)[2] & 1 << 2 != 0;
    vmx || svm
}

/// The kernel's modules that are called kvm_something, as far as it tells.
fn modules(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("kvm_")).collect()
}

/// Refuses what can't be hardware by what the host says of itself.
fn check_host(cpuid: impl Fn(u32) -> [u32; 4], modules: &[String]) -> Result<(), Unusable> {
    let names = if modules.is_empty() { "what is".into() } else { modules.join(" and ") };
    if !has_virtualization(cpuid) {
        return Err(Unusable::NoHardware { module: names });
    }
    // A kernel with KVM built in, or one that hides its modules, names none.
    if modules.is_empty() || modules.iter().any(|name| name == "kvm_intel" || name == "kvm_amd") {
        return Ok(());
    }
    Err(Unusable::Module(names))
}

/// What the small guest has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// What it took itself.
    pub guest: Duration,
    /// What it took with its making.
    pub whole: Duration,
}

/// Whether guests can be executed by this host's KVM, at the speed of its hardware. Takes some milliseconds where they can,
/// and no longer than `limit` anywhere.
///
/// # Errors
/// They can't, or it took longer.
pub fn probe(limit: Duration) -> Result<Measured, Unusable> {
    look_at(Path::new(DEVICE))?;
    check_host(|leaf| cpuid(leaf, 0), &modules(Path::new("/sys/module")))?;
    judge(measure(limit)?)
}

fn judge(measured: Measured) -> Result<Measured, Unusable> {
    if measured.guest > LIMIT { Err(Unusable::Slow(measured.guest)) } else { Ok(measured) }
}

/// Measures the small guest, in a thread of its own: whatever hangs must not hang who asks.
pub fn measure(limit: Duration) -> Result<Measured, Unusable> {
    within(limit, Arc::new(EmptyBus::default()), execute)
}

/// Has a guest executed that its bus can end.
fn within(
    limit: Duration,
    bus: Arc<EmptyBus>,
    execute: impl FnOnce(Arc<EmptyBus>) -> Result<Duration, Unusable> + Send + 'static,
) -> Result<Measured, Unusable> {
    let start = Instant::now();
    let (tell, hear) = channel();
    let guest_bus = bus.clone();
    thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            // Nobody listens any more after the limit.
            let _ = tell.send(execute(guest_bus));
        })
        .map_err(|error| Unusable::Failed(error.to_string()))?;
    let result = hear.recv_timeout(limit);
    // Ends a guest that goes on.
    bus.kick();
    match result {
        Ok(result) => result.map(|guest| Measured { guest, whole: start.elapsed() }),
        Err(RecvTimeoutError::Timeout) => Err(Unusable::Late(limit)),
        Err(RecvTimeoutError::Disconnected) => Err(Unusable::Failed("it ended".into())),
    }
}

/// Executes the small guest to its end.
fn execute(bus: Arc<EmptyBus>) -> Result<Duration, Unusable> {
    let engine = KvmEngine::new(&Device::open()?);
    run_guest(&engine, bus).map_err(|error| Unusable::Failed(error.to_string()))?
}

fn run_guest(engine: &dyn Engine, bus: Arc<EmptyBus>) -> Result<Result<Duration, Unusable>, EngineError> {
    // dec ecx; jnz to itself; hlt
    const LOOP: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];
    let memory = Arc::new(GuestMemory::on_heap(2 << 20));
    memory.write(CODE, &LOOP).map_err(|error| EngineError(error.to_string()))?;
    let model = Arc::new(CpuModel::from_host(cpuid, 1, 1_000_000_000));
    let mut vcpu = engine.create_vcpu(0, VcpuSetup { memory, bus, model })?;
    let mut best = Duration::MAX;
    for _ in 0..TRIES {
        vcpu.set_state(&flat_state())?;
        let start = Instant::now();
        let exit = vcpu.run()?;
        best = best.min(start.elapsed());
        let state = vcpu.state()?;
        if exit != Exit::Halt || state.gpr[RCX] != 0 || state.rip != CODE + LOOP.len() as u64 {
            return Ok(Err(Unusable::Failed(format!("{exit:?} at {:#x}", state.rip))));
        }
        if best <= LIMIT {
            break;
        }
    }
    Ok(Ok(best))
}

/// Ring 0 in 32-bit protected mode, without paging.
fn flat_state() -> CpuState {
    let mut state = CpuState::default();
    let flat = Segment { base: 0, limit: u32::MAX, selector: 0x10, attributes: 0xc093 };
    state.seg = [flat; 6];
    state.seg[SegReg::Cs as usize] = Segment { selector: 8, attributes: 0xc09b, ..flat };
    state.cr0 = (Cr0::PE | Cr0::ET).bits();
    state.rip = CODE;
    state.gpr[RCX] = ROUNDS;
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_machine::engine::VcpuBus;

    fn none(_: u32) -> [u32; 4] {
        [0; 4]
    }
    fn svm(leaf: u32) -> [u32; 4] {
        match leaf {
            0x8000_0000 => [0x8000_0001, 0, 0, 0],
            0x8000_0001 => [0, 0, 1 << 2, 0],
            _ => [0; 4],
        }
    }

    #[test]
    fn what_cannot_be_hardware_is_refused_by_name() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let refusal = check_host(none, &names(&["kvm_pvm"])).unwrap_err();
        assert!(refusal.to_string().contains("neither VMX nor SVM, so kvm_pvm behind it"), "{refusal}");
        assert_eq!(check_host(svm, &names(&["kvm_pvm"])), Err(Unusable::Module("kvm_pvm".into())));
        assert_eq!(check_host(svm, &names(&["kvm_amd"])), Ok(()));
        assert_eq!(check_host(svm, &[]), Ok(()));
        assert!(check_host(none, &[]).is_err());
        let vmx = |leaf| if leaf == 1 { [0, 0, 1 << 5, 0] } else { [0; 4] };
        assert_eq!(check_host(vmx, &names(&["kvm_intel", "kvm_x"])), Ok(()));
    }

    #[test]
    fn a_missing_device_and_a_file_are_told_apart() {
        assert_eq!(look_at(Path::new("/nonexistent/kvm")), Err(Unusable::Missing));
        assert_eq!(look_at(Path::new("/proc/cpuinfo")), Err(Unusable::Device("is not a device".into())));
        assert_eq!(look_at(Path::new("/dev/null")), Ok(()));
    }

    #[test]
    fn what_is_slow_is_refused_and_what_hangs_is_left() {
        let bus = || Arc::new(EmptyBus::default());
        let fast = within(ASKED_FOR, bus(), |_| Ok(Duration::from_micros(20))).and_then(judge).unwrap();
        assert!(fast.guest < fast.whole + LIMIT);
        let slow = Duration::from_millis(22);
        assert_eq!(within(ASKED_FOR, bus(), move |_| Ok(slow)).and_then(judge), Err(Unusable::Slow(slow)));
        let refusal = within(ASKED_FOR, bus(), |_| Err(Unusable::Capability("KVM_CAP_XSAVE"))).unwrap_err();
        assert_eq!(refusal, Unusable::Capability("KVM_CAP_XSAVE"));

        let (ended, end) = channel();
        let start = Instant::now();
        let hangs = move |bus: Arc<EmptyBus>| {
            while !bus.has_event() {
                thread::yield_now();
            }
            let _ = ended.send(());
            Ok(Duration::ZERO)
        };
        assert_eq!(within(CHOOSING, bus(), hangs), Err(Unusable::Late(CHOOSING)));
        assert!(start.elapsed() < CHOOSING * 20, "a busy host gives a thread its turn late");
        end.recv_timeout(Duration::from_secs(60)).expect("the guest that hangs is kicked");
    }

    #[test]
    fn probing_has_an_end() {
        let start = Instant::now();
        let result = probe(CHOOSING);
        assert!(start.elapsed() < Duration::from_secs(5), "{result:?}");
    }
}
