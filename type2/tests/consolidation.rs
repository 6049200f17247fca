//! `examples/consolidation.toml`: three servers, each driven by a real client from the host; the end of two of them is
//! nothing to the third. It makes three Debian images the first time, so `cargo xtask test --all` runs it.

mod common;

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, UNIX_EPOCH};

use common::{Folder, stderr};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PAGE: &str = "This page comes from a virtual machine.";
const FILE: &str = "This file comes from a virtual machine.\n";
/// A machine's time from its start to its server, with much to spare on a busy host.
const LONG: Duration = Duration::from_secs(180);

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

/// Adds names and contents of the files below a folder.
fn hash_files(folder: &Path, hasher: &mut DefaultHasher) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        path.file_name().hash(hasher);
        if path.is_dir() { hash_files(&path, hasher) } else { fs::read(&path).unwrap().hash(hasher) }
    }
}

/// Where the images are, which are made once for what the example says now.
fn data() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    hash_files(&examples().join("consolidation"), &mut hasher);
    let text = fs::read_to_string(examples().join("consolidation.toml")).unwrap();
    text.lines().filter(|line| line.starts_with("build")).for_each(|line| line.hash(&mut hasher));
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("consolidation");
    let data = all.join(format!("{:016x}", hasher.finish()));
    fs::create_dir_all(&data).unwrap();
    for other in fs::read_dir(&all).unwrap().map(|entry| entry.unwrap().path()).filter(|path| *path != data) {
        fs::remove_dir_all(other).unwrap();
    }
    data
}

/// The example with ports that are free here.
struct Office {
    folder: Folder,
    data: PathBuf,
    /// Of SMTP, HTTP and FTP.
    ports: [u16; 3],
}

impl Office {
    fn new() -> Self {
        let folder = Folder::new();
        std::os::unix::fs::symlink(examples().join("consolidation"), folder.path().join("consolidation"))
            .unwrap();
        let mut text = fs::read_to_string(examples().join("consolidation.toml")).unwrap();
        let held: Vec<TcpListener> = (0..6).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let free: Vec<u16> = held.iter().map(|port| port.local_addr().unwrap().port()).collect();
        for (port, free) in [2525, 8080, 2121, 2201, 2202, 2203].iter().zip(&free) {
            let own = format!("127.0.0.1:{port}-");
            assert_eq!(text.matches(&own).count(), 1, "{own}");
            text = text.replace(&own, &format!("127.0.0.1:{free}-"));
        }
        folder.file("office.toml", text);
        Self { folder, data: data(), ports: [free[0], free[1], free[2]] }
    }

    fn bivisor(&self, words: &[&str]) -> Command {
        let mut command = self.folder.bivisor(words);
        command.env("XDG_DATA_HOME", &self.data);
        command
    }

