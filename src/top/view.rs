//! What is shown now: the newest snapshot or a held one, the order of requests, and whether the server answers. Draws nothing.

use std::time::{Duration, Instant};

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::snapshot::Snapshot;
use crate::ctl::RequestRow;

/// What a poll brought, and when.
#[derive(Clone, Debug)]
pub struct Polled {
    /// When it was known.
    pub at: Instant,
    /// The cluster, or why it is not known.
    pub outcome: Result<Snapshot, String>,
}

/// The order of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Oldest first.
    #[default]
    Age,
    /// Most tokens first.
    Tokens,
    /// By instance, oldest first there.
    Instance,
    /// By stage, oldest first there.
    Stage,
}

impl Sort {
    /// Its name, as the screen shows it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Sort::Age => "age",
            Sort::Tokens => "tokens",
            Sort::Instance => "instance",
            Sort::Stage => "stage",
        }
    }

    const fn next(self) -> Sort {
        match self {
            Sort::Age => Sort::Tokens,
            Sort::Tokens => Sort::Instance,
            Sort::Instance => Sort::Stage,
            Sort::Stage => Sort::Age,
        }
    }

    /// Puts requests, which come oldest first, into this order. Equal ones keep theirs.
    fn apply(self, rows: &mut [&RequestRow]) {
        match self {
            Sort::Age => {}
            Sort::Tokens => rows.sort_by_key(|row| std::cmp::Reverse(row.n_output_tokens)),
            Sort::Instance => rows.sort_by(|a, b| a.decode_instance.cmp(&b.decode_instance)),
            Sort::Stage => rows.sort_by(|a, b| a.stage.cmp(&b.stage)),
        }
    }
}

/// Why the newest poll failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    since: Instant,
    /// How long polls have failed, at the newest.
    pub for_time: Duration,
    /// The newest failure.
    pub reason: String,
}

/// Whether to go on after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Show the next frame.
    Continue,
    /// End.
    Quit,
}

/// The screen's state.
#[derive(Clone, Debug)]
pub struct View {
    /// Whose cluster it is.
    pub server: String,
    /// `None` until the server has answered.
    pub snapshot: Option<Snapshot>,
    /// `Some` while the server does not answer.
    pub lost: Option<Lost>,
    /// The snapshot is held.
    pub is_paused: bool,
    /// The order of requests.
    pub sort: Sort,
    /// Requests left out at the top.
    pub n_scrolled: usize,
}

impl View {
    /// A view of the cluster at `server`, which has not answered yet.
    pub fn new(server: String) -> View {
        View {
            server,
            snapshot: None,
            lost: None,
            is_paused: false,
            sort: Sort::default(),
            n_scrolled: 0,
        }
    }

    /// Takes what a poll brought. The last snapshot stays while the server is gone.
    pub fn take(&mut self, polled: Polled) {
        match polled.outcome {
            Ok(snapshot) => {
                self.lost = None;
                if !self.is_paused {
                    self.snapshot = Some(snapshot);
                    self.scroll(0);
                }
            }
            Err(reason) => {
                let since = self.lost.as_ref().map_or(polled.at, |lost| lost.since);
                self.lost = Some(Lost {
                    since,
                    for_time: polled.at.saturating_duration_since(since),
                    reason,
                });
            }
        }
    }

