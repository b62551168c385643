//! The loss curve of a run, drawn from its log.

use crate::chart::{BLUE, DrawError, GREY, ORANGE, font, key, short};
use crate::checkpoint::write::write_text;
use crate::{Error, Result};
use plotters::prelude::*;
use serde::Deserialize;
use std::ops::Range;
use std::path::Path;

/// Pixels.
const SIZE: (u32, u32) = (960, 540);
/// Most points of a line: about one to a pixel.
const MAX_POINTS: usize = 800;
/// Losses beyond this are no measurements of a model, and would flatten the curve.
const MAX_LOSS: f64 = 1e4;
/// Part of the steps that a point of the smoothed loss is the mean of.
const SMOOTHED: usize = 50;

const LOSS: RGBColor = BLUE;
const VALIDATION: RGBColor = ORANGE;

/// A line of the log; a validation's have only its own keys.
#[derive(Debug, Deserialize)]
struct Line {
    step: u64,
    loss: Option<f64>,
    tokens: Option<u64>,
    validation_loss: Option<f64>,
    validation_bits_per_byte: Option<f64>,
}

/// What is drawn: x is tokens, or steps where the log has no tokens.
#[derive(Debug, Default, PartialEq)]
struct Curve {
    by_tokens: bool,
    loss: Vec<(f64, f64)>,
    validation: Vec<(f64, f64)>,
    /// Bits per byte of a validation of one nat a token: a number of the validation text.
    bits_per_nat: Option<f64>,
}

/// Draws the log of a run (`metrics_jsonl`, as [`super::MetricsLog`] writes it) as an SVG file, replacing what was
/// there: the training loss of each step and its mean over 2 % of the steps around it, and the validations, against the
/// tokens trained on, or steps where the log has no tokens. Nats a token on the left; on the right the same lines in
/// bits per byte, if validations have them.
///
/// Lines that are no such objects are left out, as the last one of a killed run; so are steps that were skipped. The
/// same log gives the same file.
///
/// # Errors
/// [`Error::Io`] if the log cannot be read or the file not be written.
pub fn write_curve(metrics_jsonl: &Path, svg: &Path) -> Result<()> {
    let log = std::fs::read(metrics_jsonl).map_err(|e| Error::io(metrics_jsonl, e))?;
    let curve = Curve::read(&log);
    let mut text = String::new();
    draw(&curve, &mut text).map_err(|e| Error::file(svg, format!("the curve could not be drawn: {e}")))?;
    write_text(svg, &text)
}

impl Curve {
    fn read(log: &[u8]) -> Self {
        let lines: Vec<Line> = log.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice(l).ok()).collect();
        let by_tokens = lines.iter().all(|l| l.loss.is_none() || l.tokens.is_some());
        let mut curve = Self { by_tokens, ..Self::default() };
        let usable = |loss: &f64| (0.0..MAX_LOSS).contains(loss);
        let mut x = 0.0;
        for line in lines {
            match (by_tokens, line.tokens) {
                (true, Some(tokens)) => x = tokens as f64,
                // A validation comes after the step whose tokens it has seen.
                (true, None) => {}
                (false, _) => x = line.step as f64,
            }
            curve.loss.extend(line.loss.filter(usable).map(|y| (x, y)));
            if let Some(loss) = line.validation_loss.filter(usable) {
                curve.validation.push((x, loss));
                let bits = line.validation_bits_per_byte.map(|bits| bits / loss);
                curve.bits_per_nat = bits.filter(|r| r.is_normal() && *r > 0.0).or(curve.bits_per_nat);
            }
        }
        curve
    }

    /// The mean of the steps around each one. The window shrinks towards the begin, where the loss falls fast.
    fn smoothed(&self) -> Vec<(f64, f64)> {
        let n = self.loss.len();
        let mut sums = vec![0.0];
        sums.extend(self.loss.iter().scan(0.0, |sum, (_, y)| {
            *sum += y;
            Some(*sum)
        }));
        let mean = |i: usize| {
            let half = (n / (2 * SMOOTHED)).min(i);
            let (low, high) = (i - half, (i + half + 1).min(n));
            (sums[high] - sums[low]) / (high - low) as f64
        };
        self.loss.iter().enumerate().map(|(i, (x, _))| (*x, mean(i))).collect()
    }

    /// What the axes show: the smoothed loss and the validations, with room around them. The first 2 % of a long run may
    /// leave it at the top: they fall by more than all that follows.
    fn ranges(&self, smoothed: &[(f64, f64)]) -> (Range<f64>, Range<f64>) {
        let points = || smoothed.iter().chain(&self.validation);
        let last = points().map(|p| p.0).fold(0.0, f64::max);
        let later = points().filter(|p| p.0 * SMOOTHED as f64 >= last);
        let (low, high) = later.fold((f64::INFINITY, 0.0), |(l, h): (f64, f64), p| (l.min(p.1), h.max(p.1)));
        if !low.is_finite() {
            return (0.0..1.0, 0.0..1.0);
        }
        let room = ((high - low) * 0.05).max(high * 0.01).max(1e-6);
        (0.0..last.max(1.0) * 1.01, (low - room).max(0.0)..high + room)
    }
}

