//! Raw results in order: the medians of each row and peer, and their ratios.
use super::record::{BOOT, Figure, Note, PeerKind, PeerSetup, Record, Setup};
use anyhow::{Context, Result};

/// Rows that don't count in means: natively, CPUID traps into the hypervisor that many a host runs on.
const NOT_IN_MEANS: &[&str] = &["cpuid"];

/// What the repeats of a row came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Of at least one value.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, least, most })
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.least <= other.most && other.least <= self.most
    }
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub group: String,
    pub name: String,
    pub unit: String,
    /// One for each peer, in the order of [`Summary::peers`].
    pub spreads: Vec<Option<Spread>>,
}

/// How one peer compares with another in a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// So many times faster.
    pub faster: f64,
    /// The ranges of the repeats overlap: the two may be equal.
    pub unsure: bool,
}

impl Line {
    /// Whether lower figures are better: those of time.
    pub fn lower_is_better(&self) -> bool {
        matches!(self.unit.as_str(), "s" | "ms" | "us" | "ns")
    }

    /// How many times faster peer `this` is than peer `other`.
    pub fn ratio(&self, this: usize, other: usize) -> Option<Ratio> {
        let (this, other) = (self.spreads.get(this)?.as_ref()?, self.spreads.get(other)?.as_ref()?);
        let quotient = this.median / other.median;
        let faster = if self.lower_is_better() { 1.0 / quotient } else { quotient };
        (faster.is_finite() && faster > 0.0).then_some(Ratio { faster, unsure: this.overlaps(other) })
    }
}

/// All results.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub setup: Setup,
    pub peers: Vec<PeerSetup>,
    pub lines: Vec<Line>,
    /// CPUs that others kept busy, in the worst run.
    pub worst_load: f64,
    /// What is to be known of single peers, each thing once.
    pub notes: Vec<String>,
}

impl Summary {
    /// Of the records of one or more files, which may tell of different peers.
    ///
    /// # Errors
    /// If there is no setup among them.
    pub fn of(records: &[Record]) -> Result<Self> {
        let setups = || {
            records
                .iter()
                .filter_map(|record| if let Record::Setup(setup) = record { Some(setup) } else { None })
        };
        let setup = setups().next().context("the results don't say what was measured")?.clone();
        let mut peers: Vec<PeerSetup> = Vec::new();
        for peer in setups().flat_map(|setup| &setup.peers) {
            if !peers.iter().any(|known| known.label == peer.label) {
                peers.push(peer.clone());
            }
        }
        let figures: Vec<&Figure> = records
            .iter()
            .filter_map(|record| if let Record::Figure(figure) = record { Some(figure) } else { None })
            .collect();
        let worst_load = records.iter().fold(0.0, |worst: f64, record| match record {
            Record::Run(run) => worst.max(run.foreign_load),
            _ => worst,
        });
        let mut notes: Vec<String> = Vec::new();
        for record in records {
            if let Record::Note(Note { peer, text, .. }) = record {
                let note = format!("{peer}: {text}");
                notes.extend((!notes.contains(&note)).then_some(note));
            }
        }
        Ok(Self { lines: lines(&peers, &figures), setup, peers, worst_load, notes })
    }

    /// The place of the first peer of this kind.
    pub fn first(&self, kind: PeerKind) -> Option<usize> {
        self.peers.iter().position(|peer| peer.kind == kind)
    }

    /// The places of the QEMUs; the newest is the last.
    pub fn qemus(&self) -> Vec<usize> {
        (0..self.peers.len()).filter(|&index| self.peers[index].kind == PeerKind::Qemu).collect()
    }

    /// The groups, in order.
    pub fn groups(&self) -> Vec<&str> {
        let mut groups: Vec<&str> = Vec::new();
        for line in &self.lines {
            if !groups.contains(&line.group.as_str()) {
                groups.push(&line.group);
            }
        }
        groups
    }

    /// The geometric mean of how many times faster `this` is than `other`, in the rows of a group or in all.
    pub fn mean(&self, group: Option<&str>, this: usize, other: usize) -> Option<f64> {
        let counts = |line: &&Line| {
            group.is_none_or(|group| line.group == group) && !NOT_IN_MEANS.contains(&line.name.as_str())
        };
        let ratios = self.lines.iter().filter(counts).filter_map(|line| line.ratio(this, other));
        geometric_mean(ratios.map(|ratio| ratio.faster))
    }
}

fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}

