//! Why the processor left a guest (APM Vol. 2, appendix C and sections 15.12 to 15.20).

use bivisor_x86::exception::{Exception, vector};

use super::vmcb::Control;
use crate::guest::{Cause, Injection, Kind, Left, PortAccess};

/// Exit codes by name.
#[allow(missing_docs)]
pub mod code {
    pub const CR_ACCESS: u64 = 0x00;
    pub const CR_ACCESS_LAST: u64 = 0x1f;
    pub const DR_ACCESS: u64 = 0x20;
    pub const DR_ACCESS_LAST: u64 = 0x3f;
    pub const EXCEPTION: u64 = 0x40;
    pub const EXCEPTION_LAST: u64 = 0x5f;
    pub const INTR: u64 = 0x60;
    pub const NMI: u64 = 0x61;
    pub const SMI: u64 = 0x62;
    pub const VINTR: u64 = 0x64;
    pub const RDPMC: u64 = 0x6f;
    pub const CPUID: u64 = 0x72;
    pub const RSM: u64 = 0x73;
    pub const IRET: u64 = 0x74;
    pub const INVD: u64 = 0x76;
    pub const HLT: u64 = 0x78;
    pub const INVLPGA: u64 = 0x7a;
    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const SHUTDOWN: u64 = 0x7f;
    pub const VMRUN: u64 = 0x80;
    pub const VMMCALL: u64 = 0x81;
    pub const SKINIT: u64 = 0x86;
    pub const WBINVD: u64 = 0x89;
    pub const MONITOR: u64 = 0x8a;
    pub const MWAIT_CONDITIONAL: u64 = 0x8c;
    pub const XSETBV: u64 = 0x8d;
    pub const NPF: u64 = 0x400;
    pub const INVALID: u64 = u64::MAX;
    pub const INVALID_32: u64 = 0xffff_ffff;
}

/// EVENTINJ and EXITINTINFO (APM Vol. 2, sections 15.20 and 15.7.2): the bits around the vector.
mod event {
    pub const INTERRUPT: u64 = 0 << 8;
    pub const NMI: u64 = 2 << 8;
    pub const EXCEPTION: u64 = 3 << 8;
    pub const SOFTWARE: u64 = 4 << 8;
    pub const TYPE: u64 = 7 << 8;
    pub const ERROR_CODE_VALID: u64 = 1 << 11;
    pub const VALID: u64 = 1 << 31;
}

/// An injection as EVENTINJ takes it.
pub fn encode(injection: &Injection) -> u64 {
    let exception = |exception: &Exception| {
        let code = exception.error_code.map_or(0, |code| event::ERROR_CODE_VALID | u64::from(code) << 32);
        u64::from(exception.vector) | event::EXCEPTION | code
    };
    event::VALID
        | match injection {
            Injection::Interrupt(vector) => u64::from(*vector) | event::INTERRUPT,
            Injection::Nmi => u64::from(vector::NMI) | event::NMI,
            Injection::Exception(of) => exception(of),
        }
}

/// What EXITINTINFO says was being delivered. A software interrupt is nothing to deliver again: its instruction is executed
/// again, as RIP is still its own.
fn delivering(info: u64, cr2: u64) -> Option<Injection> {
    if info & event::VALID == 0 {
        return None;
    }
    let number = info as u8;
    match info & event::TYPE {
        event::INTERRUPT => Some(Injection::Interrupt(number)),
        event::NMI => Some(Injection::Nmi),
        event::SOFTWARE => None,
        _ => {
            let error_code = (info & event::ERROR_CODE_VALID != 0).then_some((info >> 32) as u32);
            Some(Injection::Exception(Exception { vector: number, error_code, cr2 }))
        }
    }
}

/// EXITINFO1 of an access to a port (APM Vol. 2, figure 15-2).
mod port {
    pub const INPUT: u64 = 1 << 0;
    pub const STRING: u64 = 1 << 2;
    pub const SIZE_SHIFT: u32 = 4;
    pub const SIZE: u64 = 0b111;
    pub const PORT_SHIFT: u32 = 16;
}

/// The access to a port; `None` for a string of them.
fn port_access(control: &Control) -> Option<PortAccess> {
    let info = control.exit_info1;
    let size = (info >> port::SIZE_SHIFT & port::SIZE) as usize;
    let plain = info & port::STRING == 0 && matches!(size, 1 | 2 | 4);
    plain.then_some(PortAccess {
        port: (info >> port::PORT_SHIFT) as u16,
        size,
        input: info & port::INPUT != 0,
        next_rip: control.exit_info2,
    })
}

