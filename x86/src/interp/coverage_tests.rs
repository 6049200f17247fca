//! That everything the CPU model offers is executed: all opcodes are tried, in 32- and 64-bit code, with register and
//! memory operands, and none that is offered may raise #UD.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use iced_x86::{Code, Mnemonic};

use crate::cpu::Cpu;
use crate::cpuid::Vendor;
use crate::env::HostExecution;
use crate::exception::vector;
use crate::interp::decode::InstructionDecoder;
use crate::interp::op::Handler;
use crate::registers::{Cr0, Cr4, Efer};
use crate::state::{CpuState, Segment};
use crate::testing::{TestEnv, test_cpu};

/// Instructions whose purpose is #UD, or that raise it where there is no system management mode and no
/// paravirtual interface.
const UNDEFINED: &[Mnemonic] =
    &[Mnemonic::Ud0, Mnemonic::Ud1, Mnemonic::Ud2, Mnemonic::Rsm, Mnemonic::Vmcall, Mnemonic::Vmmcall];

/// Ring 0 with flat segments, no paging, and every instruction set enabled.
fn state(bits: u32) -> CpuState {
    let mut state = CpuState {
        cr0: (Cr0::PE | Cr0::ET | Cr0::NE).bits(),
        cr4: (Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE | Cr4::FSGSBASE).bits(),
        xcr0: 7,
        rip: 0x100,
        ..CpuState::default()
    };
    state.seg = [Segment { base: 0, limit: u32::MAX, selector: 8, attributes: 0xc093 }; 6];
    state.seg[1].attributes = if bits == 64 { 0xa09b } else { 0xc09b };
    state.msr.sysenter_cs = 8;
    state.msr.efer = Efer::SCE.bits();
    if bits == 64 {
        state.msr.efer |= (Efer::LME | Efer::LMA).bits();
    }
    state
}

/// ModRM bytes: every register field with a register operand (with each where it belongs to the opcode), and with
/// memory at [0] or a vector index.
fn modrms(opcode: u8) -> Vec<[u8; 2]> {
    let operand_is_opcode = matches!(opcode, 0x01 | 0x1e | 0xae | 0xc6 | 0xc7 | 0xd8..=0xdf);
    let mut all: Vec<_> =
        (0xc0..=0xff).filter(|modrm| operand_is_opcode || modrm & 7 == 1).map(|modrm| [modrm, 0]).collect();
    for register in 0..8 {
        // [rax], and [rax + xmm1] by a SIB byte: VSIB operands need three different registers.
        all.extend([[register << 3, 0], [register << 3 | 4, 0x08]]);
    }
    all
}

/// The starts of instructions: prefixes and opcode, with the operand bytes to follow.
fn opcodes(bits: u32) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let rex: &[&[u8]] = if bits == 64 { &[&[], &[0x48]] } else { &[&[]] };
    for prefix in [&[][..], &[0x66], &[0xf2], &[0xf3], &[0x67]] {
        for rex in rex {
            for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                all.extend((0..=255).map(|opcode| [prefix, rex, map, &[opcode]].concat()));
            }
        }
    }
    for map in 1..=3 {
        for pp_and_length in 0..8 {
            for w in [0, 0x80] {
                for vvvv in [0x78, 0x68] {
                    all.extend(
                        (0..=255).map(|opcode| vec![0xc4, 0xe0 | map, w | vvvv | pp_and_length, opcode]),
                    );
                }
            }
        }
    }
    all
}

/// Tries one vendor's processor; notes for every offered instruction whether it has been executed.
fn try_all(vendor: Vendor, bits: u32, executed: &mut BTreeMap<u32, bool>) {
    let mut cpu: Cpu = test_cpu(vendor);
    let mut env = TestEnv::new(0x2000);
    env.host_execution = HostExecution::Done;
    let decoder = InstructionDecoder::new(&cpu.model);
    let start = state(bits);
    for opcode in opcodes(bits) {
        for operand in modrms(opcode.last().copied().unwrap_or_default()) {
            let mut bytes = [0; 15];
            bytes[..opcode.len()].copy_from_slice(&opcode);
            bytes[opcode.len()..opcode.len() + 2].copy_from_slice(&operand);
            let model = cpu.model.clone();
            let Some(op) = decoder.decode(&bytes, bits, &model) else { continue };
            let code = op.instruction.code();
            let offered = code != Code::INVALID && model.offers_instruction(&op.instruction);
            if !offered || UNDEFINED.contains(&code.mnemonic()) {
                continue;
            }
            let done = executed.entry(code as u32).or_default();
            if *done || op.handler == Handler::Undefined {
                continue;
            }
            cpu.state = start.clone();
            cpu.next_rip = cpu.state.rip + u64::from(op.length);
            *done = cpu.execute(&mut env, &op).map_or_else(|fault| fault.vector != vector::UD, |()| true);
        }
    }
}

#[test]
fn everything_offered_is_executed() {
    let mut executed = BTreeMap::new();
    // SYSEXIT in 64-bit code is Intel's alone; everything else runs on AMD's processors.
    for (vendor, bits) in [(Vendor::Amd, 64), (Vendor::Amd, 32), (Vendor::Intel, 64)] {
        try_all(vendor, bits, &mut executed);
    }
    let missing: Vec<_> =
        Code::values().filter(|&code| executed.get(&(code as u32)) == Some(&false)).collect();
    assert!(executed.len() > 2200, "{}", executed.len());
    assert_eq!(missing, []);
}
