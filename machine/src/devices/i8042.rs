//! The 8042 keyboard controller with nothing plugged in (IBM PC/AT Technical Reference, "Keyboard controller"):
//! enough to be probed without delay, and to reset the machine.

use alloc::sync::Arc;

use super::reset::ResetControl;
use super::{Registers, RestoreError, Saved};
use crate::device::{IrqLine, PortIo};
use crate::sync::Mutex;

/// Data port.
pub const DATA: u16 = 0x60;
/// Status (read) and command (write) port.
pub const COMMAND: u16 = 0x64;
/// ISA interrupt of the keyboard.
pub const KEYBOARD_IRQ: usize = 1;
/// ISA interrupt of the mouse.
pub const MOUSE_IRQ: usize = 12;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_NOT_INHIBITED: u8 = 1 << 4;
const STATUS_FROM_MOUSE: u8 = 1 << 5;
const STATUS_TIMEOUT: u8 = 1 << 6;

const MODE_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const MODE_MOUSE_INTERRUPT: u8 = 1 << 1;
const MODE_SYSTEM: u8 = 1 << 2;
const MODE_KEYBOARD_DISABLED: u8 = 1 << 4;
const MODE_MOUSE_DISABLED: u8 = 1 << 5;

const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
const OUTPUT_KEYBOARD_FULL: u8 = 1 << 4;
const OUTPUT_MOUSE_FULL: u8 = 1 << 5;

/// What a device that is not there answers, together with the timeout bit of the status.
const NO_ANSWER: u8 = 0xfe;

/// A byte in the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Output {
    byte: u8,
    from_mouse: bool,
    timeout: bool,
}

/// The register machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct I8042 {
    output: Option<Output>,
    /// The command whose data byte is awaited.
    command: Option<u8>,
    last_was_command: bool,
    /// RAM of the controller; byte 0 is the mode.
    ram: [u8; 32],
    output_port: u8,
}

impl Registers for I8042 {
    const VERSION: u32 = 1;
}

impl Default for I8042 {
    fn default() -> Self {
        let mut ram = [0; 32];
        ram[0] = MODE_SYSTEM | MODE_KEYBOARD_DISABLED | MODE_MOUSE_DISABLED;
        Self {
            output: None,
            command: None,
            last_was_command: false,
            ram,
            output_port: OUTPUT_NOT_RESET | OUTPUT_A20,
        }
    }
}

impl I8042 {
    fn mode(&self) -> u8 {
        self.ram[0]
    }
    fn answer(&mut self, byte: u8) {
        self.output = Some(Output { byte, from_mouse: false, timeout: false });
    }

    /// Levels of the keyboard's and the mouse's interrupt line.
    pub fn irqs(&self) -> (bool, bool) {
        let from_mouse = self.output.map(|output| output.from_mouse);
        (
            from_mouse == Some(false) && self.mode() & MODE_KEYBOARD_INTERRUPT != 0,
            from_mouse == Some(true) && self.mode() & MODE_MOUSE_INTERRUPT != 0,
        )
    }

    /// Reads the data port (60h).
    pub fn read_data(&mut self) -> u8 {
        self.output.take().map_or(0, |output| output.byte)
    }

    /// Reads the status port (64h).
    pub fn read_status(&self) -> u8 {
        let mut status = self.mode() & MODE_SYSTEM & STATUS_SYSTEM | STATUS_NOT_INHIBITED;
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        if let Some(output) = self.output {
            status |= STATUS_OUTPUT_FULL;
            if output.from_mouse {
                status |= STATUS_FROM_MOUSE;
            }
            if output.timeout {
                status |= STATUS_TIMEOUT;
            }
        }
        status
    }

    /// Writes the command port (64h). True: the processor is reset.
    pub fn write_command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.command = None;
        match command {
            0x20..=0x3f => self.answer(self.ram[usize::from(command & 0x1f)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(command),
            0xa7 => self.ram[0] |= MODE_MOUSE_DISABLED,
            0xa8 => self.ram[0] &= !MODE_MOUSE_DISABLED,
            // Tests of the mouse's and the keyboard's wires: no error.
            0xa9 | 0xab => self.answer(0x00),
            0xaa => self.answer(0x55),
            0xad => self.ram[0] |= MODE_KEYBOARD_DISABLED,
            0xae => self.ram[0] &= !MODE_KEYBOARD_DISABLED,
            0xc0 => self.answer(0x80),
            0xd0 => self.answer(self.read_output_port()),
            // Pulses output bits that are zero here; bit 0 is the processor's reset.
            0xf0..=0xff => return command & 1 == 0,
            _ => {}
        }
        false
    }

    fn read_output_port(&self) -> u8 {
        let full = match self.output {
            Some(Output { from_mouse: true, .. }) => OUTPUT_MOUSE_FULL,
            Some(_) => OUTPUT_KEYBOARD_FULL,
            None => 0,
        };
        self.output_port | full
    }

    /// Writes the data port (60h). True: the processor is reset.
    pub fn write_data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match self.command.take() {
            Some(command @ 0x60..=0x7f) => self.ram[usize::from(command & 0x1f)] = value,
            Some(0xd1) => {
                self.output_port = value & (OUTPUT_NOT_RESET | OUTPUT_A20);
                return value & OUTPUT_NOT_RESET == 0;
            }
            // Bytes as if from the keyboard and the mouse.
            Some(0xd2) => self.answer(value),
            Some(0xd3) => self.output = Some(Output { byte: value, from_mouse: true, timeout: false }),
            Some(0xd4) => self.output = Some(Output { byte: NO_ANSWER, from_mouse: true, timeout: true }),
            _ => {
                self.ram[0] &= !MODE_KEYBOARD_DISABLED;
                self.output = Some(Output { byte: NO_ANSWER, from_mouse: false, timeout: true });
            }
        }
        false
    }
}

