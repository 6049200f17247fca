//! CPUID: a named CPU model, built from what the host has (SDM Vol. 2A, CPUID; APM Vol. 3, appendix E).

mod features;
mod reference;

use alloc::vec::Vec;
use core::fmt;
use iced_x86::{Code, CpuidFeature, Instruction};

pub use features::{FEATURES, Feature, Policy, Word};
pub use reference::REFERENCE_HOST;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::registers::Cr4;
use crate::state::{Mode, XCR0_AVX, XCR0_SSE, XCR0_X87};

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, or `None` where the leaf has no sub-leaves.
    pub index: Option<u32>,
    /// EAX, EBX, ECX, EDX on output.
    pub registers: [u32; 4],
}

/// Whose rules a processor follows where Intel's and AMD's differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, and makers that follow it.
    Intel,
    /// AMD and Hygon.
    Amd,
}

/// What CPUID says on every processor of a machine. Bits that follow the processor's state (OSXSAVE, APIC ID,
/// the size of the enabled XSAVE state) are filled in when the guest asks: see [`Cpu::cpuid`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// The model's name, for users.
    pub name: &'static str,
    /// All leaves.
    pub leaves: Vec<Leaf>,
    /// Whose rules it follows.
    pub vendor: Vendor,
    /// Width of physical addresses in bits: higher ones in page-table entries and CR3 are reserved.
    pub physical_bits: u32,
    /// XCR0 bits that XSETBV may set.
    pub xcr0: u64,
    instructions: InstructionSets,
}

/// A set of [`CpuidFeature`]s.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct InstructionSets([u64; 4]);

impl InstructionSets {
    fn insert(&mut self, set: CpuidFeature) {
        if let Some(word) = self.0.get_mut(set as usize / 64) {
            *word |= 1 << (set as usize % 64);
        }
    }
    fn contains(&self, set: CpuidFeature) -> bool {
        self.0.get(set as usize / 64).is_some_and(|word| word >> (set as usize % 64) & 1 != 0)
    }
}

impl fmt::Debug for InstructionSets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(CpuidFeature::values().filter(|&set| self.contains(set))).finish()
    }
}

/// Frequency of the local APIC's timer before its divider, in Hz; leaf 4000_0010h tells it.
///
/// That of a real processor's bus, since software that measures with a short count must not be overtaken by it
/// when the host lets a virtual processor wait.
pub const APIC_BUS_HZ: u64 = 100_000_000;

/// First leaf of the hypervisor's own, SDM Vol. 2A: reserved for software.
pub const HYPERVISOR_LEAF: u32 = 0x4000_0000;
/// Leaf with the frequencies of TSC and APIC in kHz, as VMware introduced it.
const FREQUENCY_LEAF: u32 = 0x4000_0010;
/// Size of linear addresses in bits: 4-level paging.
const LINEAR_BITS: u32 = 48;
/// XSAVE area with x87 and SSE state only: legacy area and header (SDM Vol. 1, section 13.4).
const XSAVE_LEGACY_SIZE: u32 = 576;
/// Size of the AVX state component.
const XSAVE_AVX_SIZE: u32 = 256;

impl CpuModel {
    /// The model "bivisor-v3": vendor, family, model, stepping and brand of the host, with the features of x86-64-v3
    /// and more that the host has and our engines execute. `read_host` executes CPUID on the host with
    /// a leaf and a sub-leaf. `cpus`: processors of the machine, 1 to 255, with APIC IDs from 0 on. `tsc_hz`:
    /// frequency of the time-stamp counter.
    pub fn from_host(read_host: impl Fn(u32, u32) -> [u32; 4], cpus: u32, tsc_hz: u64) -> Self {
        Builder::new(&read_host, cpus, tsc_hz).build()
    }

    /// The model as it comes out on the recorded host of [`REFERENCE_HOST`]: the same on every machine.
    pub fn reference(cpus: u32) -> Self {
        Self::from_host(read_reference, cpus, 2_250_000_000)
    }

