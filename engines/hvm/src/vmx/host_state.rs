//! The host's registers, as the control structure holds them for the way out of a guest (SDM Vol. 3C, section 25.5).
#![allow(unsafe_code)]

use core::arch::asm;

use bivisor_x86::msr::number;

use super::field::{Field, Vmcs};
use crate::host::read_msr;

/// GDTR or IDTR, as SGDT and SIDT store them.
#[repr(C, packed)]
#[derive(Default)]
struct TablePointer {
    _limit: u16,
    base: u64,
}

/// The registers of the current processor. They are the same as long as guests are entered, but for RSP and RIP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HostState {
    /// CR0, CR3, CR4.
    control: [u64; 3],
    /// ES, CS, SS, DS, FS, GS, TR.
    selectors: [u16; 7],
    fs_base: u64,
    gs_base: u64,
    tr_base: u64,
    gdt_base: u64,
    idt_base: u64,
    pat: u64,
    efer: u64,
}

impl HostState {
    /// Reads them.
    ///
    /// # Safety
    /// At privilege level 0 in 64-bit mode, with a task register that the global descriptor table describes.
    pub(super) unsafe fn read() -> Self {
        let mut state = Self::default();
        let (mut gdt, mut idt) = (TablePointer::default(), TablePointer::default());
        let [cr0, cr3, cr4] = &mut state.control;
        let [es, cs, ss, ds, fs, gs, tr] = &mut state.selectors;
        // SAFETY: the caller's promise; only registers are read, and two table pointers stored into variables. The descriptor
        // of the task register lies in the table.
        unsafe {
            asm!("mov {}, cr0", out(reg) * cr0, options(nomem, nostack, preserves_flags));
            asm!("mov {}, cr3", out(reg) * cr3, options(nomem, nostack, preserves_flags));
            asm!("mov {}, cr4", out(reg) * cr4, options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, es", out(reg) * es, options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, cs", out(reg) * cs, options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, ss", out(reg) * ss, options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, ds", out(reg) * ds, options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, fs", out(reg) * fs, options(nomem, nostack, preserves_flags));
            asm!("mov {:x}, gs", out(reg) * gs, options(nomem, nostack, preserves_flags));
            asm!("str {:x}", out(reg) * tr, options(nomem, nostack, preserves_flags));
            asm!("sgdt [{}]", in(reg) &raw mut gdt, options(nostack, preserves_flags));
            asm!("sidt [{}]", in(reg) &raw mut idt, options(nostack, preserves_flags));
            let descriptor = (gdt.base + u64::from(*tr & !7)) as *const [u64; 2];
            state.tr_base = task_base(descriptor.read_unaligned());
            state.fs_base = read_msr(number::FS_BASE);
            state.gs_base = read_msr(number::GS_BASE);
            state.pat = read_msr(number::PAT);
            state.efer = read_msr(number::EFER);
        }
        (state.gdt_base, state.idt_base) = (gdt.base, idt.base);
        state
    }

    /// Writes them into a control structure. What SYSENTER uses is zero, as the hypervisor doesn't.
    pub(super) fn write(&self, vmcs: &mut impl Vmcs) {
        let selectors = [
            Field::HostEsSelector,
            Field::HostCsSelector,
            Field::HostSsSelector,
            Field::HostDsSelector,
            Field::HostFsSelector,
            Field::HostGsSelector,
            Field::HostTrSelector,
        ];
        for (field, selector) in selectors.into_iter().zip(self.selectors) {
            vmcs.write(field, selector.into());
        }
        let [cr0, cr3, cr4] = self.control;
        for (field, value) in [
            (Field::HostCr0, cr0),
            (Field::HostCr3, cr3),
            (Field::HostCr4, cr4),
            (Field::HostFsBase, self.fs_base),
            (Field::HostGsBase, self.gs_base),
            (Field::HostTrBase, self.tr_base),
            (Field::HostGdtrBase, self.gdt_base),
            (Field::HostIdtrBase, self.idt_base),
            (Field::HostPat, self.pat),
            (Field::HostEfer, self.efer),
            (Field::HostSysenterCs, 0),
            (Field::HostSysenterEsp, 0),
            (Field::HostSysenterEip, 0),
        ] {
            vmcs.write(field, value);
        }
    }
}

/// Base of the 64-bit task state that a descriptor describes (SDM Vol. 3A, figure 8-4).
fn task_base([low, high]: [u64; 2]) -> u64 {
    low >> 16 & 0xff_ffff | low >> 56 << 24 | high << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::field::Written;

    #[test]
    fn the_base_of_a_task_state() {
        assert_eq!(task_base([0x9a00_89bc_def0_0067, 0x1234_5678]), 0x1234_5678_9abc_def0);
    }

    #[test]
    fn fields() {
        let host = HostState {
            control: [0x8001_0033, 0x5000, 0x4_2620],
            selectors: [0x10, 8, 0x10, 0x10, 0, 0, 0x18],
            tr_base: 0x1234,
            efer: 0xd00,
            ..HostState::default()
        };
        let mut vmcs = Written::default();
        host.write(&mut vmcs);
        assert_eq!((vmcs.read(Field::HostCsSelector), vmcs.read(Field::HostTrSelector)), (8, 0x18));
        assert_eq!((vmcs.read(Field::HostCr3), vmcs.read(Field::HostTrBase)), (0x5000, 0x1234));
        assert_eq!((vmcs.read(Field::HostEfer), vmcs.0.len()), (0xd00, 20));
    }
}
