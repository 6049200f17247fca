//! Every exception that code can bring about, with its error code and the RIP it reports, and how the CPU
//! delivers it: gates, stacks, flags, faults on the way (Intel SDM volume 3, chapter 6).
#![no_std]
#![no_main]

mod debug;
mod delivery;
mod rings;

use kit::{
    Suite, Trap, catch, compat,
    cpu::{self, cr0, cr4, msr},
    machine,
    segments::{self, FREE},
    trap::vector,
    trapping,
};

/// Not canonical with 48-bit linear addresses.
const NON_CANONICAL: u64 = 1 << 63;

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let mut suite = Suite::new("exceptions");
    let s = &mut suite;
    arithmetic(s);
    invalid_opcodes(s);
    floating_point(s);
    segment_loads(s);
    general_protection(s);
    compatibility_mode(s);
    debug::all(s);
    delivery::all(s);
    rings::all(s);
    suite.finish()
}

fn arithmetic(s: &mut Suite) {
    let got =
        trapping!("mov eax, 1", "xor edx, edx", "xor ecx, ecx", => "div ecx"; out("ecx") _, out("edx") _);
    s.trap("#DE by division by zero", got, vector::DE, 0, "at");
    let got = trapping!(
        "mov eax, 0x80000000", "mov edx, 0xffffffff", "mov ecx, 0xffffffff", => "idiv ecx";
        out("ecx") _, out("edx") _
    );
    s.trap("#DE by a quotient that does not fit", got, vector::DE, 0, "at");
    s.trap("#BP by INT3", trapping!(=> "int3"), vector::BP, 0, "after");
    s.trap("#BP by INT 3", trapping!(=> ".byte 0xcd, 3"), vector::BP, 0, "after");
    s.trap("#OF by INT 4", trapping!(=> "int 4"), vector::OF, 0, "after");
    s.trap("INT 0x90", trapping!(=> "int 0x90"), 0x90, 0, "after");
}