    /// Whether the processor has the instructions that iced-x86 files under `set`.
    pub fn offers(&self, set: CpuidFeature) -> bool {
        self.instructions.contains(set)
    }

    /// Whether the processor has this instruction; without it, it raises #UD. Meant for the decode step.
    pub fn offers_instruction(&self, instruction: &Instruction) -> bool {
        matches!(
            instruction.code(),
            // A NOP where there are no shadow stacks (SDM Vol. 2B, RDSSPD): programs rely on it.
            Code::Rdsspd_r32 | Code::Rdsspq_r64
            // Hypercalls are for guests of every vendor's processors, and need no CPUID bit of theirs.
            | Code::Vmcall | Code::Vmmcall
        ) || instruction.cpuid_features().iter().all(|&set| self.offers(set))
    }

    /// Sets what one leaf says, whatever it said before.
    pub fn set_leaf(&mut self, leaf: Leaf) {
        self.leaves.retain(|old| (old.function, old.index) != (leaf.function, leaf.index));
        self.leaves.push(leaf);
    }

    /// Whether a feature bit is set.
    pub fn has(&self, word: Word, bit: u32) -> bool {
        let (function, index, register) = word.place();
        self.find(function, index).is_some_and(|leaf| leaf.registers[register] >> bit & 1 != 0)
    }

    /// What CPUID says, with the bits that follow the processor's state clear. Leaves beyond the highest are zero
    /// on AMD, and the highest basic leaf on Intel.
    pub fn query(&self, function: u32, index: u32) -> [u32; 4] {
        if let Some(leaf) = self.find(function, index) {
            return leaf.registers;
        }
        let highest = self.find(0, 0).map_or(0, |leaf| leaf.registers[0]);
        let beyond = match function {
            0..0x4000_0000 => function > highest,
            0x4000_0000..0x5000_0000 => false,
            0x5000_0000..0x8000_0000 => true,
            _ => function > self.find(0x8000_0000, 0).map_or(0, |leaf| leaf.registers[0]),
        };
        if beyond && self.vendor == Vendor::Intel {
            return self.find(highest, index).map_or([0; 4], |leaf| leaf.registers);
        }
        if function == 0xb {
            // Levels beyond the last: type 0, the level number as asked (SDM Vol. 2A, CPUID).
            return [0, 0, index & 0xff, 0];
        }
        [0; 4]
    }

    fn find(&self, function: u32, index: u32) -> Option<&Leaf> {
        self.leaves.iter().find(|leaf| leaf.function == function && leaf.index.is_none_or(|own| own == index))
    }
}

/// CPUID of [`REFERENCE_HOST`].
pub(crate) fn read_reference(function: u32, index: u32) -> [u32; 4] {
    REFERENCE_HOST
        .iter()
        .find(|leaf| leaf.function == function && leaf.index.unwrap_or(0) == index)
        .map_or([0; 4], |leaf| leaf.registers)
}

/// Makes a model leaf by leaf.
struct Builder<'a> {
    read_host: &'a dyn Fn(u32, u32) -> [u32; 4],
    vendor: Vendor,
    /// Processors.
    cpus: u32,
    tsc_hz: u64,
    highest_host: u32,
    highest_host_extended: u32,
    leaves: Vec<Leaf>,
    instructions: InstructionSets,
}

impl<'a> Builder<'a> {
    fn new(read_host: &'a dyn Fn(u32, u32) -> [u32; 4], cpus: u32, tsc_hz: u64) -> Self {
        let [highest_host, name @ ..] = read_host(0, 0);
        let is = |text: &[u8; 12]| {
            // The vendor's name stands in EBX, EDX, ECX.
            [name[0], name[2], name[1]]
                .iter()
                .zip(text.chunks(4))
                .all(|(register, part)| register.to_le_bytes() == part)
        };
        let amd = is(b"AuthenticAMD") || is(b"HygonGenuine");
        Self {
            read_host,
            vendor: if amd { Vendor::Amd } else { Vendor::Intel },
            cpus: cpus.clamp(1, 255),
            tsc_hz,
            highest_host,
            highest_host_extended: read_host(0x8000_0000, 0)[0],
            leaves: Vec::new(),
            instructions: InstructionSets::default(),
        }
    }

