//! `--trace` writes everything, however the machine ends, and tells when it can't; `--perf-map` names code for perf.

mod common;

use std::process::{Output, Stdio};

use common::{COUNT, ENTRY, Folder, TEST_EXIT, stderr};
use rustix::process::{Pid, Signal, kill_process};

fn traced(folder: &Folder, engine: &str) -> Output {
    folder.run(TEST_EXIT, &["--testdev", "--engine", engine, "--trace", "trace"])
}

fn instruction_pointers(folder: &Folder) -> Vec<u32> {
    let text = std::fs::read_to_string(folder.path().join("trace")).unwrap();
    assert!(text.ends_with('\n'), "cut off");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let words = lines.map(|line| line.split(' ').collect::<Vec<_>>());
    words.map(|words| u32::from_str_radix(words[4], 16).unwrap()).collect()
}

#[test]
fn the_interpreter_traces_every_instruction_and_the_translator_every_block() {
    for (engine, first) in [("interp", &[ENTRY, ENTRY + 5][..]), ("dbt", &[ENTRY])] {
        let folder = Folder::new();
        let output = traced(&folder, engine);
        assert_eq!(output.status.code(), Some(33), "{engine}: {}", stderr(&output));
        let told = instruction_pointers(&folder);
        assert_eq!(told.get(..first.len()), Some(first), "{engine}");
    }
}

#[test]
fn a_signal_loses_nothing() {
    let folder = Folder::new();
    let child = folder.run_command(COUNT, &["--trace", "trace"]).stderr(Stdio::piped()).spawn().unwrap();
    let start = std::time::Instant::now();
    while std::fs::metadata(folder.path().join("trace")).map_or(0, |file| file.len()) < 1 << 20 {
        assert!(start.elapsed().as_secs() < 60);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert!(instruction_pointers(&folder).len() > 1000);
}

#[test]
fn a_full_disk_ends_the_machine_in_words() {
    for kernel in [COUNT, TEST_EXIT] {
        let output = Folder::new().run(kernel, &["--testdev", "--trace", "/dev/full"]);
        assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
        assert!(stderr(&output).contains("bivisor: cannot write the trace /dev/full: No space left"));
    }
}

#[test]
fn perf_is_told_the_names_of_translated_code() {
    let folder = Folder::new();
    let words = ["run", "hello", "--memory", "32M", "--engine", "dbt", "--perf-map"];
    let mut child = folder.bivisor(&words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let map = format!("/tmp/perf-{}.map", child.id());
    let mut prompt = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"poweroff\r").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = std::fs::read_to_string(&map).unwrap();
    std::fs::remove_file(&map).unwrap();
    let names: Vec<&str> = text.lines().filter_map(|line| line.splitn(3, ' ').nth(2)).collect();
    assert_eq!(names.len(), text.lines().count());
    assert_eq!(names[0], "dbt:shared");
    assert!(names.iter().any(|name| name.starts_with("guest:") && name.ends_with(":kernel")), "{text}");
}
