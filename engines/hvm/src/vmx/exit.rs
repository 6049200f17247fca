//! Why the processor left a guest (SDM Vol. 3C, chapter 28; Vol. 3D, appendix C), and what it is entered with.

use bivisor_x86::exception::{Exception, vector};

use super::field::{Field, Vmcs};
use crate::guest::{Cause, Injection, Kind, Left, PortAccess};

/// Basic exit reasons by name.
#[allow(missing_docs)]
pub mod reason {
    pub const EXCEPTION_OR_NMI: u16 = 0;
    pub const EXTERNAL_INTERRUPT: u16 = 1;
    pub const TRIPLE_FAULT: u16 = 2;
    pub const INTERRUPT_WINDOW: u16 = 7;
    pub const NMI_WINDOW: u16 = 8;
    pub const TASK_SWITCH: u16 = 9;
    pub const CPUID: u16 = 10;
    pub const GETSEC: u16 = 11;
    pub const HLT: u16 = 12;
    pub const INVD: u16 = 13;
    pub const RDPMC: u16 = 15;
    pub const VMCALL: u16 = 18;
    pub const VMCLEAR: u16 = 19;
    pub const VMXON: u16 = 27;
    pub const CR_ACCESS: u16 = 28;
    pub const DR_ACCESS: u16 = 29;
    pub const IO: u16 = 30;
    pub const RDMSR: u16 = 31;
    pub const WRMSR: u16 = 32;
    pub const INVALID_STATE: u16 = 33;
    pub const MWAIT: u16 = 36;
    pub const MONITOR: u16 = 39;
    pub const EPT_VIOLATION: u16 = 48;
    pub const INVEPT: u16 = 50;
    pub const INVVPID: u16 = 53;
    pub const WBINVD: u16 = 54;
    pub const XSETBV: u16 = 55;
}

/// Interruption information (SDM Vol. 3C, tables 25-16, 25-19 and 25-20): the bits around the vector.
mod event {
    pub const INTERRUPT: u64 = 0 << 8;
    pub const NMI: u64 = 2 << 8;
    pub const EXCEPTION: u64 = 3 << 8;
    pub const TYPE: u64 = 7 << 8;
    pub const ERROR_CODE_VALID: u64 = 1 << 11;
    /// Of an exit: IRET had ended the blocking of NMIs already.
    pub const NMI_UNBLOCKED: u64 = 1 << 12;
    pub const VALID: u64 = 1 << 31;
}

/// Bits of the qualification of an access to a port (SDM Vol. 3C, table 28-5).
mod port {
    pub const SIZE: u64 = 0b111;
    pub const INPUT: u64 = 1 << 3;
    pub const STRING: u64 = 1 << 4;
    pub const PORT_SHIFT: u32 = 16;
}

/// Qualification of a debug exception: the bits that DR6 gets (SDM Vol. 3C, table 28-1).
const DEBUG_BITS: u64 = 0b1111 | 1 << 13 | 1 << 14;
/// Of them, those that a processor clears before it sets any.
const DEBUG_HITS: u64 = 0b1111;

/// Interruption information and error code of an injection.
pub fn encode(injection: &Injection) -> (u64, u64) {
    match injection {
        Injection::Interrupt(vector) => (event::VALID | event::INTERRUPT | u64::from(*vector), 0),
        Injection::Nmi => (event::VALID | event::NMI | u64::from(vector::NMI), 0),
        Injection::Exception(exception) => {
            let code = exception.error_code.map_or(0, |_| event::ERROR_CODE_VALID);
            let info = event::VALID | event::EXCEPTION | u64::from(exception.vector) | code;
            (info, exception.error_code.unwrap_or(0).into())
        }
    }
}

/// What was being delivered. What an instruction of the guest's caused is nothing to deliver again: the instruction is
/// executed again, as RIP is still its own.
fn delivering(vmcs: &impl Vmcs, cr2: u64) -> Option<Injection> {
    let info = vmcs.read(Field::VectoringInfo);
    if info & event::VALID == 0 {
        return None;
    }
    match info & event::TYPE {
        event::INTERRUPT => Some(Injection::Interrupt(info as u8)),
        event::NMI => Some(Injection::Nmi),
        event::EXCEPTION => {
            let error_code =
                (info & event::ERROR_CODE_VALID != 0).then(|| vmcs.read(Field::VectoringErrorCode) as u32);
            Some(Injection::Exception(Exception { vector: info as u8, error_code, cr2 }))
        }
        _ => None,
    }
}

/// Why a guest was left, and what else is to be known of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// For whoever runs it.
    pub left: Left,
    /// An NMI of the host's, which the processor takes for delivered.
    pub nmi: bool,
    /// DR6: bits to be cleared, then bits to be set.
    pub dr6: (u64, u64),
    /// NMIs are blocked, though the processor says otherwise.
    pub nmi_blocked: bool,
}