/// At most [`MAX_POINTS`] of the points; of the others the lowest and the highest of a stretch stand for all of it.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MAX_POINTS / 2);
    let mut out = Vec::with_capacity(MAX_POINTS);
    for part in points.chunks(stretch) {
        let by_loss = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) = (part.iter().min_by(by_loss), part.iter().max_by(by_loss)) else { continue };
        out.extend(if low.0 < high.0 { [*low, *high] } else { [*high, *low] });
    }
    out
}

fn draw(curve: &Curve, svg: &mut String) -> std::result::Result<(), DrawError> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let smoothed = curve.smoothed();
    let (x, y) = curve.ranges(&smoothed);
    let ratio = curve.bits_per_nat;
    let bits = y.start * ratio.unwrap_or(1.0)..y.end * ratio.unwrap_or(1.0);
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .right_y_label_area_size(if ratio.is_some() { 60 } else { 0 })
        .build_cartesian_2d(x.clone(), y.clone())?
        .set_secondary_coord(x, bits);
    chart
        .configure_mesh()
        .x_desc(if curve.by_tokens { "tokens" } else { "steps" })
        .y_desc("nats per token")
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .max_light_lines(0)
        .bold_line_style(GREY.mix(0.2))
        .axis_style(GREY)
        .label_style(font(14).color(&GREY))
        .axis_desc_style(font(15).color(&GREY))
        .draw()?;
    if ratio.is_some() {
        chart
            .configure_secondary_axes()
            .y_desc("bits per byte")
            .y_label_formatter(&short)
            .axis_style(GREY)
            .label_style(font(14).color(&GREY))
            .axis_desc_style(font(15).color(&GREY))
            .draw()?;
    }
    // Single steps that leave the range are drawn at its edge.
    let single = thin(&curve.loss).into_iter().map(|(x, loss)| (x, loss.clamp(y.start, y.end)));
    chart.draw_series(LineSeries::new(single, LOSS.mix(0.25)))?;
    let shown = |points: &[(f64, f64)]| points.iter().copied().filter(|p| p.1 <= y.end).collect::<Vec<_>>();
    let validation = shown(&curve.validation);
    if !smoothed.is_empty() {
        let line = LOSS.stroke_width(2);
        chart
            .draw_series(LineSeries::new(thin(&shown(&smoothed)), line))?
            .label("training loss, smoothed")
            .legend(key(line));
        // A line of one point cannot be seen.
        if let [only] = smoothed[..] {
            chart.draw_series([Circle::new(only, 3, LOSS.filled())])?;
        }
    }
    if let Some(last) = curve.validation.last() {
        let bits = ratio.map_or(String::new(), |r| format!(", {:.3} bits per byte at last", last.1 * r));
        let line = VALIDATION.stroke_width(2);
        chart
            .draw_series(LineSeries::new(thin(&validation), line))?
            .label(format!("validation loss{bits}"))
            .legend(key(line));
        if validation.len() <= MAX_POINTS / 10 {
            chart.draw_series(validation.iter().map(|p| Circle::new(*p, 3, VALIDATION.filled())))?;
        }
    }
    if curve.loss.is_empty() && curve.validation.is_empty() {
        root.draw(&Text::new("no steps yet", (100, 40), font(15).color(&GREY)))?;
    } else {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(GREY.mix(0.4))
            .label_font(font(14).color(&GREY))
            .margin(8)
            .draw()?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file drawn from these lines.
    fn svg(log: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let (metrics, svg) = (dir.path().join("metrics.jsonl"), dir.path().join("curve.svg"));
        std::fs::write(&metrics, log).unwrap();
        write_curve(&metrics, &svg).unwrap();
        let drawn = std::fs::read_to_string(&svg).unwrap();
        write_curve(&metrics, &svg).unwrap();
        assert_eq!(std::fs::read_to_string(&svg).unwrap(), drawn, "not the same file again");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "something was left behind");
        assert!(drawn.starts_with("<svg ") && drawn.trim_end().ends_with("</svg>"), "{drawn}");
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
        drawn
    }

    const STEPS: &str = r#"{"step":1,"loss":6.0,"lr":0.1,"gradient_norm":5.0,"tokens":4096,"tokens_per_second":974.0}
{"step":2,"skipped":"NaN"}
{"step":3,"loss":5.0,"lr":0.1,"gradient_norm":5.0,"tokens":8192,"tokens_per_second":974.0}
{"step":3,"validation_loss":4.0,"validation_bits_per_byte":2.0}
"#;

    #[test]
    fn a_log_without_steps_is_an_empty_chart() {
        assert!(svg(b"").contains("no steps yet"));
        assert!(svg(b"{\"step\":1,\"skipped\":\"inf\"}\n").contains("no steps yet"));
        let gone = Path::new("/nonexistent/metrics.jsonl");
        assert!(matches!(write_curve(gone, Path::new("x.svg")), Err(Error::Io { path, .. }) if path == gone));
    }

    #[test]
    fn one_step_is_seen() {
        let one = svg(STEPS.lines().next().unwrap().as_bytes());
        assert!(one.contains("<circle ") && one.contains("training loss") && !one.contains("validation"), "{one}");
        assert!(!one.contains("bits per byte") && one.contains("nats per token"));
    }

    #[test]
    fn validations_stand_at_the_tokens_of_their_step_and_have_a_second_axis() {
        let curve = Curve::read(STEPS.as_bytes());
        assert_eq!(curve.loss, [(4096.0, 6.0), (8192.0, 5.0)]);
        assert_eq!((curve.validation.as_slice(), curve.bits_per_nat), ([(8192.0, 4.0)].as_slice(), Some(0.5)));
        let drawn = svg(STEPS.as_bytes());
        for part in ["tokens", "nats per token", "bits per byte", "2.000 bits per byte at last", "validation loss"] {
            assert!(drawn.contains(part), "no {part:?} in {drawn}");
        }
        // A fine-tuning's validations have no bytes.
        let plain =
            svg(STEPS.replace("\"validation_bits_per_byte\":2.0", "\"validation_bits_per_byte\":null").as_bytes());
        assert!(plain.contains("validation loss") && !plain.contains("bits per byte"));
    }

    #[test]
    fn torn_and_senseless_lines_are_left_out() {
        let torn = format!("{STEPS}{{\"step\":4,\"loss\":3.0,\"tok");
        assert_eq!(Curve::read(torn.as_bytes()), Curve::read(STEPS.as_bytes()));
        let odd = b"\xff\xfe\n[]\n{\"step\":1,\"loss\":1e300,\"tokens\":1}\n{\"step\":2,\"loss\":-1,\"tokens\":2}\n\
                    {\"step\":3,\"validation_loss\":0.0,\"validation_bits_per_byte\":0.0}\n";
        let curve = Curve::read(odd);
        assert_eq!((curve.loss.len(), curve.validation.len(), curve.bits_per_nat), (0, 1, None));
        svg(odd);
    }

    #[test]
    fn a_log_without_tokens_counts_steps() {
        let curve =
            Curve::read(b"{\"step\":10,\"loss\":2}\n{\"step\":20,\"loss\":1}\n{\"step\":20,\"validation_loss\":3}\n");
        assert_eq!((curve.by_tokens, curve.loss[1].0, curve.validation[0].0), (false, 20.0, 20.0));
    }

    #[test]
    fn long_runs_are_thinned_and_keep_their_extremes() {
        let loss = |i: usize| 2.0 + 6.0 / (1.0 + i as f64 / 500.0) + (i * 7919 % 100) as f64 / 200.0;
        let line = |i: usize| format!("{{\"step\":{i},\"loss\":{},\"tokens\":{}}}\n", loss(i), i * 4096);
        let log: String = (1..=100_000).map(line).collect();
        let curve = Curve::read(log.as_bytes());
        let thinned = thin(&curve.loss);
        assert!((MAX_POINTS / 2..=MAX_POINTS).contains(&thinned.len()), "{}", thinned.len());
        assert!(thinned.windows(2).all(|w| w[0].0 <= w[1].0));
        let extremes = |points: &[(f64, f64)]| {
            points.iter().fold((f64::INFINITY, 0.0), |(l, h): (f64, f64), p| (l.min(p.1), h.max(p.1)))
        };
        assert_eq!(extremes(&thinned), extremes(&curve.loss));
        // The first steps are above what is shown, the others within.
        let (_, y) = curve.ranges(&curve.smoothed());
        assert!(y.start < 2.5 && (3.0..5.0).contains(&y.end), "{y:?}");
        // The mean of 2000 steps hardly moves where the steps' losses do.
        let smoothed = curve.smoothed();
        assert!(smoothed[50_000..].windows(2).all(|w| (w[0].1 - w[1].1).abs() < 1e-3));
        assert!((smoothed[0].1 - loss(1)).abs() < 1e-9);
        assert!(svg(log.as_bytes()).len() < 100_000);
    }
}
