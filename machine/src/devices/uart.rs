//! The 16550A UART (National Semiconductor PC16550D datasheet) with a line of infinite speed: a byte sent is
//! gone at once, and a timeout of the receive FIFO is over at once.

use alloc::collections::VecDeque;
use alloc::sync::Arc;

use super::{Registers, RestoreError, Saved};
use crate::device::{IrqLine, PortIo};
use crate::host::ByteStream;
use crate::sync::Mutex;

/// First port and ISA interrupt of COM1 to COM4.
pub const COM: [(u16, usize); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
/// Ports of one UART.
pub const PORTS: u32 = 8;

const FIFO_SIZE: usize = 16;

/// Register numbers.
mod reg {
    /// Receiver buffer, transmitter holding; with DLAB the low byte of the divisor.
    pub const DATA: u16 = 0;
    /// Interrupt enable; with DLAB the high byte of the divisor.
    pub const IER: u16 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub const IIR_FCR: u16 = 2;
    pub const LCR: u16 = 3;
    pub const MCR: u16 = 4;
    pub const LSR: u16 = 5;
    pub const MSR: u16 = 6;
    pub const SCRATCH: u16 = 7;
}

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_ERRORS: u8 = 0x1e;
const LSR_THR_EMPTY: u8 = 1 << 5;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// Ring indicator's delta bit is set by its falling edge only.
const MSR_TRAILING_RI: u8 = 1 << 2;

/// The register machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uart {
    received: VecDeque<u8>,
    divisor: u16,
    ier: u8,
    fifos: bool,
    /// Bytes in the receive FIFO that raise the interrupt.
    trigger: u8,
    lcr: u8,
    mcr: u8,
    /// Line status: only the error bits are kept here.
    errors: u8,
    /// Modem status, with its delta bits.
    msr: u8,
    scratch: u8,
    /// The transmitter has become empty since IIR last said so.
    empty_pending: bool,
}

impl Registers for Uart {
    const VERSION: u32 = 1;

    fn valid(&self) -> bool {
        self.received.len() <= FIFO_SIZE
    }
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            received: VecDeque::with_capacity(FIFO_SIZE),
            divisor: 12,
            ier: 0,
            fifos: false,
            trigger: 1,
            lcr: 0,
            mcr: 0,
            errors: 0,
            // Somebody listens at the far end.
            msr: MSR_CTS | MSR_DSR | MSR_DCD,
            scratch: 0,
            empty_pending: false,
        }
    }
}

impl Uart {
    fn capacity(&self) -> usize {
        if self.fifos { FIFO_SIZE } else { 1 }
    }
    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    /// How many bytes from the line can be taken now. In loop-back mode the line is cut off.
    pub fn can_receive(&self) -> usize {
        if self.looped() { 0 } else { self.capacity().saturating_sub(self.received.len()) }
    }

