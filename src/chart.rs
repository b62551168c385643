//! Charts of lines and of bars, drawn as SVG without a font: the text is the viewer's.

use plotters::prelude::*;
use std::ops::Range;

/// A drawing failed.
pub(crate) type DrawError = Box<dyn std::error::Error>;

pub(crate) const BLUE: RGBColor = RGBColor(31, 99, 181);
pub(crate) const ORANGE: RGBColor = RGBColor(208, 92, 18);
pub(crate) const GREY: RGBColor = RGBColor(96, 96, 96);
/// What a machine gives at most, beside what is measured.
pub(crate) const LIMIT: RGBColor = RGBColor(150, 150, 150);

/// Pixels of a panel.
const PANEL: (u32, u32) = (440, 320);

/// A line, with a dot at each of its points.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub label: String,
    pub colour: RGBColor,
    pub points: Vec<(f64, f64)>,
}

/// Lines over one axis of numbers that double, such as threads or positions; y begins at zero.
#[derive(Debug, Clone)]
pub(crate) struct Panel {
    pub title: String,
    pub x: String,
    pub lines: Vec<Line>,
}

/// The text of labels.
pub(crate) fn font(size: i32) -> FontDesc<'static> {
    ("sans-serif", size).into_font()
}

/// The key of a line.
pub(crate) fn key(style: ShapeStyle) -> impl Fn((i32, i32)) -> PathElement<(i32, i32)> {
    move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style)
}

/// 1500000 as 1.5M.
pub(crate) fn short(x: &f64) -> String {
    let (value, unit) = match x.abs() {
        a if a >= 1e9 => (x / 1e9, "G"),
        a if a >= 1e6 => (x / 1e6, "M"),
        a if a >= 1e3 => (x / 1e3, "k"),
        _ => (*x, ""),
    };
    let text = format!("{value:.2}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A chart with a title and rows of panels, as SVG.
pub(crate) fn panels(title: &str, rows: &[Vec<Panel>]) -> Result<String, DrawError> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default().max(1);
    let size = (PANEL.0 * columns as u32, PANEL.1 * rows.len().max(1) as u32 + 40);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(title.to_owned(), (16, 14), font(17).color(&GREY)))?;
        let (_, body) = root.split_vertically(40);
        let areas = body.split_evenly((rows.len().max(1), columns));
        for (row, areas) in rows.iter().zip(areas.chunks(columns)) {
            for (panel, area) in row.iter().zip(areas) {
                draw(panel, area)?;
            }
        }
        root.present()?;
    }
    Ok(svg)
}

/// What the axes show: x in powers of two, y from zero.
fn ranges(panel: &Panel) -> (Range<f64>, Range<f64>) {
    let points = || panel.lines.iter().flat_map(|l| &l.points);
    let (low, high) = points().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), p| (l.min(p.0), h.max(p.0)));
    if !low.is_finite() || low <= 0.0 {
        return (0.0..1.0, 0.0..1.0);
    }
    let top = points().map(|p| p.1).fold(0.0, f64::max);
    (low.log2() - 0.2..high.log2() + 0.2, 0.0..if top > 0.0 { top * 1.15 } else { 1.0 })
}

