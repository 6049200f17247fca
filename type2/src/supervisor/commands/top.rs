//! `bivisor top`.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::thread;
use std::time::Duration;

use super::super::places::Places;
use super::stat::{self, Sample};
use crate::error::Failure;
use crate::vm::counters::{CpuStatistics, TrafficStatistics};
use crate::{say, status};

/// Clears a terminal and goes to its upper left corner (ECMA-48, ED and CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

const HEAD: [&str; 13] = [
    "NAME", "ENGINE", "PV", "CPUS", "CPU %", "MEM MiB", "OF", "READ/s", "WRITE/s", "RX/s", "TX/s", "EXITS/s",
    "TRAPS/s",
];
const LAST: &str = "HYPERCALLS/s";

pub(super) fn run(interval: u32, count: Option<u64>) -> Result<u8, Failure> {
    let places = Places::find()?;
    let terminal = io::stdout().is_terminal();
    let (mut before, _) = stat::all(&places)?;
    let mut looks = 0;
    while count.is_none_or(|count| looks < count) {
        thread::sleep(Duration::from_secs(interval.into()));
        let (now, others) = stat::all(&places)?;
        let mut text = if terminal { CLEAR.to_owned() } else { String::new() };
        text.push_str(&table(&before, &now));
        if others > 0 {
            text.push_str(&format!("{others} more do not run: `bivisor ps` says why\n"));
        }
        say(&text);
        before = now;
        looks += 1;
    }
    Ok(status::SUCCESS)
}

/// A line for each machine: what it did between two looks. One that wasn't there before is shown from its beginning.
fn table(before: &[Sample], now: &[Sample]) -> String {
    let before: HashMap<_, _> = before.iter().map(|sample| ((&sample.name, sample.pid), sample)).collect();
    let mut rows =
        vec![[&HEAD[..], &[LAST]].concat().iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>()];
    rows.extend(now.iter().map(|sample| row(before.get(&(&sample.name, sample.pid)).copied(), sample)));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<_> = (0..=HEAD.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        // Words to the left, numbers to the right.
        let cells = cells.map(|(column, (cell, &width))| match column {
            0..3 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row(before: Option<&Sample>, now: &Sample) -> Vec<String> {
    let (old, new) = (before.map(|sample| &sample.statistics), &now.statistics);
    let nanoseconds =
        new.uptime_nanoseconds - old.map_or(0, |old| old.uptime_nanoseconds.min(new.uptime_nanoseconds));
    let time = nanoseconds.max(1) as f64 / 1e9;
    let rate = |new: u64, old: Option<u64>| new.saturating_sub(old.unwrap_or(0)) as f64 / time;
    let cpu = rate(new.cpu_nanoseconds, old.map(|old| old.cpu_nanoseconds)) / 1e7;
    let sum =
        |all: &[TrafficStatistics], field: fn(&TrafficStatistics) -> u64| all.iter().map(field).sum::<u64>();
    let disk = |field| rate(sum(&new.disks, field), old.map(|old| sum(&old.disks, field)));
    let network = |field| rate(sum(&new.networks, field), old.map(|old| sum(&old.networks, field)));
    let all = |cpus: &[CpuStatistics], field: fn(&CpuStatistics) -> u64| cpus.iter().map(field).sum::<u64>();
    let exits = |field| rate(all(&new.cpus, field), old.map(|old| all(&old.cpus, field)));
    vec![
        now.name.clone(),
        new.engine.clone(),
        if new.pv { "on".into() } else { "off".into() },
        new.cpus.len().to_string(),
        format!("{cpu:.1}"),
        (now.resident_bytes >> 20).to_string(),
        (new.memory_bytes >> 20).to_string(),
        bytes(disk(|traffic| traffic.in_bytes)),
        bytes(disk(|traffic| traffic.out_bytes)),
        bytes(network(|traffic| traffic.in_bytes)),
        bytes(network(|traffic| traffic.out_bytes)),
        format!("{:.0}", exits(CpuStatistics::all)),
        format!("{:.0}", exits(|cpu| cpu.traps)),
        format!("{:.0}", exits(CpuStatistics::all_hypercalls)),
    ]
}

/// Bytes in a unit that keeps the number short.
fn bytes(count: f64) -> String {
    match count {
        ..1e4 => format!("{count:.0}"),
        ..1e7 => format!("{:.0}k", count / 1e3),
        ..1e10 => format!("{:.0}M", count / 1e6),
        _ => format!("{:.0}G", count / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::super::stat::tests::sample;
    use super::*;

    #[test]
    fn rates_are_those_of_the_time_between_two_looks() {
        let before = [sample("web", 10, &[("port", 100), ("halt", 0)], 10)];
        let mut after = sample("web", 14, &[("port", 500), ("halt", 40)], 50);
        after.statistics.networks[0].out_bytes += 40_000_000;
        let text = table(&before, &[after, sample("mail", 2, &[("port", 20)], 0)]);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1][..7], ["web", "dbt", "on", "1", "50.0", "100", "256"], "{text}");
        assert_eq!(rows[1][7..], ["0", "0", "0", "10M", "120", "100", "10"], "{text}");
        assert_eq!(rows[2][11..], ["10", "10", "0"], "{text}");
        assert_eq!(rows.len(), 3);
    }

    #[test]
    fn a_process_that_has_taken_anothers_place_is_not_compared_with_it() {
        let before = [sample("web", 100, &[("port", 1_000_000)], 0)];
        let mut after = sample("web", 1, &[("port", 30)], 0);
        after.pid = 8;
        let text = table(&before, &[after]);
        assert!(text.lines().nth(1).unwrap().split_whitespace().any(|cell| cell == "30"), "{text}");
    }

    #[test]
    fn bytes_stay_short() {
        assert_eq!([0.4, 9_999.0, 123_456.0, 2.5e8, 3e11].map(bytes), ["0", "9999", "123k", "250M", "300G"]);
    }
}