fn invalid_opcodes(s: &mut Suite) {
    s.trap("#UD by UD2", trapping!(=> "ud2"), vector::UD, 0, "at");
    s.trap("#UD by UD1", trapping!(=> ".byte 0x0f, 0xb9, 0xc0"), vector::UD, 0, "at");
    s.trap("#UD by PUSH ES in 64-bit mode", trapping!(=> ".byte 0x06"), vector::UD, 0, "at");
    s.trap("#UD by LOCK on a register", trapping!(=> ".byte 0xf0, 0x01, 0xc0"), vector::UD, 0, "at");
    s.trap("#UD by LOCK MOV", trapping!(=> ".byte 0xf0, 0x89, 0x04, 0x24"), vector::UD, 0, "at");
    s.trap("#UD by MOV to CS", trapping!(=> ".byte 0x8e, 0xc8"), vector::UD, 0, "at");
    s.trap("#UD by MOV from CR1", trapping!(=> ".byte 0x0f, 0x20, 0xc8"), vector::UD, 0, "at");
    cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) & !1);
    s.trap(
        "#UD by SYSCALL without EFER.SCE",
        trapping!(=> "syscall"; out("rcx") _, out("r11") _),
        vector::UD,
        0,
        "at",
    );
    cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) | 1);
    let got = trapping!(=> ".fill 15, 1, 0x66
        nop");
    s.trap("#GP by an instruction of 16 bytes", got, vector::GP, 0, "at");
    let got = trapping!(=> ".fill 14, 1, 0x66
        nop");
    s.check("an instruction of 15 bytes runs", got.is_none(), true);
}

fn floating_point(s: &mut Suite) {
    let before = cpu::read_cr0();
    cpu::write_cr0(before | cr0::TS);
    let nop = trapping!(=> "fnop");
    cpu::write_cr0(before | cr0::TS);
    let sse = trapping!(=> "movaps xmm0, xmm0");
    cpu::write_cr0(before | cr0::TS | cr0::MP);
    let wait = trapping!(=> "fwait");
    cpu::write_cr0(before & !cr0::MP | cr0::TS);
    let no_wait = trapping!(=> "fwait");
    cpu::write_cr0(before | cr0::EM);
    let emulated = trapping!(=> "fnop");
    cpu::write_cr0(before | cr0::EM);
    let emulated_sse = trapping!(=> "movaps xmm0, xmm0");
    cpu::write_cr0(before);
    s.trap("#NM by x87 with CR0.TS", nop, vector::NM, 0, "at");
    s.trap("#NM by SSE with CR0.TS", sse, vector::NM, 0, "at");
    s.trap("#NM by FWAIT with CR0.TS and MP", wait, vector::NM, 0, "at");
    s.check("FWAIT with CR0.TS alone runs", no_wait.is_none(), true);
    s.trap("#NM by x87 with CR0.EM", emulated, vector::NM, 0, "at");
    s.trap("#UD by SSE with CR0.EM", emulated_sse, vector::UD, 0, "at");

    // In each of these the compiler must have no SSE code between the two writes of CR4.
    let before = cpu::read_cr4();
    cpu::write_cr4(before & !cr4::OSFXSR);
    let got = trapping!(=> "xorps xmm0, xmm0");
    cpu::write_cr4(before);
    s.trap("#UD by SSE without CR4.OSFXSR", got, vector::UD, 0, "at");
    if cpu::has_xsave() && cpu::feature_1_ecx(28) {
        cpu::write_cr4(before & !cr4::OSXSAVE);
        let got = trapping!(=> "vxorps ymm0, ymm0, ymm0");
        let xgetbv = trapping!("xor ecx, ecx", => "xgetbv"; out("ecx") _, out("edx") _);
        cpu::write_cr4(before);
        s.trap("#UD by AVX without CR4.OSXSAVE", got, vector::UD, 0, "at");
        s.trap("#UD by XGETBV without CR4.OSXSAVE", xgetbv, vector::UD, 0, "at");
        cpu::xsetbv(0, 3);
        let got = trapping!(=> "vxorps ymm0, ymm0, ymm0");
        cpu::xsetbv(0, 7);
        s.trap("#UD by AVX without XCR0.AVX", got, vector::UD, 0, "at");
        let got = trapping!(=> "xsetbv"; in("ecx") 0, in("edx") 0);
        s.check(
            "#GP by XSETBV without x87",
            got.map(|trap| (trap.vector, trap.error)),
            Some((vector::GP, 0)),
        );
    } else {
        for what in [
            "#UD by AVX without CR4.OSXSAVE",
            "#UD by XGETBV without CR4.OSXSAVE",
            "#UD by AVX without XCR0.AVX",
            "#GP by XSETBV without x87",
        ] {
            s.skip(what, "no AVX");
        }
    }

    let control: u16 = 0x37f & !4;
    let got = trapping!(
        "fninit", "fldcw [{control}]", "fld1", "fldz", "fdivp st(1), st", => "fwait";
        control = in(reg) &control
    );
    s.trap("#MF by a pending x87 division by zero", got, vector::MF, 0, "at");
    let got = trapping!(
        "fninit", "fldcw [{control}]", "fld1", "fldz", "fdivp st(1), st", => "fnstsw ax";
        control = in(reg) &control
    );
    s.check("FNSTSW ignores a pending x87 exception", got.is_none(), true);
    trapping!(=> "fninit");
    let control: u32 = 0x1f80 & !0x200;
    let default: u32 = 0x1f80;
    let divide = || {
        trapping!(
            "ldmxcsr [{control}]", "mov eax, 0x3f800000", "movd xmm0, eax", "xorps xmm1, xmm1", => "divss xmm0, xmm1";
            control = in(reg) &control, out("xmm0") _, out("xmm1") _
        )
    };
    let got = divide();
    trapping!(=> "ldmxcsr [{default}]"; default = in(reg) &default);
    s.trap("#XM by an SSE division by zero", got, vector::XM, 0, "at");
    cpu::write_cr4(before & !cr4::OSXMMEXCPT);
    let got = divide();
    cpu::write_cr4(before);
    trapping!(=> "ldmxcsr [{default}]"; default = in(reg) &default);
    s.trap("#UD by the same without CR4.OSXMMEXCPT", got, vector::UD, 0, "at");
}

/// Descriptor of flat ring 0 data, writable, present.
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// The present bit of a descriptor.
const PRESENT: u64 = 1 << 47;

fn segment_loads(s: &mut Suite) {
    let selector = u64::from(FREE);
    let load_ds = |selector: u64| trapping!(=> "mov ds, {0:e}"; in(reg) selector);
    let load_ss = |selector: u64| trapping!(=> "mov ss, {0:e}"; in(reg) selector);
    segments::set_descriptor(FREE, DATA & !PRESENT);
    s.trap("#NP by an absent data segment", load_ds(selector), vector::NP, selector, "at");
    s.trap(
        "#NP keeps the selector's RPL out of the error code",
        load_ds(selector | 3),
        vector::GP,
        selector,
        "at",
    );
    s.trap("#SS by an absent stack segment", load_ss(selector), vector::SS, selector, "at");
    s.trap("#GP by a null stack segment with RPL 3", load_ss(3), vector::GP, 0, "at");
    s.trap("#GP by a selector beyond the GDT", load_ds(0x7f8), vector::GP, 0x7f8, "at");
    s.trap("#GP by a selector of the absent LDT", load_ds(0xc), vector::GP, 0xc, "at");
    // A code segment that cannot be read.
    segments::set_descriptor(FREE, 0x00af_9900_0000_ffff);
    s.trap("#GP by loading DS with code that cannot be read", load_ds(selector), vector::GP, selector, "at");
    s.trap("#GP by loading SS with code", load_ss(selector), vector::GP, selector, "at");
    segments::set_descriptor(FREE, 0x00cf_9100_0000_ffff);
    s.trap("#GP by loading SS with read-only data", load_ss(selector), vector::GP, selector, "at");
    segments::set_descriptor(FREE, 0x00cf_f300_0000_ffff);
    s.trap("#GP by loading SS with another DPL", load_ss(selector), vector::GP, selector, "at");

    segments::set_task_descriptor(FREE, 0x1000, 0x67, 0x09);
    let ltr = |selector: u64| trapping!(=> "ltr {0:x}"; in(reg) selector);
    s.trap("#NP by LTR of an absent task", ltr(selector), vector::NP, selector, "at");
    s.trap("#GP by LTR of a busy task", ltr(segments::TASK.into()), vector::GP, segments::TASK.into(), "at");
    s.trap("#GP by LTR of the null selector", ltr(0), vector::GP, 0, "at");
    segments::load_task();
    s.trap("#GP by LLDT of a task", trapping!(=> "lldt {0:x}"; in(reg) selector), vector::GP, selector, "at");

    // The CPU sets the accessed bit when a segment is loaded.
    segments::set_descriptor(FREE, DATA & !(1 << 40));
    load_ds(selector);
    s.check("loading a segment sets its accessed bit", segments::GDT.at(usize::from(FREE >> 3)), DATA);
    load_ds(segments::DATA.into());
}

fn general_protection(s: &mut Suite) {
    let address = NON_CANONICAL;
    s.trap(
        "#GP by a read at a non-canonical address",
        trapping!(=> "mov rax, [{0}]"; in(reg) address),
        vector::GP,
        0,
        "at",
    );
    s.trap(
        "#GP by a write at a non-canonical address",
        trapping!(=> "mov [{0}], al"; in(reg) address),
        vector::GP,
        0,
        "at",
    );
    s.trap(
        "#SS by a non-canonical stack address",
        trapping!(=> "mov rax, [rsp + {0}]"; in(reg) address),
        vector::SS,
        0,
        "at",
    );
    let got = catch(|| {
        // SAFETY: the jump faults.
        unsafe { core::arch::asm!("jmp {0}", in(reg) address) }
    });
    s.check(
        "#GP by a jump to a non-canonical address",
        got.map(|trap| (trap.vector, trap.error)),
        Some((vector::GP, 0)),
    );
    #[repr(align(16))]
    struct Aligned([u8; 32]);
    let bytes = Aligned([0; 32]);
    let odd = bytes.0.as_ptr().wrapping_add(8);
    s.trap(
        "#GP by MOVAPS at an odd address",
        trapping!(=> "movaps xmm0, [{0}]"; in(reg) odd, out("xmm0") _),
        vector::GP,
        0,
        "at",
    );
    s.check(
        "MOVUPS at an odd address runs",
        trapping!(=> "movups xmm0, [{0}]"; in(reg) odd, out("xmm0") _).is_none(),
        true,
    );
    let got =
        trapping!("push rbx", "xor ebx, ebx", => "cmpxchg16b [{0}]"; in(reg) odd, out("ecx") _, out("edx") _);
    s.trap("#GP by CMPXCHG16B at an odd address", got, vector::GP, 0, "at");

    let rdmsr = |number: u32| trapping!(=> "rdmsr"; in("ecx") number, out("edx") _);
    s.trap("#GP by RDMSR of an unknown register", rdmsr(0xdead_beef), vector::GP, 0, "at");
    let wrmsr = |number: u32, value: u64| trapping!("mov eax, {value:e}", => "wrmsr"; value = in(reg) value, in("ecx") number, in("edx") (value >> 32) as u32);
    let efer = cpu::rdmsr(msr::EFER);
    s.trap("#GP by a reserved bit of EFER", wrmsr(msr::EFER, efer | 1 << 63), vector::GP, 0, "at");
    s.trap(
        "#GP by clearing EFER.LME with paging on",
        wrmsr(msr::EFER, efer & !(1 << 8)),
        vector::GP,
        0,
        "at",
    );
    cpu::wrmsr(msr::EFER, efer);
    s.trap("#GP by a non-canonical LSTAR", wrmsr(msr::LSTAR, address), vector::GP, 0, "at");
    s.trap("#GP by a non-canonical FS base", wrmsr(msr::FS_BASE, address), vector::GP, 0, "at");

    control_registers(s);
    s.trap(
        "#GP by a value of CR8 above 15",
        trapping!(=> "mov cr8, {0}"; in(reg) 16u64),
        vector::GP,
        0,
        "at",
    );
    s.trap(
        "#GP by the upper half of DR7",
        trapping!(=> "mov dr7, {0}"; in(reg) 1u64 << 32),
        vector::GP,
        0,
        "at",
    );
}

fn control_registers(s: &mut Suite) {
    let (cr0, cr4) = (cpu::read_cr0(), cpu::read_cr4());
    let write_cr0 = |value: u64| trapping!(=> "mov cr0, {0}"; in(reg) value);
    let write_cr4 = |value: u64| trapping!(=> "mov cr4, {0}"; in(reg) value);
    let cases: [(_, &dyn Fn() -> Option<Trap>); 5] = [
        ("#GP by CR0 with paging without protection", &|| write_cr0(cr0 & !1)),
        ("#GP by CR0.NW without CD", &|| write_cr0(cr0 | cr0::NW)),
        ("#GP by the upper half of CR0", &|| write_cr0(cr0 | 1 << 32)),
        ("#GP by a reserved bit of CR4", &|| write_cr4(cr4 | 1 << 63)),
        ("#GP by clearing CR4.PAE in long mode", &|| write_cr4(cr4 & !cr4::PAE)),
    ];
    for (what, write) in cases {
        if machine::is_qemu_tcg() {
            s.skip(what, "QEMU's TCG takes the value and is lost");
        } else {
            s.trap(what, write(), vector::GP, 0, "at");
        }
    }
}

fn compatibility_mode(s: &mut Suite) {
    let got = compat!("sub esp, 8", "mov dword ptr [esp], 1", "mov dword ptr [esp + 4], 5", "mov eax, 7", => "bound eax, [esp]");
    s.trap("#BR by BOUND in 32-bit mode", got, vector::BR, 0, "at");
    let got = compat!("mov eax, 0x7fffffff", "add eax, 1", => ".byte 0xce");
    s.trap("#OF by INTO in 32-bit mode", got, vector::OF, 0, "after");
    let got = compat!("xor eax, eax", => ".byte 0xce");
    s.check("INTO without overflow runs", got.is_none(), true);
    let got = compat!("mov eax, 5", => ".byte 0xd4, 0");
    s.trap("#DE by AAM 0 in 32-bit mode", got, vector::DE, 0, "at");
    s.trap("#UD by UD2 in 32-bit mode", compat!(=> "ud2"), vector::UD, 0, "at");
    s.trap("#UD by SWAPGS in 32-bit mode", compat!(=> ".byte 0x0f, 0x01, 0xf8"), vector::UD, 0, "at");

    // 4 KiB from 1 MiB, byte granular, writable. A trap leaves ES flat, so each check of a fault loads it anew.
    let small = 0x0040_9300_0000_0fff | 0x10 << 32 | PRESENT;
    segments::set_descriptor(FREE, small);
    let load = |selector: u16| trapping!(=> "mov es, {0:e}"; in(reg) u32::from(selector));
    load(FREE);
    s.check("a read up to the limit runs", compat!(=> "mov eax, es:[0xffc]").is_none(), true);
    s.trap("#GP by a read across the limit", compat!(=> "mov eax, es:[0xffd]"), vector::GP, 0, "at");
    load(FREE);
    s.trap("#GP by a read beyond the limit", compat!(=> "mov al, es:[0x1000]"), vector::GP, 0, "at");
    // The same, expand-down: what was inside is outside.
    segments::set_descriptor(FREE, small | 1 << 42);
    load(FREE);
    s.trap(
        "#GP by a read below an expand-down segment",
        compat!(=> "mov al, es:[0xfff]"),
        vector::GP,
        0,
        "at",
    );
    load(FREE);
    s.check("a read inside an expand-down segment runs", compat!(=> "mov al, es:[0x1000]").is_none(), true);
    segments::set_descriptor(FREE, small & !(1 << 41));
    load(FREE);
    s.check("a read of a read-only segment runs", compat!(=> "mov al, es:[0]").is_none(), true);
    s.trap("#GP by a write to a read-only segment", compat!(=> "mov es:[0], al"), vector::GP, 0, "at");
    load(0);
    s.trap("#GP by a read through a null segment", compat!(=> "mov al, es:[0]"), vector::GP, 0, "at");
    load(segments::DATA);
    let got = compat!("push 0x0", "push 0x100000", => "retf");
    s.trap("#GP by a far return to the null selector", got, vector::GP, 0, "at");
}
