//! The view as a screen of text: totals, instances, moves, requests, keys. A pure function of the view and the area.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table, Widget};

use super::snapshot::{InstanceLine, Snapshot};
use super::view::View;
use crate::ctl::RequestRow;
use crate::ctl::table::age;

/// Cells of a KV bar.
const BAR_WIDTH: usize = 16;
/// Most moves shown one by one.
const MAX_MOVES: usize = 5;

/// Lines of the title and totals, with an empty one.
const HEAD: usize = 3;
/// Lines of the keys, with an empty one.
const FOOT: usize = 2;

const HEADER: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const ALARM: Style = Style::new().fg(Color::Red);
const WARNING: Style = Style::new().fg(Color::Yellow);

impl View {
    /// Lines that show everything.
    pub fn height(&self) -> u16 {
        let Some(snapshot) = &self.snapshot else {
            return (HEAD + FOOT) as u16;
        };
        let n_lines = HEAD + 1 + snapshot.instances.len() + between(&move_lines(snapshot)) + FOOT;
        let n_requests = self.requests().len().max(1) + 1;
        u16::try_from(n_lines + n_requests).unwrap_or(u16::MAX)
    }

    /// Everything but the keys as plain text, `width` columns wide.
    pub fn to_text(&self, width: u16) -> String {
        let area = Rect::new(0, 0, width, self.height());
        let mut buffer = Buffer::empty(area);
        self.render(area, &mut buffer);
        let mut text = String::new();
        let n_lines = self.height() - FOOT as u16;
        for y in area.rows().take(usize::from(n_lines)) {
            let line: String = y.columns().map(|cell| buffer[cell.as_position()].symbol()).collect();
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

impl Widget for &View {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let Some(snapshot) = &self.snapshot else {
            let lines = vec![title(self), Line::default(), footer(self)];
            return Paragraph::new(lines).render(area, buffer);
        };
        let moves = move_lines(snapshot);
        let length = |n_lines: usize| Constraint::Length(u16::try_from(n_lines).unwrap_or(u16::MAX));
        let [head, instances, middle, rest, foot] = Layout::vertical([
            length(HEAD),
            length(snapshot.instances.len() + 1),
            length(between(&moves)),
            Constraint::Min(2),
            length(FOOT),
        ])
        .areas(area);
        Paragraph::new(vec![title(self), totals(snapshot)]).render(head, buffer);
        instance_table(&snapshot.instances).render(instances, buffer);
        let moves = std::iter::once(Line::default()).chain(moves);
        Paragraph::new(moves.collect::<Vec<_>>()).render(middle, buffer);
        requests(self, rest, buffer);
        Paragraph::new(vec![Line::default(), footer(self)]).render(foot, buffer);
    }
}

/// Lines between instances and requests: an empty one, and the moves with another if there are any.
fn between(moves: &[Line<'_>]) -> usize {
    if moves.is_empty() { 1 } else { moves.len() + 2 }
}

fn title(view: &View) -> Line<'_> {
    let mut line = Line::from(vec![
        Span::styled("baton top", HEADER),
        Span::raw("  "),
        Span::raw(&view.server),
    ]);
    if view.is_paused {
        line.push_span(Span::styled("  PAUSED", WARNING));
    }
    match (&view.lost, &view.snapshot) {
        (Some(lost), _) => {
            let text = format!(
                "  server gone for {}, trying again: {}",
                age(lost.for_time.as_secs_f64()),
                lost.reason
            );
            line.push_span(Span::styled(text, ALARM));
        }
        (None, None) => line.push_span(Span::styled("  connecting", DIM)),
        (None, Some(_)) => {}
    }
    line
}

fn totals(snapshot: &Snapshot) -> Line<'static> {
    let n_instances = snapshot.instances.len();
    let rates = format!(
        "decode {:.1} tokens/s   prefill {:.1} tokens/s",
        snapshot.total(|line| line.decode_rate),
        snapshot.total(|line| line.prefill_rate),
    );
    let Some(requests) = &snapshot.requests else {
        return Line::from(format!("{n_instances} instances   {rates}"));
    };
    let queue = match snapshot.queued().next() {
        None => "0 queued".to_owned(),
        Some(oldest) => format!(
            "{} queued (oldest {})",
            snapshot.queued().count(),
            age(oldest.age_seconds)
        ),
    };
    let n_moving = snapshot.moves().count();
    let n_open = requests.len();
    Line::from(format!(
        "{n_instances} instances   {n_open} requests, {queue}, {n_moving} moving   {rates}"
    ))
}

fn instance_table(lines: &[InstanceLine]) -> Table<'static> {
    let header = [
        "INSTANCE",
        "ROLE",
        "STATE",
        "KV BLOCKS",
        "USED",
        "RUN",
        "WAIT",
        "STEPS/S",
        "DECODE/S",
        "PREFILL/S",
        "IN/OUT",
        "UP",
    ];
    let widths = [
        widest(lines.iter().map(|line| line.row.id.clone()), header[0]),
        Constraint::Length(7),
        Constraint::Length(8),
        Constraint::Length(BAR_WIDTH as u16),
        Constraint::Length(4),
        Constraint::Length(4),
        Constraint::Length(4),
        Constraint::Length(7),
        Constraint::Length(8),
        Constraint::Length(9),
        Constraint::Length(6),
        Constraint::Length(6),
    ];
    Table::new(lines.iter().map(instance_row), widths).header(Row::new(header).style(HEADER))
}

