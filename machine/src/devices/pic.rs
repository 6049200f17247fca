//! The pair of 8259A interrupt controllers (Intel 8259A datasheet) with the edge/level control registers
//! (ELCR) of a PC's chipset.

use super::Registers;

/// Command port of the master; data port is the next.
pub const MASTER: u16 = 0x20;
/// Command port of the slave; data port is the next.
pub const SLAVE: u16 = 0xa0;
/// ELCR of the master; the slave's is the next port.
pub const ELCR: u16 = 0x4d0;

/// The master's input that the slave is wired to.
const CASCADE: u8 = 2;
/// Inputs that may be level triggered: not the timer, keyboard, cascade, RTC and coprocessor.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// Which initialization command word is expected next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Init {
    Done,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chip {
    /// Levels of the inputs.
    inputs: u8,
    /// Rising edges not yet acknowledged. The datasheet wants the input to stay high until then, else IRQ 7 is what
    /// comes; QEMU and KVM keep the edge, and test kernels count on that.
    edges: u8,
    imr: u8,
    isr: u8,
    /// Inputs that are level triggered.
    elcr: u8,
    vector_base: u8,
    /// The input with the highest priority: one after the lowest.
    highest: u8,
    init: Init,
    single: bool,
    icw4_needed: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    poll: bool,
    read_isr: bool,
}

impl Chip {
    const fn new() -> Self {
        Self {
            inputs: 0,
            edges: 0,
            imr: 0,
            isr: 0,
            elcr: 0,
            vector_base: 0,
            highest: 0,
            init: Init::Done,
            single: false,
            icw4_needed: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            poll: false,
            read_isr: false,
        }
    }

    /// The interrupt request register.
    fn irr(&self) -> u8 {
        self.edges & !self.elcr | self.inputs & self.elcr
    }

    fn set_input(&mut self, input: u8, high: bool) {
        let bit = 1u8 << (input & 7);
        if !high {
            self.inputs &= !bit;
        } else if self.inputs & bit == 0 {
            self.inputs |= bit;
            self.edges |= bit;
        }
    }

    /// The input of highest priority among these, with its rank (0 is highest).
    fn first(&self, inputs: u8) -> Option<(u8, u32)> {
        let rank = inputs.rotate_right(u32::from(self.highest)).trailing_zeros();
        (inputs != 0).then(|| ((self.highest.wrapping_add(rank as u8)) & 7, rank))
    }

    /// The request that would be acknowledged now. `is_master`: has a slave on its cascade input.
    fn request(&self, is_master: bool) -> Option<u8> {
        let (input, rank) = self.first(self.irr() & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && is_master {
            in_service &= !(1 << CASCADE);
        }
        match self.first(in_service) {
            Some((_, serving)) if serving <= rank => None,
            _ => Some(input),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1u8 << (input & 7);
        self.edges &= !bit;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.highest = (input + 1) & 7;
        }
    }

    fn non_specific_eoi(&mut self) -> Option<u8> {
        let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let (input, _) = self.first(in_service)?;
        self.isr &= !(1 << input);
        Some(input)
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1. The level-trigger bit is without effect in a PC: ELCR decides.
            *self = Self {
                inputs: self.inputs,
                elcr: self.elcr,
                vector_base: self.vector_base,
                init: Init::Icw2,
                single: value & 2 != 0,
                icw4_needed: value & 1 != 0,
                ..Self::new()
            };
        } else if value & 0x08 != 0 {
            // OCW3
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            1 => {
                self.non_specific_eoi();
            }
            3 => self.isr &= !(1 << level),
            4 => self.rotate_on_auto_eoi = true,
            5 => {
                if let Some(input) = self.non_specific_eoi() {
                    self.highest = (input + 1) & 7;
                }
            }
            6 => self.highest = (level + 1) & 7,
            7 => {
                self.isr &= !(1 << level);
                self.highest = (level + 1) & 7;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = match (self.single, self.icw4_needed) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Done,
                };
            }
            // Which input the slave is on is wired, whatever software says.
            Init::Icw3 => self.init = if self.icw4_needed { Init::Icw4 } else { Init::Done },
            Init::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.init = Init::Done;
            }
        }
    }

    /// Reads either port. A read after the poll command acknowledges.
    fn read(&mut self, data: bool, is_master: bool) -> u8 {
        if self.poll {
            self.poll = false;
            return match self.request(is_master) {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0x07,
            };
        }
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr(),
        }
    }
}

