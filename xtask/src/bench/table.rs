//! The table in Markdown.
use super::{
    record::PeerKind,
    summary::{Line, Ratio, Summary},
};
use std::fmt::Write;

/// The table with what it was measured on.
pub fn markdown(summary: &Summary) -> String {
    let mut text = heading(summary);
    let columns = Columns::of(summary);
    text.push_str(&columns.header());
    for group in summary.groups() {
        text.push_str(&columns.means(&format!("**{group}**"), Some(group)));
        for line in summary.lines.iter().filter(|line| line.group == group) {
            text.push_str(&columns.line(line));
        }
    }
    text.push_str(&columns.means("**all**", None));
    text
}

fn heading(summary: &Summary) -> String {
    let setup = &summary.setup;
    let mut text = format!(
        "{}, {} with {} CPUs, Linux {}. Machines: {} MiB, {}. Bivisor at commit {}. {}, in turns, \
         {} s for each row; others kept {:.2} CPUs busy in the worst run.\n\n",
        setup.date,
        setup.cpu,
        setup.cpus,
        setup.kernel,
        setup.memory,
        setup.guest.join(", "),
        setup.commit,
        setup.repeats_in_words(),
        setup.seconds,
        summary.worst_load,
    );
    for peer in &summary.peers {
        // Writing to a string does not fail.
        let _ = writeln!(text, "- {}: {}", peer.label, peer.version);
    }
    for note in &summary.notes {
        let _ = writeln!(text, "- note: {note}");
    }
    text.push('\n');
    text
}

/// What stands in a column.
enum Column {
    /// A peer's figure.
    Figure(usize),
    /// How many times slower Bivisor is than the host.
    Slowdown { native: usize, bivisor: usize },
    /// How many times faster Bivisor is than a QEMU.
    Faster { bivisor: usize, qemu: usize },
}

struct Columns<'a> {
    summary: &'a Summary,
    columns: Vec<Column>,
}

impl<'a> Columns<'a> {
    fn of(summary: &'a Summary) -> Self {
        let (native, bivisor) = (summary.first(PeerKind::Native), summary.first(PeerKind::Bivisor));
        let mut columns = Vec::new();
        columns.extend(native.map(Column::Figure));
        columns.extend(bivisor.map(Column::Figure));
        if let (Some(native), Some(bivisor)) = (native, bivisor) {
            columns.push(Column::Slowdown { native, bivisor });
        }
        for qemu in summary.qemus() {
            columns.push(Column::Figure(qemu));
            columns.extend(bivisor.map(|bivisor| Column::Faster { bivisor, qemu }));
        }
        Self { summary, columns }
    }

    fn header(&self) -> String {
        let names = self.columns.iter().map(|column| match column {
            Column::Figure(peer) => self.summary.peers[*peer].label.as_str(),
            Column::Slowdown { .. } => "slow-down",
            Column::Faster { .. } => "faster",
        });
        let names: Vec<&str> = names.collect();
        format!("| row | unit | {} |\n|---|---|{}\n", names.join(" | "), "--:|".repeat(names.len()))
    }

    fn line(&self, line: &Line) -> String {
        self.row(&line.name, &line.unit, |column| match *column {
            Column::Figure(peer) => line.spreads[peer].map(|spread| figure(spread.median)),
            Column::Slowdown { native, bivisor } => line.ratio(native, bivisor).map(times),
            Column::Faster { bivisor, qemu } => line.ratio(bivisor, qemu).map(times),
        })
    }

    /// A line of geometric means.
    fn means(&self, name: &str, group: Option<&str>) -> String {
        let mean = |this, other| {
            let faster = self.summary.mean(group, this, other)?;
            Some(format!("**{}**", times(Ratio { faster, unsure: false })))
        };
        self.row(name, "", |column| match *column {
            Column::Figure(_) => Some(String::new()),
            Column::Slowdown { native, bivisor } => mean(native, bivisor),
            Column::Faster { bivisor, qemu } => mean(bivisor, qemu),
        })
    }

    fn row(&self, name: &str, unit: &str, cell: impl Fn(&Column) -> Option<String>) -> String {
        let cells: Vec<String> =
            self.columns.iter().map(|column| cell(column).unwrap_or_else(|| "–".into())).collect();
        format!("| {name} | {unit} | {} |\n", cells.join(" | "))
    }
}

/// A figure with three digits that count, whole thousands apart.
pub fn figure(value: f64) -> String {
    if value >= 999.5 {
        let mut text = format!("{value:.0}");
        for place in (1..text.len()).rev().filter(|place| (text.len() - place) % 3 == 0).collect::<Vec<_>>() {
            text.insert(place, ',');
        }
        return text;
    }
    // Rounding may carry into a digit more: 9.996 is 10.0.
    let digits = [99.95, 9.995, 0.9995].iter().take_while(|&&bound| value < bound).count();
    // Of less than a hundredth, as many places as it takes.
    let digits = if value > 0.0 && value < 0.01 { (1.0 - value.log10().floor()) as usize } else { digits };
    format!("{value:.digits$}")
}

/// A ratio; what is not sure is marked.
fn times(ratio: Ratio) -> String {
    format!("{}{}×", if ratio.unsure { "≈ " } else { "" }, figure(ratio.faster))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::summary::tests::example;

    #[test]
    fn figures_have_three_digits() {
        let shown =
            [0.000346, 0.01234, 0.9999, 1.234, 9.996, 56.78, 99.96, 577.2, 999.6, 1234.5, 71020.0, 1234567.0]
                .map(figure);
        let expected = [
            "0.00035",
            "0.012",
            "1.00",
            "1.23",
            "10.0",
            "56.8",
            "100",
            "577",
            "1,000",
            "1,234",
            "71,020",
            "1,234,567",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn the_table_has_every_row_and_the_means() {
        let text = markdown(&example());
        for expected in [
            "2026-01-02, Some CPU with 2 CPUs",
            "| row | unit | native | bivisor | slow-down | QEMU 7.2.22 | faster | QEMU 11.1.2 | faster |\n|---|---|--:|--:|--:|--:|--:|--:|--:|\n",
            "| sieve | /s | 1,100 | 550 | 2.00× | 110 | 5.00× | 275 | ≈ 2.00× |\n",
            "| list | ns | 2.00 | 4.00 | 2.00× | – | – | 32.0 | 8.00× |\n",
            "| **integer** |  |  |  | **2.00×** |  | **5.00×** |  | **2.00×** |\n",
            "| first_line_1cpu | s | – | 2.00 | – | – | – | 4.00 | 2.00× |\n",
            "| **all** |  |  |  | **2.00×** |  | **5.00×** |  | **3.17×** |\n",
            "- QEMU 11.1.2: QEMU 11.1.2 (test)\n- note: native: aes_128 the CPU has no AES instructions\n\n",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
        let columns = |line: &str| line.matches('|').count();
        assert!(text.lines().filter(|line| line.starts_with('|')).all(|line| columns(line) == 10));
    }

    #[test]
    fn peers_that_were_not_measured_have_no_columns() {
        let mut summary = example();
        summary.peers.truncate(2);
        summary.lines.iter_mut().for_each(|line| line.spreads.truncate(2));
        assert!(markdown(&summary).contains("| row | unit | native | bivisor | slow-down |\n"));
    }
}
