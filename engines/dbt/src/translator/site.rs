//! The places where translated code may leave, and what is to be done there.

/// A place where a block may leave translated code.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// The block's number.
    pub block: u32,
    /// Offset in its page of the instruction.
    pub guest: u16,
    /// The guest's flags are in the context's `block_flags`.
    pub flags_aside: bool,
    /// The instruction works on vector or x87 registers, or on their memory image.
    pub vector: bool,
    /// What to do.
    pub kind: SiteKind,
}

/// What is to be done at a [`Site`]. Host places are offsets in the code memory.
#[derive(Clone, Copy, Debug)]
pub enum SiteKind {
    /// A memory access that the inline TLB doesn't allow.
    Access {
        /// It writes.
        write: bool,
        /// Bytes.
        size: u8,
        /// Offset in the page of the next instruction.
        next: u16,
        /// Code of the instruction from its start.
        retry: u32,
        /// Code of the next instruction, if the block goes on there.
        next_host: Option<u32>,
    },
    /// The block's stack accesses don't all lie in one page of the inline TLB.
    Stack {
        /// First byte, from RSP.
        low: i32,
        /// Bytes.
        size: u16,
        /// Behind the check.
        retry: u32,
        /// Displacement of the jump that is taken where they lie in two pages.
        patch: u32,
        /// The code that leaves, which that jump goes to as long as it isn't linked.
        stub: u32,
    },
    /// A window does not lie in one page that the inline TLB, or its slot, knows. The context's `address` is its start.
    Window {
        /// It is written.
        write: bool,
        /// Bytes.
        size: u16,
        /// Code of the instruction from its start.
        retry: u32,
        /// Displacement of the jump that is taken where it lies in two pages.
        patch: u32,
        /// The code that leaves, which that jump goes to as long as it isn't linked.
        stub: u32,
    },
    /// A repeated string instruction that needs a page, or is too odd, for the shared code.
    String {
        /// It is MOVS, not STOS.
        is_move: bool,
        /// Offset in the page of the next instruction.
        next: u16,
        /// Code of the instruction from its start.
        retry: u32,
        /// Code of the next instruction, if the block goes on there.
        next_host: Option<u32>,
    },
    /// The interpreter executes the instruction, and the block goes on.
    Interpret {
        /// Offset in the page of the next instruction.
        next: u16,
        /// Its code, if the block goes on there.
        next_host: Option<u32>,
    },
    /// INVLPG, and the block goes on.
    Invlpg {
        /// Offset in the page of the next instruction.
        next: u16,
        /// Its code.
        next_host: Option<u32>,
    },
    /// CPUID whose result isn't remembered yet.
    Cpuid {
        /// Offset in the page of the next instruction.
        next: u16,
        /// Its code.
        next_host: Option<u32>,
    },
    /// The interpreter executes the instruction.
    InterpretLast,
    /// The interpreter executes the IRETQ.
    InterruptReturn,
    /// A jump within the page whose target was not translated yet.
    Jump {
        /// Offset in the page of the target.
        target: u16,
        /// It goes backwards, or stays.
        backwards: bool,
        /// Displacement of the jump.
        patch: u32,
        /// The code that leaves, which the jump goes to as long as it isn't linked.
        stub: u32,
    },
    /// A jump to another page that isn't linked.
    Link {
        /// The target, from the start of this page.
        target: i32,
        /// Number of the link.
        link: u32,
        /// The code that leaves, which the link leads to as long as it isn't set.
        stub: u32,
    },
    /// A jump to a linear address that the jump cache doesn't know.
    Lookup(Undo),
    /// An event waits; the guest goes on at this place, from the start of the page.
    Event {
        /// Offset in the page.
        target: i32,
    },
    /// So many PAUSE were executed that the host may have something better to do.
    Pause {
        /// Code behind the PAUSE.
        resume: u32,
    },
    /// The block needs the vector or x87 registers loaded.
    LoadVectors,
}

/// Where a block's code stands, and what else its sites are told from.
#[derive(Clone, Copy)]
pub struct Base {
    /// Offset in its page of the block's first instruction.
    pub guest: u16,
    /// Offset in the code memory of its code.
    pub start: u32,
    /// The same of its code that is rarely executed.
    pub cold: u32,
    /// Number of its first link.
    pub first_link: u32,
}

/// A [`Site`] as it is kept: there are several for each block. Host places are offsets in the block's code, which is never
/// longer than 16 bits tell.
#[derive(Clone, Copy)]
pub struct Packed {
    block: u32,
    /// What has up to 32 bits.
    wide: u32,
    places: [u16; 2],
    guest: u16,
    tag: Tag,
    /// Bits: [`FLAGS_ASIDE`] and its like.
    bits: u8,
}

const _: () = assert!(size_of::<Packed>() == 16);

/// See [`Site::flags_aside`].
const FLAGS_ASIDE: u8 = 1;
/// See [`Site::vector`].
const VECTOR: u8 = 2;
/// What is true or false of a kind.
const KIND: u8 = 4;