    #[track_caller]
    fn done(&self, words: &[&str]) -> String {
        let output = self.bivisor(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn machine(&self, name: &str) -> Value {
        let list: Value = serde_json::from_str(&self.done(&["ps", "--json"])).unwrap();
        let mut all = list.as_array().unwrap().iter();
        all.find(|machine| machine["name"] == name).cloned().unwrap()
    }

    fn curl(&self, words: &[&str]) -> Output {
        Command::new("curl").args(["-sS", "-m", "30"]).args(words).stdin(Stdio::null()).output().unwrap()
    }

    /// Delivers a letter by SMTP.
    fn send(&self, subject: &str) -> Output {
        let letter = format!("From: me@example.org\r\nSubject: {subject}\r\n\r\nDear Alice.\r\n");
        let letter = self.folder.file("letter", letter);
        let url = format!("smtp://127.0.0.1:{}", self.ports[0]);
        let (from, to) = ("me@example.org", "alice@mail.example");
        let words =
            [&*url, "--mail-from", from, "--mail-rcpt", to, "--upload-file", letter.to_str().unwrap()];
        self.curl(&words)
    }

    /// Waits until this letter lies in the mailbox, as root sees it in the guest; returns the mailbox.
    fn mailbox_with(&self, subject: &str) -> String {
        let begin = Instant::now();
        loop {
            let output = self.bivisor(&["ssh", "mail", "cat", "/var/mail/alice"]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
            if text.contains(&format!("Subject: {subject}\n")) && text.contains("Dear Alice.") {
                return text;
            }
            assert!(begin.elapsed() < LONG, "{text} {}", stderr(&output));
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn fetch_file(&self) -> Output {
        self.curl(&[&format!("ftp://127.0.0.1:{}/hello.txt", self.ports[2])])
    }
}

/// What a whole Debian says of the machine that it is in.
fn sees_a_sound_machine(office: &Office) {
    let say = |words: &str| office.done(&["ssh", "web", words]).replace('\r', "");
    assert_eq!(say("systemctl is-system-running --wait"), "running\n");
    // The one warning is that of a kernel without an option, on any machine.
    let complaints = say("dmesg --level=emerg,alert,crit,err,warn | grep -v CONFIG_IMA_DISABLE_HTABLE; true");
    assert_eq!(complaints, "");
    // The gateway, by the address that the router has advertised.
    let echo = say("ping -6 -c 3 -W 2 $(resolvectl dns | grep -o 'fd[0-9a-f:]*::')2");
    assert!(echo.contains(" 0% packet loss"), "{echo}");
}

/// Packages come through the user-mode network from the mirror that the image names, if the host itself reaches it.
fn installs_packages(office: &Office) {
    let say = |words: &str| office.done(&["ssh", "web", words]).replace('\r', "");
    let mirror = say("grep -o 'http://[^/ ]*' /etc/apt/sources.list | head -n 1");
    let Some(server) = mirror.trim().strip_prefix("http://") else { panic!("no mirror: {mirror}") };
    let server = if server.contains(':') { server.to_owned() } else { format!("{server}:80") };
    if TcpStream::connect(&server).is_err() {
        println!("skipped: packages, as this host does not reach {server}");
        return;
    }
    let begin = Instant::now();
    say("apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y install --reinstall ethtool");
    println!("a package is updated and installed in {:.1?}", begin.elapsed());
    let counts = say("cd /sys/class/net && for card in e*; do ethtool -S $card; done");
    let count = |name: &str| {
        let found = counts.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
        found.and_then(|count| count.parse::<u64>().ok()).unwrap_or_else(|| panic!("{name}: {counts}"))
    };
    assert!(count("rx_queue_0_bytes") > 1 << 20 && count("tx_queue_0_packets") > 100, "{counts}");
    assert_eq!((count("rx_queue_0_drops"), count("tx_queue_0_tx_timeouts")), (0, 0), "{counts}");
}

/// The file systems of machines that have ended, two of them not of their own will, are whole.
fn disks_are_clean(office: &Office) {
    for name in ["ftp", "mail", "web"] {
        let disk = office.data.join("bivisor/images").join(name).join("disk.raw");
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let check = Command::new("e2fsck").env("PATH", path).args(["-f", "-n"]).arg(disk).output().unwrap();
        assert!(
            check.status.success(),
            "{name}: {}{}",
            String::from_utf8_lossy(&check.stdout),
            stderr(&check)
        );
    }
}

impl Drop for Office {
    fn drop(&mut self) {
        let _ = self.bivisor(&["down", "--timeout", "0"]).output();
    }
}

/// Tries until it works; returns how long that took.
fn until_success(what: &str, attempt: impl Fn() -> Output) -> Duration {
    let begin = Instant::now();
    loop {
        let output = attempt();
        if output.status.success() {
            return begin.elapsed();
        }
        assert!(begin.elapsed() < LONG, "{what}: {}", stderr(&output));
        thread::sleep(Duration::from_millis(200));
    }
}

/// One request on a connection of its own.
fn get(port: u16) -> io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Clients that ask for the page without a pause.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    errors: Arc<Mutex<Vec<String>>>,
    clients: Vec<JoinHandle<Duration>>,
}

impl Load {
    fn start(port: u16) -> Self {
        let (stop, answered, errors) = (Arc::default(), Arc::default(), Arc::default());
        let mut load = Self { stop, answered, errors, clients: Vec::new() };
        for _ in 0..2 {
            let (stop, answered, errors) = (load.stop.clone(), load.answered.clone(), load.errors.clone());
            load.clients.push(thread::spawn(move || {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    match get(port) {
                        Ok(answer) if answer.starts_with("HTTP/1.1 200 ") && answer.contains(PAGE) => {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(answer) => errors.lock().unwrap().push(answer),
                        Err(error) => errors.lock().unwrap().push(error.to_string()),
                    }
                    longest = longest.max(begin.elapsed());
                }
                longest
            }));
        }
        load
    }

    /// Requests that were answered, and the longest that one took. There must have been no error.
    fn stop(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let longest = self.clients.into_iter().map(|client| client.join().unwrap()).max().unwrap();
        let errors = self.errors.lock().unwrap();
        assert!(errors.is_empty(), "{} errors: {:?}", errors.len(), errors.first());
        (self.answered.load(Ordering::Relaxed), longest)
    }
}

#[test]
#[ignore = "makes three Debian images; cargo xtask test --all runs it"]
fn three_servers_share_a_computer() {
    let office = Office::new();
    let begin = Instant::now();
    assert_eq!(office.done(&["up", "office.toml"]), "up: ftp, mail, web\n");
    println!("up, with images that were not there: {:.1?}", begin.elapsed());

    // Each does what it is there for.
    let begin = Instant::now();
    // The mailbox has the letters of all runs.
    let run = UNIX_EPOCH.elapsed().unwrap().as_nanos();
    let first = format!("first {run}");
    until_success("mail", || office.send(&first));
    until_success("page", || office.curl(&["-f", &format!("http://127.0.0.1:{}/", office.ports[1])]));
    until_success("file", || office.fetch_file());
    println!("three servers answer after {:.1?}", begin.elapsed());
    assert!(get(office.ports[1]).unwrap().contains(PAGE));
    assert_eq!(String::from_utf8_lossy(&office.fetch_file().stdout), FILE);
    office.mailbox_with(&first);
    sees_a_sound_machine(&office);
    installs_packages(&office);

    // One is killed from outside, one kills itself from inside; the third does not notice.
    let load = Load::start(office.ports[1]);
    thread::sleep(Duration::from_secs(2));
    let (mail, web) = (office.machine("mail"), office.machine("web"));
    let loaded = Instant::now();
    let pid = Pid::from_raw(i32::try_from(mail["pid"].as_i64().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    let panic = ["ssh", "ftp", "sync; echo c > /proc/sysrq-trigger"];
    assert!(!office.bivisor(&panic).output().unwrap().status.success(), "nobody comes back from a panic");
    let second = format!("second {run}");
    until_success("mail", || office.send(&second));
    until_success("file", || office.fetch_file());
    let back = loaded.elapsed();
    assert_eq!(String::from_utf8_lossy(&office.fetch_file().stdout), FILE);
    let mailbox = office.mailbox_with(&second);
    assert!(mailbox.contains(&format!("Subject: {first}\n")), "what was delivered stays: {mailbox}");
    let (mail, ftp) = (office.machine("mail"), office.machine("ftp"));
    assert_eq!((&mail["restarts"], &ftp["restarts"]), (&1.into(), &1.into()));
    assert_eq!(mail["ending"]["sentence"], "its process was ended by SIGKILL");
    assert_eq!(ftp["ending"]["status"], 10);
    assert!(office.done(&["logs", "ftp"]).contains("Kernel panic"));
    let (answered, longest) = load.stop();
    assert_eq!(office.machine("web")["pid"], web["pid"]);
    println!(
        "both are back after {back:.1?}; meanwhile {answered} requests, no error, the longest {longest:.1?}"
    );
    assert!(answered > 100, "{answered}");

    // They power off when they are told to.
    let begin = Instant::now();
    assert_eq!(office.done(&["down", "office.toml"]), "down: ftp, mail, web\n");
    println!("down in {:.1?}", begin.elapsed());
    for name in ["ftp", "mail", "web"] {
        let log = office.done(&["logs", name]);
        assert!(log.ends_with(&format!("{name} has ended: the guest powered off\n")), "{name}");
    }
    disks_are_clean(&office);
}
