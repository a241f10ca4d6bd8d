//! Plots as SVG: axes with round numbers, lines, bars and marks. Knows nothing of what is plotted.

use std::fmt::Write as _;

const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;

/// Colours that are told apart by most eyes (Okabe and Ito 2008).
pub const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222",
];

/// A plot being drawn.
pub struct Plot {
    x: Axis,
    y: Axis,
    body: String,
    n_entries: usize,
}

/// From 0 to the largest value, or on a logarithmic scale between the round numbers around the values.
#[derive(Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
    is_log: bool,
}

impl Axis {
    fn linear(high: f64) -> Axis {
        let high = if high > 0.0 && high.is_finite() { high } else { 1.0 };
        Axis {
            low: 0.0,
            high,
            is_log: false,
        }
    }

    /// Position of `value`, from 0 to 1.
    fn at(self, value: f64) -> f64 {
        let share = match self.is_log {
            true => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        share.clamp(0.0, 1.0)
    }

    fn ticks(self) -> Vec<f64> {
        if self.is_log {
            // All round numbers of up to three powers of ten, then the powers alone.
            let n_steps = if self.high / self.low <= 1001.0 { 3 } else { 1 };
            let first = self.low.log10().floor() as i32;
            let last = self.high.log10().ceil() as i32;
            let all =
                (first..=last).flat_map(|power| [1.0, 2.0, 5.0][..n_steps].iter().map(move |m| m * 10_f64.powi(power)));
            return all
                .filter(|tick| (self.low * 0.999..=self.high * 1.001).contains(tick))
                .collect();
        }
        let step = round_step(self.high / 5.0);
        let n_steps = (self.high / step).floor() as u32;
        (0..=n_steps).map(|i| f64::from(i) * step).collect()
    }
}

/// The smallest of 1, 2 and 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|factor| factor * power >= step * 0.999_999);
    factor.unwrap_or(10.0) * power
}

impl Plot {
    /// Axes from 0 to `x_high` and `y_high`.
    pub fn new(title: &str, x_name: &str, x_high: f64, y_name: &str, y_high: f64) -> Plot {
        Plot::with_axes(title, x_name, Axis::linear(x_high), y_name, Axis::linear(y_high))
    }

    /// The x axis is logarithmic and holds `x_low` to `x_high`, both above 0.
    pub fn with_log_x(title: &str, x_name: &str, [x_low, x_high]: [f64; 2], y_name: &str, y_high: f64) -> Plot {
        let high = round_step(x_high);
        let axis = Axis {
            // The reciprocals of 1, 2 and 5 are 1, 5 and 2 of the power below.
            low: (1.0 / round_step(1.0 / x_low)).min(high / 10.0),
            high,
            is_log: true,
        };
        Plot::with_axes(title, x_name, axis, y_name, Axis::linear(y_high))
    }

    fn with_axes(title: &str, x_name: &str, x: Axis, y_name: &str, y: Axis) -> Plot {
        let mut plot = Plot {
            x,
            y,
            body: String::new(),
            n_entries: 0,
        };
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for tick in x.ticks() {
            let at = plot.x(tick);
            let _ = write!(
                plot.body,
                r#"<path class="g" d="M{at:.1} {TOP}V{bottom}"/><text x="{at:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                bottom + 16.0,
                short(tick)
            );
        }
        for tick in y.ticks() {
            let at = plot.y(tick);
            let _ = write!(
                plot.body,
                r#"<path class="g" d="M{LEFT} {at:.1}H{right}"/><text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                LEFT - 6.0,
                at + 4.0,
                short(tick)
            );
        }
        let _ = write!(
            plot.body,
            r#"<text class="t" x="{LEFT}" y="20">{}</text><text x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            escape(title),
            (LEFT + right) / 2.0,
            HEIGHT - 10.0,
            escape(x_name)
        );
        let middle = (TOP + bottom) / 2.0;
        let _ = write!(
            plot.body,
            r#"<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">{}</text>"#,
            escape(y_name)
        );
        plot
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + self.x.at(value) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - self.y.at(value) * (HEIGHT - TOP - BOTTOM)
    }

    /// A line through `points`, with a name in the legend unless it is empty.
    pub fn line(&mut self, name: &str, colour: &str, points: &[(f64, f64)]) {
        let mut path = String::new();
        for (index, (x, y)) in points.iter().enumerate() {
            let letter = if index == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{letter}{:.1} {:.1}", self.x(*x), self.y(*y));
        }
        let _ = write!(
            self.body,
            r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>"#
        );
        self.legend(name, colour);
    }

