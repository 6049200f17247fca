//! How an exception is delivered: gates, stacks, flags, and what happens if delivery itself faults.
use kit::{
    Global, Suite, Trap, catch, cpu, segments,
    trap::{self, Frame, INTERRUPT_GATE, TRAP_GATE, ist, set_gate, vector},
    trapping, user,
};

const INTERRUPT_FLAG: u64 = 1 << 9;
const NESTED_TASK: u64 = 1 << 14;

/// Error code bit: the selector index is one of the interrupt table.
const IN_IDT: u64 = 2;
/// Error code bit: the fault happened while something else was delivered.
const EXTERNAL: u64 = 1;

/// Vector that these tests spoil.
const SPARE: u8 = 0x91;

fn int_spare() -> Option<Trap> {
    trapping!(=> "int 0x91")
}

pub fn all(s: &mut Suite) {
    gates(s);
    stacks(s);
    flags(s);
    returns_again(s);
    nested(s);
    double_faults(s);
}

fn gates(s: &mut Suite) {
    let error = u64::from(SPARE) * 8 | IN_IDT;
    set_gate(SPARE, INTERRUPT_GATE & !0x80, 0, segments::CODE);
    s.trap("#NP by an absent gate", int_spare(), vector::NP, error, "at");
    set_gate(SPARE, 0x80, 0, segments::CODE);
    s.trap("#GP by a gate of type 0", int_spare(), vector::GP, error, "at");
    set_gate(SPARE, 0x85, 0, segments::CODE);
    s.trap("#GP by a task gate in long mode", int_spare(), vector::GP, error, "at");
    set_gate(SPARE, INTERRUPT_GATE, 0, 0);
    s.trap("#GP by a gate to the null selector", int_spare(), vector::GP, 0, "at");
    set_gate(SPARE, INTERRUPT_GATE, 0, segments::DATA);
    s.trap("#GP by a gate to a data segment", int_spare(), vector::GP, segments::DATA.into(), "at");
    set_gate(SPARE, INTERRUPT_GATE, 0, segments::CODE32);
    s.trap("#GP by a gate to 32-bit code", int_spare(), vector::GP, segments::CODE32.into(), "at");
    set_gate(SPARE, INTERRUPT_GATE, 0, 0x7f8);
    s.trap("#GP by a gate beyond the GDT", int_spare(), vector::GP, 0x7f8, "at");
    set_gate(SPARE, INTERRUPT_GATE, 0, segments::USER_CODE);
    s.trap(
        "#GP by a gate to a less privileged ring",
        int_spare(),
        vector::GP,
        (segments::USER_CODE & !3).into(),
        "at",
    );
    trap::reset_gate(SPARE);
    segments::lidt(u16::from(SPARE) * 16 - 1, trap::IDT.address());
    let got = int_spare();
    trap::load_table();
    s.trap("#GP by a vector beyond the table", got, vector::GP, error, "at");
    set_gate(vector::UD, INTERRUPT_GATE & !0x80, 0, segments::CODE);
    let got = trapping!(=> "ud2");
    trap::reset_gate(vector::UD);
    let error = u64::from(vector::UD) * 8 | IN_IDT | EXTERNAL;
    s.trap("#NP while #UD is delivered", got, vector::NP, error, "at");
}

fn stacks(s: &mut Suite) {
    set_gate(SPARE, INTERRUPT_GATE, ist::SPARE, segments::CODE);
    let got = int_spare().map(|trap| trap.stack);
    s.check("a gate with IST6 takes its stack", got, Some(segments::stack_top(ist::SPARE.into())));
    // The stack is aligned before anything is pushed on it.
    let mut task = segments::TSS.get();
    task.ist[usize::from(ist::SPARE) - 1] -= 8;
    segments::TSS.set(task);
    let got = int_spare().map(|trap| trap.stack);
    s.check("the CPU aligns the stack to 16 bytes", got, Some(segments::stack_top(ist::SPARE.into()) - 16));
    set_gate(SPARE, INTERRUPT_GATE, 0, segments::CODE);
    let got = int_spare().map(|trap| trap.stack == trap.frame.rsp & !15);
    s.check("a gate without IST keeps the stack", got, Some(true));
    task.ist[usize::from(ist::SPARE) - 1] = 1 << 63;
    segments::TSS.set(task);
    set_gate(SPARE, INTERRUPT_GATE, ist::SPARE, segments::CODE);
    s.trap("#SS by a non-canonical IST stack", int_spare(), vector::SS, 0, "at");
    task.ist[usize::from(ist::SPARE) - 1] = segments::stack_top(ist::SPARE.into());
    segments::TSS.set(task);
    trap::reset_gate(SPARE);
    let got = int_spare().map(|trap| (trap.frame.cs, trap.frame.ss));
    s.check(
        "the pushed segments are the interrupted ones",
        got,
        Some((segments::CODE.into(), segments::DATA.into())),
    );
}

