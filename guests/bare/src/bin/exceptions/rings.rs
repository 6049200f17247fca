//! Ring 3: what it may not do, what checks its accesses, and the ways in and out.
use kit::{
    Suite,
    cpu::{self, cr0, cr4, msr},
    ring3, segments,
    trap::{self, INTERRUPT_GATE, LEAVE_USER, ist, set_gate, vector},
    trapping,
    user::{self, Space},
};

const ALIGNMENT_CHECK: u64 = 1 << 18;
const INTERRUPT_FLAG: u64 = 1 << 9;
const IO_PRIVILEGE: u64 = 3 << 12;

pub fn all(s: &mut Suite) {
    let space = Space::new();
    privileged(s, &space);
    alignment(s, &space);
    gates(s, &space);
    ports(s, &space);
    system_calls(s, &space);
    compatibility(s, &space);
    cpu::write_cr3(kit::memory::boot_root());
}

fn privileged(s: &mut Suite, space: &Space) {
    let gp = |s: &mut Suite, what, got| s.user_trap(what, got, vector::GP, 0, 0);
    gp(s, "#GP by HLT in ring 3", ring3!(space, "hlt"));
    gp(s, "#GP by CLI in ring 3", ring3!(space, "cli"));
    gp(s, "#GP by STI in ring 3", ring3!(space, "sti"));
    gp(s, "#GP by MOV from CR0 in ring 3", ring3!(space, "mov rax, cr0"));
    gp(s, "#GP by MOV from DR7 in ring 3", ring3!(space, "mov rax, dr7"));
    gp(s, "#GP by RDMSR in ring 3", ring3!(space, "rdmsr"));
    gp(s, "#GP by LGDT in ring 3", ring3!(space, "lgdt [rsp]"));
    gp(s, "#GP by LTR in ring 3", ring3!(space, "ltr ax"));
    gp(s, "#GP by INVLPG in ring 3", ring3!(space, "invlpg [rsp]"));
    gp(s, "#GP by WBINVD in ring 3", ring3!(space, "wbinvd"));
    gp(s, "#GP by SWAPGS in ring 3", ring3!(space, "swapgs"));
    gp(s, "#GP by CLTS in ring 3", ring3!(space, "clts"));
    gp(s, "#GP by LMSW in ring 3", ring3!(space, "lmsw ax"));
    gp(s, "#GP by SYSRET in ring 3", ring3!(space, "sysretq"));
    let got = ring3!(space, "mov eax, 0x10", "mov ds, eax");
    s.user_trap("#GP by loading a ring 0 segment in ring 3", got, vector::GP, 0x10, 5);
    let before = cpu::read_cr4();
    let rdtsc = ring3!(space, "rdtsc");
    s.user_trap("RDTSC runs in ring 3", rdtsc, LEAVE_USER, 0, 4);
    cpu::write_cr4(before | cr4::TSD);
    gp(s, "#GP by RDTSC with CR4.TSD", ring3!(space, "rdtsc"));
    if cpu::cpuid(7, 0).ecx >> 2 & 1 == 1 {
        cpu::write_cr4(before | cr4::UMIP);
        gp(s, "#GP by SGDT with CR4.UMIP", ring3!(space, "sgdt [rsp - 16]"));
        gp(s, "#GP by SMSW with CR4.UMIP", ring3!(space, "smsw eax"));
        gp(s, "#GP by STR with CR4.UMIP", ring3!(space, "str eax"));
    } else {
        for what in ["#GP by SGDT with CR4.UMIP", "#GP by SMSW with CR4.UMIP", "#GP by STR with CR4.UMIP"] {
            s.skip(what, "no UMIP");
        }
    }
    cpu::write_cr4(before);
    let got = ring3!(space, "pushfq", "or dword ptr [rsp], 0x3200", "popfq");
    let flags = got.map(|trap| (trap.vector, trap.frame.rflags & (INTERRUPT_FLAG | IO_PRIVILEGE)));
    s.check("POPFQ in ring 3 leaves IF and IOPL alone", flags, Some((LEAVE_USER, 0)));
}

