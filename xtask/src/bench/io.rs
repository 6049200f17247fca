//! `cargo xtask bench --io`: disks and networks of Debian machines that run beside each other. Each row is measured on one
//! machine after the other, while the others idle.
use super::{
    Arguments,
    guest::own_folder,
    host::{free_port, wait_until_quiet},
    peer::Peer,
    record::{Figure, Log, Note, Record, Run},
};
use crate::{console::Session, steps::progress};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Name of the image, and what it needs beside Debian's base.
const IMAGE: &str = "bench-io";
const PACKAGES: &str = "fio,iperf3,nginx-light";
/// The disk that is measured, in MiB: in the host's memory, since it is the machine that counts and not the host's disk.
const DISK: usize = 256;
/// The host as guests of user-mode networks see it.
const GATEWAY: &str = "10.0.2.2";
/// What a machine may take to boot, and for a row beside its seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const ROW_LIMIT: Duration = Duration::from_secs(60);
/// The least that a row takes: loads are told whole seconds.
const SECONDS: u32 = 2;
const PROMPT: &str = "io# ";

/// What one row asks of a machine.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    /// fio's pattern, bytes of a request, requests under way.
    Disk { pattern: &'static str, block: &'static str, depth: u32 },
    /// A TCP stream, from the guest to the host or back.
    Stream { back: bool },
    /// Requests for a small page by so many connections from the host, through a forwarded port.
    Web { connections: u32 },
}

const ROWS: &[(&str, &str, Load)] = &[
    ("disk_write", "MB/s", Load::Disk { pattern: "write", block: "1M", depth: 8 }),
    ("disk_read", "MB/s", Load::Disk { pattern: "read", block: "1M", depth: 8 }),
    ("disk_random_read", "k/s", Load::Disk { pattern: "randread", block: "4k", depth: 1 }),
    ("disk_random_read_32", "k/s", Load::Disk { pattern: "randread", block: "4k", depth: 32 }),
    ("disk_random_write", "k/s", Load::Disk { pattern: "randwrite", block: "4k", depth: 1 }),
    ("disk_random_write_32", "k/s", Load::Disk { pattern: "randwrite", block: "4k", depth: 32 }),
    ("net_send", "MB/s", Load::Stream { back: false }),
    ("net_receive", "MB/s", Load::Stream { back: true }),
    ("web_1", "/s", Load::Web { connections: 1 }),
    ("web_16", "/s", Load::Web { connections: 16 }),
];

impl Load {
    fn group(self) -> &'static str {
        match self {
            Self::Disk { .. } => "disk",
            Self::Stream { .. } | Self::Web { .. } => "net",
        }
    }
}

/// A Debian system on a disk.
pub struct System {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
    pub append: String,
}

/// What `image.toml` says of it.
#[derive(Deserialize)]
struct Manifest {
    description: String,
    append: String,
    disk: String,
}

/// A machine with two disks and a network.
pub struct Machine<'a> {
    pub system: &'a System,
    /// The disk that is measured.
    pub disk: PathBuf,
    /// The host's port that leads to the guest's port 80.
    pub port: u16,
}

/// Measures everything. Returns the file with the raw results.
pub fn measure(arguments: &Arguments, out: &Path) -> Result<PathBuf> {
    let rows: Vec<_> = ROWS.iter().filter(|row| arguments.wants(row.0, row.2.group())).collect();
    ensure!(!rows.is_empty(), "no row of disks or networks is named so");
    for tool in ["iperf3", "wrk"] {
        let found = Command::new(tool).arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status();
        found.with_context(|| format!("{tool} could not be started; on Debian: apt-get install {tool}"))?;
    }
    let program = super::bivisor(arguments)?;
    let (system, description) = system(&program)?;
    let mut peers = super::peers(arguments, program, None)?;
    let file = out.join("results.jsonl");
    let mut log = Log::create(&file)?;
    let seconds = arguments.seconds.map_or(SECONDS, |seconds| seconds.ceil() as u32);
    log.write(&Record::Setup(super::setup(arguments, vec![description], seconds.into(), &peers)))?;
    let folder = tempfile::tempdir_in("/dev/shm").context("a folder in the host's memory")?;
    progress(&format!("{} machines boot", peers.len()));
    let mut guests = Vec::new();
    for (number, peer) in peers.iter_mut().enumerate() {
        let disk = folder.path().join(format!("disk-{number}"));
        guests.push(match Guest::boot(peer, &system, &disk) {
            Ok(guest) => guest,
            Err(error) => {
                let text = peer.try_otherwise().ok_or(error)?.to_owned();
                log.write(&Record::Note(Note { peer: peer.label.clone(), repeat: 0, wrong: false, text }))?;
                Guest::boot(peer, &system, &disk)?
            }
        });
    }
    for repeat in 0..arguments.repeats() {
        for row in &rows {
            let foreign_load = wait_until_quiet(arguments.patience());
            for guest in &mut guests {
                measure_row(guest, row, seconds, &mut log, (repeat, foreign_load))?;
            }
        }
    }
    for guest in guests {
        guest.end()?;
    }
    Ok(file)
}

