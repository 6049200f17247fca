//! Sequences on which the translator once differed from the host's processor.

use bivisor_oracle::blocks::guest::EngineKind;
use bivisor_oracle::blocks::layout::CONTROL;
use bivisor_oracle::blocks::{Against, Blocks, Options};
use bivisor_oracle::layout::DATA;

const RAX: usize = 0;
const RCX: usize = 1;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;
const STACK: u64 = DATA + 0x800;
/// An address that is not canonical.
const NOWHERE: u64 = 1 << 62;

/// Runs the bytes at an offset in the code pages with these registers, natively and on the translator.
#[track_caller]
fn agrees(code: &[u8], origin: usize, registers: &[(usize, u64)]) {
    let mut blocks = Blocks::new(Options {
        engine: EngineKind::Dbt,
        against: Against::Native,
        seed: 0,
        first: 0,
        dead_flags_ignored: false,
        explained: 0,
    })
    .expect("both sides start");
    if let Some(report) = blocks.reproduce(code, origin, registers) {
        panic!("{report}");
    }
}

#[test]
fn a_jump_to_an_address_that_is_not_canonical_faults_itself() {
    // push rax; ret
    agrees(&[0x50, 0xc3], 0, &[(RAX, NOWHERE), (RSP, STACK)]);
    // push rax; ret 16
    agrees(&[0x50, 0xc2, 16, 0], 0, &[(RAX, NOWHERE), (RSP, STACK)]);
    // jmp rax; call rax
    agrees(&[0xff, 0xe0], 0, &[(RAX, NOWHERE)]);
    agrees(&[0xff, 0xd0], 0, &[(RAX, NOWHERE), (RSP, STACK)]);
}

#[test]
fn conversions_from_memory_to_general_registers_obey_mxcsr() {
    // mov dword [rbp], 0x3fc00000; ldmxcsr [rbp + 4] after storing rounding up; cvtss2si eax, [rbp]; stmxcsr [rbp + 8]
    let code = [
        0xc7, 0x45, 0x00, 0x00, 0x00, 0xa0, 0x3f, 0xc7, 0x45, 0x04, 0x80, 0x5f, 0x00, 0x00, 0x0f, 0xae, 0x55,
        0x04, 0xf3, 0x0f, 0x2d, 0x45, 0x00, 0x0f, 0xae, 0x5d, 0x08,
    ];
    agrees(&code, 0, &[(RBP, STACK)]);
}

#[test]
fn instructions_that_amd_sees_otherwise() {
    // prefetchw eax; xchg r8d, eax with F3
    agrees(&[0x0f, 0x0d, 0xc8], 0, &[]);
    agrees(&[0xf3, 0x41, 0x90], 0, &[(RAX, 5)]);
}

#[test]
fn a_comparison_repeated_no_times_keeps_the_flags() {
    // stc; jmp +0; repe cmpsb
    agrees(&[0xf9, 0xeb, 0x00, 0xf3, 0xa6], 0, &[(RCX, 0), (RSI, STACK), (RDI, STACK)]);
}

#[test]
fn a_stack_access_of_an_instruction_that_crosses_a_page_faults() {
    // push 1 with four bytes of immediate
    agrees(&[0x68, 1, 0, 0, 0], 0xfff, &[(RSP, 0)]);
}

#[test]
fn what_can_not_be_encoded_leaves_nothing_behind() {
    // mov rax, [CONTROL] with eight bytes of address; lea r10, [rax + 1]
    let mut code = vec![0x48, 0xa1];
    code.extend(CONTROL.to_le_bytes());
    code.extend([0x4c, 0x8d, 0x50, 1]);
    agrees(&code, 0, &[]);
}

#[test]
fn a_stack_in_two_pages_costs_no_flags() {
    // call +0, the return address in two pages
    agrees(&[0xe8, 0, 0, 0, 0], 0, &[(RSP, DATA + 0x1004)]);
}
