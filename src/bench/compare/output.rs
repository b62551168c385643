//! A comparison as a table for a terminal, as markdown, as CSV and as a chart.

use super::{Comparison, Entry};
use crate::chart::{self, BLUE, Bars, ORANGE};
use crate::checkpoint::write::write_text;
use crate::{Error, Result};
use std::path::Path;

const COLUMNS: [&str; 14] = [
    "device",
    "kernel",
    "threads",
    "load s",
    "prefill tokens/s",
    "decode tokens/s",
    "first token s",
    "GB/s",
    "of GB/s",
    "share %",
    "resident MB",
    "GPU MB",
    "J/token",
    "same tokens",
];
/// Columns of text, to the left in tables.
const TEXT: [usize; 3] = [0, 1, 13];

/// An entry's cells, in the order of the columns; without a number where nothing was measured.
fn cells(entry: &Entry, is_reference: bool) -> [String; 14] {
    let none = || String::from("-");
    let Some(r) = &entry.report else {
        let mut cells = std::array::from_fn(|_| none());
        cells[0] = entry.flags.clone();
        cells[13] = format!("failed: {}", entry.failed.as_deref().unwrap_or_default());
        return cells;
    };
    let megabytes = |bytes: f64| format!("{:.0}", bytes / 1e6);
    [
        r.device.clone(),
        r.kernel.clone(),
        r.threads.map_or_else(none, |n| n.to_string()),
        format!("{:.2}", r.load_seconds),
        format!("{:.1}", r.prefill_tps),
        format!("{:.2}", r.decode_tps),
        entry.first_token_seconds.map_or_else(none, |s| format!("{s:.3}")),
        format!("{:.1}", r.decode_gbps),
        format!("{:.1}", r.read_gbps.or(r.copy_gbps).unwrap_or_default()),
        format!("{:.0}", 100.0 * r.decode_share),
        r.resident_bytes.map_or_else(none, |b| megabytes(b as f64)),
        r.device_bytes.map_or_else(none, |b| megabytes(b as f64)),
        r.energy.map_or_else(none, |e| format!("{:.3}", e.decode_joules_per_token)),
        match (is_reference, entry.differs_at) {
            (true, _) => "reference".into(),
            (false, None) => "yes".into(),
            (false, Some(at)) => format!("to token {at}"),
        },
    ]
}

/// A cell of CSV (RFC 4180).
fn csv(cell: &str) -> String {
    match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.to_owned(),
    }
}

impl Comparison {
    fn rows(&self) -> Vec<[String; 14]> {
        let reference = self.entries.iter().position(|e| e.report.is_some());
        self.entries.iter().enumerate().map(|(i, e)| cells(e, Some(i) == reference)).collect()
    }

    /// The machine and what was run on it, in a line.
    pub fn heading(&self) -> String {
        let cpu = self.cpu.as_deref().unwrap_or("unknown CPU");
        let memory = self.memory_bytes.map_or(String::new(), |b| format!(", {:.1} GB of memory", b as f64 / 1e9));
        format!(
            "{} on {cpu}, {} core{}{memory}: {} tokens prefilled, {} decoded, {} repetition{}",
            self.model,
            self.cores,
            if self.cores == 1 { "" } else { "s" },
            self.prompt_tokens,
            self.decode_tokens,
            self.reps,
            if self.reps == 1 { "" } else { "s" },
        )
    }