/// What an exit means; `None` if it is none that anybody asked for. `cr2` is the guest's.
pub fn decode(vmcs: &impl Vmcs, cr2: u64) -> Option<Decoded> {
    let full = vmcs.read(Field::ExitReason);
    let number = full as u16;
    // Bit 31: it is a failure to enter the guest.
    if full >> 31 & 1 != 0 {
        return None;
    }
    let left = Left { cause: Cause::Host, delivering: delivering(vmcs, cr2) };
    let mut decoded = Decoded { left, nmi: false, dr6: (0, 0), nmi_blocked: false };
    decoded.left.cause = match number {
        reason::EXCEPTION_OR_NMI => exception(vmcs, &mut decoded)?,
        reason::EXTERNAL_INTERRUPT => Cause::Host,
        reason::TRIPLE_FAULT => Cause::Shutdown,
        reason::INTERRUPT_WINDOW | reason::NMI_WINDOW => Cause::InterruptWindow,
        reason::IO => port_access(vmcs),
        reason::EPT_VIOLATION => Cause::Unmapped(vmcs.read(Field::GuestPhysicalAddress)),
        _ => Cause::Instruction(instruction(number)?),
    };
    Some(decoded)
}

/// What kind of instruction an exit is for.
fn instruction(number: u16) -> Option<Kind> {
    Some(match number {
        reason::CPUID => Kind::Cpuid,
        reason::HLT => Kind::Halt,
        reason::VMCALL => Kind::Hypercall,
        reason::CR_ACCESS => Kind::ControlRegister,
        reason::DR_ACCESS => Kind::DebugRegister,
        reason::RDMSR | reason::WRMSR => Kind::Msr,
        reason::TASK_SWITCH | reason::GETSEC | reason::INVD | reason::RDPMC => Kind::Other,
        reason::VMCLEAR..=reason::VMXON | reason::MWAIT | reason::MONITOR => Kind::Other,
        reason::INVEPT | reason::INVVPID | reason::WBINVD | reason::XSETBV => Kind::Other,
        _ => return None,
    })
}

/// An exception that ends runs, or an NMI of the host's.
fn exception(vmcs: &impl Vmcs, decoded: &mut Decoded) -> Option<Cause> {
    let info = vmcs.read(Field::ExitInterruptionInfo);
    decoded.nmi_blocked = info & event::NMI_UNBLOCKED != 0;
    match (info & event::TYPE, info as u8) {
        (event::NMI, _) => {
            decoded.nmi = true;
            Some(Cause::Host)
        }
        (event::EXCEPTION, vector::AC) => Some(Cause::Exception(Exception::AC0)),
        (event::EXCEPTION, vector::DB) => {
            let bits = vmcs.read(Field::ExitQualification) & DEBUG_BITS;
            decoded.dr6 = (DEBUG_HITS, bits);
            Some(Cause::Exception(Exception::DB))
        }
        // INT1, whose length the processor would have to be told.
        (_, vector::DB) => Some(Cause::Instruction(Kind::Other)),
        _ => None,
    }
}

/// IN or OUT of a register; a string of them is for the interpreter.
fn port_access(vmcs: &impl Vmcs) -> Cause {
    let qualification = vmcs.read(Field::ExitQualification);
    if qualification & port::STRING != 0 {
        return Cause::Instruction(Kind::PortString);
    }
    Cause::Port(PortAccess {
        port: (qualification >> port::PORT_SHIFT) as u16,
        size: (qualification & port::SIZE) as usize + 1,
        input: qualification & port::INPUT != 0,
        next_rip: next_rip(vmcs),
    })
}

