//! From a sequence's events in the engine to its front door: for prompts computed here, and for what follows a handoff.

use baton_proto::cluster::{self, generate_event::Event};
use baton_proto::convert::token_to_wire;
use baton_scheduler::request::TokenLogprobs;
use baton_scheduler::timeline::Moment;

use super::outlet::{Gone, Outlet, Used};
use crate::engine::{EngineEvent, Timed};

pub(super) fn prompt_logprobs(logprobs: &[TokenLogprobs]) -> cluster::PromptLogprobs {
    cluster::PromptLogprobs {
        tokens: logprobs.iter().map(Into::into).collect(),
    }
}

/// Passes one event on. `Ok(true)` after the last.
pub(super) async fn forward(outlet: &Outlet, timed: Timed<EngineEvent>, used: &mut Used) -> Result<bool, Gone> {
    match timed.event {
        EngineEvent::PrefillStarted { n_cached_tokens } => {
            used.n_cached_tokens = n_cached_tokens as u32;
            outlet.moment_at(Moment::PrefillStarted, timed.at.into()).await?;
        }
        EngineEvent::PromptLogprobs(logprobs) => outlet.send(Event::PromptLogprobs(prompt_logprobs(&logprobs))).await?,
        EngineEvent::Token { choice, token } => {
            if !std::mem::replace(&mut used.has_token, true) {
                outlet.moment_at(Moment::PrefillFinished, timed.at.into()).await?;
                outlet.moment_at(Moment::Joined, timed.at.into()).await?;
            }
            outlet.send(Event::Token(token_to_wire(choice, &token))).await?;
        }
        EngineEvent::ChoiceFinished { choice, finish } => outlet.choice_finished(choice, finish).await?,
        EngineEvent::Preempted => {}
        EngineEvent::Finished(finish) => {
            outlet.finish(finish, *used).await;
            return Ok(true);
        }
        EngineEvent::Failed(failure) => {
            outlet.fail(&failure, "", *used).await;
            return Ok(true);
        }
    }
    Ok(false)
}
