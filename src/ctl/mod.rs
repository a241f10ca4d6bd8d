//! The operator's questions to a running cluster and the changes asked of it, and how answers are printed. Everything is
//! done by the scheduler process.

pub mod changes;
pub mod client;
pub mod instances;
pub mod requests;
pub mod table;

#[cfg(test)]
pub(crate) mod tests;

use std::time::Duration;

use anyhow::Context as _;
use baton_scheduler::ids::Role;
use serde::Serialize;

use self::changes::{DrainRow, MoveRow, RoleRow};
use self::client::{CallError, OperatorLink};
pub use self::instances::InstanceRow;
pub use self::requests::RequestRow;
use crate::announce;
use crate::config::{Address, Secret};

/// Whom to ask, and how.
#[derive(Clone, Debug)]
pub struct CtlConfig {
    /// The scheduler process.
    pub server: Address,
    /// Print JSON rather than a table.
    pub json: bool,
    /// Give up after this long.
    pub timeout: Duration,
    /// Shown as a bearer token.
    pub api_key: Option<Secret>,
    /// Shown as a process of the cluster.
    pub cluster_secret: Option<Secret>,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// List instances.
    Instances,
    /// List requests.
    Requests,
    /// Move a request.
    Migrate {
        /// Its id or label.
        id: String,
        /// Where to; `None` lets the policy choose.
        to: Option<String>,
    },
    /// Empty an instance, or take it back into use.
    Drain {
        /// Its name.
        id: String,
        /// Take it back.
        undo: bool,
    },
    /// Change what an instance is used for.
    Role {
        /// Its name.
        id: String,
        /// For what.
        role: Role,
    },
}

/// Asks, waits and prints: the answer on stdout, a drain's progress on stderr (with `--json` on stdout too).
///
/// # Errors
/// One line that names the scheduler process.
pub async fn run(config: &CtlConfig, order: Order) -> anyhow::Result<()> {
    let link = OperatorLink::open(config)?;
    let answer = answer(&link, config.json, order).await;
    let text = answer.with_context(|| format!("scheduler at {}", config.server))?;
    announce::print(text.trim_end());
    Ok(())
}

/// What an answer says to people; programs get it as JSON.
trait Answer: Serialize {
    fn text(&self) -> String;
}

impl Answer for Vec<InstanceRow> {
    fn text(&self) -> String {
        instances::table(self)
    }
}

impl Answer for Vec<RequestRow> {
    fn text(&self) -> String {
        requests::table(self)
    }
}

impl Answer for MoveRow {
    fn text(&self) -> String {
        format!(
            "{} moved: {} -> {} in {:.1} ms",
            self.id,
            self.from,
            self.to,
            self.seconds * 1e3
        )
    }
}

impl Answer for DrainRow {
    fn text(&self) -> String {
        let counts = format!("{} moved, {} moves failed", self.n_moved, self.n_failed_moves);
        match self.done {
            true => format!("{}: empty; {counts}", self.instance),
            false => format!("{}: {} open, {counts}", self.instance, self.n_open),
        }
    }
}

impl Answer for RoleRow {
    fn text(&self) -> String {
        format!("{}: {} -> {}", self.instance, self.previous, self.role)
    }
}

fn said(answer: &impl Answer, json: bool) -> String {
    match json {
        true => serde_json::to_string_pretty(answer).expect("rows always serialise"),
        false => answer.text(),
    }
}

/// One line of a stream of JSON.
fn json_line(answer: &impl Answer) -> String {
    serde_json::to_string(answer).expect("rows always serialise")
}

async fn answer(link: &OperatorLink, json: bool, order: Order) -> Result<String, CallError> {
    Ok(match order {
        Order::Instances => {
            let instances = link.instances().await?;
            let requests = link.requests_if_told().await?;
            said(&InstanceRow::all(instances, requests.as_deref()), json)
        }
        Order::Requests => said(&RequestRow::all(link.requests().await?), json),
        Order::Migrate { id, to } => said(&changes::migrate(link, id, to).await?, json),
        Order::Drain { id, undo: true } => {
            let row = changes::undo_drain(link, &id).await?;
            match json {
                true => json_line(&row),
                false => format!("{id} is in use again"),
            }
        }
        Order::Drain { id, undo: false } => {
            let drained = changes::drain(link, &id, |row| match (json, row.done) {
                // The last one is the answer.
                (_, true) => {}
                (true, false) => announce::print(&json_line(row)),
                (false, false) => eprintln!("{}", row.text()),
            });
            let row = drained.await?;
            if json { json_line(&row) } else { row.text() }
        }
        Order::Role { id, role } => said(&changes::set_role(link, id, role.to_string()).await?, json),
    })
}