/// Which [`SiteKind`] it is.
#[derive(Clone, Copy)]
enum Tag {
    Access,
    Stack,
    Window,
    String,
    Interpret,
    Invlpg,
    Cpuid,
    InterpretLast,
    InterruptReturn,
    Jump,
    Link,
    LookupOnly,
    LookupJump,
    LookupReturn,
    LookupCall,
    Event,
    Pause,
    LoadVectors,
}

/// Bytes of the jump whose displacement is patched, from there on: the code that leaves stands behind it.
const DISPLACEMENT: u32 = 4;

/// How far behind `from` a place is, if 16 bits tell it.
fn behind(from: u32, place: u32) -> Option<u16> {
    u16::try_from(place.checked_sub(from)?).ok()
}

impl Packed {
    /// Packs a site of the block that `base` tells of, unless its code is too long for that.
    pub fn new(site: &Site, base: Base) -> Option<Self> {
        let hot = |place| behind(base.start, place);
        let cold = |place| behind(base.cold, place);
        // No instruction's code is the block's first byte: there is the prologue.
        let next = |place: Option<u32>| place.map_or(Some(0), hot);
        let mut guest = site.guest;
        let (tag, bit, places, wide) = match site.kind {
            SiteKind::Access { write, size, next: following, retry, next_host } => {
                let wide = u32::from(following) | u32::from(size) << 16;
                (Tag::Access, write, [hot(retry)?, next(next_host)?], wide)
            }
            SiteKind::Stack { low, size, retry, patch, .. } => {
                // It is the block's first instruction's.
                guest = size;
                (Tag::Stack, false, [hot(retry)?, cold(patch)?], low as u32)
            }
            SiteKind::Window { write, size, retry, patch, .. } => {
                (Tag::Window, write, [hot(retry)?, cold(patch)?], size.into())
            }
            SiteKind::String { is_move, next: following, retry, next_host } => {
                (Tag::String, is_move, [hot(retry)?, next(next_host)?], following.into())
            }
            SiteKind::Interpret { next: following, next_host } => {
                (Tag::Interpret, false, [0, next(next_host)?], following.into())
            }
            SiteKind::Invlpg { next: following, next_host } => {
                (Tag::Invlpg, false, [0, next(next_host)?], following.into())
            }
            SiteKind::Cpuid { next: following, next_host } => {
                (Tag::Cpuid, false, [0, next(next_host)?], following.into())
            }
            SiteKind::InterpretLast => (Tag::InterpretLast, false, [0, 0], 0),
            SiteKind::InterruptReturn => (Tag::InterruptReturn, false, [0, 0], 0),
            SiteKind::Jump { target, backwards, patch, stub } => {
                (Tag::Jump, backwards, [hot(patch)?, cold(stub)?], target.into())
            }
            SiteKind::Link { target, link, stub } => {
                (Tag::Link, false, [behind(base.first_link, link)?, cold(stub)?], target as u32)
            }
            SiteKind::Lookup(Undo::Never) => (Tag::LookupOnly, false, [0, 0], 0),
            SiteKind::Lookup(Undo::Jump) => (Tag::LookupJump, false, [0, 0], 0),
            SiteKind::Lookup(Undo::Return(size)) => (Tag::LookupReturn, false, [0, 0], size),
            SiteKind::Lookup(Undo::Call) => (Tag::LookupCall, false, [0, 0], 0),
            SiteKind::Event { target } => (Tag::Event, false, [0, 0], target as u32),
            SiteKind::Pause { resume } => (Tag::Pause, false, [hot(resume)?, 0], 0),
            SiteKind::LoadVectors => (Tag::LoadVectors, false, [0, 0], 0),
        };
        let bit_if = |is: bool, bit| if is { bit } else { 0 };
        let bits = bit_if(site.flags_aside, FLAGS_ASIDE) | bit_if(site.vector, VECTOR) | bit_if(bit, KIND);
        Some(Self { block: site.block, wide, places, guest, tag, bits })
    }

    /// Number of the block.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// The site. `base`: of its block.
    pub fn unpack(&self, base: Base) -> Site {
        let bit = self.bits & KIND != 0;
        let (first, second) = (u32::from(self.places[0]), u32::from(self.places[1]));
        let (retry, patch) = (base.start + first, base.cold + second);
        let next = self.wide as u16;
        let next_host = (second != 0).then_some(base.start + second);
        let mut guest = self.guest;
        let kind = match self.tag {
            Tag::Access => {
                SiteKind::Access { write: bit, size: (self.wide >> 16) as u8, next, retry, next_host }
            }
            Tag::Stack => {
                let size = std::mem::replace(&mut guest, base.guest);
                SiteKind::Stack { low: self.wide as i32, size, retry, patch, stub: patch + DISPLACEMENT }
            }
            Tag::Window => {
                SiteKind::Window { write: bit, size: next, retry, patch, stub: patch + DISPLACEMENT }
            }
            Tag::String => SiteKind::String { is_move: bit, next, retry, next_host },
            Tag::Interpret => SiteKind::Interpret { next, next_host },
            Tag::Invlpg => SiteKind::Invlpg { next, next_host },
            Tag::Cpuid => SiteKind::Cpuid { next, next_host },
            Tag::InterpretLast => SiteKind::InterpretLast,
            Tag::InterruptReturn => SiteKind::InterruptReturn,
            Tag::Jump => SiteKind::Jump { target: next, backwards: bit, patch: retry, stub: patch },
            Tag::Link => {
                SiteKind::Link { target: self.wide as i32, link: base.first_link + first, stub: patch }
            }
            Tag::LookupOnly => SiteKind::Lookup(Undo::Never),
            Tag::LookupJump => SiteKind::Lookup(Undo::Jump),
            Tag::LookupReturn => SiteKind::Lookup(Undo::Return(self.wide)),
            Tag::LookupCall => SiteKind::Lookup(Undo::Call),
            Tag::Event => SiteKind::Event { target: self.wide as i32 },
            Tag::Pause => SiteKind::Pause { resume: retry },
            Tag::LoadVectors => SiteKind::LoadVectors,
        };
        let (flags_aside, vector) = (self.bits & FLAGS_ASIDE != 0, self.bits & VECTOR != 0);
        Site { block: self.block, guest, flags_aside, vector, kind }
    }
}

