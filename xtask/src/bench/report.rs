//! The files that come out: table, plot, and the spread of every row.
use super::{plot, summary::Summary, table};
use anyhow::{Context, Result};
use std::{fmt::Write, fs, path::Path};

/// Between these lines of a page in `docs/` stands the table.
const BEGIN: &str = "<!-- cargo xtask bench --bless writes from here -->\n";
const END: &str = "<!-- to here -->\n";

/// Writes `table.md`, `plot.svg` and `spread.csv` into a folder.
pub fn write(summary: &Summary, out: &Path) -> Result<()> {
    fs::write(out.join("table.md"), table::markdown(summary))?;
    fs::write(out.join("spread.csv"), spread(summary))?;
    if let Some(svg) = plot::svg(summary) {
        fs::write(out.join("plot.svg"), svg)?;
    }
    println!("    table.md, plot.svg and spread.csv are in {}", out.display());
    Ok(())
}

/// Puts table, plot and raw results into the documentation.
pub fn bless(summary: &Summary, raw: &Path, docs: &Path, name: &str) -> Result<()> {
    let page = docs.join(format!("{name}.md"));
    let text = fs::read_to_string(&page).with_context(|| format!("reading {}", page.display()))?;
    let mut section = String::new();
    if let Some(svg) = plot::svg(summary) {
        fs::write(docs.join(format!("{name}.svg")), svg)?;
        let _ = writeln!(section, "\n![Times faster than the newest QEMU, row by row]({name}.svg)");
    }
    section.push('\n');
    section.push_str(&table::markdown(summary));
    section.push('\n');
    fs::write(&page, replace_section(&text, &section).with_context(|| format!("in {}", page.display()))?)?;
    fs::copy(raw, docs.join(format!("{name}.jsonl"))).context("copying the raw results")?;
    Ok(())
}

fn replace_section(page: &str, section: &str) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).context("there is no line at which to begin")?;
    let (_, after) = rest.split_once(END).context("there is no line at which to end")?;
    Ok(format!("{before}{BEGIN}{section}{END}{after}"))
}

/// Median, least and most of every row and peer, as comma-separated values.
fn spread(summary: &Summary) -> String {
    let mut text = String::from("group,row,unit,peer,median,least,most\n");
    for line in &summary.lines {
        for (peer, spread) in summary.peers.iter().zip(&line.spreads) {
            if let Some(spread) = spread {
                let (group, name, unit) = (&line.group, &line.name, &line.unit);
                // Writing to a string does not fail.
                let _ = writeln!(
                    text,
                    "{group},{name},{unit},{},{},{},{}",
                    peer.label, spread.median, spread.least, spread.most
                );
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::summary::tests::example;

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let page = format!("before\n{BEGIN}old\n{END}after\n");
        let new = replace_section(&page, "new\n").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}new\n{END}after\n"));
        assert_eq!(replace_section(&new, "old\n").unwrap(), page);
        assert!(replace_section("no marks", "").is_err());
    }

    #[test]
    fn blessing_fills_the_page_and_keeps_the_raw_results() {
        let folder = tempfile::tempdir().unwrap();
        let raw = folder.path().join("raw");
        fs::write(&raw, "{}").unwrap();
        fs::write(folder.path().join("performance.md"), format!("{BEGIN}{END}")).unwrap();
        bless(&example(), &raw, folder.path(), "performance").unwrap();
        let page = fs::read_to_string(folder.path().join("performance.md")).unwrap();
        assert!(page.contains("](performance.svg)") && page.contains("| sieve |") && page.ends_with(END));
        assert!(
            folder.path().join("performance.svg").is_file()
                && folder.path().join("performance.jsonl").is_file()
        );
    }

    #[test]
    fn spreads_have_a_line_for_each_peer() {
        let text = spread(&example());
        assert!(text.contains("integer,sieve,/s,bivisor,550,540,560\n"), "{text}");
        assert!(text.contains("memory,list,ns,QEMU 11.1.2,32,32,32\n"));
    }
}
