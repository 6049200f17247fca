use super::*;
use alloc::format;
use iced_x86::{Decoder, DecoderOptions};

use crate::cpuid::Vendor;
use crate::registers::Efer;
use crate::state::Segment;
use crate::testing::{TestEnv, test_cpu};

struct Machine {
    cpu: Cpu,
    env: TestEnv,
}

impl Machine {
    /// In 64-bit mode at CPL 0, with no page tables: linear addresses are physical.
    fn new(vendor: Vendor) -> Self {
        let mut cpu = test_cpu(vendor);
        cpu.state.cr0 |= Cr0::PE.bits();
        cpu.state.msr.efer = (Efer::LME | Efer::LMA).bits();
        cpu.state.seg[SegReg::Cs as usize].attributes |= Segment::L;
        Self { cpu, env: TestEnv::new(0x4000) }
    }

    /// Executes one instruction; true if this module knows it.
    fn execute(&mut self, bytes: &[u8]) -> Result<bool, Exception> {
        let instruction = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid(), "{bytes:x?}");
        let mut all = [0; 15];
        all[..bytes.len()].copy_from_slice(bytes);
        self.cpu.next_rip = self.cpu.state.rip + bytes.len() as u64;
        self.cpu.exec_system_op(&mut self.env, &Op::new(instruction, all))
    }

    fn gpr(&mut self, number: usize) -> &mut u64 {
        &mut self.cpu.state.gpr[number]
    }
}

const MOV_CR0_RAX: &[u8] = &[0x0f, 0x22, 0xc0];
const MOV_RAX_CR0: &[u8] = &[0x0f, 0x20, 0xc0];
const MOV_CR8_RAX: &[u8] = &[0x44, 0x0f, 0x22, 0xc0];
const MOV_RAX_CR8: &[u8] = &[0x44, 0x0f, 0x20, 0xc0];
const MOV_DR7_RAX: &[u8] = &[0x0f, 0x23, 0xf8];
const MOV_RAX_DR7: &[u8] = &[0x0f, 0x21, 0xf8];
const RDMSR: &[u8] = &[0x0f, 0x32];
const WRMSR: &[u8] = &[0x0f, 0x30];
const RDTSC: &[u8] = &[0x0f, 0x31];
const RDPMC: &[u8] = &[0x0f, 0x33];
const CPUID: &[u8] = &[0x0f, 0xa2];
const SMSW_EAX: &[u8] = &[0x0f, 0x01, 0xe0];
const LMSW_AX: &[u8] = &[0x0f, 0x01, 0xf0];
const SWAPGS: &[u8] = &[0x0f, 0x01, 0xf8];
const CLTS: &[u8] = &[0x0f, 0x06];
const STAC: &[u8] = &[0x0f, 0x01, 0xcb];
const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
const INVLPG_RAX: &[u8] = &[0x0f, 0x01, 0x38];
const INVPCID_RAX_RCX: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x01];
const WBINVD: &[u8] = &[0x0f, 0x09];
const CLZERO: &[u8] = &[0x0f, 0x01, 0xfc];
const RDGSBASE_EAX: &[u8] = &[0xf3, 0x0f, 0xae, 0xc8];
const WRFSBASE_RAX: &[u8] = &[0xf3, 0x48, 0x0f, 0xae, 0xd0];
const VMCALL: &[u8] = &[0x0f, 0x01, 0xc1];

#[test]
fn privileged_instructions_need_cpl_0() {
    for bytes in [
        MOV_CR0_RAX,
        MOV_RAX_CR0,
        MOV_RAX_CR8,
        MOV_DR7_RAX,
        MOV_RAX_DR7,
        RDMSR,
        WRMSR,
        LMSW_AX,
        SWAPGS,
        CLTS,
        INVLPG_RAX,
        INVPCID_RAX_RCX,
        WBINVD,
    ] {
        let mut machine = Machine::new(Vendor::Amd);
        machine.cpu.state.cpl = 3;
        let before = format!("{:?}", machine.cpu.state);
        assert_eq!(machine.execute(bytes), Err(Exception::GP0), "{bytes:x?}");
        assert_eq!(format!("{:?}", machine.cpu.state), before);
    }
    let mut machine = Machine::new(Vendor::Amd);
    machine.cpu.state.cpl = 3;
    assert_eq!(machine.execute(STAC), Err(Exception::UD));
    machine.cpu.state.cr4 = Cr4::OSXSAVE.bits();
    *machine.gpr(RAX) = 7;
    assert_eq!(machine.execute(XSETBV), Err(Exception::GP0));
}

