//! Small kernels and a way to run them.
#![allow(dead_code, reason = "every test program uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Prints ">", then sends back what it receives on the first serial port.
pub const ECHO: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb0, 0x3e, // mov al, '>'
    0xee, // out dx, al
    0x66, 0xba, 0xfd, 0x03, // again: mov dx, 3fdh
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz again
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xef, // jmp again
];
/// Takes its interrupt table away and executes an undefined instruction.
pub const TRIPLE_FAULT: &[u8] = &[
    0xbb, 0x78, 0x56, 0x34, 0x12, // mov ebx, 12345678h
    0x0f, 0x01, 0x1d, 0x00, 0x00, 0x20, 0x00, // lidt [200000h]
    0x0f, 0x0b, // ud2
];
/// Prints "A" and resets the machine by the keyboard controller.
pub const RESET: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb0, 0x41, // mov al, 'A'
    0xee, // out dx, al
    0xb0, 0xfe, // mov al, 0feh
    0xe6, 0x64, // out 64h, al
    0xeb, 0xfe, // jmp $
];
/// Prints "A" and stays, for ever.
pub const STAY: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb0, 0x41, // mov al, 'A'
    0xee, // out dx, al
    0xeb, 0xfe, // jmp $
];
/// Writes 10h to isa-debug-exit.
pub const TEST_EXIT: &[u8] = &[
    0xb8, 0x10, 0x00, 0x00, 0x00, // mov eax, 10h
    0xe7, 0xf4, // out 0f4h, eax
    0xeb, 0xfe, // jmp $
];
/// Sends 100,000 characters and writes 0 to isa-debug-exit.
pub const LONG_OUTPUT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xb9, 0xa0, 0x86, 0x01, 0x00, // mov ecx, 100000
    0x88, 0xc8, // again: mov al, cl
    0x24, 0x3f, // and al, 3fh
    0x04, 0x21, // add al, 21h
    0xee, // out dx, al
    0xe2, 0xf7, // loop again
    0xb8, 0x00, 0x00, 0x00, 0x00, // mov eax, 0
    0xe7, 0xf4, // out 0f4h, eax
    0xeb, 0xfe, // jmp $
];
/// Counts in EAX and in memory at 200000h, for ever.
pub const COUNT: &[u8] = &[
    0x31, 0xc0, // xor eax, eax
    0xb9, 0x00, 0x00, 0x20, 0x00, // mov ecx, 200000h
    0x40, // again (at +7): inc eax
    0x89, 0x01, // mov [ecx], eax
    0x90, // nop (at +10)
    0xeb, 0xfa, // jmp again
];

/// Where a kernel of [`Folder::kernel`] begins to execute.
pub const ENTRY: u32 = 0x10_0020;

/// A folder for one test.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(folder.path().join("run")).unwrap();
        folder
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A file with these bytes.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A Multiboot kernel of this code, in 32-bit protected mode.
    pub fn kernel(&self, code: &[u8]) -> PathBuf {
        const MAGIC: u32 = 0x1bad_b002;
        const ADDRESSES: u32 = 1 << 16;
        let load = ENTRY - 32;
        let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES);
        let header = [MAGIC, ADDRESSES, checksum, load, load, 0, 0, ENTRY];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(code);
        self.file("kernel", bytes)
    }

    /// `bivisor` with these words, and this folder as its only cache, home and place for what runs.
    pub fn bivisor(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        command.args(words).env("HOME", self.path());
        command.env("XDG_CACHE_HOME", self.path()).env("XDG_DATA_HOME", self.path().join("data"));
        command.env("XDG_RUNTIME_DIR", self.path().join("run"));
        command.current_dir(self.path()).stdin(Stdio::null());
        command
    }

    /// `bivisor run` with a kernel of this code and more words.
    pub fn run_command(&self, code: &[u8], words: &[&str]) -> Command {
        let kernel = self.kernel(code);
        let mut all = vec!["run", "--kernel", kernel.to_str().unwrap(), "--memory", "16M"];
        all.extend(words);
        self.bivisor(&all)
    }

    /// Runs such a machine to its end.
    pub fn run(&self, code: &[u8], words: &[&str]) -> Output {
        self.run_command(code, words).output().unwrap()
    }
}

/// Whatever happens to a test, its machines in the background end with this.
pub struct Background<'a>(pub &'a Folder);

impl Drop for Background<'_> {
    fn drop(&mut self) {
        let _ = self.0.bivisor(&["down", "--timeout", "0"]).output();
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
