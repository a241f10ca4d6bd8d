//! What an operator changes: where a request runs, whether an instance is in use, what it is used for. The scheduler process
//! does all of it; here it is asked for, followed and told.

use baton_proto::cluster::DrainProgress;
use serde::Serialize;

use super::client::{CallError, OperatorLink};

/// A move that has settled, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MoveRow {
    /// The request.
    pub id: String,
    /// Where it ran.
    pub from: String,
    /// Where it runs.
    pub to: String,
    /// From asking for the move to its end.
    pub seconds: f64,
}

/// Moves one request, to where the policy chooses when `to` is `None`.
pub async fn migrate(link: &OperatorLink, id: String, to: Option<String>) -> Result<MoveRow, CallError> {
    let answer = link.move_one(id.clone(), to.unwrap_or_default()).await?;
    Ok(MoveRow {
        id,
        from: answer.from,
        to: answer.to,
        seconds: answer.seconds,
    })
}

/// How far a drain is, as `--json` prints it, one line each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DrainRow {
    /// The instance.
    pub instance: String,
    /// Requests still open there.
    pub n_open: u32,
    /// Requests moved away.
    pub n_moved: u32,
    /// Moves that failed; each is tried again.
    pub n_failed_moves: u32,
    /// Nothing is left there; for `--undo`, the instance is in use again.
    pub done: bool,
}

impl DrainRow {
    fn new(instance: &str, progress: DrainProgress) -> DrainRow {
        DrainRow {
            instance: instance.to_owned(),
            n_open: progress.n_open,
            n_moved: progress.n_moved,
            n_failed_moves: progress.n_failed_moves,
            done: progress.done,
        }
    }
}

/// Empties an instance and follows it: each change goes to `on_progress`, the last one is returned.
///
/// # Errors
/// Also when the stream ends before the instance is empty.
pub async fn drain(
    link: &OperatorLink,
    instance: &str,
    mut on_progress: impl FnMut(&DrainRow),
) -> Result<DrainRow, CallError> {
    let mut stream = link.drain(instance.to_owned(), false).await?;
    let mut last: Option<DrainRow> = None;
    while let Some(progress) = stream.message().await.map_err(CallError::Refused)? {
        let row = DrainRow::new(instance, progress);
        if last.as_ref() != Some(&row) {
            on_progress(&row);
        }
        if row.done {
            return Ok(row);
        }
        last = Some(row);
    }
    Err(CallError::Unfinished)
}

/// Takes an instance back into use.
pub async fn undo_drain(link: &OperatorLink, instance: &str) -> Result<DrainRow, CallError> {
    let mut stream = link.drain(instance.to_owned(), true).await?;
    let mut last = DrainProgress::default();
    while let Some(progress) = stream.message().await.map_err(CallError::Refused)? {
        last = progress;
    }
    Ok(DrainRow {
        done: true,
        ..DrainRow::new(instance, last)
    })
}

/// A role that was changed, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RoleRow {
    /// The instance.
    pub instance: String,
    /// What it was used for.
    pub previous: String,
    /// What it is used for.
    pub role: String,
}

/// Changes what an instance is used for.
pub async fn set_role(link: &OperatorLink, instance: String, role: String) -> Result<RoleRow, CallError> {
    let previous = link.set_role(instance.clone(), role.clone()).await?;
    Ok(RoleRow {
        instance,
        previous,
        role,
    })
}
