//! Sequences on which the translator once differed from the host's processor.

use bivisor_oracle::blocks::guest::EngineKind;
use bivisor_oracle::blocks::layout::{CONTROL, READ_ONLY};
use bivisor_oracle::blocks::monitor::{MONITOR, START};
use bivisor_oracle::blocks::{Against, Blocks, Options};
use bivisor_oracle::layout::{CODE, DATA};

const RAX: usize = 0;
const RCX: usize = 1;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;
const R11: usize = 11;
const R14: usize = 14;
const STACK: u64 = DATA + 0x800;
/// An address that is not canonical.
const NOWHERE: u64 = 1 << 62;

/// Both sides, for several sequences.
fn both_sides(dead_flags_ignored: bool) -> Blocks {
    let options = Options {
        engine: EngineKind::Dbt,
        against: Against::Native,
        seed: 0,
        first: 0,
        dead_flags_ignored,
        explained: 0,
    };
    Blocks::new(options).expect("both sides start")
}

/// Runs the bytes at an offset in the code pages with these registers, natively and on a new translator.
#[track_caller]
fn agrees(code: &[u8], origin: usize, registers: &[(usize, u64)]) {
    if let Some(report) = both_sides(false).reproduce(code, false, origin, registers) {
        panic!("{report}");
    }
}

/// The same with 32-bit code.
#[track_caller]
fn agrees_in_32_bits(code: &[u8], registers: &[(usize, u64)]) {
    if let Some(report) = both_sides(false).reproduce(code, true, 0, registers) {
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

#[test]
fn addresses_that_are_not_canonical_are_no_aliases_in_the_jump_cache() {
    // jmp rax; the addresses differ from those of code in use, and from zero, by what modes are told apart by
    let mut blocks = both_sides(false);
    for known in [0, CODE, MONITOR, START] {
        for bits in (1u64..12).chain(0xfff5..=0xffff) {
            let address = known.wrapping_add(bits << 48);
            if address << 16 >> 16 != 0 && (address as i64) << 16 >> 16 == address as i64 {
                continue;
            }
            if let Some(report) = blocks.reproduce(&[0xff, 0xe0], false, 0, &[(RAX, address)]) {
                panic!("{report}");
            }
        }
    }
}

#[test]
fn a_fault_of_the_host_leads_to_the_right_instruction() {
    // mov al, [CONTROL] with eight bytes of address; ror cl, cl; addsubpd xmm5, [rip + …], not aligned;
    // cmp r14d, r12d
    let mut code = vec![0x4c, 0xa0];
    code.extend(CONTROL.to_le_bytes());
    code.extend([0x4a, 0xd2, 0xc9, 0x66, 0x48, 0x0f, 0xd0, 0x2d, 0xf2, 0x0f, 0x01, 0x00, 0x45, 0x3b, 0xf4]);
    if let Some(report) = both_sides(true).reproduce(&code, false, 0, &[(RCX, 0xffff_ffff_ffff_ffd7)]) {
        panic!("{report}");
    }
}

#[test]
fn an_indirect_call_that_misses_the_stack_goes_where_it_should() {
    // enter 0, 0; call [rbp - 8 + 8], which holds RBP; the stack's page is not tracked behind ENTER
    agrees(&[0xc8, 0, 0, 0, 0xff, 0x55, 0x00], 0, &[(RBP, CODE + 0x20), (RSP, DATA + 0x1004)]);
    // call rax, the return address in two pages
    agrees(&[0xff, 0xd0], 0, &[(RAX, CODE + 0x20), (RSP, DATA + 0x1004)]);
}

#[test]
fn a_string_instruction_goes_down_from_the_highest_address() {
    // std; rep lodsb
    agrees(&[0xfd, 0xf3, 0xac], 0, &[(RCX, 5), (RSI, u64::MAX)]);
}

#[test]
fn arpl_writes_only_if_it_must() {
    for source in [0, 1, 2, 3] {
        // arpl [eax], bx: in a page that is not there, in one that may only be read; the same by CS
        agrees_in_32_bits(&[0x63, 0x18], &[(RAX, 0x1000), (RBX, source)]);
        agrees_in_32_bits(&[0x63, 0x18], &[(RAX, READ_ONLY + 2), (RBX, source)]);
        agrees_in_32_bits(&[0x2e, 0x63, 0x18], &[(RAX, DATA), (RBX, source)]);
    }
}

#[test]
fn eight_vector_registers_are_zeroed_in_32_bit_code() {
    // vzeroupper; vzeroall
    agrees_in_32_bits(&[0xc5, 0xf8, 0x77], &[]);
    agrees_in_32_bits(&[0xc5, 0xfc, 0x77], &[]);
    agrees(&[0xc5, 0xf8, 0x77], 0, &[]);
    agrees(&[0xc5, 0xfc, 0x77], 0, &[]);
}

#[test]
fn moves_of_eight_bytes_are_undefined_in_32_bit_code() {
    // vpinsrq xmm0, xmm0, rax, 1; vpextrq rax, xmm0, 1
    agrees_in_32_bits(&[0xc4, 0xe3, 0xf9, 0x22, 0xc0, 1], &[]);
    agrees_in_32_bits(&[0x2e, 0xc4, 0xe3, 0xf9, 0x16, 0xc0, 1], &[]);
    agrees(&[0xc4, 0xe3, 0xf9, 0x22, 0xc0, 1], 0, &[]);
}

#[test]
fn what_must_be_aligned_is_looked_at_before_its_page() {
    // cmpxchg16b [r11], where no page is; with alignment checks: mov eax, [r11]
    agrees(&[0x49, 0x0f, 0xc7, 0x0b], 0, &[(R11, 0x7f)]);
    agrees(&[0x49, 0x0f, 0xc7, 0x0b], 0, &[(R11, 0x70)]);
    let checked = [0x9c, 0x81, 0x0c, 0x24, 0, 0, 4, 0, 0x9d, 0x41, 0x8b, 0x03];
    agrees(&checked, 0, &[(R11, 0x7f), (RSP, STACK)]);
}

#[test]
fn flags_that_come_back_leave_the_address_of_a_window_alone() {
    // andps xmm4, [r14+40h]; cmovbe r9, r12; sub bl, [r14]; adc r13d, edx
    let code = [0x41, 0x0f, 0x54, 0x66, 0x40, 0x4d, 0x0f, 0x46, 0xcc, 0x41, 0x2a, 0x1e, 0x41, 0x11, 0xd5];
    agrees(&code, 0, &[(RAX, READ_ONLY), (R14, DATA + 0x740)]);
}