fn measure_row(
    guest: &mut Guest,
    (name, unit, load): &(&str, &str, Load),
    seconds: u32,
    log: &mut Log,
    (repeat, foreign_load): (u32, f64),
) -> Result<()> {
    let start = Instant::now();
    let result = guest.measure(*load, seconds);
    let told =
        result.as_ref().map_or_else(|error| format!("{error:#}"), |value| format!("{value:.4} {unit}"));
    println!("    {} {name}: {}: {told}", repeat + 1, guest.label);
    let peer = guest.label.clone();
    log.write(&Record::Run(Run {
        peer: peer.clone(),
        repeat,
        cpus: 1,
        seconds: start.elapsed().as_secs_f64(),
        foreign_load,
        failure: result.as_ref().err().map(|error| format!("{name}: {error:#}")),
    }))?;
    let Ok(value) = result else { return Ok(()) };
    let (group, name, unit) = (load.group().into(), (*name).into(), (*unit).into());
    log.write(&Record::Figure(Figure { peer, repeat, group, name, value, unit }))
}

/// The image, which is made now if it isn't there, and what it is.
fn system(bivisor: &Path) -> Result<(System, String)> {
    let folder = own_folder("XDG_DATA_HOME", ".local/share").context("no data folder: set HOME")?;
    let image = folder.join("images").join(IMAGE);
    if !image.is_dir() {
        progress("a Debian system for the machines");
        let words = ["image", "build", "debian", "--name", IMAGE, "--size", "2G", "--packages", PACKAGES];
        let status = Command::new(bivisor).args(words).status()?;
        ensure!(status.success(), "the image {IMAGE} could not be made: see above");
    }
    let text = fs::read_to_string(image.join("image.toml"))?;
    let Manifest { description, append, disk } = toml::from_str(&text).context("image.toml")?;
    let (kernel, initrd) = (image.join("vmlinuz"), image.join("initrd.img"));
    Ok((System { kernel, initrd, disk: image.join(disk), append }, format!("{description} ({PACKAGES})")))
}

/// A machine that runs.
struct Guest {
    label: String,
    session: Session,
    port: u16,
}

impl Guest {
    fn boot(peer: &Peer, system: &System, disk: &Path) -> Result<Self> {
        let mut file = fs::File::create(disk)?;
        for number in 0..DISK {
            file.write_all(&vec![number as u8 | 1; 1 << 20])?;
        }
        let port = free_port()?;
        let machine = Machine { system, disk: disk.to_owned(), port };
        let session = Session::start(&mut peer.io_command(&machine), Instant::now() + BOOT_LIMIT)?;
        let mut guest = Self { label: peer.label.clone(), session, port };
        guest.session.screen.until(":~# ").with_context(|| format!("{} does not boot", guest.label))?;
        // The echo of this line must not look like the prompt.
        guest.session.type_line("stty -echo; bind 'set enable-bracketed-paste off'; PS1='io''# '")?;
        guest.session.screen.until(PROMPT)?;
        // Whatever else starts at boot shall not be in the way of what is measured.
        guest.ask("systemctl is-system-running --wait")?;
        Ok(guest)
    }

    fn ask(&mut self, line: &str) -> Result<String> {
        self.session.type_line(line)?;
        self.session.screen.until(PROMPT)
    }