/// The figures by row and peer. Groups stay together, in the order of their first figures, but booting comes first.
fn lines(peers: &[PeerSetup], figures: &[&Figure]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let mut groups: Vec<&str> = vec![BOOT];
    for figure in figures {
        if !groups.contains(&figure.group.as_str()) {
            groups.push(&figure.group);
        }
        let known = |line: &Line| line.group == figure.group && line.name == figure.name;
        if !lines.iter().any(known) {
            let values = |label: &str| {
                let same = figures.iter().filter(|other| {
                    other.peer == label && other.group == figure.group && other.name == figure.name
                });
                same.map(|figure| figure.value).collect::<Vec<f64>>()
            };
            lines.push(Line {
                group: figure.group.clone(),
                name: figure.name.clone(),
                unit: figure.unit.clone(),
                spreads: peers.iter().map(|peer| Spread::of(values(&peer.label))).collect(),
            });
        }
    }
    lines.sort_by_key(|line| groups.iter().position(|group| *group == line.group));
    lines
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::bench::record::Run;

    /// Two rows and a boot on the host, Bivisor and two QEMUs, with one figure missing.
    pub fn example() -> Summary {
        let peer =
            |label: &str, kind| PeerSetup { label: label.into(), version: format!("{label} (test)"), kind };
        let peers = vec![
            peer("native", PeerKind::Native),
            peer("bivisor", PeerKind::Bivisor),
            peer("QEMU 7.2.22", PeerKind::Qemu),
            peer("QEMU 11.1.2", PeerKind::Qemu),
        ];
        let mut records = vec![Record::Setup(Setup {
            date: "2026-01-02".into(),
            cpu: "Some CPU".into(),
            cpus: 2,
            kernel: "6.1".into(),
            guest: vec!["linux-image-x 6.1".into(), "busybox-static 1.35".into()],
            memory: 512,
            repeats: 3,
            seconds: 0.3,
            commit: "abcdef".into(),
            peers,
        })];
        let mut add = |group: &str, name: &str, unit: &str, figures: &[(&str, &[f64])]| {
            for (peer, values) in figures {
                for (repeat, &value) in (0..).zip(*values) {
                    let (peer, group, name) = ((*peer).into(), group.into(), name.into());
                    records.push(Record::Figure(Figure {
                        peer,
                        repeat,
                        group,
                        name,
                        value,
                        unit: unit.into(),
                    }));
                }
            }
        };
        add(
            "integer",
            "sieve",
            "/s",
            &[
                ("native", &[1200.0, 1000.0, 1100.0]),
                ("bivisor", &[560.0, 540.0, 550.0]),
                ("QEMU 7.2.22", &[110.0, 100.0, 120.0]),
                ("QEMU 11.1.2", &[275.0, 545.0, 270.0]),
            ],
        );
        add("memory", "list", "ns", &[("native", &[2.0]), ("bivisor", &[4.0]), ("QEMU 11.1.2", &[32.0])]);
        add("memory", "cpuid", "M/s", &[("native", &[0.25]), ("bivisor", &[50.0]), ("QEMU 11.1.2", &[25.0])]);
        add(
            "boot",
            "first_line_1cpu",
            "s",
            &[("bivisor", &[2.0, 2.0, 2.5]), ("QEMU 11.1.2", &[3.0, 4.0, 5.0])],
        );
        for repeat in 0..2 {
            let (peer, text) = ("native".into(), "aes_128 the CPU has no AES instructions".into());
            records.push(Record::Note(Note { peer, repeat, wrong: false, text }));
        }
        records.push(Record::Run(Run {
            peer: "bivisor".into(),
            repeat: 0,
            cpus: 1,
            seconds: 30.0,
            foreign_load: 0.25,
            failure: None,
        }));
        Summary::of(&records).unwrap()
    }

    #[test]
    fn medians_and_ranges() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]).map(|spread| spread.median), Some(2.5));
        assert_eq!(Spread::of(vec![]), None);
    }

    #[test]
    fn ratios_know_which_way_is_better() {
        let summary = example();
        let line = |name: &str| summary.lines.iter().find(|line| line.name == name).unwrap();
        let ratio = |name: &str, this, other| line(name).ratio(this, other);
        assert_eq!(ratio("sieve", 1, 2), Some(Ratio { faster: 5.0, unsure: false }));
        assert_eq!(ratio("sieve", 1, 3), Some(Ratio { faster: 2.0, unsure: true }));
        assert_eq!(ratio("list", 1, 3), Some(Ratio { faster: 8.0, unsure: false }));
        assert_eq!(ratio("list", 1, 2), None);
        assert_eq!(ratio("first_line_1cpu", 1, 3), Some(Ratio { faster: 2.0, unsure: false }));
    }

    #[test]
    fn means_are_geometric_and_leave_cpuid_out() {
        let summary = example();
        assert_eq!(summary.groups(), ["boot", "integer", "memory"]);
        assert!((summary.mean(Some("memory"), 1, 3).unwrap() - 8.0).abs() < 1e-9);
        // 2, 2 and 8.
        assert!((summary.mean(None, 1, 3).unwrap() - 32f64.cbrt()).abs() < 1e-9);
        assert_eq!(summary.mean(Some("boot"), 1, 0), None);
        assert_eq!((summary.first(PeerKind::Bivisor), summary.qemus()), (Some(1), vec![2, 3]));
        assert!((summary.worst_load - 0.25).abs() < 1e-9);
    }

    #[test]
    fn results_of_nothing_are_refused() {
        assert!(Summary::of(&[]).is_err());
    }
}