/// The register machine: master and slave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pic {
    chips: [Chip; 2],
}

impl Registers for Pic {
    const VERSION: u32 = 1;

    fn valid(&self) -> bool {
        self.chips.iter().all(|chip| chip.highest < 8)
    }
}

impl Default for Pic {
    fn default() -> Self {
        let mut chips = [Chip::new(); 2];
        // The slave's output is not an edge source: it can ask again right after an acknowledge.
        chips[0].elcr = 1 << CASCADE;
        Self { chips }
    }
}

impl Pic {
    fn cascade(&mut self) {
        let [master, slave] = &mut self.chips;
        master.set_input(CASCADE, slave.request(false).is_some());
    }

    /// Drives an input: 0 to 7 on the master (not 2), 8 to 15 on the slave.
    pub fn set_input(&mut self, irq: usize, high: bool) {
        match irq {
            2 => {}
            0..8 => self.chips[0].set_input(irq as u8, high),
            8..16 => {
                self.chips[1].set_input(irq as u8 - 8, high);
                self.cascade();
            }
            _ => {}
        }
    }

    /// The INT output, wired to the processor.
    pub fn output(&self) -> bool {
        self.chips[0].request(true).is_some()
    }

    /// The processor's interrupt acknowledge: the vector. With nothing requested any more it is that of IRQ 7
    /// or 15, and no bit of the ISR is set for it.
    pub fn acknowledge(&mut self) -> u8 {
        let [master, slave] = &mut self.chips;
        let vector = match master.request(true) {
            Some(CASCADE) => {
                master.acknowledge(CASCADE);
                let input = slave.request(false);
                if let Some(input) = input {
                    slave.acknowledge(input);
                }
                slave.vector_base | input.unwrap_or(7)
            }
            Some(input) => {
                master.acknowledge(input);
                master.vector_base | input
            }
            None => master.vector_base | 7,
        };
        self.cascade();
        vector
    }

