//! Control registers and XCR0: what may be written to them, and what a change brings about (SDM Vol. 3A, sections
//! 2.5, 4.1, 10.8.5; APM Vol. 2, sections 3.1 and 14.6).

use crate::cpu::Cpu;
use crate::cpuid::Word;
use crate::env::Env;
use crate::exception::Exception;
use crate::registers::{Cr0, Cr4, Efer};
use crate::state::{SegReg, Segment, XCR0_AVX, XCR0_SSE, XCR0_X87};

/// The bits of CR0 that exist; others read as zero and are ignored when written, ET is always one.
const CR0_BITS: Cr0 = Cr0::PE
    .union(Cr0::MP)
    .union(Cr0::EM)
    .union(Cr0::TS)
    .union(Cr0::NE)
    .union(Cr0::WP)
    .union(Cr0::AM)
    .union(Cr0::NW)
    .union(Cr0::CD)
    .union(Cr0::PG);
/// Changes of CR0 that end the validity of cached translations.
const CR0_FLUSHES: Cr0 = Cr0::PG.union(Cr0::WP);
/// Changes of CR0 with which PAE paging reads its four root entries anew (SDM Vol. 3A, section 4.4.1).
const CR0_LOADS_PDPTES: Cr0 = Cr0::CD.union(Cr0::NW).union(Cr0::PG);
/// Changes of CR4 that end the validity of cached translations.
const CR4_FLUSHES: Cr4 =
    Cr4::PSE.union(Cr4::PAE).union(Cr4::PGE).union(Cr4::PCIDE).union(Cr4::SMEP).union(Cr4::SMAP);
/// Changes of CR4 with which PAE paging reads its four root entries anew.
const CR4_LOADS_PDPTES: Cr4 = Cr4::PAE.union(Cr4::PGE).union(Cr4::PSE).union(Cr4::SMEP);
/// CR4 bits, each with the CPUID bit without which it is reserved.
const CR4_FEATURES: [(Cr4, Word, u32); 9] = [
    (Cr4::VME, Word::L1Edx, 1),
    (Cr4::PVI, Word::L1Edx, 1),
    (Cr4::UMIP, Word::L7Ecx, 2),
    (Cr4::FSGSBASE, Word::L7Ebx, 0),
    (Cr4::PCIDE, Word::L1Ecx, 17),
    (Cr4::OSXSAVE, Word::L1Ecx, 26),
    (Cr4::SMEP, Word::L7Ebx, 7),
    (Cr4::SMAP, Word::L7Ebx, 20),
    (Cr4::PKE, Word::L7Ecx, 3),
];
/// CR4 bits that every processor with long mode has.
const CR4_BASELINE: Cr4 = Cr4::TSD
    .union(Cr4::DE)
    .union(Cr4::PSE)
    .union(Cr4::PAE)
    .union(Cr4::MCE)
    .union(Cr4::PGE)
    .union(Cr4::PCE)
    .union(Cr4::OSFXSR)
    .union(Cr4::OSXMMEXCPT);

impl Cpu {
    /// Writes CR0 as MOV does, with all checks but that of the privilege level.
    pub fn write_cr0<E: Env>(&mut self, env: &mut E, value: u64) -> Result<(), Exception> {
        let has = |bit: Cr0| value & bit.bits() != 0;
        if value >> 32 != 0 || has(Cr0::PG) && !has(Cr0::PE) || has(Cr0::NW) && !has(Cr0::CD) {
            return Err(Exception::GP0);
        }
        let new = value & CR0_BITS.bits() | Cr0::ET.bits();
        let changed = self.state.cr0 ^ new;
        let efer = self.state.msr.efer;
        let mut new_efer = efer;
        if changed & Cr0::PG.bits() != 0 {
            let long_code = self.state.seg[SegReg::Cs as usize].attributes & Segment::L != 0;
            if has(Cr0::PG) && efer & Efer::LME.bits() != 0 {
                if !self.state.cr4_has(Cr4::PAE) || long_code {
                    return Err(Exception::GP0);
                }
                new_efer |= Efer::LMA.bits();
            } else if !has(Cr0::PG) {
                if self.in_64bit_mode() || self.state.cr4_has(Cr4::PCIDE) {
                    return Err(Exception::GP0);
                }
                new_efer &= !Efer::LMA.bits();
            }
        }
        let pae = self.state.cr4_has(Cr4::PAE) && new_efer & Efer::LMA.bits() == 0;
        if has(Cr0::PG) && pae && changed & CR0_LOADS_PDPTES.bits() != 0 {
            self.state.pdpte = self.read_pdptes(env, self.state.cr3)?;
        }
        self.state.msr.efer = new_efer;
        self.state.cr0 = new;
        if changed & CR0_FLUSHES.bits() != 0 {
            self.flush_tlb();
        }
        Ok(())
    }

