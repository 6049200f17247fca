//! What is typed on the console: for a guest, or for the hypervisor after the escape key.

/// Begins a command: Ctrl-].
pub(crate) const ESCAPE: u8 = 0x1d;

/// Words about the commands.
pub(crate) const HELP: &str =
    "Ctrl-] and: 1 to 9 switches the console, l lists, s shows counts, r resets, q stops, Ctrl-] is itself";

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// For the guest.
    Guest(u8),
    /// Switch to the guest of this index.
    Switch(usize),
    /// List the machines.
    List,
    /// Show what was counted for the machine with the keyboard.
    Statistics,
    /// Reset it.
    Reset,
    /// Stop it.
    Stop,
    /// Anything else.
    Help,
}

/// The keyboard.
#[derive(Default)]
pub(crate) struct Keys {
    escaped: bool,
}

impl Keys {
    /// A byte was typed.
    pub(crate) fn typed(&mut self, byte: u8) -> Option<Key> {
        if !core::mem::take(&mut self.escaped) {
            self.escaped = byte == ESCAPE;
            return (!self.escaped).then_some(Key::Guest(byte));
        }
        Some(match byte {
            ESCAPE => Key::Guest(ESCAPE),
            b'1'..=b'9' => Key::Switch(usize::from(byte - b'1')),
            b'l' => Key::List,
            b's' => Key::Statistics,
            b'r' => Key::Reset,
            b'q' => Key::Stop,
            _ => Key::Help,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_begin_with_the_escape_key() {
        let mut keys = Keys::default();
        let typed: alloc::vec::Vec<_> =
            b"a1\x1d2\x1d\x1dl\x1dl\x1dr\x1dx".iter().filter_map(|byte| keys.typed(*byte)).collect();
        let guest = Key::Guest;
        assert_eq!(
            typed,
            [
                guest(b'a'),
                guest(b'1'),
                Key::Switch(1),
                guest(ESCAPE),
                guest(b'l'),
                Key::List,
                Key::Reset,
                Key::Help
            ]
        );
    }
}
