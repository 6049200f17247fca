//! Tests of the run loop: blocks, self-modifying code, budgets, events.

use crate::cpu::{Cpu, RunExit};
use crate::cpuid::Vendor;
use crate::registers::gpr::{RAX, RBX, RCX};
use crate::registers::{Cr0, Efer, Rflags};
use crate::state::{Activity, SegReg, Segment, TableRegister};
use crate::testing::{TestEnv, test_cpu};

/// Where the code of the tests stands.
pub(in crate::interp) const CODE: u64 = 0x1000;

/// A processor in 64-bit mode at CPL 0 without paging, with `code` at [`CODE`] and its stack at 0x8000.
pub(in crate::interp) fn machine(code: &[u8]) -> (Cpu, TestEnv) {
    let mut cpu = test_cpu(Vendor::Amd);
    let env = TestEnv::new(0x10000);
    env.put(CODE, code);
    let state = &mut cpu.state;
    state.cr0 |= Cr0::PE.bits();
    state.msr.efer |= (Efer::LME | Efer::LMA).bits();
    state.seg[SegReg::Cs as usize] = Segment { base: 0, limit: u32::MAX, selector: 8, attributes: 0xa09b };
    state.seg[SegReg::Ss as usize] = Segment { base: 0, limit: u32::MAX, selector: 16, attributes: 0xc093 };
    state.rip = CODE;
    state.gpr[4] = 0x8000;
    (cpu, env)
}

#[test]
fn counts_in_a_loop_until_halted() {
    // mov ecx, 1000; l: add rax, rcx; loop l; hlt
    let (mut cpu, mut env) = machine(&[0xb9, 0xe8, 3, 0, 0, 0x48, 0x01, 0xc8, 0xe2, 0xfb, 0xf4]);
    assert_eq!(cpu.run(&mut env, 10_000), RunExit::Halted);
    assert_eq!((cpu.state.gpr[RAX], cpu.state.gpr[RCX]), (500_500, 0));
    assert_eq!(cpu.state.rip, CODE + 11);
}

#[test]
fn stops_when_the_budget_is_used_up() {
    // three times inc eax, then jmp to itself
    let (mut cpu, mut env) = machine(&[0xff, 0xc0, 0xff, 0xc0, 0xff, 0xc0, 0xeb, 0xfe]);
    assert_eq!(cpu.run(&mut env, 2), RunExit::Budget);
    assert_eq!((cpu.state.gpr[RAX], cpu.state.rip), (2, CODE + 4));
    assert_eq!(cpu.run(&mut env, 5), RunExit::Budget);
    assert_eq!((cpu.state.gpr[RAX], cpu.state.rip), (3, CODE + 6));
}

#[test]
fn the_very_next_instruction_may_be_overwritten() {
    // mov byte [rip+1], 0x2a; mov al, 1; hlt: the store changes the immediate of the second instruction.
    let (mut cpu, mut env) = machine(&[0xc6, 0x05, 1, 0, 0, 0, 0x2a, 0xb0, 1, 0xf4]);
    assert_eq!(cpu.run(&mut env, 100), RunExit::Halted);
    assert_eq!(cpu.state.gpr[RAX], 0x2a);
}

#[test]
fn instructions_across_pages_follow_both_pages() {
    let (mut cpu, mut env) = machine(&[]);
    let at = CODE + 0xffd;
    for round in [0x11u8, 0x22] {
        // mov eax, imm32 whose last two bytes stand in the next page; hlt
        env.put(at, &[0xb8, 1, 2, round, 4, 0xf4]);
        cpu.state.rip = at;
        cpu.state.activity = crate::state::Activity::Running;
        assert_eq!(cpu.run(&mut env, 100), RunExit::Halted);
        assert_eq!(cpu.state.gpr[RAX], u64::from_le_bytes([1, 2, round, 4, 0, 0, 0, 0]));
    }
}