fn alignment(s: &mut Suite, space: &Space) {
    let read = |rflags: u64| {
        #[unsafe(naked)]
        unsafe extern "C" fn code() {
            core::arch::naked_asm!("mov eax, [rsp - 15]", "int 0x80")
        }
        space.run_as(segments::USER_CODE, code, rflags)
    };
    let before = cpu::read_cr0();
    cpu::write_cr0(before | cr0::AM);
    s.user_trap("#AC by an odd read in ring 3", read(2 | ALIGNMENT_CHECK), vector::AC, 0, 0);
    s.user_trap("an odd read without EFLAGS.AC runs", read(2), LEAVE_USER, 0, 6);
    cpu::write_cr0(before);
    s.user_trap("an odd read without CR0.AM runs", read(2 | ALIGNMENT_CHECK), LEAVE_USER, 0, 6);
    cpu::write_cr0(before | cr0::AM);
    let got = trapping!("pushfq", "or dword ptr [rsp], 0x40000", "popfq", => "mov eax, [rsp + 1]");
    s.check("an odd read in ring 0 runs", got.is_none(), true);
    trapping!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq", => "nop");
    cpu::write_cr0(before);
}

fn gates(s: &mut Suite, space: &Space) {
    s.user_trap("INT through a gate for ring 3", ring3!(space, "nop"), LEAVE_USER, 0, 3);
    s.user_trap(
        "#GP by INT through a gate for ring 0",
        ring3!(space, "int 0x91"),
        vector::GP,
        0x91 * 8 + 2,
        0,
    );
    s.user_trap("#GP by INT3 through a gate for ring 0", ring3!(space, "int3"), vector::GP, 3 * 8 + 2, 0);
    set_gate(vector::UD, INTERRUPT_GATE, 0, segments::CODE);
    let got = ring3!(space, "ud2");
    trap::reset_gate(vector::UD);
    s.user_trap("a fault needs no right to its gate", got, vector::UD, 0, 0);
    s.check("ring 3 enters on RSP0", got.map(|trap| trap.stack), Some(segments::stack_top(0)));
    let pushed = got.map(|trap| (trap.frame.cs, trap.frame.ss, trap.frame.rsp));
    let user_segments = (segments::USER_CODE.into(), segments::USER_DATA.into(), user::STACK);
    s.check("the frame holds ring 3's segments and stack", pushed, Some(user_segments));
    set_gate(vector::UD, INTERRUPT_GATE, ist::SPARE, segments::CODE);
    let got = ring3!(space, "ud2");
    trap::reset_gate(vector::UD);
    s.check(
        "a gate's IST goes before RSP0",
        got.map(|trap| trap.stack),
        Some(segments::stack_top(ist::SPARE.into())),
    );
}

fn ports(s: &mut Suite, space: &Space) {
    s.user_trap("#GP by IN without IOPL and bitmap", ring3!(space, "in al, 0x80"), vector::GP, 0, 0);
    #[unsafe(naked)]
    unsafe extern "C" fn port_in() {
        core::arch::naked_asm!("in al, 0x80", "int 0x80")
    }
    let got = space.run_as(segments::USER_CODE, port_in, 2 | IO_PRIVILEGE);
    s.user_trap("IN with IOPL 3 runs", got, LEAVE_USER, 0, 4);
    // A task whose bitmap opens port 0x80 alone. 104 bytes, then the bitmap.
    let task = kit::memory::pages(4);
    kit::memory::write(task, segments::TSS.get());
    kit::memory::write(task + 102, 104u16);
    for offset in 0..0x2001 {
        kit::memory::write(task + 104 + offset, 0xffu8);
    }
    kit::memory::write(task + 104 + 0x80 / 8, 0xfeu8);
    segments::set_task_descriptor(segments::FREE, task, 104 + 0x2000, 0x89);
    segments::ltr(segments::FREE);
    s.user_trap("IN of a port that the bitmap opens runs", ring3!(space, "in al, 0x80"), LEAVE_USER, 0, 4);
    s.user_trap("#GP by IN of a port that it closes", ring3!(space, "in al, 0x81"), vector::GP, 0, 0);
    s.user_trap(
        "#GP by a wide IN that touches a closed port",
        ring3!(space, "in ax, 0x80"),
        vector::GP,
        0,
        0,
    );
    segments::set_task_descriptor(segments::FREE, task, 104 + 0x10, 0x89);
    segments::ltr(segments::FREE);
    s.user_trap("#GP by IN of a port beyond the bitmap", ring3!(space, "in al, 0x80"), vector::GP, 0, 0);
    segments::load_task();
}