fn draw(panel: &Panel, area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Result<(), DrawError> {
    let (x, y) = ranges(panel);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(panel.title.clone(), font(15).color(&GREY))
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d(x, y)?;
    // Between two powers of two there is nothing to name.
    let power = |x: &f64| match (x - x.round()).abs() < 1e-6 {
        true => short(&x.round().exp2()),
        false => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc(panel.x.clone())
        .x_label_formatter(&power)
        .y_label_formatter(&short)
        .max_light_lines(0)
        .bold_line_style(GREY.mix(0.2))
        .axis_style(GREY)
        .label_style(font(13).color(&GREY))
        .axis_desc_style(font(13).color(&GREY))
        .draw()?;
    for line in &panel.lines {
        let points: Vec<_> = line.points.iter().filter(|p| p.1.is_finite()).map(|(x, y)| (x.log2(), *y)).collect();
        let style = line.colour.stroke_width(2);
        chart.draw_series(LineSeries::new(points.iter().copied(), style))?.label(line.label.clone()).legend(key(style));
        chart.draw_series(points.into_iter().map(|p| Circle::new(p, 3, line.colour.filled())))?;
    }
    if panel.lines.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .border_style(GREY.mix(0.4))
            .label_font(font(13).color(&GREY))
            .draw()?;
    }
    Ok(())
}

/// Bars of one quantity, each with its name and its value.
#[derive(Debug, Clone)]
pub(crate) struct Bars {
    pub title: String,
    pub colour: RGBColor,
    pub bars: Vec<(String, f64)>,
}

/// Blocks of bars below each other, as SVG.
pub(crate) fn bars(title: &str, blocks: &[Bars]) -> Result<String, DrawError> {
    const LINE: i32 = 26;
    const LEFT: i32 = 330;
    const WIDTH: i32 = 480;
    const RIGHT: i32 = 110;
    let height: i32 = blocks.iter().map(|b| (b.bars.len() as i32 + 2) * LINE).sum();
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, ((LEFT + WIDTH + RIGHT) as u32, (height + 48) as u32));
        let root = root.into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(title.to_owned(), (16, 14), font(17).color(&GREY)))?;
        let mut y = 48;
        for block in blocks {
            root.draw(&Text::new(block.title.clone(), (16, y), font(15).color(&GREY)))?;
            let most = block.bars.iter().map(|(_, v)| *v).filter(|v| v.is_finite()).fold(0.0, f64::max);
            for (name, value) in &block.bars {
                y += LINE;
                // A senseless number has no bar.
                let part = if most > 0.0 && value.is_finite() { (value / most).clamp(0.0, 1.0) } else { 0.0 };
                let end = LEFT + (part * f64::from(WIDTH)) as i32;
                root.draw(&Text::new(name.clone(), (16, y + 4), font(13).color(&GREY)))?;
                root.draw(&Rectangle::new([(LEFT, y), (end, y + LINE - 8)], block.colour.filled()))?;
                root.draw(&Text::new(short(value), (end + 8, y + 4), font(13).color(&GREY)))?;
            }
            y += 2 * LINE;
        }
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_on_the_axes_are_short() {
        for (x, text) in [(0.0, "0"), (0.25, "0.25"), (10.0, "10"), (1500.0, "1.5k"), (2e6, "2M"), (1.25e9, "1.25G")] {
            assert_eq!(short(&x), text);
        }
    }

    #[test]
    fn panels_show_their_lines_and_senseless_numbers_do_not_break_them() {
        let line = |points: &[(f64, f64)]| Line { label: "measured".into(), colour: BLUE, points: points.to_vec() };
        let panel = |lines| Panel { title: "decode".into(), x: "threads".into(), lines };
        let full = panel(vec![line(&[(1.0, 20.0), (2.0, 35.0), (4.0, f64::NAN)]), line(&[(1.0, 40.0)])]);
        for rows in
            [vec![], vec![vec![panel(vec![])]], vec![vec![full.clone(), panel(vec![line(&[(1.0, 0.0)])])], vec![full]]]
        {
            let svg = panels("model", &rows).unwrap();
            assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.contains("model"), "{svg}");
            if rows.len() == 2 {
                for part in ["decode", "threads", "measured", "<circle "] {
                    assert!(svg.contains(part), "{part}: {svg}");
                }
            }
        }
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let block = |bars: &[(&str, f64)]| Bars {
            title: "decode".into(),
            colour: BLUE,
            bars: bars.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        };
        let svg =
            bars("devices", &[block(&[("slow", 10.0), ("fast", 40.0), ("broken", f64::NAN)]), block(&[])]).unwrap();
        for part in ["devices", "decode", "slow", "fast", "width=\"480\"", "width=\"120\""] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(bars("none", &[]).unwrap().contains("none"));
    }
}