#[test]
fn breakpoints_of_the_debugger_stop_before_but_not_at_the_first_instruction() {
    // inc eax; inc ebx; hlt
    let (mut cpu, mut env) = machine(&[0xff, 0xc0, 0xff, 0xc3, 0xf4]);
    cpu.breakpoints.push(CODE + 2);
    assert_eq!(cpu.run(&mut env, 100), RunExit::Breakpoint);
    assert_eq!((cpu.state.rip, cpu.state.gpr[RBX]), (CODE + 2, 0));
    assert_eq!(cpu.run(&mut env, 100), RunExit::Halted);
}

#[test]
fn a_repeated_string_instruction_goes_on_after_its_interruption() {
    // mov ecx, 0x12345; mov edi, 0x4000; rep stosb; hlt
    let code = [0xb9, 0x45, 0x23, 1, 0, 0xbf, 0, 0x40, 0, 0, 0xf3, 0xaa, 0xf4];
    let (mut cpu, mut env) = machine(&code);
    env.ram.borrow_mut().resize(0x2_0000, 0);
    cpu.state.gpr[RAX] = 0x77;
    assert_eq!(cpu.run(&mut env, 3), RunExit::Budget);
    assert_eq!(cpu.state.rip, CODE + 10);
    assert_eq!(cpu.state.gpr[RCX], 0x2345);
    assert_eq!(cpu.run(&mut env, 100), RunExit::Halted);
    assert_eq!((cpu.state.gpr[RCX], cpu.state.gpr[7]), (0, 0x4000 + 0x1_2345));
    assert_eq!(env.get::<2>(0x4000 + 0x1_2344), [0x77, 0]);
}

#[test]
fn sti_shadows_one_instruction_only() {
    // sti; inc eax; inc eax
    let (mut cpu, mut env) = machine(&[0xfb, 0xff, 0xc0, 0xff, 0xc0]);
    assert_eq!(cpu.run(&mut env, 1), RunExit::Budget);
    assert!(cpu.state.interrupt_shadow && cpu.state.has_flags(Rflags::IF));
    assert_eq!(cpu.run(&mut env, 1), RunExit::Budget);
    assert!(!cpu.state.interrupt_shadow);
}

#[test]
fn sysret_that_sets_the_trap_flag_traps_at_once() {
    // sysretq
    let (mut cpu, mut env) = machine(&[0x48, 0x0f, 0x07]);
    cpu.state.msr.efer |= Efer::SCE.bits();
    cpu.state.gpr[RCX] = 0x2000;
    cpu.state.gpr[11] = (Rflags::TF | Rflags::FIXED).bits();
    env.put(0x2000, &[0x90]);
    cpu.run(&mut env, 1);
    assert_eq!(cpu.state.dr[6] & 1 << 14, 1 << 14);
    assert_eq!(cpu.state.activity, Activity::Shutdown, "there is no handler");
}

#[test]
fn a_single_step_ends_the_wait_of_hlt() {
    let (mut cpu, mut env) = machine(&[0xf4]);
    // A handler at 0x3000, through a 64-bit interrupt gate for vector 1.
    env.put(0x5010, &[0x00, 0x30, 0x08, 0x00, 0x00, 0x8e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    env.put(0x6008, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    cpu.state.idtr = TableRegister { base: 0x5000, limit: 0x1f };
    cpu.state.gdtr = TableRegister { base: 0x6000, limit: 0xf };
    cpu.state.rflags |= Rflags::TF.bits();
    assert_eq!(cpu.run(&mut env, 1), RunExit::Budget);
    assert_eq!((cpu.state.activity, cpu.state.rip), (Activity::Running, 0x3000));
}

#[test]
fn int1_reports_what_mov_ss_held_back() {
    // mov ss, [0x4000]; int1
    let (mut cpu, mut env) = machine(&[0x8e, 0x14, 0x25, 0, 0x40, 0, 0, 0xf1]);
    cpu.write_debug_register(0, 0x4000).unwrap();
    cpu.write_debug_register(7, 1 | 0b0111 << 16).unwrap();
    env.put(0x4000, &[0]);
    cpu.run(&mut env, 1);
    assert!(cpu.state.ss_shadow);
    assert_eq!(cpu.state.dr[6] & 0xf, 0);
    cpu.run(&mut env, 1);
    assert_eq!(cpu.state.dr[6] & 0xf, 1);
    assert!(cpu.debug_trap(false, false).is_ok(), "once");
}