/// Where SYSCALL enters: straight into a trap, which records the registers.
#[unsafe(naked)]
unsafe extern "C" fn system_call() {
    core::arch::naked_asm!("int 0x92")
}

fn system_calls(s: &mut Suite, space: &Space) {
    cpu::wrmsr(msr::STAR, u64::from(segments::USER_CODE32) << 48 | u64::from(segments::CODE) << 32);
    cpu::wrmsr(msr::LSTAR, system_call as *const () as u64);
    cpu::wrmsr(msr::SFMASK, 0x400);
    let got = ring3!(space, "std", "syscall");
    s.check(
        "SYSCALL enters at LSTAR",
        got.map(|trap| (trap.vector, trap.frame.cs, trap.frame.ss)),
        Some((0x92, 8, 0x10)),
    );
    // Registers lie in the frame from R15 to RAX: RCX is the 14th, R11 the 5th.
    s.check(
        "SYSCALL leaves the return address in RCX",
        got.map(|trap| trap.frame.registers[13]),
        Some(user::CODE + 3),
    );
    s.check("SYSCALL leaves the flags in R11", got.map(|trap| trap.frame.registers[4] & 0x402), Some(0x402));
    s.check("SYSCALL masks flags by SFMASK", got.map(|trap| trap.frame.rflags & 0x400), Some(0));
    s.check("SYSCALL keeps the stack pointer", got.map(|trap| trap.frame.rsp), Some(user::STACK));

    #[unsafe(naked)]
    unsafe extern "C" fn leave() {
        core::arch::naked_asm!("nop", "int 0x80")
    }
    space.place(leave);
    let got = trapping!(=> "sysretq"; in("rcx") user::CODE, in("r11") 0x402u64);
    let segments64 =
        (LEAVE_USER, u64::from(segments::USER_CODE), u64::from(segments::USER_DATA), user::CODE + 3);
    let seen = got.map(|trap| (trap.vector, trap.frame.cs, trap.frame.ss, trap.frame.rip));
    s.check("SYSRETQ returns to 64-bit code", seen, Some(segments64));
    s.check("SYSRETQ takes the flags from R11", got.map(|trap| trap.frame.rflags & 0x402), Some(0x402));
    let got = trapping!(=> ".byte 0x0f, 0x07"; in("rcx") user::CODE, in("r11") 2u64);
    let seen = got.map(|trap| (trap.vector, trap.frame.cs, trap.frame.rip));
    s.check(
        "SYSRETL returns to 32-bit code",
        seen,
        Some((LEAVE_USER, segments::USER_CODE32.into(), user::CODE + 3)),
    );
}

fn compatibility(s: &mut Suite, space: &Space) {
    #[unsafe(naked)]
    unsafe extern "C" fn code32() {
        // 40 is INC EAX in 32-bit code and a REX prefix in 64-bit code.
        core::arch::naked_asm!("xor eax, eax", ".byte 0x40", ".byte 0x40", "int 0x80")
    }
    let got = space.run_as(segments::USER_CODE32, code32, 2);
    s.check(
        "32-bit code runs in ring 3",
        got.map(|trap| (trap.vector, trap.frame.registers[14])),
        Some((LEAVE_USER, 2)),
    );
    #[unsafe(naked)]
    unsafe extern "C" fn push32() {
        core::arch::naked_asm!("push rax", "int 0x80")
    }
    let got = space.run_as(segments::USER_CODE32, push32, 2);
    s.check("a push in 32-bit code takes 4 bytes", got.map(|trap| trap.frame.rsp), Some(user::STACK - 4));
    let got = space.run_as(segments::USER_CODE32, hlt32, 2);
    s.user_trap("#GP by HLT in 32-bit ring 3", got, vector::GP, 0, 0);
}

#[unsafe(naked)]
unsafe extern "C" fn hlt32() {
    core::arch::naked_asm!("hlt")
}
