//! What `--stats` tells of the translator.

use iced_x86::Code;
use rustc_hash::FxHashMap;

use super::site::SiteKind;

/// Declares counters with what they are called.
macro_rules! counters {
    ($($name:ident: $words:literal,)*) => {
        /// Counters of one virtual processor, from its start.
        #[derive(Default)]
        pub struct Statistics {
            $(#[doc = $words] pub $name: u64,)*
            /// Instructions that translated code left to the interpreter.
            interpreted: FxHashMap<Code, u64>,
            /// Instructions that the interpreter executes are counted by their kind, too.
            pub by_kind: bool,
        }

        impl Statistics {
            fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$(($words, self.$name)),*].into_iter()
            }
        }
    };
}
counters! {
    translated: "blocks translated",
    guest_bytes: "bytes of guest code translated",
    host_bytes: "bytes of host code made",
    dropped: "writes that translations were dropped for",
    cleared: "times that all translations were dropped",
    entered: "entries into translated code",
    dispatched: "lookups by the dispatcher",
    not_translated: "instructions interpreted because their page is written too often or can't be translated",
    other_modes: "runs of the interpreter in other modes than 64-bit",
    events: "events looked for",
    access: "exits: inline TLB misses",
    access_slow: "of those: accesses that the interpreter made",
    page_faults: "page faults of translated code",
    stack: "exits: stack window misses",
    window: "exits: window misses",
    hot: "lines of code found hot",
    string: "exits: string instructions",
    interpret: "exits: instructions for the interpreter",
    jump: "exits: jumps within a page to be linked",
    link: "exits: jumps between pages to be linked",
    lookup: "exits: jump cache misses",
    event: "exits: events",
    pause: "exits: PAUSE, many times",
    naps: "of those: sleeps in favour of other virtual processors",
    vectors: "exits: vector or x87 registers to be loaded",
    host_fault: "exits: faults raised by the host in the guest's instructions",
    tlb_flushes: "TLB flushes",
    page_flushes: "TLB flushes of single pages",
    switches: "switches of the address space",
    jumps_forgotten: "times that all jumps were forgotten",
}

impl Statistics {
    /// Counts an exit.
    pub fn left(&mut self, kind: SiteKind) {
        let counter = match kind {
            SiteKind::Access { .. } => &mut self.access,
            SiteKind::Stack { .. } => &mut self.stack,
            SiteKind::Window { .. } => &mut self.window,
            SiteKind::String { .. } => &mut self.string,
            SiteKind::Interpret { .. }
            | SiteKind::Cpuid { .. }
            | SiteKind::Invlpg { .. }
            | SiteKind::InterpretLast
            | SiteKind::InterruptReturn => &mut self.interpret,
            SiteKind::Jump { .. } => &mut self.jump,
            SiteKind::Link { .. } => &mut self.link,
            SiteKind::Lookup(_) => &mut self.lookup,
            SiteKind::Event { .. } => &mut self.event,
            SiteKind::Pause { .. } => &mut self.pause,
            SiteKind::LoadVectors => &mut self.vectors,
        };
        *counter += 1;
    }

    /// Counts an instruction that the interpreter executes for translated code.
    pub fn interpreted(&mut self, code: Code) {
        *self.interpreted.entry(code).or_default() += 1;
    }

    /// All counters, with their names.
    pub fn list(&self) -> Vec<(String, u64)> {
        let mut instructions: Vec<_> = self.interpreted.iter().map(|(&m, &count)| (m, count)).collect();
        instructions.sort_by_key(|&(code, count)| (std::cmp::Reverse(count), code as u32));
        let counters = self.counters().map(|(name, count)| (name.to_owned(), count));
        let instructions = instructions.into_iter().map(|(m, count)| (format!("interpreted: {m:?}"), count));
        counters.chain(instructions).collect()
    }
}