#[test]
fn other_instructions_are_left_alone() {
    let mut machine = Machine::new(Vendor::Amd);
    for bytes in [&[0x90][..], &[0x48, 0x89, 0xc8], &[0x0f, 0x05], &[0x8e, 0xd8]] {
        assert_eq!(machine.execute(bytes), Ok(false), "{bytes:x?}");
    }
}

#[test]
fn machine_status_word() {
    let mut machine = Machine::new(Vendor::Amd);
    *machine.gpr(RAX) = 0xe;
    machine.execute(LMSW_AX).unwrap();
    assert_eq!(machine.cpu.state.cr0 & 0xf, 0xf, "PE can't be cleared");
    *machine.gpr(RAX) = u64::MAX;
    machine.execute(SMSW_EAX).unwrap();
    assert_eq!(machine.cpu.state.gpr[RAX], machine.cpu.state.cr0);
    machine.execute(CLTS).unwrap();
    assert_eq!(machine.cpu.state.cr0 & Cr0::TS.bits(), 0);
    machine.cpu.state.cpl = 3;
    assert_eq!(machine.execute(SMSW_EAX), Ok(true));
    machine.cpu.state.cr4 = Cr4::UMIP.bits();
    assert_eq!(machine.execute(SMSW_EAX), Err(Exception::GP0));
}

#[test]
fn cr8_is_the_task_priority() {
    let mut machine = Machine::new(Vendor::Amd);
    *machine.gpr(RAX) = 9;
    machine.execute(MOV_CR8_RAX).unwrap();
    assert_eq!(machine.env.cr8, 9);
    *machine.gpr(RAX) = 16;
    assert_eq!(machine.execute(MOV_CR8_RAX), Err(Exception::GP0));
    machine.execute(MOV_RAX_CR8).unwrap();
    assert_eq!(*machine.gpr(RAX), 9);
}

#[test]
fn time_stamp_counter() {
    let mut machine = Machine::new(Vendor::Amd);
    machine.env.tsc.set(0x1_2345_6789);
    machine.execute(RDTSC).unwrap();
    assert_eq!((*machine.gpr(RDX), *machine.gpr(RAX)), (1, 0x2345_678a));
    machine.cpu.state.cr4 = Cr4::TSD.bits();
    machine.execute(RDTSC).unwrap();
    machine.cpu.state.cpl = 3;
    assert_eq!(machine.execute(RDTSC), Err(Exception::GP0));
}

#[test]
fn performance_counters_stand_still() {
    let mut machine = Machine::new(Vendor::Amd);
    assert_eq!(machine.execute(RDPMC), Ok(true));
    *machine.gpr(RCX) = 4;
    assert_eq!(machine.execute(RDPMC), Err(Exception::GP0));
    *machine.gpr(RCX) = 0;
    machine.cpu.state.cpl = 3;
    assert_eq!(machine.execute(RDPMC), Err(Exception::GP0));
    machine.cpu.state.cr4 = Cr4::PCE.bits();
    assert_eq!(machine.execute(RDPMC), Ok(true));
    assert_eq!(Machine::new(Vendor::Intel).execute(RDPMC), Err(Exception::GP0));
}

#[test]
fn cpuid_follows_the_state() {
    let mut machine = Machine::new(Vendor::Amd);
    machine.cpu.apic_id = 5;
    machine.env.msrs.insert(0x1b, 1 << 11);
    let leaf = |machine: &mut Machine, function: u64, index: u64| {
        *machine.gpr(RAX) = 0xffff_ffff_0000_0000 | function;
        *machine.gpr(RCX) = index;
        machine.execute(CPUID).unwrap();
        [RAX, RBX, RCX, RDX].map(|register| machine.cpu.state.gpr[register])
    };
    let [_, ebx, ecx, edx] = leaf(&mut machine, 1, 0);
    assert_eq!((ebx >> 24, ecx >> 27 & 1, edx >> 9 & 1), (5, 0, 1));
    assert_eq!(leaf(&mut machine, 0xd, 0)[1], 576);
    machine.cpu.state.cr4 = Cr4::OSXSAVE.bits();
    machine.cpu.state.xcr0 = 7;
    machine.env.msrs.insert(0x1b, 0);
    let [_, _, ecx, edx] = leaf(&mut machine, 1, 0);
    assert_eq!((ecx >> 27 & 1, edx >> 9 & 1), (1, 0));
    assert_eq!(leaf(&mut machine, 0xd, 0), [7, 832, 832, 0]);
    assert_eq!(leaf(&mut machine, 0xd, 2), [256, 576, 0, 0]);
    assert_eq!(leaf(&mut machine, 0xb, 1)[3], 5);
    assert_eq!(leaf(&mut machine, 0x8000_001e, 0)[0], 5);
}

