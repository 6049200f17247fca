//! Model-specific registers (SDM Vol. 4; APM Vol. 2, appendix A).
//!
//! Those of the processor itself are here. The local APIC's, the machine's and paravirtual ones are asked from
//! the environment, and what nobody knows raises #GP(0).

use crate::cpu::Cpu;
use crate::cpuid::{Vendor, Word};
use crate::env::Env;
use crate::exception::Exception;
use crate::memory::is_canonical;
use crate::registers::{Cr0, Efer};
use crate::state::{MC_BANKS, SegReg};

/// MSR numbers, by their names in the manuals.
#[allow(missing_docs)]
pub mod number {
    pub const P5_MC_ADDR: u32 = 0;
    pub const P5_MC_TYPE: u32 = 1;
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const EBL_CR_POWERON: u32 = 0x2a;
    pub const SMI_COUNT: u32 = 0x34;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRRCAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MCG_CTL: u32 = 0x17b;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_BRANCH_FROM: u32 = 0x1db;
    pub const LAST_EXCEPTION_TO: u32 = 0x1de;
    pub const MTRR_PHYSBASE0: u32 = 0x200;
    pub const MTRR_PHYSMASK7: u32 = 0x20f;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K_80000: u32 = 0x258;
    pub const MTRR_FIX16K_A0000: u32 = 0x259;
    pub const MTRR_FIX4K_C0000: u32 = 0x268;
    pub const MTRR_FIX4K_F8000: u32 = 0x26f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const MC0_CTL: u32 = 0x400;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const PERF_CTL0: u32 = 0xc001_0000;
    pub const PERF_CTR3: u32 = 0xc001_0007;
    pub const SYSCFG: u32 = 0xc001_0010;
    pub const HWCR: u32 = 0xc001_0015;
    pub const TOP_MEM: u32 = 0xc001_001a;
    pub const TOP_MEM2: u32 = 0xc001_001d;
    pub const NB_CFG: u32 = 0xc001_001f;
    pub const PATCH_LOADER: u32 = 0xc001_0020;
    pub const INT_PENDING: u32 = 0xc001_0055;
    pub const MMIO_CFG_BASE: u32 = 0xc001_0058;
    pub const VM_CR: u32 = 0xc001_0114;
    pub const LS_CFG: u32 = 0xc001_1020;
    pub const IC_CFG: u32 = 0xc001_1021;
    pub const DC_CFG: u32 = 0xc001_1022;
    pub const TW_CFG: u32 = 0xc001_1023;
    pub const FP_CFG: u32 = 0xc001_1028;
    pub const DE_CFG: u32 = 0xc001_1029;
    pub const BU_CFG2: u32 = 0xc001_102a;
}

use number::*;

/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO: the guest needs no mitigation.
const ARCH_CAPABILITIES_VALUE: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write-combining.
const MTRRCAP_VALUE: u64 = 8 | 1 << 8 | 1 << 10;
/// IA32_MTRR_DEF_TYPE: the bits that are not reserved.
const MTRR_DEF_TYPE_BITS: u64 = 0xcff;
/// IA32_MCG_CAP: the banks, and IA32_MCG_CTL is there (bit 8).
const MCG_CAP_VALUE: u64 = MC_BANKS as u64 | 1 << 8;
/// IA32_MISC_ENABLE, read-only: no branch trace storage, no PEBS.
const MISC_ENABLE_ONES: u64 = 1 << 11 | 1 << 12;
/// IA32_MISC_ENABLE, read-only: no performance monitoring.
const MISC_ENABLE_ZEROS: u64 = 1 << 7;
/// IA32_SPEC_CTRL: IBRS and STIBP.
const SPEC_CTRL_BITS: u64 = 0b11;
/// IA32_DEBUGCTL: LBR, BTF, and AMD's pin control bits.
const DEBUGCTL_BITS: u64 = 0x3f;
/// HWCR: machine-check status registers may be written.
const HWCR_MC_STATUS_WRITE: u64 = 1 << 18;
/// HWCR, always: the TSC counts at the frequency of P-state 0.
const HWCR_TSC_FREQUENCY: u64 = 1 << 24;
/// HWCR: bits that are kept though they do nothing here (TLB cache, FFDIS, IGNNE), and the one that does.
const HWCR_BITS: u64 = 1 << 3 | 1 << 6 | 1 << 8 | HWCR_MC_STATUS_WRITE;
/// DE_CFG: LFENCE is serializing.
const DE_CFG_LFENCE: u64 = 1 << 1;
/// NB_CFG: the extended configuration space is reached through port CF8h.
const NB_CFG_CF8_EXTENDED: u64 = 1 << 46;
/// VM_CR: SVM is disabled, and locked so.
const VM_CR_DISABLED: u64 = 1 << 3 | 1 << 4;
/// Revision of the microcode that AMD processors show in virtual machines.
const AMD_PATCH_LEVEL: u64 = 0x0100_0065;

