//! What a page fault reports and leaves behind when it comes in the middle of something.
use crate::{ALL, FAR, fault, page_fault, read};
use kit::{
    Suite, cpu,
    memory::{self, bit, fault as code, pages},
    trapping,
    user::Space,
};

pub fn all(s: &mut Suite, space: &Space) {
    let page = pages(1);
    let next = FAR + 0x1000;
    space.tables.map(FAR, page, ALL);
    memory::write(space.tables.entry(next, 1), 0u64);
    cpu::invlpg(next);

    let end = next - 4;
    s.check("a read that ends in an absent page", fault(read(end)), page_fault(0, next));
    memory::write(page + 0xffc, 0x1111_1111u32);
    let got = trapping!(=> "mov [{0}], rax"; in(reg) end);
    s.check("a write that ends in an absent page", fault(got), page_fault(code::W, next));
    s.check("leaves the first page as it was", memory::read::<u32>(page + 0xffc), 0x1111_1111);
    let got = trapping!(=> "movups [{0}], xmm0"; in(reg) next - 8);
    s.check("a vector write that ends there", fault(got), page_fault(code::W, next));
    s.check("leaves it, too", memory::read::<u32>(page + 0xffc), 0x1111_1111);
    let got = trapping!(=> "inc dword ptr [{0}]"; in(reg) next);
    s.check("a read-modify-write faults as a write", fault(got), page_fault(code::W, next));
    let got = trapping!("xor eax, eax", => "lock cmpxchg [{0}], ecx"; in(reg) next);
    s.check("CMPXCHG faults as a write", fault(got), page_fault(code::W, next));
    let before = cpu::read_cr2();
    trapping!(=> "ud2");
    s.check("other exceptions leave CR2 alone", cpu::read_cr2(), before);

    strings(s, page, next);
    stack(s, next);
    crossing_code(s, space, page, next);

    // An entry that becomes present is seen without invalidation.
    space.tables.entry(next, 1);
    read(next);
    memory::write(space.tables.entry(next, 1), page | ALL);
    s.check("an entry that becomes present counts at once", read(next).is_none(), true);
    memory::write(space.tables.entry(next, 1), 0u64);
    cpu::invlpg(next);

    let high = 0xffff_8765_4321_0000;
    space.tables.map(high, page, bit::P | bit::W);
    memory::write(high + 8, 0xabcd_u64);
    s.check("the upper half is mapped like the lower", memory::read::<u64>(page + 8), 0xabcd);
    s.check("an absent page of the upper half", fault(read(high + 0x1000)), page_fault(0, high + 0x1000));
}

fn strings(s: &mut Suite, page: u64, next: u64) {
    let source = pages(1);
    for offset in 0..64 {
        memory::write(source + offset, offset as u8 + 1);
    }
    // Registers in the frame lie from R15 to RAX: RDI is the 9th, RSI the 10th, RCX the 14th.
    let got = trapping!(=> "rep movsb"; inout("rcx") 64u64 => _, inout("rsi") source => _, inout("rdi") next - 16 => _);
    s.check("REP MOVSB into an absent page", fault(got), page_fault(code::W, next));
    let left = got
        .map(|trap| (trap.place, trap.frame.registers[13], trap.frame.registers[9], trap.frame.registers[8]));
    s.check("stops with its registers where it stands", left, Some(("at", 48, source + 16, next)));
    s.check("and the bytes before it written", memory::read::<u8>(page + 0xfff), 16);
    let got = trapping!("std", => "rep stosq"; inout("rcx") 3u64 => _, inout("rdi") next + 8 => _);
    s.check("a string that goes down", fault(got), page_fault(code::W, next + 8));
    let got = trapping!(=> "repe cmpsb"; inout("rcx") 64u64 => _, inout("rsi") next - 16 => _, inout("rdi") source => _);
    s.check("REPE CMPSB into an absent page", fault(got), page_fault(0, next));
}

fn stack(s: &mut Suite, next: u64) {
    let got = trapping!("mov rcx, rsp", "mov rsp, {0}", => "push rax"; in(reg) next + 8, out("rcx") _);
    s.check("PUSH into an absent page", fault(got), page_fault(code::W, next));
    s.check("leaves the stack pointer alone", got.map(|trap| trap.frame.rsp), Some(next + 8));
    let got = trapping!("mov rcx, rsp", "mov rsp, {0}", => "pop rax"; in(reg) next, out("rcx") _);
    s.check("POP from an absent page", fault(got).map(|fault| fault.1), Some(0));
    let got = trapping!("mov rcx, rsp", "mov rsp, {0}", => "call rax"; in(reg) next + 8, out("rcx") _);
    s.check(
        "CALL with an absent stack",
        (fault(got), got.map(|trap| trap.place)),
        (page_fault(code::W, next), Some("at")),
    );
}

/// An instruction whose last bytes lie in an absent page.
fn crossing_code(s: &mut Suite, space: &Space, page: u64, next: u64) {
    // MOV EAX, imm32: one byte of opcode, four of immediate; then RET.
    let bytes = [0xb8u8, 0x78, 0x56, 0x34, 0x12, 0xc3];
    let start = next - 3;
    for (offset, byte) in (0..).zip(&bytes[..3]) {
        memory::write(page + 0xffd + offset, *byte);
    }
    let got = crate::fetch(start);
    s.check("code that ends in an absent page", fault(got), page_fault(code::I, next));
    s.check("the fault points at its first byte", got.map(|trap| trap.frame.rip), Some(start));
    let second = pages(1);
    for (offset, byte) in (0..).zip(&bytes[3..]) {
        memory::write(second + offset, *byte);
    }
    space.tables.map(next, second, ALL | bit::NX);
    s.check(
        "code that ends in a page of data",
        fault(crate::fetch(start)),
        page_fault(code::P | code::I, next),
    );
    space.tables.map(next, second, ALL);
    let value: u64;
    // SAFETY: the code there loads EAX and returns.
    unsafe { core::arch::asm!("call {0}", in(reg) start, out("rax") value, clobber_abi("C")) };
    s.check("code across two pages runs", value, 0x1234_5678);
    memory::write(space.tables.entry(next, 1), 0u64);
    cpu::invlpg(next);
}