/// A column as wide as its widest cell, within reason.
fn widest(cells: impl Iterator<Item = String>, header: &str) -> Constraint {
    const WIDEST: usize = 40;
    let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
    Constraint::Length(widest.max(header.len()).min(WIDEST) as u16)
}

fn instance_row(line: &InstanceLine) -> Row<'static> {
    let row = &line.row;
    let state = row.state();
    let style = match state {
        "ok" => Style::new(),
        "stuck" | "leaking" => ALARM,
        _ => WARNING,
    };
    let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
    let moves = match (row.n_moving_in, row.n_moving_out) {
        (Some(n_in), Some(n_out)) => format!("{n_in}/{n_out}"),
        _ => "-".to_owned(),
    };
    let used = share(row.n_blocks_used(), row.n_blocks_total);
    Row::new(vec![
        Cell::from(row.id.clone()),
        Cell::from(row.role.clone()),
        Cell::from(Span::styled(state, style)),
        Cell::from(kv_bar(row.n_blocks_used(), row.n_blocks_cached, row.n_blocks_total)),
        Cell::from(format!("{:.0}%", used * 100.0)),
        Cell::from(row.n_running.to_string()),
        Cell::from(row.n_waiting.to_string()),
        Cell::from(rate(line.step_rate)),
        Cell::from(rate(line.decode_rate)),
        Cell::from(rate(line.prefill_rate)),
        Cell::from(moves),
        Cell::from(age(row.up_seconds as f64)),
    ])
}

fn share(part: u32, whole: u32) -> f64 {
    f64::from(part) / f64::from(whole.max(1))
}

/// Held blocks full, cached ones shaded, free ones empty. What is not nothing has a cell at least.
fn kv_bar(n_used: u32, n_cached: u32, n_total: u32) -> Line<'static> {
    let cells = |n: u32| match n {
        0 => 0,
        n => ((share(n, n_total) * BAR_WIDTH as f64).round() as usize).max(1),
    };
    let n_full = cells(n_used).min(BAR_WIDTH);
    let n_shaded = cells(n_cached).min(BAR_WIDTH - n_full);
    let color = match share(n_used, n_total) {
        used if used >= 0.9 => Color::Red,
        used if used >= 0.7 => Color::Yellow,
        _ => Color::Green,
    };
    Line::from(vec![
        Span::styled("█".repeat(n_full), Style::new().fg(color)),
        Span::styled("▒".repeat(n_shaded), DIM),
        Span::styled("·".repeat(BAR_WIDTH - n_full - n_shaded), DIM),
    ])
}

/// Moves under way, under a heading; nothing when there are none.
fn move_lines(snapshot: &Snapshot) -> Vec<Line<'static>> {
    let n_moves = snapshot.moves().count();
    if n_moves == 0 {
        return Vec::new();
    }
    let mut lines = vec![Line::from(Span::styled("MOVES UNDER WAY", HEADER))];
    let shown = snapshot.moves().take(MAX_MOVES);
    lines.extend(shown.map(|row| Line::from(format!("{}  {}  {} tokens", row.id, row.place(), row.tokens()))));
    if n_moves > MAX_MOVES {
        lines.push(Line::from(format!("and {} more", n_moves - MAX_MOVES)));
    }
    lines
}

