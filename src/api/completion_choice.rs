//! One choice of a completions answer as it grows: text, echoed prompt, ids and log-probabilities, cut into pieces.

use std::sync::Arc;

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::TokenLogprobs;

use super::ApiState;
use super::logprobs::{CompletionLogprobs, PromptLogprobsBody, TokenWriter, prompt_logprobs};
use super::output::{ChoiceEnd, OutputToken};

/// What the client asked to be told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reports {
    /// Alternatives per token; `None` reports no log-probabilities.
    pub(super) n_top: Option<u8>,
    /// Alternatives per prompt token in `prompt_logprobs`.
    pub(super) n_prompt_top: Option<u8>,
    /// Ids of prompt and output.
    pub(super) token_ids: bool,
    /// Tokens as `token_id:N`.
    pub(super) tokens_as_ids: bool,
    /// The generated token is not shown: only the prompt was to be scored.
    pub(super) only_prompt: bool,
}

/// Part of a choice, or all of it.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) logprobs: Option<CompletionLogprobs>,
    pub(super) token_ids: Option<Vec<TokenId>>,
    pub(super) prompt_token_ids: Option<Arc<[TokenId]>>,
}

/// Adds outputs to pieces.
pub(super) struct ChoiceWriter {
    state: ApiState,
    prompt_ids: Arc<[TokenId]>,
    /// The prompt's text until it has been written.
    echo: Option<String>,
    reports: Reports,
    prompt_logprobs: Vec<TokenLogprobs>,
    has_begun: bool,
    next_offset: usize,
}

impl ChoiceWriter {
    pub(super) fn new(
        state: &ApiState,
        prompt_ids: Arc<[TokenId]>,
        echo: Option<String>,
        reports: Reports,
    ) -> ChoiceWriter {
        let state = state.clone();
        let prompt_logprobs = Vec::new();
        ChoiceWriter {
            state,
            prompt_ids,
            echo,
            reports,
            prompt_logprobs,
            has_begun: false,
            next_offset: 0,
        }
    }

    /// An empty piece that goes on where the last one ended.
    pub(super) fn piece(&self) -> Piece {
        Piece {
            logprobs: self
                .reports
                .n_top
                .map(|_| CompletionLogprobs::continued(self.next_offset)),
            token_ids: self.reports.token_ids.then(Vec::new),
            ..Piece::default()
        }
    }

    /// Takes the prompt's log-probabilities, of each token after the first.
    pub(super) fn prompt_logprobs(&mut self, logprobs: Vec<TokenLogprobs>) {
        self.prompt_logprobs = logprobs;
    }

    /// Adds a token.
    pub(super) fn token(&mut self, piece: &mut Piece, output: &OutputToken) {
        self.begin(piece);
        if self.reports.only_prompt {
            return;
        }
        piece.text.push_str(&output.text);
        if let Some(ids) = &mut piece.token_ids {
            ids.push(output.token.id);
        }
        if let (Some(logprobs), Some(n_top)) = (&mut piece.logprobs, self.reports.n_top) {
            let writer = TokenWriter::new(&self.state, self.reports.tokens_as_ids);
            logprobs.push(writer, output.token.id, output.token.logprobs.as_ref(), n_top);
            self.next_offset = logprobs.next_offset();
        }
    }

    /// Adds the end.
    pub(super) fn ended(&mut self, piece: &mut Piece, end: ChoiceEnd) -> ChoiceEnd {
        self.begin(piece);
        if !self.reports.only_prompt {
            piece.text.push_str(&end.text);
        }
        end
    }

    /// What comes before the first token: the prompt, as far as it was asked for.
    fn begin(&mut self, piece: &mut Piece) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        piece.prompt_token_ids = self.reports.token_ids.then(|| self.prompt_ids.clone());
        let Some(text) = self.echo.take() else { return };
        piece.text.push_str(&text);
        if let (Some(logprobs), Some(n_top)) = (&mut piece.logprobs, self.reports.n_top) {
            let writer = TokenWriter::new(&self.state, self.reports.tokens_as_ids);
            let known = std::iter::once(None).chain(self.prompt_logprobs.iter().map(Some));
            self.prompt_ids
                .iter()
                .zip(known)
                .for_each(|(&id, known)| logprobs.push(writer, id, known, n_top));
            self.next_offset = logprobs.next_offset();
        }
    }

    /// vLLM's `prompt_logprobs`, when asked for.
    pub(super) fn prompt_logprobs_body(&self) -> Option<PromptLogprobsBody> {
        let writer = TokenWriter::new(&self.state, self.reports.tokens_as_ids);
        let n_top = self.reports.n_prompt_top?;
        Some(prompt_logprobs(writer, &self.prompt_ids, &self.prompt_logprobs, n_top))
    }
}