fn flags(s: &mut Suite) {
    let with = |access: u8| {
        set_gate(SPARE, access, ist::INTERRUPT, segments::CODE);
        let got = trapping!("pushfq", "or dword ptr [rsp], 0x4200", "popfq", => "int 0x91");
        trap::reset_gate(SPARE);
        got.map(|trap| {
            (trap.frame.rflags & (INTERRUPT_FLAG | NESTED_TASK), trap.inside & (INTERRUPT_FLAG | NESTED_TASK))
        })
    };
    let both = INTERRUPT_FLAG | NESTED_TASK;
    s.check("an interrupt gate clears IF and NT", with(INTERRUPT_GATE), Some((both, 0)));
    s.check("a trap gate clears NT and keeps IF", with(TRAP_GATE), Some((both, INTERRUPT_FLAG)));
    let got = trapping!(
        "mov rcx, rsp", "push 0x10", "push rcx", "push 2", "push 8", "lea rax, [rip + 3f]", "push rax",
        "pushfq", "or dword ptr [rsp], 0x4000", "popfq", => "iretq";
        out("rcx") _
    );
    s.trap("#GP by IRETQ with NT", got, vector::GP, 0, "at");
    let iret = |rip: u64, cs: u64, ss: u64| {
        trapping!(
            "push {ss}", "push rsp", "push 2", "push {cs}", "push {rip}", => "iretq";
            rip = in(reg) rip, cs = in(reg) cs, ss = in(reg) ss
        )
        .map(|trap| (trap.vector, trap.error))
    };
    s.check("#GP by IRETQ to a non-canonical address", iret(1 << 63, 8, 0x10), Some((vector::GP, 0)));
    s.check("#GP by IRETQ to the null selector", iret(0, 0, 0x10), Some((vector::GP, 0)));
    s.check("#GP by IRETQ to a data segment", iret(0, 0x10, 0x10), Some((vector::GP, 0x10)));
    s.check(
        "#GP by IRETQ with a null stack in ring 3",
        iret(0, segments::USER_CODE.into(), 0),
        Some((vector::GP, 0)),
    );
    s.check("#GP by IRETQ with a code segment as stack", iret(0, 8, 8), Some((vector::GP, 8)));
}

/// One IRETQ again and again, while the descriptors that it loads change.
fn returns_again(s: &mut Suite) {
    const CODE64: u64 = 0x00af_9b00_0000_ffff;
    const STACK: u64 = 0x00cf_9300_0000_ffff;
    const PRESENT: u64 = 1 << 47;
    const ACCESSED: u64 = 1 << 40;
    let (code, stack) = (segments::FREE, segments::FREE + 8);
    let iret = |cs: u16, ss: u16| {
        trapping!(
            "mov {old}, rsp", "push {ss}", "push {old}", "push 2", "push {cs}", "lea rax, [rip + 3f]", "push rax",
            => "iretq";
            old = out(reg) _, cs = in(reg) u64::from(cs), ss = in(reg) u64::from(ss)
        )
        .map(|trap| (trap.vector, trap.error))
    };
    let thrice = |cs: u16, ss: u16| [iret(cs, ss), iret(cs, ss), iret(cs, ss)];
    segments::set_descriptor(code, CODE64);
    segments::set_descriptor(stack, STACK);
    s.check("IRETQ to other selectors, three times", thrice(code, stack), [None; 3]);
    segments::set_descriptor(code, CODE64 & !PRESENT);
    s.check("#NP once the code segment is absent", iret(code, stack), Some((vector::NP, code.into())));
    segments::set_descriptor(code, STACK);
    s.check("#GP once it is data", iret(code, stack), Some((vector::GP, code.into())));
    segments::set_descriptor(code, CODE64 & !ACCESSED);
    s.check("IRETQ once it is as before", iret(code, stack), None);
    s.check("it has been accessed again", segments::GDT.at(usize::from(code >> 3)), CODE64);
    segments::set_descriptor(stack, STACK & !PRESENT);
    s.check("#SS once the stack segment is absent", iret(code, stack), Some((vector::SS, stack.into())));
    segments::set_descriptor(stack, CODE64);
    s.check("#GP once it is code", iret(code, stack), Some((vector::GP, stack.into())));
    s.check("IRETQ with a null stack in ring 0", thrice(segments::CODE, 0), [None; 3]);
    s.check("IRETQ to the first selectors", thrice(segments::CODE, segments::DATA), [None; 3]);
}