    /// A leaf of the host; zero where it has none.
    fn host(&self, function: u32, index: u32) -> [u32; 4] {
        let highest = if function < 0x8000_0000 { self.highest_host } else { self.highest_host_extended };
        if function <= highest { (self.read_host)(function, index) } else { [0; 4] }
    }

    fn add(&mut self, function: u32, registers: [u32; 4]) {
        self.leaves.push(Leaf { function, index: None, registers });
    }

    fn add_sub(&mut self, function: u32, index: u32, registers: [u32; 4]) {
        self.leaves.push(Leaf { function, index: Some(index), registers });
    }

    /// The feature bits of one register.
    fn word(&self, word: Word) -> u32 {
        let (function, index, register) = word.place();
        let host = self.host(function, index)[register];
        let amd = self.vendor == Vendor::Amd;
        let smp = self.cpus > 1;
        FEATURES.iter().filter(|feature| feature.word == word).fold(0, |bits, feature| {
            let offered = match feature.policy {
                Policy::Host => host >> feature.bit & 1 != 0,
                Policy::Always => true,
                Policy::Amd => amd,
                Policy::Intel => !amd,
                Policy::Smp => smp,
                Policy::AmdSmp => amd && smp,
                Policy::Dynamic | Policy::Hidden(_) => false,
            };
            bits | u32::from(offered) << feature.bit
        })
    }

