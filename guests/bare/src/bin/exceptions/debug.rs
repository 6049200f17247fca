//! Single step and the debug registers (Intel SDM volume 3, chapter 17).
use kit::{
    Suite, Trap,
    cpu::{self, cr4},
    trap::vector,
    trapping,
};

/// DR6 bits.
const B0: u64 = 1;
const B1: u64 = 1 << 1;
const BD: u64 = 1 << 13;
const BS: u64 = 1 << 14;

/// DR7 bits: breakpoints 0 and 1 on, general detect, and the condition fields of breakpoint 0.
const L0: u64 = 1;
const L1: u64 = 1 << 2;
const ALWAYS_ONE: u64 = 1 << 10;
const GD: u64 = 1 << 13;
const WRITE: u64 = 1 << 16;
const PORT: u64 = 2 << 16;
const ACCESS: u64 = 3 << 16;
const FOUR_BYTES: u64 = 3 << 18;

const TRAP_FLAG: u64 = 1 << 8;
const RESUME_FLAG: u64 = 1 << 16;

/// DR6 as software leaves it: no condition, and the bits that read as one.
const CLEAR: u64 = 0xffff_0ff0;

fn conditions(trap: Option<Trap>) -> Option<u64> {
    trap.map(|trap| trap.dr6 & (0xf | BD | BS))
}

/// Clears what a test left in the debug registers.
fn reset() {
    cpu::write_dr7(ALWAYS_ONE);
    cpu::write_dr6(CLEAR);
}

pub fn all(s: &mut Suite) {
    reset();
    s.trap("#DB by INT1", trapping!(=> ".byte 0xf1"), vector::DB, 0, "after");
    single_step(s);
    data_breakpoints(s);
    other_breakpoints(s);
}

fn single_step(s: &mut Suite) {
    reset();
    let got = trapping!("pushfq", "or dword ptr [rsp], 0x100", "popfq", => "nop");
    s.trap("#DB by single step", got, vector::DB, 0, "after");
    s.check("single step sets DR6.BS", conditions(got), Some(BS));
    s.check("the pushed flags keep TF", got.map(|trap| trap.frame.rflags & TRAP_FLAG), Some(TRAP_FLAG));
    s.check("TF is off in the handler", got.map(|trap| trap.inside & TRAP_FLAG), Some(0));
    let got = trapping!("mov ecx, ss", "pushfq", "or dword ptr [rsp], 0x100", "popfq", "mov ss, ecx", => "nop"; out("ecx") _);
    s.trap("single step waits for the instruction after MOV SS", got, vector::DB, 0, "after");
    let got = trapping!("pushfq", "or dword ptr [rsp], 0x100", "popfq", => "ud2");
    s.trap("a fault comes before the single step of its instruction", got, vector::UD, 0, "at");
    let got = trapping!("mov ecx, 3", "lea rsi, [rsp - 64]", "lea rdi, [rsp - 128]", "pushfq", "or dword ptr [rsp], 0x100", "popfq", => "rep movsb";
        out("ecx") _, out("rsi") _, out("rdi") _);
    s.trap("single step stops in each round of REP", got, vector::DB, 0, "at");
    reset();
}

fn data_breakpoints(s: &mut Suite) {
    let word = 0u32;
    let address = &raw const word;
    let set = |condition: u64| {
        reset();
        cpu::write_dr0(address as u64);
        cpu::write_dr7(ALWAYS_ONE | L0 | condition | FOUR_BYTES);
    };
    set(WRITE);
    let got = trapping!(=> "mov [{0}], eax"; in(reg) address);
    reset();
    s.trap("#DB by a write breakpoint", got, vector::DB, 0, "after");
    s.check("DR6 names the breakpoint", conditions(got), Some(B0));
    set(WRITE);
    let got = trapping!(=> "mov eax, [{0}]"; in(reg) address);
    reset();
    s.check("a read passes a write breakpoint", got.is_none(), true);
    set(ACCESS);
    let got = trapping!(=> "mov al, [{0} + 3]"; in(reg) address);
    reset();
    s.trap("#DB by an access breakpoint, last byte", got, vector::DB, 0, "after");
    set(ACCESS);
    let got = trapping!(=> "mov al, [{0} + 4]"; in(reg) address);
    reset();
    s.check("the byte after it passes", got.is_none(), true);
    cpu::write_dr7(ALWAYS_ONE);
    s.check("DR7 bit 10 reads as one", cpu::read_dr7(), ALWAYS_ONE);
}

fn other_breakpoints(s: &mut Suite) {
    reset();
    let got = trapping!(
        "lea rax, [rip + 2f]", "mov dr1, rax", "mov eax, {enable}", "mov dr7, rax", => "nop";
        enable = const ALWAYS_ONE | L1
    );
    reset();
    s.trap("#DB by an instruction breakpoint", got, vector::DB, 0, "at");
    s.check("DR6 names the instruction breakpoint", conditions(got), Some(B1));
    // Section 17.3.1.1: the handler of the breakpoint is to set RF, other faults' handlers find it set.
    let resume = |trap: Option<Trap>| trap.map(|trap| trap.frame.rflags & RESUME_FLAG);
    s.check("an instruction breakpoint pushes RF as it was", resume(got), Some(0));
    s.check("a fault pushes RF as one", resume(trapping!(=> "ud2")), Some(RESUME_FLAG));
    s.check("a trap pushes RF as it was", resume(trapping!(=> "int3")), Some(0));
    resume_flag(s);

    let before = cpu::read_cr4();
    cpu::write_cr4(before | cr4::DE);
    cpu::write_dr0(0x80);
    cpu::write_dr7(ALWAYS_ONE | L0 | PORT);
    let got = trapping!(=> "out 0x80, al");
    reset();
    s.trap("#DB by a port breakpoint", got, vector::DB, 0, "after");
    let got = trapping!(=> "mov rax, dr4");
    cpu::write_cr4(before);
    s.trap("#UD by DR4 with CR4.DE", got, vector::UD, 0, "at");
    let got = trapping!(=> "mov rax, dr4");
    s.check("DR4 stands for DR6 without CR4.DE", got.is_none(), true);

    cpu::write_dr7(ALWAYS_ONE | GD);
    let got = trapping!(=> "mov rax, dr0");
    reset();
    s.trap("#DB by general detect", got, vector::DB, 0, "at");
    s.check("general detect sets DR6.BD", conditions(got), Some(BD));
}

/// With RF in the flags that IRETQ loads, the next instruction runs despite a breakpoint on it.
fn resume_flag(s: &mut Suite) {
    reset();
    let got = trapping!(
        "lea rax, [rip + 2f]", "mov dr1, rax", "mov eax, {enable}", "mov dr7, rax",
        "mov rcx, rsp", "push 0x10", "push rcx", "push 0x10002", "push 8", "lea rax, [rip + 2f]", "push rax", "iretq",
        => "nop";
        enable = const ALWAYS_ONE | L1, out("rcx") _
    );
    reset();
    s.check("RF lets one instruction pass its breakpoint", got.is_none(), true);
}