static INNER: Global<Option<u8>> = Global::new(None);

fn nested(s: &mut Suite) {
    fn faulting(_: &mut Frame) {
        INNER.set(trapping!(=> "ud2").map(|trap| trap.vector));
    }
    set_gate(SPARE, INTERRUPT_GATE, ist::SPARE, segments::CODE);
    trap::handle(SPARE, Some(faulting));
    trap::reset_count(SPARE);
    let outer = int_spare();
    trap::handle(SPARE, None);
    trap::reset_gate(SPARE);
    s.check("a fault in a handler is delivered", INNER.get(), Some(vector::UD));
    s.check("and the handler returns", (outer.is_none(), trap::count(SPARE)), (true, 1));
    let depth = nest(20);
    s.check("twenty traps within each other", depth, 20);
}

/// Faults, and in the code after it faults again, `rounds` deep; each level's stack frame stays alive.
fn nest(rounds: u32) -> u32 {
    if rounds == 0 {
        return 0;
    }
    let mut inner = 0;
    let got = catch(|| {
        inner = nest(rounds - 1);
        trapping!(=> "ud2");
        // SAFETY: ends in `catch`.
        unsafe { core::arch::asm!("int3") }
    });
    inner + u32::from(got.is_some_and(|trap| trap.vector == vector::BP))
}

fn double_faults(s: &mut Suite) {
    let double = |trap: Option<Trap>| trap.map(|trap| (trap.vector, trap.error));
    for absent in [vector::GP, vector::NP] {
        set_gate(absent, INTERRUPT_GATE & !0x80, 0, segments::CODE);
    }
    let got = trapping!(=> "mov ds, {0:e}"; in(reg) 0x7f8u32);
    s.check("#DF by #NP while #GP is delivered", double(got), Some((vector::DF, 0)));
    s.check(
        "#DF takes its own stack",
        got.map(|trap| trap.stack),
        Some(segments::stack_top(ist::DOUBLE_FAULT.into())),
    );
    trap::reset_gate(vector::GP);
    trap::reset_gate(vector::NP);

    set_gate(vector::PF, INTERRUPT_GATE & !0x80, 0, segments::CODE);
    let nowhere = 1u64 << 40;
    let got = trapping!(=> "mov al, [{0}]"; in(reg) nowhere);
    s.check("#DF by #NP while #PF is delivered", double(got), Some((vector::DF, 0)));
    trap::reset_gate(vector::PF);

    // A page fault's handler has a stack that is not there.
    let mut task = segments::TSS.get();
    task.ist[usize::from(ist::SPARE) - 1] = nowhere;
    segments::TSS.set(task);
    set_gate(vector::PF, INTERRUPT_GATE, ist::SPARE, segments::CODE);
    let got = trapping!(=> "mov al, [{0}]"; in(reg) nowhere);
    s.check("#DF by #PF while #PF is delivered", double(got), Some((vector::DF, 0)));
    trap::reset_gate(vector::PF);
    set_gate(vector::UD, INTERRUPT_GATE, ist::SPARE, segments::CODE);
    let got = trapping!(=> "ud2");
    s.check(
        "#PF while #UD is delivered",
        got.map(|trap| (trap.vector, trap.error, trap.cr2)),
        Some((vector::PF, 2, nowhere - 8)),
    );
    trap::reset_gate(vector::UD);

    // Ring 0's own stack is not canonical: #SS while #GP is delivered.
    let space = user::Space::new();
    task.rsp[0] = 1 << 63;
    segments::TSS.set(task);
    set_gate(vector::GP, INTERRUPT_GATE, 0, segments::CODE);
    let got = kit::ring3!(space, "hlt");
    trap::reset_gate(vector::GP);
    s.check("#DF by #SS while #GP is delivered", double(got), Some((vector::DF, 0)));
    task.rsp[0] = segments::stack_top(0);
    task.ist[usize::from(ist::SPARE) - 1] = segments::stack_top(ist::SPARE.into());
    segments::TSS.set(task);
    cpu::write_cr3(kit::memory::boot_root());
}
