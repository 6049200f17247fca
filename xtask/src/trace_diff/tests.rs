use super::*;
use std::fmt::Write;

/// `inc eax; dec ecx; jnz` back, with bytes and lengths.
const LOOP: [(u64, &str); 3] = [(0x1000, "ffc0"), (0x1002, "ffc9"), (0x1004, "75fa")];

fn text(engine: &str, lines: &[String]) -> String {
    format!(
        "# bivisor trace 1: cpu mode bits cpl rip rflags rax ... code\n# engine {engine}\n{}",
        lines.concat()
    )
}

fn line(rip: u64, flags: u64, rax: u64, rcx: u64, code: &str) -> String {
    let mut line = format!("0 long 64 0 {rip:x} {flags:x} {rax:x} {rcx:x}");
    for _ in 2..16 {
        line.push_str(" 0");
    }
    let _ = writeln!(line, " {code}");
    line
}

/// The loop's lines, every instruction or every round.
fn rounds(every_instruction: bool) -> Vec<String> {
    let mut lines = Vec::new();
    for round in 0..40 {
        let left = 100 - round;
        for (step, (rip, code)) in LOOP.into_iter().enumerate() {
            if every_instruction || step == 0 {
                let (rax, rcx) = (round + u64::from(step > 0), left - u64::from(step > 1));
                lines.push(line(rip, 0x202, rax, rcx, code));
            }
        }
    }
    lines
}

/// An interrupt before a line: three instructions with IF clear.
fn interrupt(lines: &mut Vec<String>, index: usize) {
    let handler = [(0x5000, "50"), (0x5001, "58"), (0x5002, "48cf")];
    let words: Vec<u64> =
        lines[index].split(' ').skip(6).take(2).map(|word| u64::from_str_radix(word, 16).unwrap()).collect();
    let handler = handler.map(|(rip, code)| line(rip, 2, words[0], words[1], code));
    lines.splice(index..index, handler);
}

fn compare(interp: &[String], dbt: &[String]) -> (Option<String>, u64, usize) {
    let folder = tempfile::tempdir().unwrap();
    let open = |engine: &str, lines: &[String]| {
        let path = folder.path().join(engine);
        std::fs::write(&path, text(engine, lines)).unwrap();
        Reader::open(&path, 0).unwrap()
    };
    let mut comparison = Comparison::new(open("interp", interp), open("dbt", dbt));
    let difference = comparison.run().unwrap();
    (difference, comparison.compared, comparison.skipped.len())
}

#[test]
fn blocks_are_found_among_instructions() {
    assert_eq!(compare(&rounds(true), &rounds(false)), (None, 40, 0));
}

#[test]
fn a_changed_register_is_found_and_named() {
    let mut dbt = rounds(false);
    dbt[7] = dbt[7].replace(" 7 ", " 3007 ");
    let (difference, compared, _) = compare(&rounds(true), &dbt);
    assert_eq!(compared, 7);
    let difference = difference.unwrap();
    assert!(
        difference.contains("RAX: 3007, interpreter 7") && difference.contains("inc eax"),
        "{difference}"
    );
}

#[test]
fn a_missing_block_is_found() {
    let mut interp = rounds(true);
    interp.splice(18..24, [line(0x2000, 0x202, 0, 0, "ebfe")]);
    let (difference, compared, _) = compare(&interp, &rounds(false));
    assert_eq!((compared, difference.is_some()), (6, true));
}

#[test]
fn interrupts_may_come_anywhere() {
    let (mut interp, mut dbt) = (rounds(true), rounds(false));
    interrupt(&mut dbt, 5);
    interrupt(&mut interp, 100);
    assert_eq!(compare(&interp, &dbt).0, None);
    // But what comes behind them is compared.
    dbt[39] = dbt[39].replace("0 long 64 0 1000 202", "0 long 64 0 1000 203");
    let difference = compare(&interp, &dbt).0.unwrap();
    assert!(difference.contains("RFLAGS: 203, interpreter 202"), "{difference}");
}

#[test]
fn what_time_decides_is_not_compared() {
    // rdtsc; mov ecx, eax; xor eax, eax; jmp
    let code = [(0x1000, "0f31"), (0x1002, "89c1"), (0x1004, "31c0"), (0x1006, "ebf8"), (0x2000, "90")];
    let lines = |clock: u64| {
        let values = [(0, 0), (clock, 0), (clock, clock), (0, clock), (0, clock)];
        let lines = code.iter().zip(values);
        lines.map(|((rip, code), (rax, rcx))| line(*rip, 0x246, rax, rcx, code)).collect::<Vec<_>>()
    };
    assert_eq!(compare(&lines(5), &lines(9)), (None, 5, 0));
    // A round more of waiting.
    let twice = [&lines(9)[..4], &lines(9)[..]].concat();
    assert_eq!(compare(&lines(5), &twice), (None, 5, 1));
    let mut wrong = lines(9);
    wrong[3] = line(0x1006, 0x246, 1, 9, "ebf8");
    assert!(compare(&lines(5), &wrong).0.unwrap().contains("RAX: 1, interpreter 0"));
}