/// What an exit means; `None` if it is none that anybody asked for. `cr2` is the guest's.
pub fn decode(control: &Control, cr2: u64) -> Option<Left> {
    let kind = |kind| Some(Cause::Instruction(kind));
    let cause = match control.exit_code {
        code::CR_ACCESS..=code::CR_ACCESS_LAST => kind(Kind::ControlRegister),
        code::DR_ACCESS..=code::DR_ACCESS_LAST => kind(Kind::DebugRegister),
        code::EXCEPTION..=code::EXCEPTION_LAST => match (control.exit_code - code::EXCEPTION) as u8 {
            vector::AC => Some(Cause::Exception(Exception::AC0)),
            vector::DB => Some(Cause::Exception(Exception::DB)),
            _ => None,
        },
        code::INTR | code::NMI | code::SMI => Some(Cause::Host),
        code::VINTR => Some(Cause::InterruptWindow),
        code::CPUID => kind(Kind::Cpuid),
        code::HLT => kind(Kind::Halt),
        code::IOIO => match port_access(control) {
            Some(access) => Some(Cause::Port(access)),
            None => kind(Kind::PortString),
        },
        code::MSR => kind(Kind::Msr),
        code::VMMCALL => kind(Kind::Hypercall),
        code::IRET => kind(Kind::InterruptReturn),
        code::RDPMC | code::RSM | code::INVD | code::INVLPGA | code::WBINVD | code::XSETBV => {
            kind(Kind::Other)
        }
        code::VMRUN..=code::SKINIT | code::MONITOR..=code::MWAIT_CONDITIONAL => kind(Kind::Other),
        code::NPF => Some(Cause::Unmapped(control.exit_info2)),
        code::SHUTDOWN => Some(Cause::Shutdown),
        _ => None,
    };
    Some(Left { cause: cause?, delivering: delivering(control.exit_interrupt_info, cr2) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svm::vmcb::Vmcb;

    fn left(exit_code: u64, info2: u64, interrupt_info: u64) -> Option<Left> {
        let mut vmcb = Vmcb::zeroed();
        vmcb.control.exit_code = exit_code;
        vmcb.control.exit_info2 = info2;
        vmcb.control.exit_interrupt_info = interrupt_info;
        decode(&vmcb.control, 0xabc)
    }
    fn cause(exit_code: u64) -> Option<Cause> {
        left(exit_code, 0, 0).map(|left| left.cause)
    }

    #[test]
    fn injections_are_laid_out_as_the_manual_says() {
        assert_eq!(encode(&Injection::Interrupt(0xee)), 0x8000_00ee);
        assert_eq!(encode(&Injection::Nmi), 0x8000_0202);
        assert_eq!(encode(&Injection::Exception(Exception::UD)), 0x8000_0306);
        assert_eq!(encode(&Injection::Exception(Exception::gp(0x18))), 0x18_8000_0b0d);
    }

    #[test]
    fn what_was_under_way_comes_back() {
        for injection in [
            Injection::Interrupt(0x31),
            Injection::Nmi,
            Injection::Exception(Exception::page_fault(0xabc, 7)),
            Injection::Exception(Exception { cr2: 0xabc, ..Exception::UD }),
        ] {
            let left = left(code::NPF, 0xfee0_0000, encode(&injection)).unwrap();
            assert_eq!(left.delivering, Some(injection));
            assert_eq!(left.cause, Cause::Unmapped(0xfee0_0000));
        }
        // INT 80h.
        assert_eq!(left(code::NPF, 0, 0x8000_0480).unwrap().delivering, None);
        assert_eq!(left(code::NPF, 0, 0x0000_0031).unwrap().delivering, None);
    }

    #[test]
    fn ports() {
        let access = |info1| {
            let mut vmcb = Vmcb::zeroed();
            (vmcb.control.exit_code, vmcb.control.exit_info1) = (code::IOIO, info1);
            vmcb.control.exit_info2 = 0x1002;
            decode(&vmcb.control, 0).unwrap().cause
        };
        let expected = PortAccess { port: 0x3f8, size: 1, input: false, next_rip: 0x1002 };
        assert_eq!(access(0x3f8_0010), Cause::Port(expected));
        assert_eq!(
            access(0xcfc_0041),
            Cause::Port(PortAccess { port: 0xcfc, size: 4, input: true, ..expected })
        );
        assert_eq!(access(0x3f8_001c), Cause::Instruction(Kind::PortString));
    }

    #[test]
    fn exits() {
        assert_eq!(cause(0x10), Some(Cause::Instruction(Kind::ControlRegister)));
        assert_eq!(cause(0x37), Some(Cause::Instruction(Kind::DebugRegister)));
        assert_eq!(cause(0x51), Some(Cause::Exception(Exception::AC0)));
        assert_eq!(cause(code::INTR), Some(Cause::Host));
        assert_eq!(cause(code::VINTR), Some(Cause::InterruptWindow));
        assert_eq!(cause(code::SHUTDOWN), Some(Cause::Shutdown));
        assert_eq!(cause(0x85), Some(Cause::Instruction(Kind::Other)));
        // VMEXIT_INVALID, and one that is not intercepted.
        assert_eq!((cause(u64::MAX), cause(0x79), cause(0x4e)), (None, None, None));
    }
}