impl Cpu {
    /// RDMSR without its privilege check: the value, or #GP(0).
    pub fn read_msr<E: Env>(&mut self, env: &mut E, msr: u32) -> Result<u64, Exception> {
        let own = &self.state.msr;
        let value = match msr {
            TSC => env.tsc(),
            TSC_ADJUST => own.tsc_adjust,
            MTRRCAP => MTRRCAP_VALUE,
            SYSENTER_CS => own.sysenter_cs,
            SYSENTER_ESP => own.sysenter_esp,
            SYSENTER_EIP => own.sysenter_eip,
            MISC_ENABLE => own.misc_enable & !MISC_ENABLE_ZEROS | MISC_ENABLE_ONES,
            DEBUGCTL => own.debugctl,
            PAT => own.pat,
            MTRR_DEF_TYPE => own.mtrr_def_type,
            MTRR_PHYSBASE0..=MTRR_PHYSMASK7 => own.mtrr_variable[(msr & 15) as usize],
            EFER => own.efer,
            STAR => own.star,
            LSTAR => own.lstar,
            CSTAR => own.cstar,
            SFMASK => own.sfmask,
            FS_BASE => self.state.seg[SegReg::Fs as usize].base,
            GS_BASE => self.state.seg[SegReg::Gs as usize].base,
            KERNEL_GS_BASE => own.kernel_gs_base,
            TSC_AUX => own.tsc_aux,
            SPEC_CTRL if self.has_spec_ctrl() => own.spec_ctrl,
            ARCH_CAPABILITIES if self.model.has(Word::L7Edx, 29) => ARCH_CAPABILITIES_VALUE,
            P5_MC_ADDR | P5_MC_TYPE | LAST_BRANCH_FROM..=LAST_EXCEPTION_TO => 0,
            _ => {
                return self
                    .read_fixed_mtrr(msr)
                    .or_else(|| self.read_machine_check(msr))
                    .or_else(|| self.read_vendor_msr(msr))
                    .or_else(|| env.read_msr(msr))
                    .ok_or(Exception::GP0);
            }
        };
        Ok(value)
    }

