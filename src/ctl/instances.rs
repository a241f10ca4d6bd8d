//! `baton ctl instances`: what each instance is used for, its load, and the moves to and from it.

use baton_proto::cluster::{InstanceStatus, RequestStatus};
use serde::Serialize;

use super::requests::MOVING;
use super::table::{Table, age};

/// One instance, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InstanceRow {
    /// Its name.
    pub id: String,
    /// What it is used for.
    pub role: String,
    /// Where it is reached.
    pub address: String,
    /// Process id on its machine.
    pub pid: u32,
    /// Which life of the instance, 16 hexadecimal digits.
    pub incarnation: String,
    /// The model it serves.
    pub model: String,
    /// Whether it makes steps when it has work.
    pub healthy: bool,
    /// Gets no new requests, and its running ones are moved away.
    pub draining: bool,
    /// It was told to end, and asks to be emptied first.
    pub leaving: bool,
    /// Requests open there, paused ones included; 0 from workers that do not say.
    pub n_open: u32,
    /// Requests on their way to it; `null` when the server does not say.
    pub n_moving_in: Option<u32>,
    /// Requests on their way from it; `null` when the server does not say.
    pub n_moving_out: Option<u32>,
    /// Sequences in its batches.
    pub n_running: u32,
    /// Sequences that wait there.
    pub n_waiting: u32,
    /// Blocks neither held nor cached.
    pub n_blocks_free: u32,
    /// Blocks that only the prefix cache holds.
    pub n_blocks_cached: u32,
    /// Blocks it has.
    pub n_blocks_total: u32,
    /// Steps made.
    pub n_steps: u64,
    /// Seconds since it joined.
    pub up_seconds: u64,
    /// Whether its ledger of blocks is whole.
    pub ledger_whole: bool,
    /// Device kind, instruction set and dtypes.
    pub numerics_class: String,
}

impl From<InstanceStatus> for InstanceRow {
    fn from(status: InstanceStatus) -> InstanceRow {
        let join = status.join.unwrap_or_default();
        let load = status.load.unwrap_or_default();
        InstanceRow {
            id: join.instance_id,
            role: join.role,
            address: join.address,
            pid: join.pid,
            incarnation: format!("{:016x}", join.incarnation),
            model: join.model,
            healthy: load.healthy,
            draining: status.draining,
            leaving: load.leaving,
            n_open: load.n_open,
            n_moving_in: None,
            n_moving_out: None,
            n_running: load.n_running,
            n_waiting: load.n_waiting,
            n_blocks_free: load.n_blocks_free,
            n_blocks_cached: load.n_blocks_cached,
            n_blocks_total: join.n_blocks_total,
            n_steps: load.n_steps,
            up_seconds: status.joined_seconds_ago,
            ledger_whole: load.ledger_whole,
            numerics_class: join.numerics_class,
        }
    }
}

impl InstanceRow {
    /// Rows by name; `requests` says which moves are under way, where the server tells.
    pub fn all(instances: Vec<InstanceStatus>, requests: Option<&[RequestStatus]>) -> Vec<InstanceRow> {
        let mut rows: Vec<InstanceRow> = instances.into_iter().map(InstanceRow::from).collect();
        rows.sort_by(|a, b| a.id.cmp(&b.id));
        if let Some(requests) = requests {
            let moving = || requests.iter().filter(|request| request.stage == MOVING);
            for row in &mut rows {
                let n_in = moving()
                    .filter(|request| request.destination_instance == row.id)
                    .count();
                let n_out = moving().filter(|request| request.decode_instance == row.id).count();
                row.n_moving_in = Some(n_in as u32);
                row.n_moving_out = Some(n_out as u32);
            }
        }
        rows
    }

    /// Blocks that requests hold.
    pub fn n_blocks_used(&self) -> u32 {
        self.n_blocks_total
            .saturating_sub(self.n_blocks_free)
            .saturating_sub(self.n_blocks_cached)
    }

    /// One word: `ok`, or what an operator should know first.
    pub fn state(&self) -> &'static str {
        let is_empty = self.n_open == 0 && self.n_running == 0 && self.n_waiting == 0;
        match self {
            row if !row.healthy => "stuck",
            row if !row.ledger_whole => "leaking",
            row if row.draining && is_empty => "drained",
            row if row.draining => "draining",
            row if row.leaving => "leaving",
            _ => "ok",
        }
    }
}

/// The rows as a table.
pub fn table(rows: &[InstanceRow]) -> String {
    let mut table = Table::new(&[
        "INSTANCE",
        "ROLE",
        "STATE",
        "RUNNING",
        "WAITING",
        "MOVES IN/OUT",
        "BLOCKS USED",
        "STEPS",
        "UP",
        "PID",
        "ADDRESS",
    ]);
    for row in rows {
        let moves = match (row.n_moving_in, row.n_moving_out) {
            (Some(n_in), Some(n_out)) => format!("{n_in}/{n_out}"),
            _ => "-".to_owned(),
        };
        table.row(vec![
            row.id.clone(),
            row.role.clone(),
            row.state().to_owned(),
            row.n_running.to_string(),
            row.n_waiting.to_string(),
            moves,
            format!("{}/{}", row.n_blocks_used(), row.n_blocks_total),
            row.n_steps.to_string(),
            age(row.up_seconds as f64),
            row.pid.to_string(),
            row.address.clone(),
        ]);
    }
    table.render()
}
