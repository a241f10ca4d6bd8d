//! Columns of text, as wide as their widest cell. Knows nothing of what it shows.

use std::fmt::Write as _;

/// Lines of cells under a header.
#[derive(Clone, Debug)]
pub struct Table {
    lines: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(header: &[&str]) -> Table {
        Table {
            lines: vec![header.iter().map(|&cell| cell.to_owned()).collect()],
        }
    }

    /// Adds a row, which has a cell for each column.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.lines[0].len(), "a cell for each column");
        self.lines.push(cells);
    }

    /// The text, each line ended.
    pub fn render(&self) -> String {
        let width = |column: usize| {
            let cells = self.lines.iter().map(|line| line[column].chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.lines[0].len()).map(width).collect();
        let mut text = String::new();
        for line in &self.lines {
            let mut padded = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                let _ = write!(padded, "{cell:<width$}  ");
            }
            let _ = writeln!(text, "{}", padded.trim_end());
        }
        text
    }
}

/// A length of time in two units at most.
pub fn age(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{seconds:.1}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86400 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86400, whole % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["A", "LONG"]);
        table.row(vec!["xyz".into(), "é".into()]);
        assert_eq!(table.render(), "A    LONG\nxyz  é\n");
    }

    #[test]
    fn ages_have_two_units() {
        let ages = [0.04, 9.95, 61.0, 3599.9, 3600.0, 90_000.0].map(age);
        assert_eq!(ages, ["0.0s", "9.9s", "1m01s", "59m59s", "1h00m", "1d01h"]);
    }
}
