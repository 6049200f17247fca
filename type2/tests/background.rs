//! Machines in the background: started together, known by name, found again when their supervisor was killed.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Background, COUNT, ECHO, Folder, RESET, TRIPLE_FAULT, stderr};
use rustix::fs::{FileType, Mode, mknodat};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(60);

/// A user with machines, which end with it.
struct User(Folder);

impl Deref for User {
    type Target = Folder;
    fn deref(&self) -> &Folder {
        &self.0
    }
}

impl Drop for User {
    fn drop(&mut self) {
        drop(Background(&self.0));
    }
}

impl User {
    fn new() -> Self {
        Self(Folder::new())
    }

    fn output(&self, words: &[&str]) -> Output {
        self.bivisor(words).output().unwrap()
    }

    /// What a command prints, which must succeed.
    #[track_caller]
    fn done(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert_eq!(output.status.code(), Some(0), "{words:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{words:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A command that must fail with this status and say this in one sentence.
    #[track_caller]
    fn refused(&self, words: &[&str], status: i32, told: &[&str]) {
        let output = self.output(words);
        let text = stderr(&output);
        assert_eq!((output.status.code(), text.lines().count()), (Some(status), 1), "{words:?}: {text}");
        for told in told {
            assert!(text.contains(told), "{words:?}: {told:?} in {text}");
        }
    }

    /// What is known of a machine; null if there is none.
    fn machine(&self, name: &str) -> Value {
        let list: Value = serde_json::from_str(&self.done(&["ps", "--json"])).unwrap();
        let mut all = list.as_array().unwrap().iter();
        all.find(|machine| machine["name"] == name).cloned().unwrap_or_default()
    }

    fn pid(&self, name: &str) -> Pid {
        let pid = self.machine(name)["pid"].as_i64().unwrap_or_else(|| panic!("{name} does not run"));
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }

    #[track_caller]
    fn wait(&self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let machine = self.machine(name);
            if wanted(&machine) {
                return machine;
            }
            assert!(begin.elapsed() < LONG, "{machine}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The supervisor's process.
    fn supervisor(&self) -> Pid {
        let lock = self.path().join("run/bivisor/supervisor.lock");
        let holds = |folder: &Path| {
            let command = fs::read(folder.join("cmdline")).unwrap_or_default();
            let files = fs::read_dir(folder.join("fd")).into_iter().flatten().filter_map(Result::ok);
            let mut open = files.filter_map(|file| fs::read_link(file.path()).ok());
            command.ends_with(b"\0supervisor\0") && open.any(|file| file == lock)
        };
        let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let found = processes.map(|process| process.path()).find(|process| holds(process)).unwrap();
        Pid::from_raw(found.file_name().unwrap().to_str().unwrap().parse().unwrap()).unwrap()
    }

    fn kill_supervisor(&self) {
        let supervisor = self.supervisor();
        kill_process(supervisor, Signal::KILL).unwrap();
        wait_for_end(supervisor);
    }
}

fn wait_for_end(pid: Pid) {
    let begin = Instant::now();
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    // Who has nobody to wait for it stays as a zombie.
    while test_kill_process(pid).is_ok() && !fs::read_to_string(&stat).unwrap_or_default().contains(") Z ") {
        assert!(begin.elapsed() < LONG);
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until every thread of a process has stopped.
fn wait_for_stop(pid: Pid) {
    let begin = Instant::now();
    let runs = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).unwrap();
        let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        tasks.filter_map(Result::ok).any(|task| !stat(task).contains(") T "))
    };
    while runs() {
        assert!(begin.elapsed() < LONG);
        thread::sleep(Duration::from_millis(5));
    }
}

/// Types this at a machine's console, which shows the answer on its standard output.
fn type_at(user: &User, name: &str, text: &str) -> Child {
    let mut console = user
        .bivisor(&["console", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // What is typed before the guest has set up its serial port is lost, as on a real machine.
    let begin = Instant::now();
    while !user.done(&["logs", name]).contains("> ") {
        assert!(begin.elapsed() < LONG);
        thread::sleep(Duration::from_millis(20));
    }
    console.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    console
}

const TWO: &str = "[vm.one]\nimage = \"hello\"\nmemory = \"32M\"\nrestart = \"on-failure\"\n\
                   [vm.two]\nimage = \"hello\"\nmemory = \"32M\"\n";

#[test]
fn machines_have_names_and_a_life_each() {
    let user = User::new();
    let file = user.file("two.toml", TWO);
    assert_eq!(user.done(&["ps"]).lines().count(), 1);
    assert_eq!(user.done(&["up", "two.toml"]), "up: one, two\n");
    let one = user.machine("one");
    assert_eq!((one["state"].as_str(), one["file"].as_str()), (Some("running"), file.to_str()));
    let comm = fs::read_to_string(format!("/proc/{}/comm", one["pid"])).unwrap();
    assert_eq!(comm, "biv:one\n", "it can be told from others");

    let shown = type_at(&user, "one", "help\rpoweroff\r").wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(text.contains("help: this list") && text.contains("Goodbye."), "{text}");
    assert_eq!(stderr(&shown), "bivisor: the console of one has ended\n");
    let one = user.wait("one", |machine| machine["state"] == "stopped");
    assert_eq!((&one["ending"]["status"], &one["restarts"]), (&0.into(), &0.into()), "success is no failure");
    user.refused(&["console", "one"], 4, &["does not run (stopped: the guest powered off)", "restart one"]);
    let log = user.done(&["logs", "one"]);
    assert!(log.starts_with("bivisor: one starts\n") && log.contains("> poweroff"), "{log}");
    assert!(log.ends_with("bivisor: one has ended: the guest powered off\n"), "{log}");

    assert_eq!(user.done(&["restart", "one"]), "started: one\n");
    assert_eq!(user.done(&["kill", "one"]), "killed: one\n");
    let one = user.machine("one");
    assert_eq!(one["ending"]["sentence"], "its process was ended by SIGKILL");
    assert_eq!(one["state"], "stopped", "what the user ends is not started again");
    // This guest does not know a power button.
    assert_eq!(user.done(&["stop", "two", "--timeout", "1"]), "stopped: two\n");
    assert_eq!(
        user.machine("two")["ending"]["sentence"],
        "it did not end in time when asked, so it was ended"
    );

    assert_eq!(user.done(&["down", "two"]), "down: two\n");
    assert!(user.machine("two").is_null() && !user.machine("one").is_null());
    assert_eq!(user.done(&["down", "two.toml"]), "down: one\n");
    assert_eq!(user.done(&["ps", "--json"]).trim(), "[]");
    assert!(user.done(&["logs", "two"]).contains("two has ended"), "the log stays");
}

/// What `bivisor stat` tells of machines, by its words.
fn stat(user: &User, names: &[&str]) -> Vec<Value> {
    let told = user.done(&[&["stat", "--json"], names].concat());
    serde_json::from_str::<Value>(&told).unwrap().as_array().unwrap().clone()
}

#[test]
fn machines_tell_what_they_have_done() {
    let user = User::new();
    user.file(
        "three.toml",
        "[vm.idle]\nimage = \"hello\"\nmemory = \"32M\"\npv = \"off\"\n\
         [vm.busy]\nkernel = \"kernel\"\nmemory = \"16M\"\ncpus = 2\nnet = [\"user\"]\nengine = \"dbt\"\n\
         [vm.over]\nimage = \"hello\"\nmemory = \"32M\"\n",
    );
    user.kernel(ECHO);
    assert_eq!(user.done(&["stat"]), "", "nothing runs");
    user.done(&["up", "three.toml"]);
    user.done(&["kill", "over"]);

    let all = stat(&user, &[]);
    let names: Vec<_> = all.iter().map(|machine| machine["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["busy", "idle"], "those that run");
    let (busy, idle) = (&all[0], &all[1]);
    assert_eq!(
        (busy["pid"].as_i64(), &busy["engine"]),
        (user.machine("busy")["pid"].as_i64(), &"dbt".into())
    );
    assert_eq!((&busy["pv"], &idle["pv"]), (&true.into(), &false.into()));
    assert_eq!(busy["memory_bytes"], 16 << 20);
    assert_eq!([busy, idle].map(|machine| machine["cpus"].as_array().unwrap().len()), [2, 1]);
    assert_eq!([busy, idle].map(|machine| machine["networks"].as_array().unwrap().len()), [1, 0]);
    assert!(busy["resident_bytes"].as_u64().unwrap() > 1 << 20);

    // This guest asks its serial port without end.
    let ports = |machine: &Value| machine["cpus"][0]["exits"]["port"].as_u64().unwrap();
    let begin = Instant::now();
    while ports(&stat(&user, &["busy"])[0]) <= ports(busy) {
        assert!(begin.elapsed() < LONG);
    }
    let later = &stat(&user, &["busy"])[0];
    for time in ["cpu_nanoseconds", "uptime_nanoseconds"] {
        assert!(later[time].as_u64() > busy[time].as_u64(), "{time}: {later}");
    }

    let words = user.done(&["stat", "busy"]);
    assert!(words.starts_with("busy: process ") && words.contains("\n  CPU 1: "), "{words}");
    let metrics = user.done(&["stat", "--prometheus"]);
    for line in ["bivisor_memory_bytes{vm=\"busy\"} 16777216", "bivisor_paravirtual{vm=\"idle\"} 0"] {
        assert!(metrics.lines().any(|found| found == line), "{line} in {metrics}");
    }
    user.refused(&["stat", "over"], 4, &["the machine over does not run", "restart over"]);
    assert_eq!(user.output(&["stat", "busy", "--json", "--prometheus"]).status.code(), Some(2));

    let shown = user.done(&["top", "--interval", "1", "-n", "2"]);
    let looks: Vec<_> = shown.split("NAME").skip(1).collect();
    assert_eq!(looks.len(), 2, "{shown}");
    for look in looks {
        let row = look.lines().find(|line| line.starts_with("busy ")).unwrap();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(cells[1..4], ["dbt", "on", "2"], "{shown}");
        let (exits, traps): (u64, u64) = (cells[11].parse().unwrap(), cells[12].parse().unwrap());
        assert!(exits >= traps && traps > 0, "{shown}");
        assert!(look.contains("\n1 more do not run: `bivisor ps` says why\n"), "{shown}");
    }
}

#[test]
fn a_machine_that_does_not_answer_is_named() {
    let user = User::new();
    user.file("two.toml", TWO);
    user.done(&["up", "two.toml"]);
    let pid = user.pid("one");
    let control = user.path().join("run/bivisor/vms/one/control");
    // Whoever keeps a machine's ear busy is not waited for.
    let silent = UnixStream::connect(&control).unwrap();
    assert_eq!(stat(&user, &["one"]).len(), 1);
    drop(silent);
    for nonsense in ["statistics", "statistics \n", "\0\n", "x".repeat(100).as_str()] {
        let mut stream = UnixStream::connect(&control).unwrap();
        stream.write_all(nonsense.as_bytes()).unwrap();
    }
    assert_eq!(stat(&user, &["one"]).len(), 1);
    kill_process(pid, Signal::STOP).unwrap();
    wait_for_stop(pid);
    user.refused(&["stat", "one"], 6, &["one does not tell what it does"]);
    assert_eq!(stat(&user, &[]).len(), 1, "the others do");
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(stat(&user, &["one"]).len(), 1);
}

#[test]
fn nobody_else_can_look_in() {
    let user = User::new();
    user.file("two.toml", TWO);
    user.done(&["up", "two.toml"]);
    let mut folders = vec![user.path().join("run/bivisor"), user.path().join("data/bivisor/logs")];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        assert_eq!(
            fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
            0o700,
            "{}",
            folder.display()
        );
        for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            seen += 1;
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
                assert_eq!(mode, 0o600, "{}", entry.path().display());
            }
        }
    }
    assert!(seen > 15, "{seen}");
}

#[test]
fn all_start_or_none() {
    let user = User::new();
    let (echo, count) = (user.kernel(ECHO), user.path().join("kernel"));
    assert_eq!(echo, count);
    let good = "[vm.good]\nimage = \"hello\"\nmemory = \"32M\"\n";
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("net = [\"user,hostfwd=tcp:{}-:22\"]", port.local_addr().unwrap());
    let disk = user.file("disk", vec![0; 1 << 20]);
    let disk = format!("[[vm.bad.disk]]\npath = \"{}\"", disk.display());
    user.file(
        "owner.toml",
        format!("[vm.owner]\nkernel = \"kernel\"\nmemory = \"16M\"\n{}", disk.replace("bad", "owner")),
    );
    user.done(&["up", "owner.toml"]);
    for (bad, told) in [
        ("kernel = \"nosuch\"", vec!["bad: there is no kernel", "nosuch"]),
        (
            &*format!("kernel = \"kernel\"\n{taken}"),
            vec!["bad: cannot forward tcp", "another program has that port"],
        ),
        (&*format!("kernel = \"kernel\"\n{disk}"), vec!["bad: ", "in use by biv:owner (process"]),
        ("image = \"nosuch\"", vec!["bad: there is no image nosuch"]),
        ("kernel = \"kernel\"\nconsole = \"file=/nosuch/x\"", vec!["bad: cannot write the console file"]),
        (
            "kernel = \"kernel\"\ntrace = \"t\"\nengine = \"kvm\"",
            vec!["bad: the engine kvm can't write a trace"],
        ),
        (
            "kernel = \"kernel\"\nconsole = \"pty\"\nvirtio-console = \"stdio\"",
            vec!["bad: ", "has no terminal"],
        ),
        ("kernel = \"kernel\"\nmemory = \"60T\"", vec!["bad: ", "this host has only"]),
    ] {
        user.file("bad.toml", format!("{good}[vm.bad]\n{bad}\n"));
        let output = user.output(&["up", "bad.toml"]);
        let text = stderr(&output);
        assert!(matches!(output.status.code(), Some(4 | 6)) && text.lines().count() == 1, "{bad}: {text}");
        assert!(told.iter().all(|told| text.contains(told)), "{bad}: {text}");
        assert!(user.machine("good").is_null() && user.machine("bad").is_null(), "{bad}");
        assert!(!user.path().join("run/bivisor/vms/good").exists());
    }
    assert_eq!(user.machine("owner")["state"], "running", "others are not touched");
}

#[test]
fn names_and_files_are_taken_once() {
    let user = User::new();
    let file = user.file("two.toml", TWO);
    user.file("other.toml", TWO.replace("vm.one", "vm.three"));
    user.done(&["up", "two.toml"]);
    user.done(&["kill", "one"]);
    let known = file.display().to_string();
    user.refused(
        &["up", "two.toml"],
        4,
        &[&known, "is up already (one stopped, two running)", "restart NAME"],
    );
    user.refused(&["up", "other.toml"], 4, &["there is a machine two already, from", &known, "down two"]);
    assert!(user.machine("three").is_null());
    user.refused(&["up", "nosuch.toml"], 4, &["cannot read the configuration nosuch.toml"]);
    user.file("broken.toml", "[vm.x]\nmemory = \"a lot\"\n");
    user.refused(&["up", "broken.toml"], 4, &["broken.toml:2:10: memory: 'a lot' is no size"]);
    user.refused(&["run", "two.toml"], 4, &["two.toml describes one, two: start them with `bivisor up"]);
    for verb in ["stop", "kill", "restart", "down", "console", "logs", "ssh", "stat"] {
        user.refused(&[verb, "nosuch"], 4, &["there is no machine nosuch; those there are: one, two"]);
    }
    user.refused(&["kill", "two", "nosuch"], 4, &["there is no machine nosuch"]);
    assert_eq!(user.machine("two")["state"], "running", "all or none");
    user.refused(&["down", "other.toml"], 4, &["no machine of", "other.toml is up"]);
    user.refused(
        &["ssh", "two", "true"],
        4,
        &["no port of this host leads to port 22 of two", "hostfwd=tcp:"],
    );
}

#[test]
fn machines_outlive_their_supervisor() {
    let user = User::new();
    let more = "[vm.three]\nimage = \"hello\"\nmemory = \"32M\"\n";
    user.file("three.toml", format!("{TWO}{more}"));
    user.done(&["up", "three.toml"]);
    let pids = ["one", "two", "three"].map(|name| user.pid(name));
    user.kill_supervisor();
    assert_eq!(["one", "two", "three"].map(|name| user.pid(name)), pids, "they are found again");
    assert!(user.machine("one")["since"].is_u64());

    // The new one hears of an end too, although it is nobody's parent.
    kill_process(pids[0], Signal::KILL).unwrap();
    let one = user.wait("one", |machine| machine["restarts"] == 1 && machine["state"] == "running");
    assert_eq!(one["ending"]["sentence"], "its process ended without a word");

    // What ends while there is no supervisor is dealt with by the next.
    let one = user.pid("one");
    let mut console = type_at(&user, "three", "");
    user.kill_supervisor();
    console.stdin.as_mut().unwrap().write_all(b"poweroff\r").unwrap();
    console.wait().unwrap();
    wait_for_end(pids[2]);
    kill_process(one, Signal::KILL).unwrap();
    kill_process(pids[1], Signal::KILL).unwrap();
    wait_for_end(one);
    wait_for_end(pids[1]);
    let one = user.wait("one", |machine| machine["state"] == "running");
    assert_eq!(one["restarts"], 2);
    assert_eq!(
        (&user.machine("two")["state"], &user.machine("two")["restarts"]),
        (&"stopped".into(), &0.into())
    );
    assert_eq!(user.machine("three")["ending"]["sentence"], "");
    assert_eq!(user.machine("three")["ending"]["status"], 0);

    // What is over stays so.
    user.kill_supervisor();
    assert_eq!(user.machine("three")["state"], "stopped");
    assert_eq!(user.machine("two")["state"], "stopped");
    assert_eq!(user.done(&["down", "--timeout", "0"]), "down: one, three, two\n");
}

#[test]
fn half_of_a_set_does_not_stay_when_the_supervisor_is_killed() {
    let user = User::new();
    // Nobody reads it, so this machine can't get any further.
    let pipe = user.path().join("pipe");
    mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    user.file("set.toml", format!("{TWO}trace = \"{}\"\n", pipe.display()));
    let mut up =
        user.bivisor(&["up", "set.toml"]).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let one = user.wait("one", |machine| machine["state"] == "running");
    assert_eq!(user.machine("two")["state"], "starting");
    let two = user.pid("two");
    // The command would start the set again.
    up.kill().unwrap();
    up.wait().unwrap();
    user.kill_supervisor();
    let begin = Instant::now();
    while !user.machine("one").is_null() || !user.machine("two").is_null() {
        assert!(begin.elapsed() < LONG);
        thread::sleep(Duration::from_millis(20));
    }
    wait_for_end(two);
    wait_for_end(Pid::from_raw(i32::try_from(one["pid"].as_i64().unwrap()).unwrap()).unwrap());
}

#[test]
fn who_crashes_again_and_again_is_given_up() {
    let user = User::new();
    user.kernel(TRIPLE_FAULT);
    user.file("vm.toml", "kernel = \"kernel\"\nmemory = \"16M\"\nrestart = \"on-failure\"\n");
    assert_eq!(user.done(&["up", "vm.toml"]), "up: vm\n", "it has started");
    let vm = user.wait("vm", |machine| machine["state"] == "given-up");
    assert_eq!((&vm["restarts"], &vm["ending"]["status"]), (&5.into(), &8.into()));
    assert!(
        user.done(&["ps"]).contains("vm is given up, it ended too often: the guest crashed: triple fault")
    );
    assert_eq!(user.done(&["logs", "vm"]).matches("vm starts").count(), 6);
    assert_eq!(user.done(&["restart", "vm"]), "started: vm\n");
    assert!(user.machine("vm")["restarts"].as_u64() < Some(5), "it has another chance");
}

#[test]
fn policies_are_kept() {
    let user = User::new();
    user.kernel(RESET);
    let machine = |name: &str, policy: &str| {
        format!(
            "[vm.{name}]\nkernel = \"kernel\"\nmemory = \"16M\"\nno-reboot = true\nrestart = \"{policy}\"\n"
        )
    };
    let text = machine("never", "no") + &machine("always", "always") + &machine("failed", "on-failure");
    user.file("set.toml", text);
    user.done(&["up", "set.toml"]);
    for name in ["always", "failed"] {
        let machine = user.wait(name, |machine| machine["restarts"].as_u64() >= Some(2));
        assert_eq!(machine["ending"]["status"], 10);
    }
    let never = user.wait("never", |machine| machine["state"] == "stopped");
    assert_eq!(never["restarts"], 0);
}

#[test]
fn a_log_can_be_followed() {
    let user = User::new();
    user.file("two.toml", TWO);
    user.done(&["up", "two.toml"]);
    let follower = user.bivisor(&["logs", "-f", "two"]).stdout(Stdio::piped()).spawn().unwrap();
    type_at(&user, "two", "info\rpoweroff\r").wait().unwrap();
    user.done(&["down", "--timeout", "0"]);
    let seen = follower.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&seen.stdout), user.done(&["logs", "two"]));
    assert!(String::from_utf8_lossy(&seen.stdout).contains("Goodbye."));
}

#[test]
fn a_busy_guest_does_not_hold_up_an_end() {
    let user = User::new();
    user.kernel(COUNT);
    user.file("vm.toml", "kernel = \"kernel\"\nmemory = \"16M\"\ncpus = 2\n");
    user.done(&["up", "vm.toml"]);
    let begin = Instant::now();
    assert_eq!(user.done(&["down", "--timeout", "0"]), "down: vm\n");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn nothing_of_who_starts_it_stays_open() {
    let user = User::new();
    user.file("two.toml", TWO);
    let (mut ours, inherited) = UnixStream::pair().unwrap();
    fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
    user.done(&["up", "two.toml"]);
    drop(inherited);
    ours.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0, "nobody else has it");
    assert_eq!(user.machine("two")["state"], "running");
}
