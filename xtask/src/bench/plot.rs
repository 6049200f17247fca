//! The plot in SVG: how many times faster Bivisor is than the newest QEMU, row by row.
//!
//! It brings its own colours for light and dark pages and has no background of its own.
use super::{record::PeerKind, summary::Summary, table::figure};
use std::fmt::Write;

/// Sizes in pixels.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 70.0;
const TOP: f64 = 56.0;
const ROW: f64 = 17.0;
const BAR: f64 = 11.0;
const GROUP: f64 = 26.0;

const STYLE: &str = "\
text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1f2328}\
.title{font-size:15px;font-weight:600}.group{font-weight:600}.axis{fill:#59636e;font-size:11px}.value{font-size:11px}\
.grid{stroke:#59636e;stroke-opacity:.25}.one{stroke:#59636e;stroke-opacity:.9}\
.faster{fill:#2f81f7}.slower{fill:#d1782a}.mean{fill-opacity:.45}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{fill:#9198a1}.grid,.one{stroke:#9198a1}}";

/// A logarithmic axis.
struct Axis {
    /// Powers of ten at its ends.
    from: i32,
    to: i32,
}

impl Axis {
    /// One that holds these values and 1, in whole decades.
    fn over(values: &[f64]) -> Self {
        let decades = values.iter().map(|value| value.log10());
        let (least, most) =
            decades.fold((0.0f64, 0.0f64), |(least, most), value| (least.min(value), most.max(value)));
        Self { from: least.floor() as i32, to: (most.ceil() as i32).max(1) }
    }

    fn x(&self, value: f64) -> f64 {
        let share = (value.log10() - f64::from(self.from)) / f64::from(self.to - self.from);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }

    /// Where it is marked, and whether with a number.
    fn marks(&self) -> Vec<(f64, bool)> {
        let mut marks = Vec::new();
        for decade in self.from..self.to {
            marks.extend((1..10).map(|digit| (10f64.powi(decade) * f64::from(digit), digit == 1)));
        }
        marks.push((10f64.powi(self.to), true));
        marks.retain(|&(_, numbered)| numbered || self.to - self.from <= 2);
        marks
    }
}

/// What is drawn from top to bottom.
enum Item<'a> {
    Group(&'a str, Option<f64>),
    Row(&'a str, f64),
}

/// The plot; `None` if there is no QEMU to compare with.
pub fn svg(summary: &Summary) -> Option<String> {
    let bivisor = summary.first(PeerKind::Bivisor)?;
    let qemu = *summary.qemus().last()?;
    let mut items = Vec::new();
    for group in summary.groups() {
        items.push(Item::Group(group, summary.mean(Some(group), bivisor, qemu)));
        for line in summary.lines.iter().filter(|line| line.group == group) {
            items.extend(line.ratio(bivisor, qemu).map(|ratio| Item::Row(&line.name, ratio.faster)));
        }
    }
    let values: Vec<f64> = items
        .iter()
        .filter_map(|item| if let Item::Row(_, value) = item { Some(*value) } else { None })
        .collect();
    if values.is_empty() {
        return None;
    }
    let axis = Axis::over(&values);
    let heights = items.iter().map(|item| if matches!(item, Item::Group(..)) { GROUP } else { ROW });
    let bottom = TOP + heights.sum::<f64>() + 6.0;
    let mut text = head(summary, &summary.peers[qemu].label, bottom);
    draw_axis(&mut text, &axis, bottom);
    let mut y = TOP;
    for item in &items {
        match item {
            Item::Group(name, mean) => {
                y += GROUP;
                let label = mean.map_or(String::new(), |mean| format!(" {}×", figure(mean)));
                if let Some(mean) = mean {
                    bar(&mut text, &axis, y - ROW, *mean, " mean");
                }
                let _ = writeln!(
                    text,
                    r#"<text class="group" x="8" y="{:.1}">{}{label}</text>"#,
                    y - 5.0,
                    escape(name)
                );
            }
            Item::Row(name, value) => {
                y += ROW;
                bar(&mut text, &axis, y - ROW, *value, "");
                let _ = writeln!(
                    text,
                    r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                    LEFT - 8.0,
                    y - 5.0,
                    escape(name)
                );
                let at = axis.x(value.max(1.0)) + 5.0;
                let _ = writeln!(
                    text,
                    r#"<text class="value" x="{at:.1}" y="{:.1}">{}×</text>"#,
                    y - 5.0,
                    figure(*value)
                );
            }
        }
    }
    text.push_str("</svg>\n");
    Some(text)
}

fn head(summary: &Summary, qemu: &str, bottom: f64) -> String {
    let title = format!("Bivisor: times faster than {} (TCG)", escape(qemu));
    let height = bottom + 24.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         role=\"img\" aria-label=\"{title}\">\n<style>{STYLE}</style>\n\
         <text class=\"title\" x=\"8\" y=\"20\">{title}</text>\n\
         <text class=\"axis\" x=\"8\" y=\"38\">{}, logarithmic; pale: geometric means. {}, {}</text>\n",
        summary.setup.repeats_in_words(),
        escape(&summary.setup.cpu),
        escape(&summary.setup.date),
    )
}