fn requests(view: &View, area: Rect, buffer: &mut Buffer) {
    let rows = view.requests();
    if rows.is_empty() {
        let is_told = view
            .snapshot
            .as_ref()
            .is_some_and(|snapshot| snapshot.requests.is_some());
        let text = match is_told {
            true => "no requests",
            false => "this server does not list its requests",
        };
        return Paragraph::new(Span::styled(text, DIM)).render(area, buffer);
    }
    let header = [
        "REQUEST", "STAGE", "INSTANCE", "TOKENS", "PROMPT", "N", "MOVES", "AGE", "LABEL",
    ];
    let widths = [
        widest(rows.iter().map(|row| row.id.clone()), header[0]),
        Constraint::Length(7),
        widest(rows.iter().map(|row| row.place()), header[2]),
        Constraint::Length(11),
        Constraint::Length(6),
        Constraint::Length(3),
        Constraint::Length(5),
        Constraint::Length(6),
        Constraint::Fill(1),
    ];
    let shown = rows.into_iter().skip(view.n_scrolled).map(request_row);
    Table::new(shown, widths)
        .header(Row::new(header).style(HEADER))
        .render(area, buffer);
}

fn request_row(row: &RequestRow) -> Row<'static> {
    let style = if row.is_moving() { WARNING } else { Style::new() };
    Row::new(vec![
        row.id.clone(),
        row.stage.clone(),
        row.place(),
        row.tokens(),
        row.n_prompt_tokens.to_string(),
        row.n_choices.to_string(),
        row.n_moves.to_string(),
        age(row.age_seconds),
        row.label.clone(),
    ])
    .style(style)
}

