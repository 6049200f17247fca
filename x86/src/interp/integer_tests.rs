//! Tests of single integer instructions, above all of what 64-bit mode does not have or does not show.

use crate::cpu::Cpu;
use crate::exception::{Exception, vector};
use crate::interp::decode::InstructionDecoder;
use crate::interp::flags::{AF, CF, OF, PF, SF, ZF};
use crate::interp::tests::{CODE, machine};
use crate::registers::Rflags;
use crate::registers::gpr::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::state::{Activity, SegReg};
use crate::testing::TestEnv;

/// Where memory operands of the tests stand.
const DATA: u64 = 0x4000;

/// A processor about to execute code of `bits`.
fn prepared(bits: u32) -> (Cpu, TestEnv) {
    let (mut cpu, env) = machine(&[]);
    if bits != 64 {
        cpu.state.msr.efer = 0;
        cpu.state.seg[SegReg::Cs as usize].attributes = if bits == 32 { 0xc09b } else { 0x9b };
        cpu.state.seg[SegReg::Ss as usize].attributes = if bits == 32 { 0xc093 } else { 0x93 };
    }
    (cpu, env)
}

/// Executes one instruction.
fn execute(cpu: &mut Cpu, env: &mut TestEnv, code: &[u8]) -> Result<(), Exception> {
    let mut bytes = [0x90; 15];
    bytes[..code.len()].copy_from_slice(code);
    let decoder = InstructionDecoder::new(&cpu.model);
    let op = decoder.decode(&bytes, cpu.state.code_bits(), &cpu.model).unwrap();
    assert_eq!(usize::from(op.length), code.len());
    cpu.state.rip = CODE;
    cpu.next_rip = CODE + code.len() as u64;
    cpu.execute(env, &op)
}

fn memory(env: &TestEnv) -> u64 {
    u64::from_le_bytes(env.get(DATA))
}

fn set_memory(env: &TestEnv, value: u64) {
    env.put(DATA, &value.to_le_bytes());
}

#[test]
fn pusha_pushes_the_old_stack_pointer_and_popa_skips_it() {
    let (mut cpu, mut env) = prepared(32);
    for register in 0..8 {
        cpu.state.gpr[register] = 0x100 + register as u64;
    }
    cpu.state.gpr[RSP] = 0x8000;
    execute(&mut cpu, &mut env, &[0x60]).unwrap();
    assert_eq!(cpu.state.gpr[RSP], 0x8000 - 32);
    assert_eq!(u32::from_le_bytes(env.get(0x8000 - 20)), 0x8000);
    assert_eq!(u32::from_le_bytes(env.get(0x8000 - 32)), 0x107);
    let before = cpu.state.gpr;
    env.put(0x8000 - 20, &[0xff; 4]);
    cpu.state.gpr[..4].fill(0);
    execute(&mut cpu, &mut env, &[0x61]).unwrap();
    assert_eq!(cpu.state.gpr[..4], before[..4]);
    assert_eq!(cpu.state.gpr[RSP], 0x8000);
}

#[test]
fn sixteen_bit_stacks_and_addresses_wrap() {
    let (mut cpu, mut env) = prepared(16);
    cpu.state.gpr[RSP] = 0xabcd_0000;
    cpu.state.gpr[RAX] = 0x1234;
    // push ax
    execute(&mut cpu, &mut env, &[0x50]).unwrap();
    assert_eq!(cpu.state.gpr[RSP], 0xabcd_fffe);
    assert_eq!(env.get::<2>(0xfffe), [0x34, 0x12]);
    // mov ax, [bx+si+2]
    set_memory(&env, 0xbeef);
    cpu.state.gpr[RBX] = 0x7_ffff;
    cpu.state.gpr[RSI] = DATA - 1;
    execute(&mut cpu, &mut env, &[0x8b, 0x40, 2]).unwrap();
    assert_eq!(cpu.state.gpr[RAX], 0xbeef);
    // lea cx, [bx+si+2]
    execute(&mut cpu, &mut env, &[0x8d, 0x48, 2]).unwrap();
    assert_eq!(cpu.state.gpr[RCX], DATA);
}