    /// Reads one of the six ports.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.chips[0].read(port & 1 != 0, true),
            0xa0 | 0xa1 => self.chips[1].read(port & 1 != 0, false),
            ELCR => self.chips[0].elcr & ELCR_MASK[0],
            0x4d1 => self.chips[1].elcr,
            _ => 0xff,
        };
        self.cascade();
        value
    }

    /// Writes one of the six ports.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.chips[0].write_command(value),
            0x21 => self.chips[0].write_data(value),
            0xa0 => self.chips[1].write_command(value),
            0xa1 => self.chips[1].write_data(value),
            ELCR => self.chips[0].elcr = value & ELCR_MASK[0] | 1 << CASCADE,
            0x4d1 => self.chips[1].elcr = value & ELCR_MASK[1],
            _ => {}
        }
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set up as a PC's BIOS does: vectors 08h and 70h, nothing masked.
    fn pic() -> Pic {
        let mut pic = Pic::default();
        for (port, icw2, icw3) in [(0x20, 0x08, 4), (0xa0, 0x70, 2)] {
            pic.write(port, 0x11);
            pic.write(port + 1, icw2);
            pic.write(port + 1, icw3);
            pic.write(port + 1, 0x01);
        }
        pic
    }
    fn isr(pic: &mut Pic, port: u16) -> u8 {
        pic.write(port, 0x0b);
        pic.read(port)
    }

    #[test]
    fn an_edge_interrupts_once_until_eoi_and_the_next_edge() {
        let mut pic = pic();
        pic.set_input(0, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x08);
        assert_eq!(isr(&mut pic, 0x20), 1);
        pic.write(0x20, 0x20);
        assert!(!pic.output());
        pic.set_input(0, false);
        pic.set_input(0, true);
        assert!(pic.output());
    }

    #[test]
    fn priorities_nest() {
        let mut pic = pic();
        pic.set_input(4, true);
        assert_eq!(pic.acknowledge(), 0x0c);
        pic.set_input(5, true);
        assert!(!pic.output());
        pic.set_input(1, true);
        assert_eq!(pic.acknowledge(), 0x09);
        pic.write(0x20, 0x20);
        assert_eq!(isr(&mut pic, 0x20), 1 << 4);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x0d);
    }

    #[test]
    fn the_slave_comes_through_input_2() {
        let mut pic = pic();
        pic.set_input(8, true);
        pic.set_input(3, true);
        assert_eq!(pic.acknowledge(), 0x70);
        assert_eq!((isr(&mut pic, 0x20), isr(&mut pic, 0xa0)), (4, 1));
        assert!(!pic.output());
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x62);
        assert_eq!(pic.acknowledge(), 0x0b);
    }

    #[test]
    fn two_slave_interrupts_follow_each_other() {
        let mut pic = pic();
        pic.set_input(10, true);
        pic.set_input(9, true);
        assert_eq!(pic.acknowledge(), 0x71);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x72);
    }

    #[test]
    fn special_fully_nested_mode_lets_a_better_slave_request_through() {
        let mut pic = pic();
        pic.write(0x20, 0x11);
        pic.write(0x21, 0x08);
        pic.write(0x21, 0x04);
        pic.write(0x21, 0x11);
        pic.set_input(12, true);
        assert_eq!(pic.acknowledge(), 0x74);
        pic.set_input(9, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x71);
    }

    #[test]
    fn an_edge_is_kept_when_its_input_falls() {
        let mut pic = pic();
        pic.set_input(11, true);
        pic.set_input(11, false);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x73);
        assert!(!pic.output());
    }

    #[test]
    fn a_request_that_goes_away_is_spurious() {
        let mut pic = pic();
        pic.write(0x4d0, 1 << 4);
        pic.set_input(4, true);
        pic.set_input(4, false);
        assert!(!pic.output());
        assert_eq!(pic.acknowledge(), 0x0f);
        assert_eq!(isr(&mut pic, 0x20), 0);
        pic.set_input(10, true);
        pic.write(0xa1, 0xff);
        assert!(!pic.output());
    }

    #[test]
    fn masks_hold_requests_back() {
        let mut pic = pic();
        pic.write(0x21, 0x10);
        pic.set_input(4, true);
        assert!(!pic.output());
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), 0x10);
        pic.write(0x21, 0);
        assert!(pic.output());
        assert_eq!(pic.read(0x21), 0);
    }

    #[test]
    fn special_mask_mode_serves_lower_priorities() {
        let mut pic = pic();
        pic.set_input(1, true);
        pic.acknowledge();
        pic.set_input(6, true);
        assert!(!pic.output());
        pic.write(0x21, 1 << 1);
        assert!(!pic.output());
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x0e);
        pic.write(0x20, 0x20);
        assert_eq!(isr(&mut pic, 0x20), 1 << 1);
    }

    #[test]
    fn rotation_makes_the_served_input_lowest() {
        let mut pic = pic();
        pic.set_input(0, true);
        pic.acknowledge();
        pic.write(0x20, 0xa0);
        pic.set_input(0, false);
        pic.set_input(0, true);
        pic.set_input(1, true);
        assert_eq!(pic.acknowledge(), 0x09);
        pic.write(0x20, 0xe1);
        assert_eq!(isr(&mut pic, 0x20), 0);
        pic.write(0x20, 0xc3);
        pic.set_input(4, true);
        assert_eq!(pic.acknowledge(), 0x0c);
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        let mut pic = pic();
        pic.write(0x20, 0x13);
        pic.write(0x21, 0x20);
        pic.write(0x21, 0x03);
        pic.write(0x20, 0x80);
        pic.set_input(0, true);
        assert_eq!(pic.acknowledge(), 0x20);
        assert_eq!(isr(&mut pic, 0x20), 0);
        pic.set_input(0, false);
        pic.set_input(0, true);
        pic.set_input(7, true);
        assert_eq!(pic.acknowledge(), 0x27);
    }

    #[test]
    fn poll_acknowledges() {
        let mut pic = pic();
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x07);
        pic.set_input(5, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x21), 0x85);
        assert_eq!(isr(&mut pic, 0x20), 1 << 5);
        assert_eq!(pic.read(0x21), 0);
    }

    #[test]
    fn level_inputs_ask_as_long_as_they_are_high() {
        let mut pic = pic();
        pic.write(0x4d1, 0xff);
        pic.write(0x4d0, 0xff);
        assert_eq!((pic.read(0x4d0), pic.read(0x4d1)), (0xf8, 0xde));
        pic.set_input(9, true);
        assert_eq!(pic.acknowledge(), 0x71);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x71);
        pic.set_input(9, false);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert!(!pic.output());
    }

    #[test]
    fn save_and_restore() {
        let mut pic = pic();
        pic.set_input(12, true);
        let mut other = Pic::default();
        other.restore(&pic.save()).unwrap();
        assert_eq!(other.acknowledge(), 0x74);
    }
}
