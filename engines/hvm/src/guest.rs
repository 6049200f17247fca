//! The seam between what every processor with virtualization has and what each maker's looks like.

use bivisor_machine::engine::EngineError;
use bivisor_x86::exception::Exception;
use bivisor_x86::state::CpuState;

/// DR7: any breakpoint is enabled.
pub(crate) const DR7_ENABLES: u64 = 0xff;

/// What is delivered to a guest as it is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// A maskable interrupt with its vector.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// An exception; for #PF, CR2 is already set.
    Exception(Exception),
}

/// What a guest is entered with, beside its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Delivered before its next instruction.
    pub injection: Option<Injection>,
    /// It is to be left as soon as it can take an interrupt.
    pub interrupt_window: bool,
    /// It is to be left as soon as it can take an NMI. Hardware that leaves the end of an NMI's handler to software needs no
    /// telling.
    pub nmi_window: bool,
    /// What it reads as the time-stamp counter is the processor's plus this.
    pub tsc_offset: u64,
    /// Everything that the processor has cached of its page tables is out of date.
    pub flush: bool,
}

/// IN or OUT of a single register, as far as the processor has decoded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: usize,
    /// IN.
    pub input: bool,
    /// RIP of the next instruction.
    pub next_rip: u64,
}

/// Why the processor left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An interrupt or NMI of the host's, which has been handled.
    Host,
    /// The guest can take an interrupt, or an NMI, now.
    InterruptWindow,
    /// A port was to be accessed; that it may be is checked.
    Port(PortAccess),
    /// The instruction at RIP is to be executed in software.
    Instruction(Kind),
    /// The guest accessed this guest-physical address, where nothing is mapped; the instruction at RIP has to be executed
    /// in software, unless the access was part of a delivery ([`Left::delivering`]).
    Unmapped(u64),
    /// An exception that the hardware has not delivered because it must not do so unseen. It is to be injected.
    Exception(Exception),
    /// A triple fault.
    Shutdown,
}

/// What an intercepted instruction is, for those who count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// INS, OUTS.
    PortString,
    /// RDMSR, WRMSR.
    Msr,
    /// CPUID.
    Cpuid,
    /// HLT.
    Halt,
    /// MOV to or from a control register, CLTS, LMSW, SMSW.
    ControlRegister,
    /// MOV to or from a debug register.
    DebugRegister,
    /// VMMCALL or VMCALL.
    Hypercall,
    /// IRET, while NMIs are blocked.
    InterruptReturn,
    /// Anything else.
    Other,
}

impl Kind {
    /// All kinds, with words for each.
    pub const ALL: [(Self, &'static str); 9] = [
        (Self::PortString, "exits for strings of ports"),
        (Self::Msr, "exits for model-specific registers"),
        (Self::Cpuid, "exits for CPUID"),
        (Self::Halt, "exits for HLT"),
        (Self::ControlRegister, "exits for control registers"),
        (Self::DebugRegister, "exits for debug registers"),
        (Self::Hypercall, "exits for hypercalls"),
        (Self::InterruptReturn, "exits for the end of an NMI's handler"),
        (Self::Other, "exits for other instructions"),
    ];
}

/// A guest that has been left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// Why.
    pub cause: Cause,
    /// What was on the way to the guest and has not arrived. It has to be injected again, or to be delivered in software
    /// where the delivery itself met what ended the run.
    pub delivering: Option<Injection>,
}

/// One virtual processor as the hardware keeps it.
pub trait HardwareGuest: Send {
    /// Whether the directory pointers of PAE paging in the state are those that the processor uses. Else they are only checked
    /// when CR3 is loaded, and read where they lie.
    const KEEPS_PDPTES: bool;

    /// Enters the guest in this state, and brings the state up to date when the processor has left it. Interrupts of
    /// the host are taken after that only, in here.
    ///
    /// # Errors
    /// The processor refuses the state, or leaves the guest for a reason that nobody asked for.
    fn run(&mut self, state: &mut CpuState, entry: &Entry) -> Result<Left, EngineError>;
}
