//! `baton ctl requests`: what is open at the front door, and where it runs.

use baton_proto::cluster::RequestStatus;
use serde::Serialize;

use super::table::{Table, age};

/// The stage of a request that changes its instance.
pub const MOVING: &str = "moving";
/// The stage of a request that waits for a place.
pub const QUEUED: &str = "queued";

/// One request, as `--json` prints it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RequestRow {
    /// As in answers and logs; what `migrate` takes.
    pub id: String,
    /// The client's own name for it.
    pub label: String,
    /// `queued`, `prefill`, `decode` or `moving`.
    pub stage: String,
    /// Where it generates, or will.
    pub decode_instance: String,
    /// Where its prompt is computed; empty when that is the same.
    pub prefill_instance: String,
    /// Where it moves to; empty unless it moves.
    pub destination_instance: String,
    /// Tokens of the prompt.
    pub n_prompt_tokens: u32,
    /// Choices generated from it.
    pub n_choices: u32,
    /// Tokens generated, over all choices.
    pub n_output_tokens: u32,
    /// Bound on the tokens of each choice.
    pub max_tokens: u32,
    /// The epoch whose stream speaks.
    pub epoch: u32,
    /// Moves that have settled.
    pub n_moves: u32,
    /// Seconds since it came.
    pub age_seconds: f64,
}

impl From<RequestStatus> for RequestRow {
    fn from(status: RequestStatus) -> RequestRow {
        RequestRow {
            id: status.request_id,
            label: status.label,
            stage: status.stage,
            decode_instance: status.decode_instance,
            prefill_instance: status.prefill_instance,
            destination_instance: status.destination_instance,
            n_prompt_tokens: status.n_prompt_tokens,
            n_choices: status.n_choices.max(1),
            n_output_tokens: status.n_output_tokens,
            max_tokens: status.max_tokens,
            epoch: status.epoch,
            n_moves: status.n_moves,
            age_seconds: status.age_seconds,
        }
    }
}

impl RequestRow {
    /// Rows, oldest first.
    pub fn all(requests: Vec<RequestStatus>) -> Vec<RequestRow> {
        let mut rows: Vec<RequestRow> = requests.into_iter().map(RequestRow::from).collect();
        rows.sort_by(|a, b| b.age_seconds.total_cmp(&a.age_seconds).then_with(|| a.id.cmp(&b.id)));
        rows
    }

    /// Whether it changes its instance now.
    pub fn is_moving(&self) -> bool {
        self.stage == MOVING
    }

    /// Where it is, and where it goes.
    pub fn place(&self) -> String {
        let (from, to) = match self.stage.as_str() {
            MOVING => (&self.decode_instance, &self.destination_instance),
            "prefill" if !self.prefill_instance.is_empty() => (&self.prefill_instance, &self.decode_instance),
            "embed" => return or_dash(&self.prefill_instance),
            _ => return or_dash(&self.decode_instance),
        };
        format!("{} -> {}", or_dash(from), or_dash(to))
    }

    /// Tokens generated of those it may generate.
    pub fn tokens(&self) -> String {
        let most = u64::from(self.max_tokens) * u64::from(self.n_choices);
        format!("{}/{most}", self.n_output_tokens)
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.to_owned()
    }
}

/// The rows as a table.
pub fn table(rows: &[RequestRow]) -> String {
    let mut table = Table::new(&[
        "REQUEST", "STAGE", "INSTANCE", "TOKENS", "PROMPT", "CHOICES", "MOVES", "EPOCH", "AGE", "LABEL",
    ]);
    for row in rows {
        table.row(vec![
            row.id.clone(),
            row.stage.clone(),
            row.place(),
            row.tokens(),
            row.n_prompt_tokens.to_string(),
            row.n_choices.to_string(),
            row.n_moves.to_string(),
            row.epoch.to_string(),
            age(row.age_seconds),
            row.label.clone(),
        ]);
    }
    table.render()
}
