//! Several guests' consoles on one line: whoever has the keyboard writes as he likes, the others whole lines; each line begins
//! with its guest's name.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

/// Bytes of a guest's output that are kept to be shown again.
const RING: usize = 4096;
/// A line that is longer is cut.
const LONGEST_LINE: usize = 400;

/// Where output goes.
type Output<'a> = &'a mut dyn FnMut(&[u8]);

struct Source {
    name: String,
    /// The line that is not finished yet.
    line: Vec<u8>,
    ring: VecDeque<u8>,
}

impl Source {
    fn keep(&mut self, byte: u8) {
        if self.ring.len() == RING {
            self.ring.pop_front();
        }
        self.ring.push_back(byte);
    }

    fn begin(&self, out: Output<'_>) {
        out(b"[");
        out(self.name.as_bytes());
        out(b"] ");
    }
}

/// The state of the line.
pub(super) struct Mux {
    alone: bool,
    focus: usize,
    /// The line on the screen belongs to whoever has the keyboard, and is not finished.
    open: bool,
    sources: Vec<Source>,
}

impl Mux {
    pub(super) fn new(alone: bool) -> Self {
        Self { alone, focus: 0, open: false, sources: Vec::new() }
    }

    pub(super) fn add(&mut self, name: String) -> usize {
        self.sources.push(Source { name, line: Vec::new(), ring: VecDeque::with_capacity(RING) });
        self.sources.len() - 1
    }

    pub(super) fn focus(&self) -> usize {
        self.focus
    }

    pub(super) fn write(&mut self, index: usize, bytes: &[u8], out: Output<'_>) {
        if self.alone {
            out(bytes);
            return;
        }
        for byte in bytes {
            self.put(index, *byte, out);
        }
    }

    fn put(&mut self, index: usize, byte: u8, out: Output<'_>) {
        let focused = index == self.focus;
        let Some(source) = self.sources.get_mut(index) else { return };
        source.keep(byte);
        let ends = byte == b'\n' || source.line.len() >= LONGEST_LINE;
        if byte != b'\n' {
            source.line.push(byte);
        }
        if focused {
            if !self.open {
                source.begin(out);
                // What stands on the line already, if another one's line came between.
                let shown = source.line.len() - usize::from(byte != b'\n');
                out(source.line.get(..shown).unwrap_or_default());
            }
            out(&[byte]);
            self.open = !ends;
            if ends {
                source.line.clear();
            }
        } else if ends {
            let line = core::mem::take(&mut source.line);
            if self.open {
                out(b"\r\n");
            }
            source.begin(out);
            out(line.trim_ascii_end());
            out(b"\r\n");
            self.open = false;
            self.reopen(out);
        }
    }

    /// Shows the unfinished line of whoever has the keyboard, if there is one.
    fn reopen(&mut self, out: Output<'_>) {
        if let Some(source) = self.sources.get(self.focus)
            && !source.line.is_empty()
        {
            source.begin(out);
            out(&source.line);
            self.open = true;
        }
    }

    pub(super) fn set_focus(&mut self, index: usize, out: Output<'_>) -> bool {
        let Some(source) = self.sources.get(index) else { return false };
        if self.open {
            out(b"\r\n");
        }
        self.open = false;
        self.focus = index;
        let kept: Vec<u8> = source.ring.iter().copied().collect();
        for line in kept.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            source.begin(out);
            out(line);
        }
        self.reopen(out);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes pieces of two guests; what is on the screen.
    fn screen(pieces: &[(usize, &str)]) -> String {
        let mut mux = Mux::new(false);
        mux.add("a".into());
        mux.add("b".into());
        let mut shown = Vec::new();
        for (index, text) in pieces {
            mux.write(*index, text.as_bytes(), &mut |bytes| shown.extend_from_slice(bytes));
        }
        String::from_utf8(shown).unwrap()
    }

    #[test]
    fn a_guest_alone_has_the_line() {
        let mut mux = Mux::new(true);
        mux.add("a".into());
        let mut shown = Vec::new();
        mux.write(0, b"x\r\ny", &mut |bytes| shown.extend_from_slice(bytes));
        assert_eq!(shown, b"x\r\ny");
    }

    #[test]
    fn lines_have_names() {
        assert_eq!(screen(&[(0, "x\r\ny\r\n"), (1, "z\r\n")]), "[a] x\r\n[a] y\r\n[b] z\r\n");
    }

    #[test]
    fn a_line_of_another_does_not_hide_the_prompt() {
        assert_eq!(
            screen(&[(0, "$ l"), (1, "no"), (0, "s"), (1, "te\r\n")]),
            "[a] $ ls\r\n[b] note\r\n[a] $ ls"
        );
        assert_eq!(screen(&[(0, "$ "), (1, "n\n"), (0, "x")]), "[a] $ \r\n[b] n\r\n[a] $ x");
    }

    #[test]
    fn endless_lines_are_cut() {
        let long = "x".repeat(3 * LONGEST_LINE);
        let shown = screen(&[(1, &long)]);
        assert_eq!(shown.matches("[b] ").count(), 2);
    }

    #[test]
    fn switching_shows_what_was_said() {
        let mut mux = Mux::new(false);
        mux.add("a".into());
        mux.add("b".into());
        mux.write(1, b"one\r\n# ", &mut |_| {});
        mux.write(0, b"$ ", &mut |_| {});
        let mut shown = Vec::new();
        let mut out = |bytes: &[u8]| shown.extend_from_slice(bytes);
        assert!(mux.set_focus(1, &mut out) && !mux.set_focus(2, &mut out));
        mux.write(1, b"l", &mut out);
        assert_eq!(mux.focus(), 1);
        assert_eq!(shown, b"\r\n[b] one\r\n[b] # l");
    }
}