/// What a jump has changed before it is known whether its target is canonical: if it isn't, it is the jump that faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undo {
    /// It doesn't fault.
    Never,
    /// JMP: nothing.
    Jump,
    /// RET: so many bytes were taken from the stack.
    Return(u32),
    /// CALL: the return address was pushed; what stood there is in the context.
    Call,
}

/// An instruction of the guest's that stands in the code as it is, and may fault there.
#[derive(Clone, Copy, Debug)]
pub struct FaultPoint {
    /// Offset in the block's code.
    pub host: u16,
    /// Offset in its page of the guest's instruction, and [`FaultPoint::ASIDE`].
    guest: u16,
}

impl FaultPoint {
    const ASIDE: u16 = 1 << 15;

    /// `host`: offset in the block's code; `guest`: of the instruction, in its page. None if the code is too long.
    pub fn new(host: usize, guest: usize, flags_aside: bool) -> Option<Self> {
        let aside = if flags_aside { Self::ASIDE } else { 0 };
        Some(Self { host: u16::try_from(host).ok()?, guest: guest as u16 & !Self::ASIDE | aside })
    }
    /// Offset in its page of the guest's instruction.
    pub fn guest(self) -> u16 {
        self.guest & !Self::ASIDE
    }
    /// The guest's flags are in the context's `block_flags`.
    pub fn flags_aside(self) -> bool {
        self.guest & Self::ASIDE != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Base = Base { guest: 0x123, start: 0x10_0000, cold: 0x40_0000, first_link: 70_000 };

    #[test]
    fn what_was_packed_comes_out_again() {
        let (hot, cold) = (BASE.start + 0xffff, BASE.cold + 0x4321);
        let kinds = [
            SiteKind::Access { write: true, size: 64, next: 0xfff, retry: hot, next_host: Some(hot) },
            SiteKind::Access { write: false, size: 1, next: 0, retry: BASE.start, next_host: None },
            SiteKind::Stack { low: -70_000, size: 4096, retry: hot, patch: cold, stub: cold + 4 },
            SiteKind::Window { write: true, size: 4096, retry: hot, patch: cold, stub: cold + 4 },
            SiteKind::String { is_move: true, next: 7, retry: hot, next_host: None },
            SiteKind::Interpret { next: 0x1000, next_host: Some(hot) },
            SiteKind::Invlpg { next: 3, next_host: Some(hot) },
            SiteKind::Cpuid { next: 3, next_host: None },
            SiteKind::InterpretLast,
            SiteKind::InterruptReturn,
            SiteKind::Jump { target: 0xfff, backwards: true, patch: hot, stub: cold },
            SiteKind::Link { target: -0x7fff_ffff, link: BASE.first_link + 9, stub: cold },
            SiteKind::Lookup(Undo::Never),
            SiteKind::Lookup(Undo::Jump),
            SiteKind::Lookup(Undo::Return(0xffff_fff8)),
            SiteKind::Lookup(Undo::Call),
            SiteKind::Event { target: -5 },
            SiteKind::Pause { resume: hot },
            SiteKind::LoadVectors,
        ];
        for (number, kind) in kinds.into_iter().enumerate() {
            let site = Site {
                block: number as u32 | 1 << 31,
                guest: BASE.guest,
                flags_aside: number % 2 == 0,
                vector: number % 3 == 0,
                kind,
            };
            let packed = Packed::new(&site, BASE).map(|packed| packed.unpack(BASE));
            assert_eq!(format!("{packed:?}"), format!("{:?}", Some(site)));
        }
    }

    #[test]
    fn what_16_bits_do_not_tell_is_refused() {
        let kind = SiteKind::Pause { resume: BASE.start + 0x1_0000 };
        let site = Site { block: 0, guest: 0, flags_aside: false, vector: false, kind };
        assert!(Packed::new(&site, BASE).is_none());
        assert!(FaultPoint::new(0x1_0000, 0, false).is_none());
    }
}