    fn measure(&mut self, load: Load, seconds: u32) -> Result<f64> {
        self.session.screen.set_deadline(Instant::now() + ROW_LIMIT + Duration::from_secs(seconds.into()));
        match load {
            Load::Disk { pattern, block, depth } => {
                let text = self.ask(&format!(
                    "fio --name=x --filename=/dev/vdb --size={DISK}M --direct=1 --ioengine=libaio --rw={pattern} \
                     --bs={block} --iodepth={depth} --time_based --runtime={seconds} --ramp_time=0.5 --minimal"
                ))?;
                parse_fio(&text, pattern.ends_with("read"), depth == 8)
                    .with_context(|| format!("fio said {text:?}"))
            }
            Load::Stream { back } => {
                let server = Server::start()?;
                let back = if back { "-R" } else { "" };
                let text = self.ask(&format!(
                    "iperf3 -c {GATEWAY} -p {} -f m -t {} -O 1 {back}",
                    server.port,
                    seconds + 1
                ))?;
                parse_iperf(&text).with_context(|| format!("iperf3 said {text:?}"))
            }
            Load::Web { connections } => {
                let output = Command::new("wrk")
                    .args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}s")])
                    .arg(format!("http://127.0.0.1:{}/", self.port))
                    .output()?;
                let text = String::from_utf8_lossy(&output.stdout);
                parse_wrk(&text).with_context(|| format!("wrk said {text:?}"))
            }
        }
    }

    fn end(mut self) -> Result<()> {
        self.session.screen.set_deadline(Instant::now() + ROW_LIMIT);
        self.session.type_line("poweroff")?;
        self.session.rest()?;
        Ok(())
    }
}

/// iperf3 on the host's side.
struct Server {
    program: Child,
    port: u16,
}

impl Server {
    fn start() -> Result<Self> {
        let port = free_port()?;
        let program = Command::new("iperf3")
            .args(["-s", "-B", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .spawn()?;
        let server = Self { program, port };
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(Instant::now() < deadline, "iperf3 does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing to be done if it has ended by itself.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// fio's terse line, version 3: kB/s and requests per second of reads are fields 7 and 8, of writes 48 and 49. MB/s, or
/// thousands of requests per second.
fn parse_fio(text: &str, reads: bool, bytes: bool) -> Option<f64> {
    let line = text.lines().find(|line| line.split(';').count() > 50)?;
    let at = if reads { 6 } else { 47 } + usize::from(!bytes);
    let value: f64 = line.split(';').nth(at)?.parse().ok()?;
    (value > 0.0).then_some(value * if bytes { 1.024 / 1000.0 } else { 1.0 / 1000.0 })
}

/// MB/s that arrived.
fn parse_iperf(text: &str) -> Option<f64> {
    let line = text.lines().rfind(|line| line.trim_end().ends_with("receiver"))?;
    let (before, _) = line.split_once(" Mbits/sec")?;
    let value: f64 = before.split_whitespace().last()?.parse().ok()?;
    (value > 0.0).then_some(value / 8.0)
}

/// Requests per second; none if any was not answered well.
fn parse_wrk(text: &str) -> Option<f64> {
    let failed = text.contains("Socket errors") || text.contains("Non-2xx");
    let value: f64 = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"))?.trim().parse().ok()?;
    (!failed && value > 0.0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_programs_say_is_understood() {
        let mut fields = vec!["0"; 130];
        (fields[6], fields[7], fields[47], fields[48]) = ("1000000", "2000", "500000", "3000");
        let fio = format!("note\r\n{}\r\n", fields.join(";"));
        assert_eq!(parse_fio(&fio, true, true), Some(1024.0));
        assert_eq!(parse_fio(&fio, true, false), Some(2.0));
        assert_eq!(parse_fio(&fio, false, true), Some(512.0));
        assert_eq!(parse_fio(&fio, false, false), Some(3.0));
        assert_eq!(parse_fio("fio: failed\n", true, true), None);
        let iperf = "[  5] 0.0-3.0 sec 1 MBytes 800 Mbits/sec   0  sender\r\n\
                     [  5] 0.0-3.0 sec 1 MBytes 400 Mbits/sec      receiver\r\n";
        assert_eq!(parse_iperf(iperf), Some(50.0));
        assert_eq!(parse_iperf("iperf3: error - unable to connect"), None);
        assert_eq!(parse_wrk("x\nRequests/sec:   1234.50\n"), Some(1234.5));
        assert_eq!(parse_wrk("  Non-2xx or 3xx responses: 2\nRequests/sec:   1234.50\n"), None);
    }
}