    /// WRMSR without its privilege check: #GP(0) if there is no such register or it can't have this value.
    pub fn write_msr<E: Env>(&mut self, env: &mut E, msr: u32, value: u64) -> Result<(), Exception> {
        match msr {
            TSC => {
                let adjust = &mut self.state.msr.tsc_adjust;
                *adjust = adjust.wrapping_add(value.wrapping_sub(env.tsc()));
                env.set_tsc(value);
            }
            TSC_ADJUST => {
                let by = value.wrapping_sub(self.state.msr.tsc_adjust);
                self.state.msr.tsc_adjust = value;
                env.set_tsc(env.tsc().wrapping_add(by));
            }
            SYSENTER_CS => self.state.msr.sysenter_cs = value,
            SYSENTER_ESP => self.state.msr.sysenter_esp = self.sysenter_address(value)?,
            SYSENTER_EIP => self.state.msr.sysenter_eip = self.sysenter_address(value)?,
            MISC_ENABLE => self.state.msr.misc_enable = value & !MISC_ENABLE_ZEROS | MISC_ENABLE_ONES,
            DEBUGCTL => self.state.msr.debugctl = only(value, DEBUGCTL_BITS)?,
            PAT => {
                check(value.to_le_bytes().iter().all(|&entry| matches!(entry, 0 | 1 | 4..=7)))?;
                self.state.msr.pat = value;
            }
            EFER => self.write_efer(value)?,
            STAR => self.state.msr.star = value,
            LSTAR => self.state.msr.lstar = canonical(value)?,
            CSTAR => self.state.msr.cstar = canonical(value)?,
            SFMASK => self.state.msr.sfmask = value & 0xffff_ffff,
            FS_BASE => self.state.seg[SegReg::Fs as usize].base = canonical(value)?,
            GS_BASE => self.state.seg[SegReg::Gs as usize].base = canonical(value)?,
            KERNEL_GS_BASE => self.state.msr.kernel_gs_base = canonical(value)?,
            TSC_AUX => {
                check(self.model.vendor == Vendor::Amd || value >> 32 == 0)?;
                self.state.msr.tsc_aux = value & 0xffff_ffff;
            }
            SPEC_CTRL if self.has_spec_ctrl() => self.state.msr.spec_ctrl = only(value, SPEC_CTRL_BITS)?,
            // The SPEC_CTRL bit of Intel's CPUID announces both registers.
            PRED_CMD if self.model.has(Word::L7Edx, 26) => check(value & !1 == 0)?,
            // Loading new microcode changes nothing.
            BIOS_UPDT_TRIG | BIOS_SIGN_ID => {}
            P5_MC_ADDR | P5_MC_TYPE => {}
            _ => {
                let known = self.write_mtrr(msr, value)?
                    || self.write_machine_check(msr, value)?
                    || self.write_amd_msr(msr, value)
                    || env.write_msr(msr, value);
                check(known)?;
            }
        }
        Ok(())
    }

    fn has_spec_ctrl(&self) -> bool {
        self.model.has(Word::L7Edx, 26) || self.model.has(Word::X8Ebx, 14)
    }

    /// Intel refuses an address that is not canonical; AMD keeps its low bits.
    fn sysenter_address(&self, value: u64) -> Result<u64, Exception> {
        match self.model.vendor {
            Vendor::Intel => canonical(value),
            Vendor::Amd => Ok(((value << 16) as i64 >> 16) as u64),
        }
    }

    /// EFER (SDM Vol. 3A, section 2.2.1): LMA is read-only, LME can't change while paging is on.
    fn write_efer(&mut self, value: u64) -> Result<(), Exception> {
        let mut allowed = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
        if self.model.has(Word::X21Eax, 8) {
            allowed |= Efer::AUTO_IBRS;
        }
        only(value, allowed.bits())?;
        let old = self.state.msr.efer;
        let new = value & !Efer::LMA.bits() | old & Efer::LMA.bits();
        check((old ^ new) & Efer::LME.bits() == 0 || !self.state.cr0_has(Cr0::PG))?;
        self.state.msr.efer = new;
        if (old ^ new) & Efer::NXE.bits() != 0 {
            self.flush_tlb();
        }
        Ok(())
    }

    fn read_fixed_mtrr(&self, msr: u32) -> Option<u64> {
        self.state.msr.mtrr_fixed.get(fixed_mtrr(msr)?).copied()
    }