#[test]
fn bases_of_fs_and_gs() {
    let mut machine = Machine::new(Vendor::Amd);
    machine.cpu.state.msr.kernel_gs_base = 0x1_2345_6789;
    machine.execute(SWAPGS).unwrap();
    assert_eq!(machine.cpu.state.seg[SegReg::Gs as usize].base, 0x1_2345_6789);
    assert_eq!(machine.execute(RDGSBASE_EAX), Err(Exception::UD));
    machine.cpu.state.cr4 = Cr4::FSGSBASE.bits();
    machine.cpu.state.cpl = 3;
    machine.execute(RDGSBASE_EAX).unwrap();
    assert_eq!(*machine.gpr(RAX), 0x2345_6789);
    machine.execute(WRFSBASE_RAX).unwrap();
    assert_eq!(machine.cpu.state.seg[SegReg::Fs as usize].base, 0x2345_6789);
    *machine.gpr(RAX) = 1 << 63;
    assert_eq!(machine.execute(WRFSBASE_RAX), Err(Exception::GP0));
}

#[test]
fn extended_control_registers() {
    let mut machine = Machine::new(Vendor::Amd);
    assert_eq!(machine.execute(XGETBV), Err(Exception::UD));
    machine.cpu.state.cr4 = Cr4::OSXSAVE.bits();
    *machine.gpr(RAX) = 3;
    machine.execute(XSETBV).unwrap();
    *machine.gpr(RAX) = 0;
    machine.execute(XGETBV).unwrap();
    assert_eq!((*machine.gpr(RDX), *machine.gpr(RAX)), (0, 3));
    *machine.gpr(RCX) = 2;
    assert_eq!(machine.execute(XGETBV), Err(Exception::GP0));
    assert_eq!(machine.execute(XSETBV), Err(Exception::GP0));
}

#[test]
fn invpcid_checks_its_descriptor() {
    let mut machine = Machine::new(Vendor::Amd);
    let mut run = |kind: u64, pcid: u64, linear: u64| {
        machine.env.put(0x1000, &pcid.to_le_bytes());
        machine.env.put(0x1008, &linear.to_le_bytes());
        *machine.gpr(RAX) = kind;
        *machine.gpr(RCX) = 0x1000;
        machine.execute(INVPCID_RAX_RCX)
    };
    assert_eq!(run(0, 0, 0x5000), Ok(true));
    assert_eq!(run(2, 0, u64::MAX >> 1), Ok(true), "the address is for type 0");
    assert_eq!(run(2, 5, 0), Ok(true), "the PCID is for types 0 and 1");
    assert_eq!(run(4, 0, 0), Err(Exception::GP0));
    assert_eq!(run(0, 0, 1 << 63), Err(Exception::GP0));
    assert_eq!(run(1, 5, 0), Err(Exception::GP0), "a PCID without CR4.PCIDE");
    assert_eq!(run(3, 1 << 12, 0), Err(Exception::GP0));
}

#[test]
fn clzero_clears_a_cache_line() {
    let mut machine = Machine::new(Vendor::Amd);
    machine.env.put(0x1000, &[0xff; 256]);
    *machine.gpr(RAX) = 0x1077;
    machine.execute(CLZERO).unwrap();
    assert_eq!(machine.env.get::<1>(0x103f), [0xff]);
    assert_eq!(machine.env.get::<64>(0x1040), [0; 64]);
    assert_eq!(machine.env.get::<1>(0x1080), [0xff]);
}

#[test]
fn undefined_ones() {
    let mut machine = Machine::new(Vendor::Amd);
    assert_eq!(machine.execute(VMCALL), Err(Exception::UD), "no paravirtual interface");
    assert_eq!(machine.execute(&[0x0f, 0xaa]), Err(Exception::UD), "RSM");
}

#[test]
fn msrs_go_through_edx_eax() {
    let mut machine = Machine::new(Vendor::Amd);
    *machine.gpr(RCX) = 0xffff_ffff_c000_0082;
    *machine.gpr(RAX) = 0xffff_ffff_8765_4321;
    *machine.gpr(RDX) = 0x1234;
    machine.execute(WRMSR).unwrap();
    assert_eq!(machine.cpu.state.msr.lstar, 0x1234_8765_4321);
    *machine.gpr(RAX) = 0;
    machine.execute(RDMSR).unwrap();
    assert_eq!((*machine.gpr(RDX), *machine.gpr(RAX)), (0x1234, 0x8765_4321));
    *machine.gpr(RCX) = 0x1234_5678;
    assert_eq!(machine.execute(RDMSR), Err(Exception::GP0));
}