#[test]
fn branches_are_cut_to_their_operand_size_and_checked() {
    let (mut cpu, mut env) = prepared(32);
    // o16 jmp +0x7f: from 0x1000 within 16 bits
    execute(&mut cpu, &mut env, &[0x66, 0xeb, 0x7f]).unwrap();
    assert_eq!(cpu.next_rip, CODE + 3 + 0x7f);
    // o16 jmp near -0x2000 wraps at 16 bits
    execute(&mut cpu, &mut env, &[0x66, 0xe9, 0, 0xe0]).unwrap();
    assert_eq!(cpu.next_rip, (CODE + 4).wrapping_sub(0x2000) & 0xffff);
    // call eax, beyond the limit of CS: #GP(0), and nothing is pushed
    cpu.state.seg[SegReg::Cs as usize].limit = 0xffff;
    cpu.state.gpr[RAX] = 0x1_0000;
    assert_eq!(execute(&mut cpu, &mut env, &[0xff, 0xd0]), Err(Exception::GP0));
    assert_eq!(cpu.state.gpr[RSP], 0x8000);
    // In 64-bit mode the target must be canonical; ret leaves the stack alone if it is not.
    let (mut cpu, mut env) = prepared(64);
    env.put(0x8000, &(1u64 << 47).to_le_bytes());
    assert_eq!(execute(&mut cpu, &mut env, &[0xc3]), Err(Exception::GP0));
    assert_eq!(cpu.state.gpr[RSP], 0x8000);
    env.put(0x8000, &0x1234u64.to_le_bytes());
    execute(&mut cpu, &mut env, &[0xc2, 0x10, 0]).unwrap();
    assert_eq!((cpu.next_rip, cpu.state.gpr[RSP]), (0x1234, 0x8018));
}

#[test]
fn loops_count_in_the_address_size() {
    let (mut cpu, mut env) = prepared(64);
    cpu.state.gpr[RCX] = 0xf_0000_0000;
    // a32 loop: ECX wraps and clears the upper half
    execute(&mut cpu, &mut env, &[0x67, 0xe2, 0x10]).unwrap();
    assert_eq!((cpu.state.gpr[RCX], cpu.next_rip), (0xffff_ffff, CODE + 0x13));
    // loopne with ZF set: counts, does not jump
    cpu.state.rflags |= ZF;
    execute(&mut cpu, &mut env, &[0xe0, 0x10]).unwrap();
    assert_eq!((cpu.state.gpr[RCX], cpu.next_rip), (0xffff_fffe, CODE + 2));
    // jecxz looks at ECX alone
    cpu.state.gpr[RCX] = 1 << 32;
    execute(&mut cpu, &mut env, &[0x67, 0xe3, 0x10]).unwrap();
    assert_eq!((cpu.state.gpr[RCX], cpu.next_rip), (1 << 32, CODE + 0x13));
}

#[test]
fn decimal_adjustment() {
    let (mut cpu, mut env) = prepared(32);
    for (code, before, flags, after, flags_after) in [
        (&[0x27][..], 0x7a, 0, 0x80, AF | SF | OF),
        (&[0x27], 0x9a, 0, 0x00, AF | CF | ZF | PF),
        (&[0x2f], 0x05, AF, 0xff, AF | CF | SF | PF),
        (&[0x37], 0x0a, 0, 0x100, AF | CF | PF),
        (&[0x3f], 0x200, AF, 0x00a, AF | CF | PF),
        (&[0xd4, 10], 0x4d, 0, 0x707, 0),
        (&[0xd5, 10], 0x707, 0, 0x4d, PF),
        (&[0xd6], 0x1200, CF, 0x12ff, CF),
    ] {
        cpu.state.gpr[RAX] = before;
        cpu.state.rflags = Rflags::FIXED.bits() | flags;
        execute(&mut cpu, &mut env, code).unwrap();
        assert_eq!(cpu.state.gpr[RAX], after, "{code:x?} of {before:x}");
        let defined = if matches!(code[0], 0x37 | 0x3f) { AF | CF } else { AF | CF | PF | ZF | SF | OF };
        let flags = cpu.state.rflags & defined;
        assert_eq!(flags, flags_after & defined, "flags of {code:x?} of {before:x}");
    }
    assert_eq!(execute(&mut cpu, &mut env, &[0xd4, 0]), Err(Exception::DE));
}

#[test]
fn bound_compares_signed() {
    let (mut cpu, mut env) = prepared(32);
    env.put(DATA, &[0xf0, 0xff, 0xff, 0xff, 0x10, 0, 0, 0]);
    let code = [0x62, 0x05, 0, 0x40, 0, 0];
    for (index, inside) in [(-16i32, true), (16, true), (-17, false), (17, false)] {
        cpu.state.gpr[RAX] = u64::from(index as u32);
        let expected = if inside { Ok(()) } else { Err(Exception::new(vector::BR)) };
        assert_eq!(execute(&mut cpu, &mut env, &code), expected);
    }
}