    /// False if it is no MTRR that can be written (SDM Vol. 3A, section 12.11.2).
    fn write_mtrr(&mut self, msr: u32, value: u64) -> Result<bool, Exception> {
        if let Some(slot) = fixed_mtrr(msr).and_then(|number| self.state.msr.mtrr_fixed.get_mut(number)) {
            check(value.to_le_bytes().into_iter().all(is_mtrr_type))?;
            *slot = value;
            return Ok(true);
        }
        match msr {
            MTRR_DEF_TYPE => {
                check(is_mtrr_type(value as u8))?;
                self.state.msr.mtrr_def_type = only(value, MTRR_DEF_TYPE_BITS)?;
            }
            MTRR_PHYSBASE0..=MTRR_PHYSMASK7 => {
                let is_mask = msr & 1 != 0;
                let low = if is_mask { 1 << 11 } else { 0xff };
                check(is_mask || is_mtrr_type(value as u8))?;
                let value = only(value, self.physical_mask() & !0xfff | low)?;
                self.state.msr.mtrr_variable[(msr & 15) as usize] = value;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn read_machine_check(&self, msr: u32) -> Option<u64> {
        match msr {
            MCG_CAP => Some(MCG_CAP_VALUE),
            MCG_STATUS => Some(self.state.msr.mcg_status),
            MCG_CTL => Some(self.state.msr.mcg_ctl),
            _ => {
                let (bank, register) = machine_check_register(msr)?;
                self.state.msr.mc_banks.get(bank)?.get(register).copied()
            }
        }
    }

    /// False if it is none of the machine-check registers that can be written (SDM Vol. 3B, section 16.3).
    fn write_machine_check(&mut self, msr: u32, value: u64) -> Result<bool, Exception> {
        match msr {
            MCG_STATUS => self.state.msr.mcg_status = only(value, 0b1111)?,
            MCG_CTL => self.state.msr.mcg_ctl = all_or_nothing(value)?,
            _ => {
                let status_writable = self.state.msr.hwcr & HWCR_MC_STATUS_WRITE != 0;
                let Some((bank, register)) = machine_check_register(msr) else { return Ok(false) };
                let banks = &mut self.state.msr.mc_banks;
                let Some(slot) = banks.get_mut(bank).and_then(|bank| bank.get_mut(register)) else {
                    return Ok(false);
                };
                *slot = match register {
                    0 => all_or_nothing(value)?,
                    1 if !status_writable => only(value, 0)?,
                    _ => value,
                };
            }
        }
        Ok(true)
    }

    /// Registers that only one vendor's processors have.
    fn read_vendor_msr(&self, msr: u32) -> Option<u64> {
        if self.model.vendor == Vendor::Intel {
            return match msr {
                PLATFORM_ID | EBL_CR_POWERON | SMI_COUNT => Some(0),
                BIOS_SIGN_ID => Some(1 << 32),
                // Bits 8 to 15: the base frequency in units of 100 MHz.
                PLATFORM_INFO => Some(u64::from(self.model.query(0x16, 0)[0] / 100) << 8 & 0xff00),
                _ => None,
            };
        }
        match msr {
            BIOS_SIGN_ID => Some(AMD_PATCH_LEVEL),
            HWCR => Some(self.state.msr.hwcr | HWCR_TSC_FREQUENCY),
            NB_CFG => Some(NB_CFG_CF8_EXTENDED),
            VM_CR => Some(VM_CR_DISABLED),
            DE_CFG => Some(DE_CFG_LFENCE),
            SYSCFG | TOP_MEM | TOP_MEM2 | INT_PENDING | MMIO_CFG_BASE => Some(0),
            LS_CFG | IC_CFG | DC_CFG | TW_CFG | FP_CFG | BU_CFG2 => Some(0),
            // Every AMD processor has these counters, so no CPUID bit can hide them; they never count.
            PERF_CTL0..=PERF_CTR3 => Some(0),
            _ => None,
        }
    }

    /// False if it is none of AMD's registers. What the guest writes to the configuration registers has no effect.
    fn write_amd_msr(&mut self, msr: u32, value: u64) -> bool {
        if self.model.vendor == Vendor::Intel {
            return false;
        }
        match msr {
            HWCR => self.state.msr.hwcr = value & HWCR_BITS,
            NB_CFG | DE_CFG | SYSCFG | TOP_MEM | TOP_MEM2 | INT_PENDING | PATCH_LOADER => {}
            LS_CFG | IC_CFG | DC_CFG | TW_CFG | FP_CFG | BU_CFG2 => {}
            PERF_CTL0..=PERF_CTR3 => {}
            _ => return false,
        }
        true
    }
}

fn check(condition: bool) -> Result<(), Exception> {
    if condition { Ok(()) } else { Err(Exception::GP0) }
}

/// The value if it has no other bits than `allowed`.
fn only(value: u64, allowed: u64) -> Result<u64, Exception> {
    check(value & !allowed == 0).map(|()| value)
}

fn canonical(value: u64) -> Result<u64, Exception> {
    check(is_canonical(value)).map(|()| value)
}

fn all_or_nothing(value: u64) -> Result<u64, Exception> {
    check(value == 0 || value == u64::MAX).map(|()| value)
}

/// Memory types that MTRRs know: UC, WC, WT, WP, WB.
fn is_mtrr_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4..=6)
}

/// Number of a fixed-range MTRR in the order of its addresses.
fn fixed_mtrr(msr: u32) -> Option<usize> {
    match msr {
        MTRR_FIX64K => Some(0),
        MTRR_FIX16K_80000 => Some(1),
        MTRR_FIX16K_A0000 => Some(2),
        MTRR_FIX4K_C0000..=MTRR_FIX4K_F8000 => Some(3 + (msr - MTRR_FIX4K_C0000) as usize),
        _ => None,
    }
}

/// Bank and register (0 CTL, 1 STATUS, 2 ADDR, 3 MISC) of an IA32_MCi register.
fn machine_check_register(msr: u32) -> Option<(usize, usize)> {
    let number = msr.checked_sub(MC0_CTL)? as usize;
    Some((number / 4, number % 4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestEnv, test_cpu};

    const ADDRESS: u64 = 0x1234_5678_9abc;
    const NOT_CANONICAL: u64 = 0xaaaa_aaaa_aaaa_aaaa;
    const GP: Result<(), Exception> = Err(Exception::GP0);

    #[track_caller]
    fn holds(vendor: Vendor, msr: u32, value: u64) {
        let (mut cpu, mut env) = (test_cpu(vendor), TestEnv::new(0));
        assert_eq!(cpu.write_msr(&mut env, msr, value), Ok(()), "{msr:x}");
        assert_eq!(cpu.read_msr(&mut env, msr), Ok(value), "{msr:x}");
    }

    #[track_caller]
    fn refuses(vendor: Vendor, msr: u32, value: u64) {
        assert_eq!(test_cpu(vendor).write_msr(&mut TestEnv::new(0), msr, value), GP, "{msr:x}");
    }

    #[test]
    fn addresses_are_canonical() {
        for msr in [FS_BASE, GS_BASE, KERNEL_GS_BASE, LSTAR, CSTAR] {
            holds(Vendor::Amd, msr, ADDRESS);
            refuses(Vendor::Amd, msr, NOT_CANONICAL);
        }
        for msr in [SYSENTER_EIP, SYSENTER_ESP] {
            holds(Vendor::Amd, msr, ADDRESS);
            refuses(Vendor::Intel, msr, NOT_CANONICAL);
            let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0));
            cpu.write_msr(&mut env, msr, NOT_CANONICAL).unwrap();
            assert_eq!(cpu.read_msr(&mut env, msr), Ok(0xffff_aaaa_aaaa_aaaa));
        }
    }