    /// Takes a byte from the line; with no room it is lost, and the overrun is noted.
    pub fn receive(&mut self, byte: u8) {
        if !self.looped() {
            self.push(byte);
        }
    }
    fn push(&mut self, byte: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
            return;
        }
        self.errors |= LSR_OVERRUN;
        if !self.fifos {
            // Without FIFOs the new byte replaces the old; with FIFOs it is the one that is lost.
            self.received.clear();
            self.received.push_back(byte);
        }
    }

    /// The interrupt of highest priority (datasheet, table IV), as IIR's low four bits.
    fn interrupt(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        if enabled(IER_LINE_STATUS) && self.errors != 0 {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && !self.received.is_empty() {
            if self.received.len() >= usize::from(self.trigger) { IIR_RECEIVED } else { IIR_TIMEOUT }
        } else if enabled(IER_TRANSMITTER_EMPTY) && self.empty_pending {
            IIR_TRANSMITTER_EMPTY
        } else if enabled(IER_MODEM_STATUS) && self.msr & 0xf != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// Level of the interrupt line. On a PC, OUT2 gates it.
    pub fn irq(&self) -> bool {
        self.interrupt() != IIR_NONE && (self.mcr & MCR_OUT2 != 0 || self.looped())
    }

    /// Reads register 0 to 7.
    pub fn read(&mut self, register: u16) -> u8 {
        let latch = self.lcr & LCR_DLAB != 0;
        match register & 7 {
            reg::DATA if latch => self.divisor as u8,
            reg::IER if latch => (self.divisor >> 8) as u8,
            reg::DATA => self.received.pop_front().unwrap_or(0),
            reg::IER => self.ier,
            reg::IIR_FCR => {
                let interrupt = self.interrupt();
                if interrupt == IIR_TRANSMITTER_EMPTY {
                    self.empty_pending = false;
                }
                interrupt | if self.fifos { IIR_FIFOS } else { 0 }
            }
            reg::LCR => self.lcr,
            reg::MCR => self.mcr,
            reg::LSR => {
                let ready = if self.received.is_empty() { 0 } else { LSR_DATA_READY };
                let errors = core::mem::take(&mut self.errors);
                ready | errors & LSR_ERRORS | LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY
            }
            reg::MSR => {
                let msr = self.msr;
                self.msr &= 0xf0;
                msr
            }
            _ => self.scratch,
        }
    }

    /// Writes register 0 to 7. Returns a byte for the line.
    pub fn write(&mut self, register: u16, value: u8) -> Option<u8> {
        let latch = self.lcr & LCR_DLAB != 0;
        match register & 7 {
            reg::DATA if latch => self.divisor = self.divisor & 0xff00 | u16::from(value),
            reg::IER if latch => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            reg::DATA => {
                self.empty_pending = true;
                if !self.looped() {
                    return Some(value);
                }
                self.push(value);
            }
            reg::IER => {
                let enabled = value & !self.ier;
                self.ier = value & 0xf;
                // Enabling the interrupt while the transmitter is empty raises it.
                self.empty_pending |= enabled & IER_TRANSMITTER_EMPTY != 0;
            }
            reg::IIR_FCR => self.write_fcr(value),
            reg::LCR => self.lcr = value,
            reg::MCR => self.write_mcr(value & 0x1f),
            reg::SCRATCH => self.scratch = value,
            // LSR and MSR are read-only (writes are for factory tests).
            _ => {}
        }
        None
    }

    fn write_fcr(&mut self, value: u8) {
        let fifos = value & FCR_ENABLE != 0;
        if fifos != self.fifos || value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        self.fifos = fifos;
        self.trigger = match (fifos, value >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        };
    }

    fn write_mcr(&mut self, value: u8) {
        self.mcr = value;
        // In loop-back mode the modem outputs drive the modem inputs.
        let input = if self.looped() {
            let wired = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)];
            wired.iter().filter(|(out, _)| value & out != 0).map(|(_, input)| input).sum()
        } else {
            MSR_CTS | MSR_DSR | MSR_DCD
        };
        let old = self.msr & 0xf0;
        let mut delta = (old ^ input) >> 4;
        if input & MSR_RI != 0 {
            delta &= !MSR_TRAILING_RI;
        }
        self.msr = input | self.msr & 0xf | delta;
    }
}

/// A UART on its ports, its interrupt line and its far end.
pub struct SerialPort {
    registers: Mutex<Uart>,
    irq: Arc<dyn IrqLine>,
    far_end: Arc<dyn ByteStream>,
}

impl SerialPort {
    /// A UART after reset.
    pub fn new(irq: Arc<dyn IrqLine>, far_end: Arc<dyn ByteStream>) -> Arc<Self> {
        Arc::new(Self { registers: Mutex::default(), irq, far_end })
    }

    /// How many bytes [`SerialPort::receive`] would take now. When it grows from nothing,
    /// [`ByteStream::ready`] is called.
    pub fn can_receive(&self) -> usize {
        self.registers.lock().can_receive()
    }