#[test]
fn bit_strings_reach_both_ways() {
    let (mut cpu, mut env) = prepared(64);
    // bts [DATA], rax
    let code = [0x48, 0x0f, 0xab, 0x04, 0x25, 0, 0x40, 0, 0];
    cpu.state.gpr[RAX] = 64 * 3 + 5;
    execute(&mut cpu, &mut env, &code).unwrap();
    assert_eq!(u64::from_le_bytes(env.get(DATA + 24)), 1 << 5);
    cpu.state.gpr[RAX] = (-1i64) as u64;
    execute(&mut cpu, &mut env, &code).unwrap();
    assert_eq!(u64::from_le_bytes(env.get(DATA - 8)), 1 << 63);
    assert_eq!(cpu.state.rflags & CF, 0);
    execute(&mut cpu, &mut env, &code).unwrap();
    assert_eq!(cpu.state.rflags & CF, CF);
}

#[test]
fn compare_and_exchange() {
    let (mut cpu, mut env) = prepared(64);
    // lock cmpxchg [DATA], ecx
    let code = [0xf0, 0x0f, 0xb1, 0x0c, 0x25, 0, 0x40, 0, 0];
    set_memory(&env, 7);
    (cpu.state.gpr[RAX], cpu.state.gpr[RCX]) = (0xffff_ffff_0000_0007, 9);
    execute(&mut cpu, &mut env, &code).unwrap();
    assert_eq!((memory(&env), cpu.state.gpr[RAX]), (9, 0xffff_ffff_0000_0007));
    assert_eq!(cpu.state.rflags & ZF, ZF);
    execute(&mut cpu, &mut env, &code).unwrap();
    assert_eq!((memory(&env), cpu.state.gpr[RAX]), (9, 9));
    assert_eq!(cpu.state.rflags & ZF, 0);
    // cmpxchg ecx, edx that fails leaves ECX's upper half alone
    (cpu.state.gpr[RCX], cpu.state.gpr[RDX]) = (u64::MAX, 1);
    execute(&mut cpu, &mut env, &[0x0f, 0xb1, 0xd1]).unwrap();
    assert_eq!((cpu.state.gpr[RCX], cpu.state.gpr[RAX]), (u64::MAX, 0xffff_ffff));
    // lock cmpxchg16b [DATA]: 16-byte aligned, or #GP(0)
    let mut code = [0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0, 0x40, 0, 0];
    (cpu.state.gpr[RAX], cpu.state.gpr[RDX]) = (9, 0);
    (cpu.state.gpr[RBX], cpu.state.gpr[RCX]) = (1, 2);
    execute(&mut cpu, &mut env, &code).unwrap();
    assert_eq!(u128::from_le_bytes(env.get(DATA)), 2 << 64 | 1);
    code[6] = 8;
    assert_eq!(execute(&mut cpu, &mut env, &code), Err(Exception::GP0));
}

#[test]
fn division_errors_change_nothing() {
    let (mut cpu, mut env) = prepared(64);
    // div ecx, idiv rcx
    for (code, high, low, divisor) in [
        (&[0xf7, 0xf1][..], 0, 1, 0),
        (&[0xf7, 0xf1], 5, 0, 5),
        (&[0x48, 0xf7, 0xf9], 0, 1 << 63, 1),
        (&[0x48, 0xf7, 0xf9], 1 << 63, 0, u64::MAX),
    ] {
        (cpu.state.gpr[RDX], cpu.state.gpr[RAX], cpu.state.gpr[RCX]) = (high, low, divisor);
        assert_eq!(execute(&mut cpu, &mut env, code), Err(Exception::DE));
        assert_eq!((cpu.state.gpr[RDX], cpu.state.gpr[RAX]), (high, low));
    }
    // idiv rcx: the smallest quotient
    (cpu.state.gpr[RDX], cpu.state.gpr[RAX], cpu.state.gpr[RCX]) = (u64::MAX, 1 << 63, 1);
    execute(&mut cpu, &mut env, &[0x48, 0xf7, 0xf9]).unwrap();
    assert_eq!((cpu.state.gpr[RDX], cpu.state.gpr[RAX]), (0, 1 << 63));
}