    /// A dot at each of `points`.
    pub fn dots(&mut self, colour: &str, points: &[(f64, f64)]) {
        for (x, y) in points {
            let (x, y) = (self.x(*x), self.y(*y));
            let _ = write!(self.body, r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"#);
        }
    }

    /// Horizontal lines (from, to, y) in one path.
    pub fn spans(&mut self, name: &str, colour: &str, width: f64, spans: &[(f64, f64, f64)]) {
        let mut path = String::new();
        for (from, to, y) in spans {
            let _ = write!(
                path,
                "M{:.1} {:.1}H{:.1}",
                self.x(*from),
                self.y(*y),
                self.x(*to).max(self.x(*from) + 0.5)
            );
        }
        let _ = write!(
            self.body,
            r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:.2}"/>"#
        );
        self.legend(name, colour);
    }

    /// A dashed line across the plot at `y`.
    pub fn level(&mut self, name: &str, y: f64) {
        let at = self.y(y);
        let right = WIDTH - RIGHT;
        let _ = write!(
            self.body,
            r##"<path d="M{LEFT} {at:.1}H{right}" stroke="#888" stroke-dasharray="5 4"/><text x="{right}" y="{:.1}" text-anchor="end">{}</text>"##,
            at - 4.0,
            escape(name)
        );
    }

    fn legend(&mut self, name: &str, colour: &str) {
        if name.is_empty() {
            return;
        }
        let y = 20.0 + 14.0 * (self.n_entries / 4) as f64;
        let x = WIDTH - RIGHT - 90.0 * (self.n_entries % 4 + 1) as f64;
        let _ = write!(
            self.body,
            r#"<path d="M{x} {:.1}h14" stroke="{colour}" stroke-width="3"/><text x="{:.1}" y="{y}">{}</text>"#,
            y - 4.0,
            x + 18.0,
            escape(name)
        );
        self.n_entries += 1;
    }

    /// The plot as an element of a page.
    pub fn finish(self) -> String {
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{}</svg>"#,
            self.body
        )
    }
}

/// A number as one would say it.
pub fn short(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return if value == 0.0 { "0".into() } else { "-".into() };
    }
    let text = match value.abs() {
        large if large >= 1e6 => return format!("{value:.1e}"),
        large if large >= 100.0 => format!("{value:.0}"),
        large if large >= 0.01 => format!("{value:.3}"),
        _ => return format!("{value:.1e}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Text as the content of an element or of a quoted attribute.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_axis() {
        assert_eq!(Axis::linear(1.0).ticks(), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(Axis::linear(730.0).ticks(), [0.0, 200.0, 400.0, 600.0]);
        assert_eq!(
            Axis::linear(f64::NAN).ticks().len(),
            6,
            "nothing to plot is no reason to stop"
        );
        let log = |range| Plot::with_log_x("", "", range, "", 1.0).x;
        assert_eq!(log([0.3, 7.0]).ticks().len(), 6, "0.2, 0.5, 1, 2, 5, 10");
        assert_eq!(log([0.1, 3000.0]).ticks().len(), 5, "0.1, 1, 10, 100, 1000");
        let log = log([10.0, 1000.0]);
        assert!((log.at(100.0) - 0.5).abs() < 1e-9 && log.at(0.0) == 0.0 && log.at(1e9) == 1.0);
    }

    #[test]
    fn numbers_and_texts_are_shown_plainly() {
        for (value, text) in [
            (0.0, "0"),
            (0.25, "0.25"),
            (12.0, "12"),
            (1500.0, "1500"),
            (2.5e7, "2.5e7"),
            (1e-4, "1.0e-4"),
        ] {
            assert_eq!(short(value), text);
        }
        assert_eq!(escape("a<b & \"c\""), "a&lt;b &amp; &quot;c&quot;");
    }

    #[test]
    fn points_lie_where_their_values_say() {
        let mut plot = Plot::new("t", "x", 10.0, "y", 1.0);
        plot.dots("red", &[(0.0, 0.0), (10.0, 1.0)]);
        let svg = plot.finish();
        assert!(svg.contains(r#"cx="64.0" cy="274.0""#), "{svg}");
        assert!(svg.contains(r#"cx="604.0" cy="34.0""#), "{svg}");
    }
}