/// RIP behind the instruction.
fn next_rip(vmcs: &impl Vmcs) -> u64 {
    const LONG: u64 = 1 << 13;
    const BIG: u64 = 1 << 14;
    let next = vmcs.read(Field::GuestRip).wrapping_add(vmcs.read(Field::InstructionLength));
    match vmcs.read(Field::GuestCsRights) & (LONG | BIG) {
        // What only 64-bit code has, no other code can have loaded.
        rights if rights & LONG != 0 => next,
        BIG => next & 0xffff_ffff,
        _ => next & 0xffff,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::field::Written;

    fn vmcs(number: u16, fields: &[(Field, u64)]) -> Written {
        let mut vmcs = Written::default();
        vmcs.write(Field::ExitReason, number.into());
        fields.iter().for_each(|(field, value)| vmcs.write(*field, *value));
        vmcs
    }
    fn cause(number: u16, fields: &[(Field, u64)]) -> Option<Cause> {
        decode(&vmcs(number, fields), 0).map(|decoded| decoded.left.cause)
    }

    #[test]
    fn injections_are_laid_out_as_the_manual_says() {
        assert_eq!(encode(&Injection::Interrupt(0xee)), (0x8000_00ee, 0));
        assert_eq!(encode(&Injection::Nmi), (0x8000_0202, 0));
        assert_eq!(encode(&Injection::Exception(Exception::UD)), (0x8000_0306, 0));
        assert_eq!(encode(&Injection::Exception(Exception::gp(0x18))), (0x8000_0b0d, 0x18));
    }

    #[test]
    fn what_was_under_way_comes_back() {
        let violation = |info, code| {
            let fields = [
                (Field::VectoringInfo, info),
                (Field::VectoringErrorCode, code),
                (Field::GuestPhysicalAddress, 0xfee0_0000),
            ];
            decode(&vmcs(reason::EPT_VIOLATION, &fields), 0xabc).unwrap().left
        };
        for injection in [
            Injection::Interrupt(0x31),
            Injection::Nmi,
            Injection::Exception(Exception::page_fault(0xabc, 7)),
            Injection::Exception(Exception { cr2: 0xabc, ..Exception::UD }),
        ] {
            let (info, code) = encode(&injection);
            let left = violation(info, code);
            assert_eq!((left.cause, left.delivering), (Cause::Unmapped(0xfee0_0000), Some(injection)));
        }
        // INT 80h, INT1, INT3; and nothing at all.
        for info in [0x8000_0480, 0x8000_0501, 0x8000_0603, 0x31] {
            assert_eq!(violation(info, 0).delivering, None);
        }
    }

    #[test]
    fn ports() {
        let access = |qualification, rights| {
            let fields = [
                (Field::ExitQualification, qualification),
                (Field::GuestRip, 0xfffe),
                (Field::InstructionLength, 2),
                (Field::GuestCsRights, rights),
            ];
            cause(reason::IO, &fields).unwrap()
        };
        let expected = PortAccess { port: 0x3f8, size: 1, input: false, next_rip: 0x1_0000 };
        assert_eq!(access(0x3f8_0000, 0xa09b), Cause::Port(expected));
        assert_eq!(
            access(0xcfc_000b, 0xc09b),
            Cause::Port(PortAccess { port: 0xcfc, size: 4, input: true, ..expected })
        );
        assert_eq!(access(0x3f8_0000, 0x9b), Cause::Port(PortAccess { next_rip: 0, ..expected }));
        assert_eq!(access(0x3f8_0030, 0x9b), Cause::Instruction(Kind::PortString));
    }

    #[test]
    fn exceptions_and_interrupts_of_the_host() {
        let exception = |info, qualification| {
            let fields = [(Field::ExitInterruptionInfo, info), (Field::ExitQualification, qualification)];
            decode(&vmcs(reason::EXCEPTION_OR_NMI, &fields), 0)
        };
        let nmi = exception(0x8000_0202, 0).unwrap();
        assert!(nmi.nmi && nmi.left.cause == Cause::Host);
        let step = exception(0x8000_0301, 1 << 14 | 1 << 12).unwrap();
        assert_eq!((step.left.cause, step.dr6), (Cause::Exception(Exception::DB), (0xf, 1 << 14)));
        let alignment = exception(0x8000_1b11, 0).unwrap();
        assert_eq!(alignment.left.cause, Cause::Exception(Exception::AC0));
        assert!(alignment.nmi_blocked && !step.nmi_blocked);
        assert_eq!(exception(0x8000_0501, 0).unwrap().left.cause, Cause::Instruction(Kind::Other));
        assert_eq!(exception(0x8000_0b0e, 0), None);
        assert_eq!(cause(reason::EXTERNAL_INTERRUPT, &[]), Some(Cause::Host));
    }

    #[test]
    fn exits() {
        assert_eq!(cause(reason::CR_ACCESS, &[]), Some(Cause::Instruction(Kind::ControlRegister)));
        assert_eq!(cause(reason::TASK_SWITCH, &[]), Some(Cause::Instruction(Kind::Other)));
        assert_eq!(cause(25, &[]), Some(Cause::Instruction(Kind::Other)));
        assert_eq!(cause(reason::NMI_WINDOW, &[]), Some(Cause::InterruptWindow));
        assert_eq!(cause(reason::TRIPLE_FAULT, &[]), Some(Cause::Shutdown));
        // An EPT misconfiguration, PAUSE, and a failed entry.
        assert_eq!((cause(49, &[]), cause(40, &[])), (None, None));
        assert_eq!(cause(0, &[(Field::ExitReason, 0x8000_0021)]), None);
    }
}