    #[test]
    fn values_that_are_kept() {
        holds(Vendor::Amd, MISC_ENABLE, 0x4_00c5_0809 | MISC_ENABLE_ONES);
        holds(Vendor::Amd, PAT, 0x0707_0707);
        holds(Vendor::Amd, SFMASK, 0xffff_ffff);
        holds(Vendor::Amd, STAR, u64::MAX);
        holds(Vendor::Amd, MTRR_DEF_TYPE, 0xc06);
        holds(Vendor::Amd, MTRR_FIX4K_F8000, 0x0606_0606_0505_0000);
        holds(Vendor::Intel, SPEC_CTRL, 1);
        refuses(Vendor::Amd, PAT, 2);
        refuses(Vendor::Amd, PAT, 8 << 56);
        refuses(Vendor::Amd, MTRR_DEF_TYPE, 2);
        refuses(Vendor::Amd, MTRR_FIX64K, 0x0200);
        refuses(Vendor::Amd, MTRR_PHYSBASE0, 1 << 52);
        refuses(Vendor::Amd, MTRR_PHYSBASE0 + 1, 6);
        refuses(Vendor::Amd, MTRRCAP, 0);
        refuses(Vendor::Amd, ARCH_CAPABILITIES, 0);
        refuses(Vendor::Amd, SPEC_CTRL, 1 << 2);
        refuses(Vendor::Intel, TSC_AUX, 1 << 32);
    }

