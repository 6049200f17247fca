//! The oracle: random instructions of user mode are executed natively, in a child process, and by the interpreter,
//! and every register, flag, exception and byte of memory is compared.

pub mod asm_tests;
pub mod blocks;
mod child;
pub mod compare;
pub mod exclude;
pub mod generate;
pub mod interpreted;
pub mod layout;
pub mod mode;
pub mod native;
pub mod random;
pub mod system;

use std::arch::x86_64::__cpuid_count;
use std::collections::HashSet;
use std::io::Result;
use std::sync::Arc;

use bivisor_x86::cpuid::CpuModel;
use iced_x86::{Code, Instruction};

use crate::generate::{Generated, Generator, images};
use crate::interpreted::Interpreted;
use crate::layout::{IMAGES, Image, Outcome};
use crate::native::{BATCH, Native};

/// A difference between the host and the interpreter.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Mnemonic of the instruction.
    pub mnemonic: String,
    /// Everything to know about it, several lines.
    pub report: String,
}

/// The CPU model of guests: what of the host's processor is offered.
fn host_model() -> CpuModel {
    let read_host = |function, index| {
        let leaf = __cpuid_count(function, index);
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    };
    CpuModel::from_host(read_host, 1, 1_000_000_000)
}

/// The two ways of executing, side by side.
pub struct Oracle {
    native: Native,
    interpreted: Interpreted,
    generator: Generator,
    model: Arc<CpuModel>,
    images: Box<[Image; IMAGES]>,
    outcomes: Vec<Outcome>,
    tried: HashSet<Code>,
}

impl Oracle {
    /// Starts with this seed.
    ///
    /// # Errors
    /// The host gives no memory or process.
    pub fn new(seed: u64) -> Result<Self> {
        let model = Arc::new(host_model());
        let images = images();
        Ok(Self {
            native: Native::start(&images)?,
            interpreted: Interpreted::new(Arc::clone(&model), images.clone())?,
            generator: Generator::new(seed, &model),
            model,
            images,
            outcomes: vec![Outcome::empty(); BATCH],
            tried: HashSet::new(),
        })
    }

    /// Tries `count` instructions, rounded up to whole batches. `found` is told of every difference and says
    /// whether to go on; `progress` hears how many were tried.
    ///
    /// # Errors
    /// The native process died.
    pub fn run(
        &mut self,
        count: u64,
        mut found: impl FnMut(Difference) -> bool,
        mut progress: impl FnMut(u64),
    ) -> Result<u64> {
        let mut tried = 0;
        let mut batch = self.batch();
        while tried < count {
            self.native.submit(batch.iter().map(|generated| &generated.case));
            let next = self.batch();
            for (generated, outcome) in batch.iter().zip(&mut self.outcomes) {
                self.interpreted.execute(&generated.case, outcome);
            }
            let native = self.native.wait()?;
            for ((generated, native), interpreted) in batch.iter().zip(native).zip(&self.outcomes) {
                let Generated { case, instruction } = generated;
                self.tried.insert(instruction.code());
                let lines = compare::differences(case, instruction, native, interpreted);
                if !lines.is_empty() {
                    let difference = Difference {
                        mnemonic: format!("{:?}", instruction.mnemonic()),
                        report: compare::report(case, instruction, &lines),
                    };
                    if !found(difference) {
                        return Ok(tried);
                    }
                }
            }
            tried += batch.len() as u64;
            progress(tried);
            batch = next;
        }
        Ok(tried)
    }

    /// How many of iced-x86's codes (an instruction with its encoding and operand kinds) were tried.
    pub fn tried(&self) -> usize {
        self.tried.len()
    }

    /// Those that should be, but were not.
    pub fn untried(&self) -> Vec<Code> {
        let offered = |code: &Code| {
            let info = code.op_code();
            let sets = code.cpuid_features();
            // Those with FWAIT are two instructions for the processor.
            info.mode64()
                && info.is_instruction()
                && !info.fwait()
                && sets.iter().all(|&set| self.model.offers(set))
        };
        let included = |code: &Code| {
            let mut instruction = Instruction::default();
            instruction.set_code(*code);
            exclude::exclusion(&instruction, &self.model).is_none()
        };
        Code::values()
            .filter(|code| {
                !self.tried.contains(code) && *code != Code::INVALID && offered(code) && included(code)
            })
            .collect()
    }

    fn batch(&mut self) -> Vec<Generated> {
        (0..BATCH).map(|_| self.generator.next(&self.model, &self.images)).collect()
    }
}
