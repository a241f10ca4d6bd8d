//! Requests that run now, by the name their clients gave them, so that they can be aborted by it. Holds no results.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

type ByLabel = HashMap<Arc<str>, Vec<Entry>>;

#[derive(Debug)]
struct Entry {
    number: u64,
    abort: CancellationToken,
}

#[derive(Debug, Default)]
struct Table {
    by_label: ByLabel,
    next_number: u64,
}

/// The table; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Running {
    table: Arc<Mutex<Table>>,
}

/// One running sequence's place in the table, given back on drop.
#[derive(Debug)]
pub struct RunningGuard {
    running: Running,
    label: Arc<str>,
    number: u64,
    abort: CancellationToken,
}

impl Running {
    /// Enters a sequence. Several may have one name: the prompts of one request, or a client that repeats itself.
    pub fn enter(&self, label: Arc<str>) -> RunningGuard {
        let abort = CancellationToken::new();
        let mut table = self.table.lock();
        let number = table.next_number;
        table.next_number += 1;
        table.by_label.entry(label.clone()).or_default().push(Entry {
            number,
            abort: abort.clone(),
        });
        RunningGuard {
            running: self.clone(),
            label,
            number,
            abort,
        }
    }

    /// Aborts everything of that name; returns whether anything was running.
    pub fn abort(&self, label: &str) -> bool {
        let entries = self.table.lock().by_label.remove(label);
        let entries = entries.unwrap_or_default();
        entries.iter().for_each(|entry| entry.abort.cancel());
        !entries.is_empty()
    }

    #[cfg(test)]
    pub(super) fn n_labels(&self) -> usize {
        self.table.lock().by_label.len()
    }
}

impl RunningGuard {
    /// Completes once the sequence is aborted by its name.
    pub async fn aborted(&self) {
        self.abort.cancelled().await;
    }
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        let mut table = self.running.table.lock();
        if let Some(entries) = table.by_label.get_mut(&self.label) {
            entries.retain(|entry| entry.number != self.number);
            if entries.is_empty() {
                table.by_label.remove(&self.label);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn all_of_a_name_are_aborted_once() {
        let running = Running::default();
        let (first, second, other) = (
            running.enter("a".into()),
            running.enter("a".into()),
            running.enter("b".into()),
        );
        assert!(running.abort("a") && !running.abort("a") && !running.abort("nobody"));
        assert!(first.aborted().now_or_never().is_some() && second.aborted().now_or_never().is_some());
        assert!(other.aborted().now_or_never().is_none());
    }

    #[test]
    fn a_name_used_again_is_not_lost_when_the_aborted_one_goes() {
        let running = Running::default();
        let first = running.enter("a".into());
        running.abort("a");
        let again = running.enter("a".into());
        drop(first);
        assert_eq!(running.n_labels(), 1);
        assert!(running.abort("a") && again.aborted().now_or_never().is_some());
        drop(again);
        assert_eq!(running.n_labels(), 0);
    }
}