    #[test]
    fn efer() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0));
        let long = (Efer::LME | Efer::SCE | Efer::NXE).bits();
        assert_eq!(cpu.write_msr(&mut env, EFER, long | Efer::LMA.bits()), Ok(()));
        assert_eq!(cpu.state.msr.efer, long, "LMA is read-only");
        cpu.state.cr0 |= (Cr0::PG | Cr0::PE).bits();
        assert_eq!(cpu.write_msr(&mut env, EFER, 0), GP, "LME while paging is on");
        assert_eq!(cpu.write_msr(&mut env, EFER, long | Efer::SVME.bits()), GP);
        assert_eq!(cpu.write_msr(&mut env, EFER, long | Efer::AUTO_IBRS.bits()), Ok(()));
        refuses(Vendor::Intel, EFER, Efer::AUTO_IBRS.bits());
    }

    #[test]
    fn time_stamp_counter_and_its_adjustment() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0));
        env.tsc.set(1000);
        cpu.write_msr(&mut env, TSC_ADJUST, 5000).unwrap();
        assert!((6000..6010).contains(&env.tsc.get()));
        cpu.write_msr(&mut env, TSC, 1_000_000).unwrap();
        assert!((998_990..=999_000).contains(&cpu.read_msr(&mut env, TSC_ADJUST).unwrap()));
        assert!((1_000_000..1_000_010).contains(&cpu.read_msr(&mut env, TSC).unwrap()));
    }

    #[test]
    fn machine_check_banks() {
        let bank = |number: u32, register: u32| MC0_CTL + 4 * number + register;
        let last = MC_BANKS as u32 - 1;
        for value in [0, u64::MAX] {
            holds(Vendor::Amd, bank(last, 0), value);
            holds(Vendor::Amd, bank(last, 2), value);
            holds(Vendor::Amd, bank(last, 3), value);
        }
        holds(Vendor::Amd, bank(0, 2), NOT_CANONICAL);
        refuses(Vendor::Amd, bank(0, 0), NOT_CANONICAL);
        refuses(Vendor::Amd, bank(0, 1), 1);
        refuses(Vendor::Amd, bank(last + 1, 0), 0);
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0));
        cpu.write_msr(&mut env, HWCR, HWCR_MC_STATUS_WRITE).unwrap();
        assert_eq!(cpu.write_msr(&mut env, bank(0, 1), 1), Ok(()));
        assert_eq!(cpu.read_msr(&mut env, bank(last + 1, 0)), Err(Exception::GP0));
    }

    #[test]
    fn others_are_the_environments() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Intel), TestEnv::new(0));
        env.msrs.insert(0x4b56_4d00, 7);
        assert_eq!(cpu.read_msr(&mut env, 0x4b56_4d00), Ok(7));
        assert_eq!(cpu.write_msr(&mut env, 0x4b56_4d00, 8), Ok(()));
        assert_eq!(cpu.read_msr(&mut env, 0xc001_0015), Err(Exception::GP0), "HWCR is AMD's");
        refuses(Vendor::Intel, 0x1234_5678, 0);
    }
}