    /// Number of low APIC ID bits that tell the processors apart.
    fn apic_id_bits(&self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    fn build(mut self) -> CpuModel {
        let xcr0 = if self.word(Word::L1Ecx) >> 28 & 1 != 0 {
            XCR0_X87 | XCR0_SSE | XCR0_AVX
        } else {
            XCR0_X87 | XCR0_SSE
        };
        self.basic_leaves();
        self.xsave_leaves(xcr0);
        self.hypervisor_leaves();
        let physical_bits = self.extended_leaves();
        self.collect_instructions();
        CpuModel {
            name: "bivisor-v3",
            leaves: self.leaves,
            vendor: self.vendor,
            physical_bits,
            xcr0,
            instructions: self.instructions,
        }
    }

    fn basic_leaves(&mut self) {
        let intel = self.vendor == Vendor::Intel;
        let [_, ebx, ecx, edx] = self.host(0, 0);
        self.add(0, [if intel { 0x16 } else { 0xd }, ebx, ecx, edx]);
        let logical = if self.cpus > 1 { 1 << self.apic_id_bits() } else { 1 };
        // CLFLUSH works on 64 bytes; the top byte is the initial APIC ID, filled in when asked.
        let ebx = 8 << 8 | logical.min(255) << 16;
        self.add(1, [self.host(1, 0)[0], ebx, self.word(Word::L1Ecx), self.word(Word::L1Edx)]);
        if intel {
            let descriptors = self.host(2, 0);
            self.add(2, descriptors);
            self.intel_caches();
        }
        self.add(6, [self.word(Word::L6Eax), 0, 0, 0]);
        self.add_sub(7, 0, [0, self.word(Word::L7Ebx), self.word(Word::L7Ecx), self.word(Word::L7Edx)]);
        // One thread per core, all cores in one package. EDX is the x2APIC ID, filled in when asked.
        self.add_sub(0xb, 0, [0, 1, 1 << 8, 0]);
        self.add_sub(0xb, 1, [self.apic_id_bits(), self.cpus, 2 << 8 | 1, 0]);
        if intel {
            // The ratio of TSC and crystal is not enumerated: from it Linux would take the frequency of the APIC
            // timer, and with that of ours the ratio could not be told finely enough.
            self.add(0x15, [0; 4]);
            let mhz = (self.tsc_hz / 1_000_000) as u32;
            self.add(0x16, [mhz, mhz, 100, 0]);
        }
    }

    /// Leaf 4: the host's caches; those up to the second level belong to a core, the third to all.
    fn intel_caches(&mut self) {
        for index in 0..8 {
            let [eax, ebx, ecx, edx] = self.host(4, index);
            if eax & 0x1f == 0 {
                break;
            }
            let id_mask = (1 << self.apic_id_bits()) - 1;
            let sharing = if eax >> 5 & 7 >= 3 { id_mask } else { 0 };
            let eax = eax & 0x3fff | sharing << 14 | id_mask.min(63) << 26;
            self.add_sub(4, index, [eax, ebx, ecx, edx]);
        }
    }

    fn xsave_leaves(&mut self, xcr0: u64) {
        let avx = xcr0 & XCR0_AVX != 0;
        let size = XSAVE_LEGACY_SIZE + if avx { XSAVE_AVX_SIZE } else { 0 };
        if self.word(Word::L1Ecx) >> 26 & 1 == 0 {
            return;
        }
        self.add_sub(0xd, 0, [xcr0 as u32, size, size, 0]);
        self.add_sub(0xd, 1, [self.word(Word::LDs1Eax), size, 0, 0]);
        if avx {
            self.add_sub(0xd, 2, [XSAVE_AVX_SIZE, XSAVE_LEGACY_SIZE, 0, 0]);
        }
    }

    fn hypervisor_leaves(&mut self) {
        let part = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
        let name = [part(*b"Bivi"), part(*b"sorB"), part(*b"ivis")];
        self.add(HYPERVISOR_LEAF, [FREQUENCY_LEAF, name[0], name[1], name[2]]);
        let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(u32::MAX);
        self.add(FREQUENCY_LEAF, [khz(self.tsc_hz), khz(APIC_BUS_HZ), 0, 0]);
    }

    /// The leaves from 8000_0000h on; returns the width of physical addresses.
    fn extended_leaves(&mut self) -> u32 {
        let amd = self.vendor == Vendor::Amd;
        let [_, ebx, ecx, edx] = self.host(0x8000_0000, 0);
        self.add(0x8000_0000, [if amd { 0x8000_0021 } else { 0x8000_0008 }, ebx, ecx, edx]);
        let [eax, ebx, ..] = self.host(0x8000_0001, 0);
        self.add(0x8000_0001, [eax, ebx, self.word(Word::X1Ecx), self.word(Word::X1Edx)]);
        // Brand string; TLBs and caches of the host.
        for function in 0x8000_0002..=0x8000_0006 {
            let registers = self.host(function, 0);
            self.add(function, registers);
        }
        self.add(0x8000_0007, [0, 0, 0, self.word(Word::X7Edx)]);
        let physical_bits = match self.host(0x8000_0008, 0)[0] & 0xff {
            bits @ 36..=52 => bits,
            _ => 40,
        };
        let cores = if amd { (self.cpus - 1) | self.apic_id_bits() << 12 } else { 0 };
        self.add(0x8000_0008, [physical_bits | LINEAR_BITS << 8, self.word(Word::X8Ebx), cores, 0]);
        if amd {
            for function in [0x8000_0019, 0x8000_001a] {
                let registers = self.host(function, 0);
                self.add(function, registers);
            }
            self.amd_caches();
            // EAX (extended APIC ID) and the core ID in EBX are filled in when asked; one node.
            self.add(0x8000_001e, [0; 4]);
            self.add(0x8000_0021, [self.word(Word::X21Eax), 0, self.word(Word::X21Ecx), 0]);
        }
        physical_bits
    }

    /// Leaf 8000_001Dh, like [`Self::intel_caches`].
    fn amd_caches(&mut self) {
        for index in 0..8 {
            let [eax, ebx, ecx, edx] = self.host(0x8000_001d, index);
            if eax & 0x1f == 0 {
                break;
            }
            let sharing = if eax >> 5 & 7 >= 3 { self.cpus - 1 } else { 0 };
            self.add_sub(0x8000_001d, index, [eax & 0x3fff | sharing << 14, ebx, ecx, edx]);
        }
    }

    fn collect_instructions(&mut self) {
        for &set in features::BASELINE {
            self.instructions.insert(set);
        }
        for word in Word::ALL {
            let bits = self.word(word);
            for feature in FEATURES.iter().filter(|feature| feature.word == word) {
                if bits >> feature.bit & 1 != 0 {
                    feature.instructions.iter().for_each(|&set| self.instructions.insert(set));
                }
            }
        }
    }
}

/// MSR IA32_APIC_BASE, whose bit 11 CPUID repeats.
const APIC_BASE: u32 = 0x1b;

impl Cpu {
    /// EAX, EBX, ECX, EDX as the CPUID instruction gives them on this processor now.
    pub fn cpuid<E: Env>(&self, env: &mut E, function: u32, index: u32) -> [u32; 4] {
        let mut registers = self.model.query(function, index);
        let [eax, ebx, ecx, edx] = &mut registers;
        match function {
            1 => {
                *ebx |= self.apic_id << 24;
                *ecx |= u32::from(self.state.cr4_has(Cr4::OSXSAVE)) << 27;
                *edx |= apic_enabled(env) << 9;
            }
            0xb => *edx = self.apic_id,
            0xd if index < 2 && *eax != 0 => {
                let avx = self.state.xcr0 & XCR0_AVX != 0;
                *ebx = XSAVE_LEGACY_SIZE + if avx { XSAVE_AVX_SIZE } else { 0 };
            }
            0x8000_0001 if self.model.vendor == Vendor::Amd => *edx |= apic_enabled(env) << 9,
            0x8000_0001 if self.state.mode() != Mode::Long64 => {
                // Intel shows SYSCALL in 64-bit mode only (SDM Vol. 2A, CPUID).
                *edx &= !(1 << 11);
            }
            0x8000_001e => {
                *eax = self.apic_id;
                *ebx = self.apic_id & 0xff;
            }
            _ => {}
        }
        registers
    }
}

/// One if the local APIC is not switched off in IA32_APIC_BASE.
fn apic_enabled<E: Env>(env: &mut E) -> u32 {
    env.read_msr(APIC_BASE).map_or(0, |base| (base >> 11 & 1) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn offers(model: &CpuModel, bytes: &[u8]) -> bool {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid(), "{bytes:x?}");
        model.offers_instruction(&instruction)
    }

    #[test]
    fn the_reference_model_is_x86_64_v3() {
        let model = CpuModel::reference(2);
        for set in [
            CpuidFeature::AVX,
            CpuidFeature::AVX2,
            CpuidFeature::BMI1,
            CpuidFeature::BMI2,
            CpuidFeature::F16C,
            CpuidFeature::FMA,
            CpuidFeature::LZCNT,
            CpuidFeature::MOVBE,
            CpuidFeature::XSAVE,
            CpuidFeature::CMPXCHG16B,
            CpuidFeature::SSE4_2,
            CpuidFeature::POPCNT,
        ] {
            assert!(model.offers(set), "{set:?}");
        }
        for set in [CpuidFeature::AVX512F, CpuidFeature::SVM, CpuidFeature::VMX, CpuidFeature::MONITOR] {
            assert!(!model.offers(set), "{set:?}");
        }
        assert_eq!(model.vendor, Vendor::Amd);
        assert_eq!(model.physical_bits, 48);
    }

    #[test]
    fn no_bit_is_listed_twice() {
        for (number, feature) in FEATURES.iter().enumerate() {
            assert!(feature.bit < 32);
            assert!(
                FEATURES[..number].iter().all(|other| (other.word, other.bit) != (feature.word, feature.bit)),
                "{}",
                feature.name
            );
        }
    }

    #[test]
    fn instructions_follow_the_feature_bits() {
        let model = CpuModel::reference(1);
        assert!(offers(&model, &[0xf3, 0x0f, 0x1e, 0xfa]), "endbr64 is a NOP");
        assert!(offers(&model, &[0xf3, 0x48, 0x0f, 0x1e, 0xc8]), "rdsspq is a NOP");
        assert!(offers(&model, &[0x0f, 0x01, 0xc1]), "vmcall");
        assert!(offers(&model, &[0x0f, 0x01, 0xd9]), "vmmcall");
        assert!(offers(&model, &[0xc5, 0xf5, 0xfe, 0xc2]), "vpaddd ymm");
        assert!(offers(&model, &[0xc4, 0xe2, 0x75, 0xdc, 0xc2]), "vaesenc ymm");
        assert!(!offers(&model, &[0x62, 0xf1, 0x75, 0x48, 0xfe, 0xc2]), "vpaddd zmm");
        assert!(!offers(&model, &[0x0f, 0x01, 0xc8]), "monitor");
        assert!(!offers(&model, &[0xf3, 0x48, 0x0f, 0xae, 0xe8]), "incsspq");
        assert!(!offers(&model, &[0x0f, 0x01, 0xd8]), "vmrun");
    }

    #[test]
    fn every_offered_extension_comes_from_the_host() {
        let bare = |function, index| match function {
            1 | 7 | 0xd | 0x8000_0001 => [0; 4],
            _ => read_reference(function, index),
        };
        let model = CpuModel::from_host(bare, 1, 1_000_000_000);
        assert!(!model.offers(CpuidFeature::AVX) && !model.offers(CpuidFeature::SSE3));
        assert!(model.offers(CpuidFeature::SSE2) && model.offers(CpuidFeature::RDRAND));
        assert_eq!(model.xcr0, XCR0_X87 | XCR0_SSE);
        assert_eq!(model.query(0xd, 0), [0; 4]);
    }

    #[test]
    fn leaves_beyond_the_highest() {
        let amd = CpuModel::reference(1);
        assert_eq!(amd.query(0x20, 0), [0; 4]);
        assert_eq!(amd.query(0x9000_0000, 0), [0; 4]);
        assert_eq!(amd.query(0xb, 5), [0, 0, 5, 0]);
        let intel = |function, _| match function {
            0 => [
                0x1f,
                u32::from_le_bytes(*b"Genu"),
                u32::from_le_bytes(*b"ntel"),
                u32::from_le_bytes(*b"ineI"),
            ],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            _ => [0; 4],
        };
        let model = CpuModel::from_host(intel, 1, 2_000_000_000);
        assert_eq!(model.vendor, Vendor::Intel);
        assert_eq!(model.query(0x1f, 0), [2000, 2000, 100, 0]);
        assert_eq!(model.query(0x4000_0000, 0)[0], FREQUENCY_LEAF);
        assert_eq!(model.query(0x4000_0001, 0), [0; 4]);
    }

    #[test]
    fn topology_counts_the_processors() {
        let model = CpuModel::reference(6);
        assert_eq!(model.query(1, 0)[1], 8 << 8 | 8 << 16);
        assert!(model.has(Word::L1Edx, 28));
        assert_eq!(model.query(0xb, 0), [0, 1, 0x100, 0]);
        assert_eq!(model.query(0xb, 1), [3, 6, 0x201, 0]);
        assert_eq!(model.query(0x8000_0008, 0)[2], 5 | 3 << 12);
        assert_eq!(model.query(0x8000_001d, 3)[0] >> 14 & 0xfff, 5);
        assert_eq!(model.query(0x8000_001d, 2)[0] >> 14 & 0xfff, 0);
        assert!(!CpuModel::reference(1).has(Word::L1Edx, 28));
    }
}