fn footer(view: &View) -> Line<'static> {
    let sort = view.sort.as_str();
    Line::from(Span::styled(
        format!("q quit   p pause   s sort: {sort}   ↑↓ scroll"),
        DIM,
    ))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::ctl::tests::{instance, request};
    use crate::top::snapshot::Rates;
    use crate::top::view::Polled;

    /// Two polls two seconds apart: one instance busy, one draining, a move, a queue.
    fn view() -> View {
        let busy = |n_steps: u64, n_decode: u64| {
            let mut status = instance("decode-0", "decode", 3);
            let load = status.load.as_mut().expect("a load");
            load.n_steps = n_steps;
            load.counters = [("decode_tokens_total".to_owned(), n_decode)].into();
            status
        };
        let mut draining = instance("decode-1", "decode", 1);
        draining.draining = true;
        let mut moving = request("r-moving", "moving", 4.0);
        moving.destination_instance = "decode-1".into();
        let requests = vec![
            moving,
            request("r-plain", "decode", 9.0),
            request("r-waits", "queued", 61.0),
        ];
        let mut rates = Rates::default();
        rates.snapshot(0.0, vec![busy(100, 1000)], None);
        let snapshot = rates.snapshot(2.0, vec![busy(150, 1160), draining], Some(requests));
        let mut view = View::new("127.0.0.1:8000".into());
        view.take(Polled {
            at: Instant::now(),
            outcome: Ok(snapshot),
        });
        view
    }

    /// What a terminal of that size shows.
    fn screen(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a backend in memory");
        terminal
            .draw(|frame| frame.render_widget(view, frame.area()))
            .expect("drawn");
        let buffer = terminal.backend().buffer();
        let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned()).collect()
    }

    fn words<'a>(lines: &'a [String], begins: &str) -> Vec<&'a str> {
        let line = lines.iter().find(|line| line.starts_with(begins));
        line.unwrap_or_else(|| panic!("no line begins with {begins}: {lines:#?}"))
            .split_whitespace()
            .collect()
    }

    #[test]
    fn everything_is_on_the_screen() {
        let lines = screen(&view(), 130, 24);
        assert_eq!(lines[0], "baton top  127.0.0.1:8000");
        assert_eq!(
            lines[1],
            "2 instances   3 requests, 1 queued (oldest 1m01s), 1 moving   decode 80.0 tokens/s   prefill 0.0 tokens/s"
        );
        // 10 of 100 blocks held, 30 cached, on 16 cells.
        let bar = "██▒▒▒▒▒·········";
        let decode = [
            "decode-0", "decode", "ok", bar, "10%", "3", "0", "25.0", "80.0", "0.0", "0/1", "12.0s",
        ];
        assert_eq!(words(&lines, "decode-0"), decode);
        assert_eq!(words(&lines, "decode-1")[2], "draining");
        assert_eq!(words(&lines, "decode-1")[7..11], ["-", "-", "-", "1/0"]);
        let heading = lines
            .iter()
            .position(|line| line == "MOVES UNDER WAY")
            .expect("a move is under way");
        assert_eq!(lines[heading + 1], "r-moving  decode-0 -> decode-1  3/16 tokens");
        let order: Vec<&str> = lines[heading + 2..]
            .iter()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(order[..4], ["REQUEST", "r-waits", "r-plain", "r-moving"]);
        let row = [
            "r-plain", "decode", "decode-0", "3/16", "7", "1", "0", "9.0s", "client", "r-plain",
        ];
        assert_eq!(words(&lines, "r-plain"), row);
        assert_eq!(lines[23], "q quit   p pause   s sort: age   ↑↓ scroll");
    }

    #[test]
    fn a_screen_of_any_size_is_drawn() {
        for (width, height) in [(1, 1), (20, 3), (80, 24), (300, 100), (130, 7)] {
            screen(&view(), width, height);
            screen(&View::new("s".into()), width, height);
        }
    }

    #[test]
    fn a_server_that_is_gone_is_shown_over_the_last_snapshot() {
        let mut view = view();
        let at = Instant::now();
        for after in [0, 7] {
            let outcome = Err("Unavailable: connection refused".to_owned());
            view.take(Polled {
                at: at + Duration::from_secs(after),
                outcome,
            });
        }
        let lines = screen(&view, 130, 24);
        let title = "baton top  127.0.0.1:8000  server gone for 7.0s, trying again: Unavailable: connection refused";
        assert_eq!(lines[0], title);
        assert_eq!(words(&lines, "decode-0")[2], "ok");
        view.is_paused = true;
        assert!(screen(&view, 130, 24)[0].starts_with("baton top  127.0.0.1:8000  PAUSED  server gone"));
        assert_eq!(screen(&View::new("s".into()), 80, 24)[0], "baton top  s  connecting");
    }

    #[test]
    fn scrolling_leaves_out_the_first_requests() {
        let mut view = view();
        view.n_scrolled = 2;
        let lines = screen(&view, 130, 24);
        assert!(
            !lines
                .iter()
                .any(|line| line.starts_with("r-waits") || line.starts_with("r-plain"))
        );
        assert!(
            lines.iter().filter(|line| line.starts_with("r-moving")).count() == 2,
            "as a move and as a request"
        );
    }

    #[test]
    fn the_plain_text_has_every_line_whatever_their_number() {
        let requests = (0..200)
            .map(|idx| request(&format!("r-{idx:03}"), "moving", f64::from(idx)))
            .collect();
        let snapshot = Rates::default().snapshot(0.0, vec![instance("decode-0", "decode", 3)], Some(requests));
        let mut view = View::new("s".into());
        view.take(Polled {
            at: Instant::now(),
            outcome: Ok(snapshot),
        });
        let text = view.to_text(120);
        assert_eq!(
            text.lines().filter(|line| line.starts_with("r-")).count(),
            200 + MAX_MOVES
        );
        assert!(text.contains("and 195 more"), "{text}");
        assert!(
            text.trim_end().ends_with("client r-000") && !text.contains('\u{1b}'),
            "{text}"
        );
        let quiet = View {
            snapshot: Some(Snapshot::default()),
            ..View::new("s".into())
        };
        assert!(quiet.to_text(80).contains("this server does not list its requests"));
    }

    #[test]
    fn bars_are_full_only_when_the_cache_is() {
        let bar = |n_used, n_cached, n_total| kv_bar(n_used, n_cached, n_total).to_string();
        assert_eq!(bar(0, 0, 100), "·".repeat(16));
        assert_eq!(
            bar(1, 0, 1000),
            format!("█{}", "·".repeat(15)),
            "something is not nothing"
        );
        assert_eq!(bar(100, 0, 100), "█".repeat(16));
        assert_eq!(bar(50, 50, 100), format!("{}{}", "█".repeat(8), "▒".repeat(8)));
        assert_eq!(bar(0, 0, 0), "·".repeat(16), "an instance without blocks");
    }
}
