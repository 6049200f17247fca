//! `bivisor ps`.

use super::super::places::Places;
use super::super::protocol::{MachineStatus, State};
use super::super::record::seconds;
use super::machines;
use crate::error::Failure;
use crate::{say, status};

const HEAD: [&str; 6] = ["NAME", "STATE", "PID", "UP", "RESTARTS", "FILE"];

pub(super) fn run(json: bool) -> Result<u8, Failure> {
    let machines = machines(&Places::find()?)?;
    if json {
        let text = serde_json::to_string_pretty(&machines).map_err(Failure::host)?;
        say(&format!("{text}\n"));
    } else {
        say(&table(&machines, seconds()));
    }
    Ok(status::SUCCESS)
}

/// The state in words, with what there is to tell of the last end.
pub(super) fn state(machine: &MachineStatus) -> String {
    let ending = machine.ending.as_ref().filter(|_| machine.pid.is_none());
    let told = match ending {
        // Registers and the like are in the log.
        Some(ending) if !ending.sentence.is_empty() => ending.sentence.lines().next().unwrap_or_default(),
        Some(_) => "the guest powered off",
        None => return machine.state.to_string(),
    };
    match machine.state {
        State::GivenUp => format!("given up, it ended too often: {told}"),
        state => format!("{state}: {told}"),
    }
}

fn table(machines: &[MachineStatus], now: u64) -> String {
    let rows: Vec<[String; 6]> = machines
        .iter()
        .map(|machine| {
            [
                machine.name.clone(),
                machine.state.to_string(),
                machine.pid.map_or("-".into(), |pid| pid.to_string()),
                machine.since.map_or("-".into(), |since| duration(now.saturating_sub(since))),
                machine.restarts.to_string(),
                machine.file.display().to_string(),
            ]
        })
        .collect();
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    let line = |cells: [&str; 6]| {
        let cells = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    let mut text = line(HEAD);
    for row in &rows {
        text.push_str(&line(row.each_ref().map(String::as_str)));
    }
    for machine in machines.iter().filter(|machine| machine.pid.is_none()) {
        text.push_str(&format!("{} is {}\n", machine.name, state(machine)));
    }
    text
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RestartPolicy;
    use crate::supervisor::record::Ending;

    #[test]
    fn a_table_has_a_line_for_each_and_says_why_one_does_not_run() {
        let machine = |name: &str, state, pid| MachineStatus {
            name: name.into(),
            state,
            pid,
            since: pid.map(|_| 1000),
            restarts: 2,
            policy: RestartPolicy::No,
            ending: Some(Ending { status: Some(8), sentence: "it crashed\nRAX 0".into(), at: 900 }),
            file: "/f.toml".into(),
            log: "/l".into(),
        };
        let text = table(
            &[machine("mail", State::Running, Some(7)), machine("web-server", State::GivenUp, None)],
            1090,
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "NAME        STATE     PID  UP     RESTARTS  FILE");
        assert_eq!(lines[1], "mail        running   7    1 min  2         /f.toml");
        assert_eq!(lines[2], "web-server  given up  -    -      2         /f.toml");
        assert_eq!(lines[3], "web-server is given up, it ended too often: it crashed");
        assert_eq!(lines.len(), 4);
    }
}