#[test]
fn pop_addresses_with_the_incremented_stack_pointer() {
    let (mut cpu, mut env) = prepared(64);
    env.put(0x8000, &0x55u64.to_le_bytes());
    // pop qword [rsp+8]
    execute(&mut cpu, &mut env, &[0x8f, 0x44, 0x24, 8]).unwrap();
    assert_eq!(u64::from_le_bytes(env.get(0x8010)), 0x55);
    // A destination that faults leaves RSP alone: pop qword [rax] at a non-canonical address.
    cpu.state.gpr[RAX] = 1 << 60;
    assert_eq!(execute(&mut cpu, &mut env, &[0x8f, 0x00]), Err(Exception::GP0));
    assert_eq!(cpu.state.gpr[RSP], 0x8008);
}

#[test]
fn enter_copies_outer_frames_and_leave_undoes_it() {
    let (mut cpu, mut env) = prepared(64);
    cpu.state.gpr[RBP] = 0x9000;
    env.put(0x9000 - 8, &0x77u64.to_le_bytes());
    // enter 16, 2
    execute(&mut cpu, &mut env, &[0xc8, 16, 0, 2]).unwrap();
    assert_eq!((cpu.state.gpr[RBP], cpu.state.gpr[RSP]), (0x7ff8, 0x7ff8 - 16 - 16));
    assert_eq!(u64::from_le_bytes(env.get(0x7ff0)), 0x77);
    assert_eq!(u64::from_le_bytes(env.get(0x7fe8)), 0x7ff8);
    execute(&mut cpu, &mut env, &[0xc9]).unwrap();
    assert_eq!((cpu.state.gpr[RBP], cpu.state.gpr[RSP]), (0x9000, 0x8000));
}

#[test]
fn strings_overlap_step_down_and_compare() {
    let (mut cpu, mut env) = prepared(64);
    env.put(DATA, b"abcdefgh");
    // rep movsb one byte up smears the first byte
    (cpu.state.gpr[RSI], cpu.state.gpr[RDI], cpu.state.gpr[RCX]) = (DATA, DATA + 1, 4);
    while cpu.state.gpr[RCX] != 0 {
        execute(&mut cpu, &mut env, &[0xf3, 0xa4]).unwrap();
    }
    assert_eq!(env.get::<8>(DATA), *b"aaaaafgh");
    // std; rep movsb moves the end first
    cpu.state.rflags |= Rflags::DF.bits();
    (cpu.state.gpr[RSI], cpu.state.gpr[RDI], cpu.state.gpr[RCX]) = (DATA + 7, DATA + 9, 3);
    execute(&mut cpu, &mut env, &[0xf3, 0xa4]).unwrap();
    assert_eq!(env.get::<10>(DATA), *b"aaaaafgfgh");
    assert_eq!((cpu.state.gpr[RSI], cpu.state.gpr[RDI]), (DATA + 4, DATA + 6));
    // repne scasb finds the g
    cpu.state.rflags &= !Rflags::DF.bits();
    (cpu.state.gpr[RDI], cpu.state.gpr[RCX], cpu.state.gpr[RAX]) = (DATA, 100, u64::from(b'g'));
    execute(&mut cpu, &mut env, &[0xf2, 0xae]).unwrap();
    assert_eq!((cpu.state.gpr[RDI], cpu.state.gpr[RCX]), (DATA + 7, 93));
    assert_eq!(cpu.state.rflags & ZF, ZF);
    // repe cmpsb stops at the first difference
    env.put(DATA + 0x100, b"aaaaxx");
    (cpu.state.gpr[RSI], cpu.state.gpr[RDI], cpu.state.gpr[RCX]) = (DATA, DATA + 0x100, 6);
    execute(&mut cpu, &mut env, &[0xf3, 0xa6]).unwrap();
    assert_eq!((cpu.state.gpr[RSI], cpu.state.gpr[RCX]), (DATA + 5, 1));
    assert_eq!(cpu.state.rflags & (ZF | CF), CF);
}

#[test]
fn a_fault_within_a_repeated_store_keeps_what_was_done() {
    let (mut cpu, mut env) = prepared(32);
    // rep stosd up to the limit of ES
    cpu.state.seg[SegReg::Es as usize].limit = DATA as u32 + 11;
    (cpu.state.gpr[RDI], cpu.state.gpr[RCX], cpu.state.gpr[RAX]) = (DATA, 5, 0x0101_0101);
    assert_eq!(execute(&mut cpu, &mut env, &[0xf3, 0xab]), Err(Exception::GP0));
    assert_eq!((cpu.state.gpr[RDI], cpu.state.gpr[RCX]), (DATA + 12, 2));
    assert_eq!(env.get::<13>(DATA)[11..], [1, 0]);
}