    /// Writes CR4 as MOV does, with all checks but that of the privilege level.
    pub fn write_cr4<E: Env>(&mut self, env: &mut E, new: u64) -> Result<(), Exception> {
        if new & !self.cr4_allowed() != 0 {
            return Err(Exception::GP0);
        }
        let old = self.state.cr4;
        let sets = |bit: Cr4| new & !old & bit.bits() != 0;
        let long = self.in_long_mode();
        if long && new & Cr4::PAE.bits() == 0 || sets(Cr4::PCIDE) && (!long || self.state.cr3 & 0xfff != 0) {
            return Err(Exception::GP0);
        }
        let changed = old ^ new;
        if self.state.cr0_has(Cr0::PG) && self.uses_pdptes(new) && changed & CR4_LOADS_PDPTES.bits() != 0 {
            self.state.pdpte = self.read_pdptes(env, self.state.cr3)?;
        }
        self.state.cr4 = new;
        if changed & Cr4::DE.bits() != 0 {
            self.debug_changed();
        }
        if changed & CR4_FLUSHES.bits() != 0 {
            self.flush_tlb();
        }
        Ok(())
    }

    /// The bits of CR4 that this model has.
    pub fn cr4_allowed(&self) -> u64 {
        CR4_FEATURES
            .iter()
            .filter(|&&(_, word, bit)| self.model.has(word, bit))
            .fold(CR4_BASELINE, |bits, &(feature, ..)| bits | feature)
            .bits()
    }

