//! `bivisor stat`.

use std::fmt::Write;

use serde::Serialize;

use super::super::places::Places;
use super::super::process;
use super::super::protocol::MachineStatus;
use super::{machines, running};
use crate::error::Failure;
use crate::vm::counters::{CpuStatistics, Statistics, TrafficStatistics};
use crate::{say, status};

/// A machine that runs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Sample {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: i32,
    /// Memory of the host's that its process has, in bytes.
    pub resident_bytes: u64,
    /// What it tells itself.
    #[serde(flatten)]
    pub statistics: Statistics,
}

impl Sample {
    fn of(places: &Places, machine: &MachineStatus) -> Result<Self, Failure> {
        let name = &machine.name;
        let failed =
            |error| Failure::new(status::HOST, format!("{name} does not tell what it does: {error}"));
        let statistics = process::statistics(&places.machine(name)).map_err(failed)?;
        let pid = machine.pid.unwrap_or_default();
        let resident_bytes = process::resident(pid).map_err(failed)?;
        Ok(Self { name: name.clone(), pid, resident_bytes, statistics })
    }
}

/// All machines that run, and how many do not.
pub(super) fn all(places: &Places) -> Result<(Vec<Sample>, usize), Failure> {
    let machines = machines(places)?;
    let running = machines.iter().filter(|machine| machine.pid.is_some());
    // One that has ended by now is one that does not run.
    let samples: Vec<_> = running.filter_map(|machine| Sample::of(places, machine).ok()).collect();
    let others = machines.len() - samples.len();
    Ok((samples, others))
}