#[test]
fn flags_are_popped_by_privilege() {
    let everything = Rflags::IOPL | Rflags::IF | Rflags::CF | Rflags::VM | Rflags::RF;
    let (mut cpu, mut env) = prepared(64);
    for (cpl, iopl, expected) in [
        (0, 0, Rflags::IOPL | Rflags::IF | Rflags::CF),
        (3, 0, Rflags::CF),
        (3, 3, Rflags::IOPL | Rflags::IF | Rflags::CF),
    ] {
        cpu.state.cpl = cpl;
        cpu.state.rflags = Rflags::FIXED.bits() | iopl << 12;
        cpu.state.gpr[RSP] = 0x8000;
        env.put(0x8000, &everything.bits().to_le_bytes());
        execute(&mut cpu, &mut env, &[0x9d]).unwrap();
        assert_eq!(cpu.state.rflags, (expected | Rflags::FIXED).bits(), "CPL {cpl}, IOPL {iopl}");
    }
}

#[test]
fn privileged_instructions_fault_in_user_mode() {
    let (mut cpu, mut env) = prepared(64);
    cpu.state.cpl = 3;
    for code in [[0xfa], [0xfb], [0xf4]] {
        assert_eq!(execute(&mut cpu, &mut env, &code), Err(Exception::GP0), "{code:x?}");
    }
    cpu.state.rflags |= Rflags::IOPL.bits();
    execute(&mut cpu, &mut env, &[0xfb]).unwrap();
    assert!(cpu.state.has_flags(Rflags::IF) && cpu.state.interrupt_shadow);
    assert_eq!(cpu.state.activity, Activity::Running);
}

#[test]
fn ports() {
    let (mut cpu, mut env) = prepared(64);
    env.ports.insert(0x60, 0x1234_5678);
    cpu.state.gpr[RAX] = u64::MAX;
    // in al, 0x60; in eax, 0x60
    execute(&mut cpu, &mut env, &[0xe4, 0x60]).unwrap();
    assert_eq!(cpu.state.gpr[RAX], 0xffff_ffff_ffff_ff78);
    execute(&mut cpu, &mut env, &[0xe5, 0x60]).unwrap();
    assert_eq!(cpu.state.gpr[RAX], 0x1234_5678);
    // rep outsb
    env.put(DATA, b"hi");
    (cpu.state.gpr[RDX], cpu.state.gpr[RSI], cpu.state.gpr[RCX]) = (0x3f8, DATA, 2);
    execute(&mut cpu, &mut env, &[0xf3, 0x6e]).unwrap();
    assert_eq!(env.port_writes, [(0x3f8, 1, u32::from(b'h')), (0x3f8, 1, u32::from(b'i'))]);
}

#[test]
fn what_is_undefined_or_too_long() {
    let (cpu, _) = prepared(64);
    let decoder = InstructionDecoder::new(&cpu.model);
    let raises = |bytes: &[u8], bits| {
        let op = decoder.decode(bytes, bits, &cpu.model).unwrap();
        let (mut cpu, mut env) = prepared(64);
        cpu.execute(&mut env, &op).err()
    };
    // ud2; lock mov eax, ecx; daa in 64-bit mode; mov cs, ax
    for code in [&[0x0f, 0x0b][..], &[0xf0, 0x89, 0xc8], &[0x27, 0], &[0x8e, 0xc8]] {
        assert_eq!(raises(code, 64), Some(Exception::UD), "{code:x?}");
    }
    // 15 prefixes, and 14 before an instruction of two bytes
    assert_eq!(raises(&[0x66; 16], 64), Some(Exception::GP0));
    let mut long = [0x66; 16];
    long[14..].copy_from_slice(&[0x89, 0xc8]);
    assert_eq!(raises(&long, 64), Some(Exception::GP0));
    // mov eax, ecx with 13 prefixes has 15 bytes.
    assert_eq!(raises(&long[1..], 64), None);
    // The bytes end before the instruction does.
    assert!(decoder.decode(&[0xb8, 1], 64, &cpu.model).is_none());
}