    /// Writes XCR0 as XSETBV does, with all checks but that of the privilege level (SDM Vol. 1, section 13.3).
    pub fn write_xcr0(&mut self, value: u64) -> Result<(), Exception> {
        let avx_alone = value & XCR0_AVX != 0 && value & XCR0_SSE == 0;
        if value & XCR0_X87 == 0 || avx_alone || value & !self.model.xcr0 != 0 {
            return Err(Exception::GP0);
        }
        self.state.xcr0 = value;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::Vendor;
    use crate::testing::{TestEnv, test_cpu};

    const GP: Result<(), Exception> = Err(Exception::GP0);
    const PAGED: u64 = Cr0::PE.bits() | Cr0::PG.bits();

    #[test]
    fn cr0_combinations() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0x1000));
        assert_eq!(cpu.write_cr0(&mut env, Cr0::PG.bits()), GP);
        assert_eq!(cpu.write_cr0(&mut env, Cr0::NW.bits()), GP);
        assert_eq!(cpu.write_cr0(&mut env, 1 << 32), GP);
        assert_eq!(cpu.write_cr0(&mut env, Cr0::PE.bits() | 1 << 6), Ok(()));
        assert_eq!(cpu.state.cr0, (Cr0::PE | Cr0::ET).bits());
    }

    #[test]
    fn long_mode_goes_on_and_off_with_paging() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0x1000));
        cpu.state.msr.efer = Efer::LME.bits();
        assert_eq!(cpu.write_cr0(&mut env, PAGED), GP, "needs PAE");
        cpu.write_cr4(&mut env, Cr4::PAE.bits()).unwrap();
        cpu.state.seg[SegReg::Cs as usize].attributes |= Segment::L;
        assert_eq!(cpu.write_cr0(&mut env, PAGED), GP, "CS.L is set");
        cpu.state.seg[SegReg::Cs as usize].attributes &= !Segment::L;
        assert_eq!(cpu.write_cr0(&mut env, PAGED), Ok(()));
        assert_eq!(cpu.state.msr.efer, (Efer::LME | Efer::LMA).bits());
        assert_eq!(cpu.write_cr4(&mut env, 0), GP, "PAE must stay");
        cpu.state.seg[SegReg::Cs as usize].attributes |= Segment::L;
        assert_eq!(cpu.write_cr0(&mut env, Cr0::PE.bits()), GP, "in 64-bit mode");
        cpu.state.seg[SegReg::Cs as usize].attributes &= !Segment::L;
        assert_eq!(cpu.write_cr0(&mut env, Cr0::PE.bits()), Ok(()));
        assert_eq!(cpu.state.msr.efer, Efer::LME.bits());
    }

    #[test]
    fn process_context_identifiers() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0x1000));
        let (pae, pcide) = (Cr4::PAE.bits(), (Cr4::PAE | Cr4::PCIDE).bits());
        assert_eq!(cpu.write_cr4(&mut env, pcide), GP, "outside long mode");
        cpu.state.msr.efer = Efer::LME.bits();
        cpu.write_cr4(&mut env, pae).unwrap();
        cpu.write_cr0(&mut env, PAGED).unwrap();
        cpu.load_cr3(&mut env, 0x18).unwrap();
        assert_eq!(cpu.write_cr4(&mut env, pcide), GP, "with a PCID in CR3");
        assert_eq!(cpu.load_cr3(&mut env, 1 << 63), GP, "bit 63 without PCIDE");
        cpu.load_cr3(&mut env, 0).unwrap();
        assert_eq!(cpu.write_cr4(&mut env, pcide), Ok(()));
        assert_eq!(cpu.load_cr3(&mut env, 1 << 63 | 5), Ok(()));
        assert_eq!(cpu.state.cr3, 5);
        assert_eq!(cpu.write_cr0(&mut env, Cr0::PE.bits()), GP, "PCIDE keeps paging on");
    }

    #[test]
    fn pae_paging_checks_its_root_entries() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0x2000));
        env.put(0x1000, &0x5001u64.to_le_bytes());
        env.put(0x1008, &3u64.to_le_bytes());
        cpu.state.cr3 = 0x1000;
        cpu.write_cr4(&mut env, Cr4::PAE.bits()).unwrap();
        assert_eq!(cpu.write_cr0(&mut env, PAGED), GP, "a reserved bit is set");
        assert_eq!(cpu.state.cr0 & PAGED, 0);
        env.put(0x1008, &[0; 8]);
        assert_eq!(cpu.write_cr0(&mut env, PAGED), Ok(()));
        assert_eq!(cpu.state.pdpte, [0x5001, 0, 0, 0]);
    }

    #[test]
    fn cr4_has_what_the_model_offers() {
        let (mut cpu, mut env) = (test_cpu(Vendor::Amd), TestEnv::new(0));
        for bit in [Cr4::VMXE, Cr4::LA57, Cr4::PKE, Cr4::VME] {
            assert_eq!(cpu.write_cr4(&mut env, bit.bits()), GP);
        }
        let all = Cr4::SMEP | Cr4::SMAP | Cr4::UMIP | Cr4::FSGSBASE | Cr4::OSXSAVE | Cr4::MCE;
        assert_eq!(cpu.write_cr4(&mut env, all.bits()), Ok(()));
    }

    #[test]
    fn xcr0() {
        let mut cpu = test_cpu(Vendor::Amd);
        for bad in [0, XCR0_SSE, XCR0_X87 | XCR0_AVX, 0xe7, 1 << 9 | XCR0_X87] {
            assert_eq!(cpu.write_xcr0(bad), GP);
        }
        assert_eq!(cpu.write_xcr0(7), Ok(()));
        assert_eq!(cpu.state.xcr0, 7);
    }
}
