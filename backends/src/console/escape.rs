//! The escape key of a console on a terminal: Ctrl-A and a letter.

/// What the user wants of us instead of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ctrl-A x: end the machine.
    Quit,
    /// Ctrl-A b: press the machine's power button.
    PowerButton,
    /// Ctrl-A h: list the commands.
    Help,
}

/// The list of commands, as shown by Ctrl-A h.
pub const HELP: &str = "\n\
    Ctrl-A x       end the machine at once\n\
    Ctrl-A b       press the power button\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest (or Ctrl-A a)\n\
    Ctrl-A h       this help\n";

const CTRL_A: u8 = 1;

/// Splits what is typed into the guest's bytes and our commands.
#[derive(Debug, Default)]
pub struct Escape {
    pressed: bool,
}

impl Escape {
    /// Takes one typed byte; bytes for the guest are added to `guest`.
    pub fn key(&mut self, byte: u8, guest: &mut Vec<u8>) -> Option<Command> {
        if !std::mem::take(&mut self.pressed) {
            if byte == CTRL_A {
                self.pressed = true;
            } else {
                guest.push(byte);
            }
            return None;
        }
        match byte {
            b'x' => return Some(Command::Quit),
            b'b' => return Some(Command::PowerButton),
            b'h' | b'?' => return Some(Command::Help),
            b'a' | CTRL_A => guest.push(CTRL_A),
            // Ctrl-A is "start of line" in a shell: a user who forgot about the escape key loses nothing.
            other => guest.extend([CTRL_A, other]),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn type_keys(keys: &[u8]) -> (Vec<u8>, Vec<Command>) {
        let (mut escape, mut guest) = (Escape::default(), Vec::new());
        let commands = keys.iter().filter_map(|&key| escape.key(key, &mut guest)).collect();
        (guest, commands)
    }

    #[test]
    fn plain_keys_go_to_the_guest() {
        assert_eq!(type_keys(b"ls -l\r\x03\x1d"), (b"ls -l\r\x03\x1d".to_vec(), vec![]));
    }

    #[test]
    fn commands_are_not_seen_by_the_guest() {
        let (guest, commands) = type_keys(b"a\x01hb\x01b\x01xc");
        assert_eq!(guest, b"abc");
        assert_eq!(commands, [Command::Help, Command::PowerButton, Command::Quit]);
    }

    #[test]
    fn ctrl_a_can_be_sent() {
        assert_eq!(type_keys(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(type_keys(b"\x01ax"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(type_keys(b"\x01z"), (b"\x01z".to_vec(), vec![]));
    }
}
