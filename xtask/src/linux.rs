//! Stock Linux as a test: the default guest boots to a shell, does what a user would try first, and powers off.
use crate::{
    steps::Tally,
    test::{cargo, target},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{ErrorKind, Read, Write},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// What the guest's shell asks with.
pub const PROMPT: &str = "root@debian:/root# ";
/// The guest's time from power-up to power-off on the slower engine, with much to spare on a busy machine.
const TIME_LIMIT: Duration = Duration::from_secs(400);

/// Bytes of the guest's disk.
const DISK_SIZE: u64 = 64 << 20;

/// A line to type, and what must be in the answer.
pub const DIALOGUE: &[(&str, &[&str])] = &[
    ("uname -a", &["Linux debian", "-cloud-amd64", "x86_64"]),
    ("cat /proc/interrupts", &["IO-APIC", "ttyS0", "acpi", "Local timer interrupts"]),
    ("cat /proc/cmdline", &["console=ttyS0"]),
    ("dmesg | grep -c 'ACPI: Interpreter enabled'", &["\n1"]),
    ("mke2fs -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && echo mounted", &["\nmounted"]),
    ("head -c 4000000 /dev/urandom > /mnt/x; cp /bin/busybox /mnt; sync; echo kept", &["\nkept"]),
    ("sha256sum < /mnt/x > /sum; umount /mnt; mount -t ext4 /dev/vda /mnt && echo again", &["\nagain"]),
    ("sha256sum < /mnt/x | cmp - /sum && /mnt/busybox echo same", &["\nsame"]),
    ("umount /mnt; cat /sys/block/vda/serial; grep -c virtio0-req /proc/interrupts", &["serial-1"]),
    ("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo counted $i | sha256sum", &["  -"]),
];

/// Builds the program as a user does; returns where it is.
///
/// # Errors
/// If cargo cannot be started.
pub fn program(tally: &mut Tally) -> Result<PathBuf> {
    tally.step("optimised build", cargo(".").args(["build", "--release", "--package", "bivisor"]))?;
    Ok(target().join("release/bivisor"))
}

/// Boots Linux on each software engine.
pub fn boots(tally: &mut Tally, program: &PathBuf) {
    for engine in ["dbt", "interp"] {
        tally.check(&format!("Linux on {engine}"), || {
            Ok(format!(", shell after {:.1?}", boot(program, engine)?))
        });
    }
}

/// Boots with an empty disk, talks to the shell, powers off, looks at the disk. Returns the time to the shell.
fn boot(program: &PathBuf, engine: &str) -> Result<Duration> {
    let disk = tempfile::NamedTempFile::new().context("no temporary file")?;
    disk.as_file().set_len(DISK_SIZE)?;
    let option = format!("{},serial=serial-1", disk.path().display());
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(["run", "--no-reboot", "--engine", engine, "--disk", &option])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} could not be started", program.display()))?;
    let result = talk(&mut child, start);
    if result.is_err() {
        // It may have ended by itself.
        let _ = child.kill();
    }
    let status = child.wait()?;
    let shell = result?;
    ensure!(status.success(), "the guest powered off, but bivisor ended with {status}");
    // Where the host has the program: the file system must be whole without repair.
    match Command::new("/sbin/e2fsck").args(["-fn"]).arg(disk.path()).output() {
        Ok(check) => ensure!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout)),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("e2fsck could not be started"),
    }
    Ok(shell)
}

fn talk(child: &mut Child, start: Instant) -> Result<Duration> {
    let mut keyboard = child.stdin.take().context("no standard input")?;
    let mut screen = Screen::new(child.stdout.take().context("no standard output")?, start + TIME_LIMIT);
    screen.until(PROMPT)?;
    let shell = start.elapsed();
    for (line, expected) in DIALOGUE {
        writeln!(keyboard, "{line}")?;
        let answer = screen.until(PROMPT)?;
        for part in *expected {
            ensure!(answer.contains(part), "`{line}` answers without {part:?}: {answer:?}");
        }
    }
    writeln!(keyboard, "poweroff")?;
    let rest = screen.rest()?;
    ensure!(rest.contains("Power down"), "no power-off: {rest:?}");
    Ok(shell)
}

/// What the guest writes.
pub struct Screen {
    bytes: Receiver<Vec<u8>>,
    text: String,
    deadline: Instant,
}

impl Screen {
    /// Reads it in a thread of its own.
    pub fn new(mut output: impl Read + Send + 'static, deadline: Instant) -> Self {
        let (send, bytes) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                if send.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { bytes, text: String::new(), deadline }
    }

    /// Waits no longer than this for what is still to come.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// More text, or `false` at the end.
    fn more(&mut self) -> Result<bool> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.bytes.recv_timeout(left) {
            Ok(bytes) => {
                self.text.push_str(&String::from_utf8_lossy(&bytes));
                Ok(true)
            }
            Err(RecvTimeoutError::Disconnected) => Ok(false),
            Err(RecvTimeoutError::Timeout) => {
                bail!("nothing more in time: {:?}", tail(&self.text))
            }
        }
    }

    /// The text up to `end`.
    pub fn until(&mut self, end: &str) -> Result<String> {
        loop {
            if let Some(at) = self.text.find(end) {
                let rest = self.text.split_off(at + end.len());
                return Ok(std::mem::replace(&mut self.text, rest));
            }
            ensure!(self.more()?, "the machine ended before {end:?}: {:?}", tail(&self.text));
        }
    }

    /// The text up to the end of all.
    pub fn rest(&mut self) -> Result<String> {
        while self.more()? {}
        Ok(std::mem::take(&mut self.text))
    }
}

/// The last lines of a text.
fn tail(text: &str) -> &str {
    let start = text.rmatch_indices('\n').nth(12).map_or(0, |(at, _)| at);
    &text[start..]
}