    /// Does what a key asks for.
    pub fn key(&mut self, key: KeyEvent) -> Flow {
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Flow::Quit,
            KeyCode::Char('q') | KeyCode::Esc => return Flow::Quit,
            KeyCode::Char('p' | ' ') => self.is_paused = !self.is_paused,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Down | KeyCode::Char('j') => self.scroll(1),
            KeyCode::Up | KeyCode::Char('k') => self.scroll(-1),
            KeyCode::PageDown => self.scroll(10),
            KeyCode::PageUp => self.scroll(-10),
            KeyCode::Home => self.n_scrolled = 0,
            _ => {}
        }
        Flow::Continue
    }

    /// The last request stays in sight.
    fn scroll(&mut self, by: isize) {
        let n = self.requests().len();
        self.n_scrolled = self.n_scrolled.saturating_add_signed(by).min(n.saturating_sub(1));
    }

    /// The requests in order.
    pub fn requests(&self) -> Vec<&RequestRow> {
        let requests = self.snapshot.as_ref().and_then(|snapshot| snapshot.requests.as_ref());
        let mut rows: Vec<&RequestRow> = requests.into_iter().flatten().collect();
        self.sort.apply(&mut rows);
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::tests::request;
    use crate::top::snapshot::Rates;

    fn snapshot() -> Snapshot {
        let mut young = request("young", "prefill", 1.0);
        young.n_output_tokens = 9;
        let mut old = request("old", "queued", 3.0);
        old.decode_instance = "decode-1".into();
        let requests = vec![young, old, request("middle", "decode", 2.0)];
        Rates::default().snapshot(0.0, Vec::new(), Some(requests))
    }

    fn press(view: &mut View, code: KeyCode) -> Flow {
        view.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    fn ids(view: &View) -> Vec<&str> {
        view.requests().iter().map(|row| row.id.as_str()).collect()
    }

    #[test]
    fn requests_are_sorted_as_asked() {
        let mut view = View::new("s".into());
        view.take(Polled {
            at: Instant::now(),
            outcome: Ok(snapshot()),
        });
        for (sort, expected) in [
            (Sort::Age, ["old", "middle", "young"]),
            (Sort::Tokens, ["young", "old", "middle"]),
            (Sort::Instance, ["middle", "young", "old"]),
            (Sort::Stage, ["middle", "young", "old"]),
        ] {
            assert_eq!((view.sort, ids(&view)), (sort, expected.to_vec()));
            press(&mut view, KeyCode::Char('s'));
        }
        assert_eq!(view.sort, Sort::Age, "around");
    }

    #[test]
    fn a_held_snapshot_stays_until_it_is_let_go() {
        let mut view = View::new("s".into());
        let at = Instant::now();
        press(&mut view, KeyCode::Char('p'));
        view.take(Polled {
            at,
            outcome: Ok(snapshot()),
        });
        assert_eq!(view.snapshot, None);
        press(&mut view, KeyCode::Char('p'));
        view.take(Polled {
            at,
            outcome: Ok(snapshot()),
        });
        assert!(view.snapshot.is_some());
    }

    #[test]
    fn scrolling_ends_at_both_ends_and_follows_the_list() {
        let mut view = View::new("s".into());
        let at = Instant::now();
        view.take(Polled {
            at,
            outcome: Ok(snapshot()),
        });
        press(&mut view, KeyCode::Up);
        assert_eq!(view.n_scrolled, 0);
        press(&mut view, KeyCode::PageDown);
        assert_eq!(view.n_scrolled, 2);
        view.take(Polled {
            at,
            outcome: Ok(Snapshot::default()),
        });
        assert_eq!(view.n_scrolled, 0);
    }

    #[test]
    fn a_server_that_is_gone_is_counted_from_its_first_failure() {
        let mut view = View::new("s".into());
        let at = Instant::now();
        view.take(Polled {
            at,
            outcome: Ok(snapshot()),
        });
        for seconds in [1, 4] {
            let outcome = Err("connection refused".to_owned());
            view.take(Polled {
                at: at + Duration::from_secs(seconds),
                outcome,
            });
        }
        let lost = view.lost.as_ref().expect("gone");
        assert_eq!(
            (lost.for_time, lost.reason.as_str()),
            (Duration::from_secs(3), "connection refused")
        );
        assert!(view.snapshot.is_some(), "the last one is still shown");
        view.take(Polled {
            at,
            outcome: Ok(snapshot()),
        });
        assert_eq!(view.lost, None);
    }

    #[test]
    fn quitting_keys_quit() {
        let mut view = View::new("s".into());
        assert_eq!(press(&mut view, KeyCode::Char('q')), Flow::Quit);
        assert_eq!(
            view.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)),
            Flow::Quit
        );
        assert_eq!(press(&mut view, KeyCode::Char('c')), Flow::Continue);
    }
}