/// The controller on its two ports.
pub struct KeyboardController {
    registers: Mutex<I8042>,
    keyboard: Arc<dyn IrqLine>,
    mouse: Arc<dyn IrqLine>,
    reset: Arc<ResetControl>,
}

impl KeyboardController {
    /// The controller after its self-test, with its interrupt lines.
    pub fn new(keyboard: Arc<dyn IrqLine>, mouse: Arc<dyn IrqLine>, reset: Arc<ResetControl>) -> Arc<Self> {
        Arc::new(Self { registers: Mutex::default(), keyboard, mouse, reset })
    }
    fn access<R>(&self, access: impl FnOnce(&mut I8042) -> R) -> R {
        let mut registers = self.registers.lock();
        let result = access(&mut registers);
        let (keyboard, mouse) = registers.irqs();
        self.keyboard.set(keyboard);
        self.mouse.set(mouse);
        result
    }
    /// A copy of the registers.
    pub fn save(&self) -> Saved<I8042> {
        self.registers.lock().save()
    }
    /// Takes over saved registers.
    pub fn restore(&self, saved: &Saved<I8042>) -> Result<(), RestoreError> {
        self.access(|registers| registers.restore(saved))
    }
}

impl PortIo for KeyboardController {
    fn port_read(&self, port: u16, _: usize) -> u32 {
        let value = self.access(|r| if port == DATA { r.read_data() } else { r.read_status() });
        value.into()
    }
    fn port_write(&self, port: u16, _: usize, value: u32) {
        let value = value as u8;
        if self.access(|r| if port == DATA { r.write_data(value) } else { r.write_command(value) }) {
            self.reset.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Host;
    use crate::host::MachineEvent;

    #[test]
    fn self_test_and_wire_tests_pass() {
        let mut c = I8042::default();
        for (command, answer) in [(0xaa, 0x55), (0xa9, 0), (0xab, 0)] {
            assert!(!c.write_command(command));
            assert_ne!(c.read_status() & STATUS_OUTPUT_FULL, 0);
            assert_eq!(c.read_data(), answer);
            assert_eq!(c.read_status() & STATUS_OUTPUT_FULL, 0);
        }
    }

    #[test]
    fn the_mode_byte_is_kept_and_changed_by_commands() {
        let mut c = I8042::default();
        c.write_command(0x60);
        c.write_data(0x47);
        c.write_command(0xad);
        c.write_command(0x20);
        assert_eq!(c.read_data(), 0x57);
        c.write_command(0xae);
        c.write_command(0x20);
        assert_eq!(c.read_data(), 0x47);
    }

    #[test]
    fn no_keyboard_and_no_mouse_answer_with_a_timeout() {
        let mut c = I8042::default();
        c.write_data(0xf2);
        assert_eq!(c.read_status() & (STATUS_OUTPUT_FULL | STATUS_TIMEOUT | STATUS_FROM_MOUSE), 0x41);
        assert_eq!(c.read_data(), NO_ANSWER);
        c.write_command(0xd4);
        c.write_data(0xf2);
        assert_eq!(c.read_status() & (STATUS_TIMEOUT | STATUS_FROM_MOUSE), 0x60);
    }

    #[test]
    fn mouse_loop_back_interrupts_if_enabled() {
        let mut c = I8042::default();
        c.write_command(0xd3);
        c.write_data(0x5a);
        assert_eq!(c.irqs(), (false, false));
        c.write_command(0x60);
        c.write_data(MODE_MOUSE_INTERRUPT);
        assert_eq!(c.irqs(), (false, true));
        assert_eq!(c.read_data(), 0x5a);
        assert_eq!(c.irqs(), (false, false));
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let mut c = I8042::default();
        assert!(!c.write_command(0xff));
        assert!(c.write_command(0xfe));
        c.write_command(0xd1);
        assert!(!c.write_data(OUTPUT_NOT_RESET | OUTPUT_A20));
        c.write_command(0xd0);
        assert_eq!(c.read_data(), 3);
        c.write_command(0xd1);
        assert!(c.write_data(OUTPUT_A20));
    }

    #[test]
    fn the_port_tells_the_host_of_a_reset() {
        let host = Host::new();
        let port = KeyboardController::new(host.clone(), host.clone(), ResetControl::new(host.clone()));
        port.port_write(COMMAND, 1, 0xfe);
        assert_eq!(host.events(), [MachineEvent::Reset]);
    }

    #[test]
    fn save_and_restore() {
        let mut c = I8042::default();
        c.write_command(0xaa);
        let mut other = I8042::default();
        other.restore(&c.save()).unwrap();
        assert_eq!(other.read_data(), 0x55);
    }
}