    /// Bytes from the far end: takes as many as there is room for, and returns how many.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut registers = self.registers.lock();
        let count = registers.can_receive().min(bytes.len());
        for &byte in bytes.iter().take(count) {
            registers.receive(byte);
        }
        self.irq.set(registers.irq());
        count
    }

    /// A copy of the registers.
    pub fn save(&self) -> Saved<Uart> {
        self.registers.lock().save()
    }
    /// Takes over saved registers.
    pub fn restore(&self, saved: &Saved<Uart>) -> Result<(), RestoreError> {
        let mut registers = self.registers.lock();
        registers.restore(saved)?;
        self.irq.set(registers.irq());
        Ok(())
    }

    /// Accesses the registers, then lets the interrupt line follow and tells the far end about new room.
    fn access<R>(&self, access: impl FnOnce(&mut Uart) -> R) -> R {
        let mut registers = self.registers.lock();
        let was_full = registers.can_receive() == 0;
        let result = access(&mut registers);
        self.irq.set(registers.irq());
        let has_room = registers.can_receive() != 0;
        drop(registers);
        if was_full && has_room {
            self.far_end.ready();
        }
        result
    }
}

impl PortIo for SerialPort {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        self.access(|registers| registers.read(port)).into()
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        if let Some(byte) = self.access(|registers| registers.write(port, value as u8)) {
            self.far_end.write(&[byte]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Host;

    fn fifo_uart() -> Uart {
        let mut uart = Uart::default();
        uart.write(reg::MCR, MCR_OUT2);
        uart.write(reg::IIR_FCR, FCR_ENABLE | 0x80);
        uart
    }

    #[test]
    fn bytes_are_sent_at_once() {
        let mut uart = Uart::default();
        assert_eq!(uart.write(reg::DATA, b'x'), Some(b'x'));
        assert_eq!(uart.read(reg::LSR), LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn the_divisor_latch_hides_data_and_ier() {
        let mut uart = Uart::default();
        uart.write(reg::IER, 5);
        uart.write(reg::LCR, LCR_DLAB | 3);
        assert_eq!(uart.write(reg::DATA, 0x34), None);
        uart.write(reg::IER, 0x12);
        assert_eq!((uart.read(reg::DATA), uart.read(reg::IER)), (0x34, 0x12));
        uart.write(reg::LCR, 3);
        assert_eq!(uart.read(reg::IER), 5);
    }

    #[test]
    fn enabling_the_empty_interrupt_raises_it_and_reading_iir_ends_it() {
        let mut uart = fifo_uart();
        uart.write(reg::IER, IER_TRANSMITTER_EMPTY);
        assert!(uart.irq());
        assert_eq!(uart.read(reg::IIR_FCR), IIR_FIFOS | IIR_TRANSMITTER_EMPTY);
        assert_eq!(uart.read(reg::IIR_FCR), IIR_FIFOS | IIR_NONE);
        assert!(!uart.irq());
        uart.write(reg::DATA, 0);
        assert!(uart.irq());
        uart.write(reg::IER, 0);
        uart.write(reg::IER, IER_TRANSMITTER_EMPTY);
        assert_eq!(uart.read(reg::IIR_FCR), IIR_FIFOS | IIR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn the_receive_fifo_has_a_trigger_and_a_timeout() {
        let mut uart = fifo_uart();
        uart.write(reg::IER, IER_RECEIVED);
        uart.receive(b'a');
        assert_eq!(uart.read(reg::IIR_FCR), IIR_FIFOS | IIR_TIMEOUT);
        (0..7).for_each(|_| uart.receive(b'b'));
        assert_eq!(uart.read(reg::IIR_FCR), IIR_FIFOS | IIR_RECEIVED);
        assert_eq!(uart.read(reg::DATA), b'a');
        (0..7).for_each(|_| assert_eq!(uart.read(reg::DATA), b'b'));
        assert!(!uart.irq());
        assert_eq!(uart.read(reg::DATA), 0);
    }

    #[test]
    fn overrun_has_the_highest_priority_and_is_cleared_by_reading() {
        let mut uart = fifo_uart();
        uart.write(reg::IER, 0xf);
        (0..17).for_each(|_| uart.receive(1));
        assert_eq!((uart.can_receive(), uart.received.len()), (0, 16));
        assert_eq!(uart.read(reg::IIR_FCR) & 0xf, IIR_LINE_STATUS);
        assert_eq!(uart.read(reg::LSR) & 0x1f, LSR_OVERRUN | LSR_DATA_READY);
        assert_eq!(uart.read(reg::IIR_FCR) & 0xf, IIR_RECEIVED);
    }

    #[test]
    fn without_fifos_there_is_room_for_one() {
        let mut uart = Uart::default();
        uart.receive(1);
        assert_eq!(uart.can_receive(), 0);
        uart.receive(2);
        assert_eq!(uart.read(reg::DATA), 2);
        assert_eq!(uart.read(reg::IIR_FCR), IIR_NONE);
    }

    #[test]
    fn switching_the_fifos_empties_them() {
        let mut uart = fifo_uart();
        uart.receive(1);
        uart.write(reg::IIR_FCR, 0);
        assert_eq!(uart.read(reg::LSR) & LSR_DATA_READY, 0);
    }

    #[test]
    fn loop_back_joins_data_and_modem_lines() {
        let mut uart = Uart::default();
        uart.write(reg::MCR, MCR_LOOP | MCR_RTS | MCR_OUT2);
        assert_eq!(uart.write(reg::DATA, 0x5a), None);
        assert_eq!((uart.can_receive(), uart.read(reg::DATA)), (0, 0x5a));
        assert_eq!(uart.read(reg::MSR), MSR_CTS | MSR_DCD | MSR_DSR >> 4);
        assert_eq!(uart.read(reg::MSR), MSR_CTS | MSR_DCD);
        uart.write(reg::MCR, MCR_LOOP | MCR_OUT1);
        assert_eq!(uart.read(reg::MSR) & MSR_TRAILING_RI, 0);
        uart.write(reg::MCR, MCR_LOOP);
        assert_eq!(uart.read(reg::MSR), MSR_TRAILING_RI);
    }

    #[test]
    fn a_modem_change_interrupts_until_read() {
        let mut uart = fifo_uart();
        uart.write(reg::IER, IER_MODEM_STATUS);
        uart.write(reg::MCR, MCR_LOOP | MCR_OUT2);
        assert_eq!(uart.read(reg::IIR_FCR), IIR_FIFOS | IIR_MODEM_STATUS);
        uart.read(reg::MSR);
        assert_eq!(uart.read(reg::IIR_FCR), IIR_FIFOS | IIR_NONE);
    }

    #[test]
    fn out2_gates_the_interrupt_line() {
        let mut uart = Uart::default();
        uart.write(reg::IER, IER_RECEIVED);
        uart.receive(1);
        assert!(!uart.irq());
        uart.write(reg::MCR, MCR_OUT2);
        assert!(uart.irq());
    }

    #[test]
    fn scratch_keeps_and_reserved_bits_do_not() {
        let mut uart = Uart::default();
        uart.write(reg::SCRATCH, 0xa5);
        uart.write(reg::IER, 0xff);
        uart.write(reg::MCR, 0xff);
        assert_eq!((uart.read(reg::SCRATCH), uart.read(reg::IER), uart.read(reg::MCR)), (0xa5, 0x0f, 0x1f));
    }

    #[test]
    fn the_port_holds_input_back_and_says_when_there_is_room() {
        let host = Host::new();
        let port = SerialPort::new(host.clone(), host.clone());
        port.port_write(0x3f8 + reg::IIR_FCR, 1, FCR_ENABLE.into());
        assert_eq!(port.receive(&[7; 20]), 16);
        assert_eq!((port.can_receive(), host.ready_calls()), (0, 0));
        port.port_read(0x3f8, 1);
        assert_eq!((port.can_receive(), host.ready_calls()), (1, 1));
        port.port_read(0x3f8, 1);
        assert_eq!(host.ready_calls(), 1);
        port.port_write(0x3f8, 1, 0x41);
        assert_eq!(host.bytes(), [0x41]);
    }

    #[test]
    fn save_and_restore() {
        let mut uart = fifo_uart();
        uart.receive(3);
        let mut other = Uart::default();
        other.restore(&uart.save()).unwrap();
        assert_eq!(other.read(reg::DATA), 3);
        let mut saved = uart.save();
        saved.registers.received.extend([0; 16]);
        assert_eq!(other.restore(&saved), Err(RestoreError::Invalid));
    }
}