    /// What follows the table: tokens, energy, the recommendation; a line each.
    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let ran = self.entries.iter().filter(|e| e.report.is_some());
        let differ: Vec<_> = ran.clone().filter_map(|e| Some((e, e.differs_at?))).collect();
        let reference = ran.clone().map(|e| e.flags.as_str()).next().unwrap_or_default();
        if differ.is_empty() {
            let count = ran.count();
            let tokens = self.decode_tokens;
            remarks.push(format!("tokens: all {count} chose the same {tokens} greedy tokens"));
        }
        for (entry, at) in differ {
            remarks.push(format!("tokens: {} differs from {reference} at token {}", entry.flags, at + 1));
        }
        remarks.extend(self.energy_unreadable.iter().map(|reason| format!("energy: not readable: {reason}")));
        remarks.push(format!("recommended: {}", self.recommendation));
        remarks
    }

    /// For a terminal.
    pub fn describe(&self) -> String {
        let rows = self.rows();
        let widths: Vec<usize> = (0..COLUMNS.len())
            .map(|c| rows.iter().map(|r| r[c].chars().count()).chain([COLUMNS[c].len()]).max().unwrap_or_default())
            .collect();
        let line = |cells: &[&str]| {
            let cell = |(c, text): (usize, &&str)| match TEXT.contains(&c) {
                true => format!("{text:width$}", width = widths[c]),
                false => format!("{text:>width$}", width = widths[c]),
            };
            let line: Vec<String> = cells.iter().enumerate().map(cell).collect();
            line.join("  ").trim_end().to_owned() + "\n"
        };
        let mut text = self.heading() + "\n\n" + &line(&COLUMNS);
        for row in &rows {
            text += &line(&row.each_ref().map(String::as_str));
        }
        text + "\n" + &self.remarks().join("\n") + "\n"
    }

    /// As markdown, with a heading.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = (0..COLUMNS.len()).map(|c| if TEXT.contains(&c) { "---" } else { "---:" }.to_owned());
        let mut text = format!("{}\n\n", self.heading());
        text += &line(&COLUMNS.map(str::to_owned));
        text += &line(&rule.collect::<Vec<_>>());
        for row in self.rows() {
            text += &line(&row.map(|cell| cell.replace('|', "\\|")));
        }
        let remarks: String = self.remarks().iter().map(|r| format!("- {r}\n")).collect();
        text + "\n" + &remarks
    }

    /// As CSV with a line of names.
    pub fn csv(&self) -> String {
        let line = |cells: &[String]| cells.iter().map(|c| csv(c)).collect::<Vec<_>>().join(",") + "\n";
        let mut text = line(&COLUMNS.map(str::to_owned));
        for row in self.rows() {
            text += &line(&row.map(|cell| if cell == "-" { String::new() } else { cell }));
        }
        text
    }

    /// Draws decode and prefill speed as an SVG file, replacing what was there.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write_chart(&self, svg: &Path) -> Result<()> {
        let ran = || self.entries.iter().filter_map(|e| Some((e, e.report.as_ref()?)));
        let bars = |title: &str, colour, value: &dyn Fn(&crate::bench::Report) -> f64| Bars {
            title: title.into(),
            colour,
            bars: ran().map(|(e, r)| (e.flags.clone(), value(r))).collect(),
        };
        let title = format!("{}; {}", self.model, self.cpu.as_deref().unwrap_or("unknown CPU"));
        let blocks =
            [bars("decode, tokens/s", BLUE, &|r| r.decode_tps), bars("prefill, tokens/s", ORANGE, &|r| r.prefill_tps)];
        let text = chart::bars(&title, &blocks);
        let text = text.map_err(|e| Error::file(svg, format!("the chart could not be drawn: {e}")))?;
        write_text(svg, &text)
    }

    /// Appends the comparison to a file of records as markdown, under a heading with the date; `command` is how it was made.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read or written.
    pub fn append_to(&self, file: &Path, date: &str, command: &str) -> Result<()> {
        let mut text = match std::fs::read_to_string(file) {
            Ok(text) => text.trim_end().to_owned() + "\n\n",
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => "# Devices compared\n\n".to_owned(),
            Err(e) => return Err(Error::io(file, e)),
        };
        text += &format!("## {date}\n\n`{command}`\n\n{}", self.markdown());
        write_text(file, &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::BenchModel;
    use crate::bench::compare::{Contender, Workload, compare};
    use crate::checkpoint::ModelFiles;
    use crate::{DeviceChoice, LoadOptions};
    use candle_core::Device;

    /// Two that run and one that does not.
    fn comparison() -> Comparison {
        let model = BenchModel::files("builtin", ModelFiles::Builtin).unwrap();
        let cpu = |threads| Contender { device: DeviceChoice::Cpu, kernel: None, threads: Some(threads) };
        let contenders = [cpu(1), cpu(0), cpu(2)];
        let mut told = 0;
        let options = LoadOptions::new(&Device::Cpu);
        let work = Workload { prompt: &[3, 1, 4], decode_tokens: 2, reps: 1 };
        let compared = compare(&model, &options, &contenders, work, |_| told += 1).unwrap();
        assert_eq!(told, 3);
        compared
    }

    #[test]
    fn what_ran_and_what_failed_is_in_every_form() {
        let mut compared = comparison();
        assert!(compared.same_tokens && compared.entries[0].tokens.len() == 2, "{compared:?}");
        let text = compared.describe();
        for part in
            ["decode tokens/s", "reference", "yes", "failed: --threads: 0", "all 2 chose the same 2", "recommended: "]
        {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
        compared.entries[2].differs_at = Some(1);
        compared.entries[2].flags = "a, \"b\" | c".into();
        let (markdown, csv) = (compared.markdown(), compared.csv());
        assert!(
            markdown.contains("| to token 1 |")
                && markdown.contains("differs from --device cpu --threads 1 at token 2")
        );
        let lines: Vec<&str> = csv.lines().collect();
        assert!(lines.len() == 4 && lines[0].starts_with("device,kernel,threads,"), "{csv}");
        assert!(lines.iter().all(|l| l.split(',').count() == COLUMNS.len()), "{csv}");
        assert_eq!(super::csv("a, \"b\""), "\"a, \"\"b\"\"\"");
    }

    #[test]
    fn records_grow_and_charts_are_replaced() {
        let (compared, dir) = (comparison(), tempfile::tempdir().unwrap());
        let (record, svg) = (dir.path().join("r.md"), dir.path().join("c.svg"));
        for date in ["2026-01-01", "2026-01-02"] {
            compared.append_to(&record, date, "bitnet compare").unwrap();
            compared.write_chart(&svg).unwrap();
        }
        let text = std::fs::read_to_string(&record).unwrap();
        assert!(text.starts_with("# Devices compared\n\n## 2026-01-01\n\n`bitnet compare`\n"), "{text}");
        assert!(text.contains("\n\n## 2026-01-02\n") && text.matches("recommended: ").count() == 2, "{text}");
        let svg = std::fs::read_to_string(&svg).unwrap();
        assert!(svg.contains("--device cpu --threads 2") && svg.contains("prefill, tokens/s"), "{svg}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(compared.append_to(dir.path(), "d", "c").is_err());
    }
}