fn draw_axis(text: &mut String, axis: &Axis, bottom: f64) {
    for (value, numbered) in axis.marks() {
        let x = axis.x(value);
        let class = if value == 1.0 { "one" } else { "grid" };
        let _ =
            writeln!(text, r#"<line class="{class}" x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{bottom:.1}"/>"#);
        if numbered {
            let y = bottom + 15.0;
            let number = if value >= 1.0 { format!("{value:.0}") } else { format!("{value}") };
            let _ = writeln!(
                text,
                r#"<text class="axis" x="{x:.1}" y="{y:.1}" text-anchor="middle">{number}×</text>"#
            );
        }
    }
}

/// A bar from 1 to a value.
fn bar(text: &mut String, axis: &Axis, top: f64, value: f64, class: &str) {
    let (from, to) = (axis.x(value.min(1.0)), axis.x(value.max(1.0)));
    let side = if value < 1.0 { "slower" } else { "faster" };
    let y = top + (ROW - BAR) / 2.0;
    let _ = writeln!(
        text,
        r#"<rect class="{side}{class}" x="{from:.1}" y="{y:.1}" width="{:.1}" height="{BAR}" rx="1.5"/>"#,
        (to - from).max(0.5)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::summary::tests::example;

    #[test]
    fn the_axis_holds_all_values_and_one() {
        let axis = Axis::over(&[3.0, 250.0]);
        assert_eq!((axis.from, axis.to), (0, 3));
        let axis = Axis::over(&[0.04]);
        assert_eq!((axis.from, axis.to), (-2, 1));
        assert!((axis.x(0.01) - LEFT).abs() < 1e-9 && (axis.x(10.0) - (WIDTH - RIGHT)).abs() < 1e-9);
        assert_eq!(axis.marks().len(), 4);
        assert_eq!(Axis::over(&[1.0, 2.0]).marks().len(), 10);
    }

    #[test]
    fn every_row_with_both_figures_has_a_bar_of_its_length() {
        let svg = svg(&example()).unwrap();
        // Four rows and the means of three groups.
        assert_eq!(svg.matches("<rect").count(), 7);
        let axis = Axis::over(&[2.0, 2.0, 8.0, 2.0]);
        let length = format!("width=\"{:.1}\"", axis.x(8.0) - axis.x(1.0));
        assert!(svg.contains(&length), "{length} in\n{svg}");
        assert!(svg.contains("Bivisor: times faster than QEMU 11.1.2 (TCG)"));
        assert!(svg.contains(">sieve</text>") && svg.contains(">8.00×</text>"));
    }

    #[test]
    fn names_cannot_break_out_of_the_text() {
        let mut summary = example();
        summary.lines[1].name = "<a & \"b\">".into();
        assert!(svg(&summary).unwrap().contains("&lt;a &amp; &quot;b&quot;&gt;"));
    }

    #[test]
    fn without_a_qemu_there_is_no_plot() {
        let mut summary = example();
        summary.peers.truncate(2);
        assert!(svg(&summary).is_none());
    }
}