pub(super) fn run(names: &[String], json: bool, prometheus: bool) -> Result<u8, Failure> {
    let places = Places::find()?;
    let samples = if names.is_empty() {
        all(&places)?.0
    } else {
        let sample = |name: &String| Sample::of(&places, &running(&places, name)?);
        names.iter().map(sample).collect::<Result<_, _>>()?
    };
    let text = if json {
        let text = serde_json::to_string_pretty(&samples).map_err(Failure::host)?;
        format!("{text}\n")
    } else if prometheus {
        exposition(&samples)
    } else {
        samples.iter().map(in_words).collect()
    };
    say(&text);
    Ok(status::SUCCESS)
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// For people.
fn in_words(sample: &Sample) -> String {
    let Sample { name, pid, resident_bytes, statistics } = sample;
    let Statistics { engine, pv, memory_bytes, uptime_nanoseconds, cpu_nanoseconds, resets, .. } = statistics;
    let pv = if *pv { "on" } else { "off" };
    let mut text = format!(
        "{name}: process {pid}, engine {engine}, pv {pv}, up {:.0} s, {resets} resets\n  CPU time {:.2} s, memory {} MiB of {} MiB\n",
        seconds(*uptime_nanoseconds),
        seconds(*cpu_nanoseconds),
        resident_bytes >> 20,
        memory_bytes >> 20,
    );
    let devices = [
        ("disk", &statistics.disks, "read", "written"),
        ("network", &statistics.networks, "received", "sent"),
    ];
    for (device, all, into, out_of) in devices {
        for (number, traffic) in all.iter().enumerate() {
            text.push_str(&format!(
                "  {device} {number}: {} requests {into} ({} bytes), {} {out_of} ({} bytes)\n",
                traffic.in_requests, traffic.in_bytes, traffic.out_requests, traffic.out_bytes
            ));
        }
    }
    for (number, cpu) in statistics.cpus.iter().enumerate() {
        let kinds = cpu.exits.iter().filter(|(_, count)| **count != 0);
        let kinds = kinds.map(|(kind, count)| format!("{kind} {count}"));
        let calls = cpu.hypercalls.iter().map(|(number, count)| format!("hypercall {number} {count}"));
        let list: Vec<_> = kinds.chain(calls).collect();
        text.push_str(&format!("  CPU {number}: {} exits: {}\n", cpu.all(), list.join(", ")));
    }
    text
}

/// A metric of each machine: name, kind, what it is, value.
type Metric = (&'static str, &'static str, &'static str, fn(&Sample) -> String);

const METRICS: [Metric; 6] = [
    ("uptime_seconds", "gauge", "Age of the machine's process.", |s| {
        seconds(s.statistics.uptime_nanoseconds).to_string()
    }),
    ("cpu_seconds_total", "counter", "CPU time of the machine's process.", |s| {
        seconds(s.statistics.cpu_nanoseconds).to_string()
    }),
    ("memory_bytes", "gauge", "RAM of the machine.", |s| s.statistics.memory_bytes.to_string()),
    ("resident_bytes", "gauge", "Memory of the host's that the machine's process has.", |s| {
        s.resident_bytes.to_string()
    }),
    ("resets_total", "counter", "Resets by the guest.", |s| s.statistics.resets.to_string()),
    ("paravirtual", "gauge", "1 if the guest is offered the paravirtual interface.", |s| {
        u8::from(s.statistics.pv).to_string()
    }),
];

/// A counter of each device.
type DeviceMetric = (&'static str, &'static str, fn(&TrafficStatistics) -> u64);

const DISK_METRICS: [DeviceMetric; 4] = [
    ("disk_reads_total", "Reads from a disk.", |t| t.in_requests),
    ("disk_read_bytes_total", "Bytes read from a disk.", |t| t.in_bytes),
    ("disk_writes_total", "Writes to a disk.", |t| t.out_requests),
    ("disk_written_bytes_total", "Bytes written to a disk.", |t| t.out_bytes),
];

const NETWORK_METRICS: [DeviceMetric; 4] = [
    ("network_received_frames_total", "Frames that the guest got.", |t| t.in_requests),
    ("network_received_bytes_total", "Bytes that the guest got.", |t| t.in_bytes),
    ("network_sent_frames_total", "Frames that the guest sent.", |t| t.out_requests),
    ("network_sent_bytes_total", "Bytes that the guest sent.", |t| t.out_bytes),
];

/// The text format of Prometheus (prometheus.io, "Exposition formats", version 0.0.4).
fn exposition(samples: &[Sample]) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, lines: Vec<(String, String)>| {
        let _ = write!(text, "# HELP bivisor_{name} {help}\n# TYPE bivisor_{name} {kind}\n");
        for (labels, value) in lines {
            let _ = writeln!(text, "bivisor_{name}{{{labels}}} {value}");
        }
    };
    let vm = |sample: &Sample| format!("vm=\"{}\"", escaped(&sample.name));
    for (name, kind, help, value) in METRICS {
        metric(name, kind, help, samples.iter().map(|sample| (vm(sample), value(sample))).collect());
    }
    let mut devices =
        |metrics: &[DeviceMetric], device: &str, all: fn(&Statistics) -> &[TrafficStatistics]| {
            for (name, help, value) in metrics {
                let lines = samples.iter().flat_map(|sample| {
                    let each = all(&sample.statistics).iter().enumerate();
                    each.map(|(number, traffic)| {
                        (format!("{},{device}=\"{number}\"", vm(sample)), value(traffic).to_string())
                    })
                });
                metric(name, "counter", help, lines.collect());
            }
        };
    devices(&DISK_METRICS, "disk", |statistics| &statistics.disks);
    devices(&NETWORK_METRICS, "interface", |statistics| &statistics.networks);
    let cpus = |counts: fn(&CpuStatistics) -> Vec<(String, u64)>| {
        let lines = samples.iter().flat_map(|sample| {
            sample.statistics.cpus.iter().enumerate().flat_map(move |(number, cpu)| {
                let label = move |label| format!("{},cpu=\"{number}\",{label}", vm(sample));
                counts(cpu).into_iter().map(move |(kind, count)| (label(kind), count.to_string()))
            })
        });
        lines.collect::<Vec<_>>()
    };
    let exits =
        cpus(|cpu| cpu.exits.iter().map(|(kind, count)| (format!("kind=\"{kind}\""), *count)).collect());
    metric("exits_total", "counter", "Exits from guest code by kind, hypercalls apart.", exits);
    let calls = cpus(|cpu| {
        cpu.hypercalls.iter().map(|(number, count)| (format!("number=\"{number}\""), *count)).collect()
    });
    metric("hypercalls_total", "counter", "Hypercalls by number; 16 is for all from there on.", calls);
    text
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// A machine with one processor.
    pub fn sample(name: &str, uptime: u64, exits: &[(&str, u64)], hypercalls: u64) -> Sample {
        let exits: BTreeMap<_, _> = exits.iter().map(|&(kind, count)| (kind.to_owned(), count)).collect();
        let traps = exits.iter().filter(|(kind, _)| *kind != "halt").map(|(_, count)| count).sum();
        let cpu = CpuStatistics { exits, traps, hypercalls: BTreeMap::from([(5, hypercalls)]) };
        let traffic = TrafficStatistics { in_requests: 1, in_bytes: 512, out_requests: 2, out_bytes: 8192 };
        let statistics = Statistics {
            engine: "dbt".into(),
            pv: true,
            memory_bytes: 256 << 20,
            uptime_nanoseconds: uptime * 1_000_000_000,
            cpu_nanoseconds: uptime * 500_000_000,
            cpus: vec![cpu],
            disks: vec![traffic.clone()],
            networks: vec![traffic],
            ..Statistics::default()
        };
        Sample { name: name.into(), pid: 7, resident_bytes: 100 << 20, statistics }
    }

    #[test]
    fn scrapers_find_every_number_once_under_its_name() {
        let samples =
            [sample("web", 10, &[("port", 3), ("halt", 4)], 5), sample("a\"b", 10, &[("port", 1)], 0)];
        let text = exposition(&samples);
        for line in [
            "# TYPE bivisor_cpu_seconds_total counter",
            "bivisor_cpu_seconds_total{vm=\"web\"} 5",
            "bivisor_resident_bytes{vm=\"web\"} 104857600",
            "bivisor_exits_total{vm=\"web\",cpu=\"0\",kind=\"port\"} 3",
            "bivisor_hypercalls_total{vm=\"web\",cpu=\"0\",number=\"5\"} 5",
            "bivisor_disk_written_bytes_total{vm=\"web\",disk=\"0\"} 8192",
            "bivisor_network_received_frames_total{vm=\"web\",interface=\"0\"} 1",
            "bivisor_exits_total{vm=\"a\\\"b\",cpu=\"0\",kind=\"port\"} 1",
        ] {
            assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line} in {text}");
        }
        let helps = text.lines().filter(|line| line.starts_with("# HELP")).count();
        assert_eq!(helps, METRICS.len() + DISK_METRICS.len() + NETWORK_METRICS.len() + 2);
    }

    #[test]
    fn people_are_told_what_there_was() {
        let text = in_words(&sample("web", 10, &[("port", 3), ("mmio", 0)], 5));
        assert!(text.starts_with("web: process 7, engine dbt, pv on, up 10 s, 0 resets\n"), "{text}");
        assert!(text.contains("CPU 0: 8 exits: port 3, hypercall 5 5\n"), "{text}");
        assert!(text.contains("disk 0: 1 requests read (512 bytes), 2 written (8192 bytes)\n"), "{text}");
    }
}
