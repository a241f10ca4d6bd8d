//! The prompts of one HTTP request as one stream of outputs, each marked with its prompt, and that stream as events.

use std::ops::ControlFlow;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, SelectAll};
use futures::{Stream, StreamExt as _};

use super::ApiState;
use super::error::{ApiError, ErrorKind};
use super::output::{Job, Output, OutputStream};
use super::sse::PING;
use super::timeline_body::TimelineBody;
use crate::door::Usage;

/// One output of one prompt.
#[derive(Debug)]
pub(super) struct Item {
    /// Position of the prompt in the request.
    pub(super) prompt: usize,
    /// What came.
    pub(super) output: Result<Output, ApiError>,
    /// Counts so far, of all choices of that prompt.
    pub(super) usage: Usage,
    /// How long its parts took, with its last output.
    pub(super) timeline: Option<TimelineBody>,
}

/// All prompts of a request. Dropping it cancels those that run.
pub(super) struct Outputs {
    prompts: SelectAll<BoxStream<'static, Item>>,
}

enum Source {
    Waiting(ApiState, Box<Job>),
    Running(Box<OutputStream>),
    Failed,
}

impl Outputs {
    /// Starts one request per job. Returns once the first is admitted; the others are admitted while outputs are read, so
    /// that none stands finished and unread while another still waits.
    pub(super) async fn start(state: &ApiState, jobs: Vec<Job>) -> Result<Outputs, ApiError> {
        let mut jobs = jobs.into_iter();
        let first = jobs
            .next()
            .ok_or_else(|| ApiError::new(ErrorKind::Internal, "a request without prompts"))?;
        let first = Source::Running(Box::new(OutputStream::start(state, first).await?));
        let rest = jobs.map(|job| Source::Waiting(state.clone(), Box::new(job)));
        let prompts = std::iter::once(first).chain(rest).enumerate();
        Ok(Outputs {
            prompts: prompts.map(|(prompt, source)| items(prompt, source).boxed()).collect(),
        })
    }

    /// The next output of any prompt; `None` once all have ended.
    pub(super) async fn next(&mut self) -> Option<Item> {
        self.prompts.next().await
    }

    /// The next output of any prompt, where the end has not been seen yet.
    pub(super) async fn required(&mut self) -> Result<Item, ApiError> {
        self.next()
            .await
            .ok_or_else(|| ApiError::new(ErrorKind::Internal, "the request's outputs ended without an end"))
    }

    /// Waits for the first output, at most `patience`: an error that comes that early is still a status. What has not come
    /// by then goes on as events.
    pub(super) async fn first(mut self, patience: Duration) -> Result<(Option<Item>, Outputs), ApiError> {
        match tokio::time::timeout(patience, self.next()).await {
            Ok(Some(Item { output: Err(error), .. })) => Err(error),
            Ok(first) => Ok((first, self)),
            Err(_) => Ok((None, self)),
        }
    }

    /// Events as `write` makes them of each output; it breaks with the last. While nothing has come yet, a ping every
    /// `ping_interval`.
    pub(super) fn into_events(
        self,
        first: Option<Item>,
        ping_interval: Duration,
        write: impl FnMut(Item) -> ControlFlow<Bytes, Bytes> + Send + 'static,
    ) -> impl Stream<Item = Bytes> + Send + 'static {
        let is_silent = first.is_none();
        let state = Some((self, first, is_silent, write));
        futures::stream::unfold(state, move |state| async move {
            let (mut outputs, mut first, mut is_silent, mut write) = state?;
            loop {
                let item = match first.take() {
                    Some(item) => Some(item),
                    None if is_silent => match tokio::time::timeout(ping_interval, outputs.next()).await {
                        Ok(item) => item,
                        Err(_) => return Some((PING, Some((outputs, None, true, write)))),
                    },
                    None => outputs.next().await,
                };
                is_silent = false;
                match write(item?) {
                    ControlFlow::Break(bytes) => return Some((bytes, None)),
                    // An output that says nothing yet.
                    ControlFlow::Continue(bytes) if bytes.is_empty() => {}
                    ControlFlow::Continue(bytes) => return Some((bytes, Some((outputs, None, false, write)))),
                }
            }
        })
    }
}

fn items(prompt: usize, source: Source) -> impl Stream<Item = Item> + Send {
    futures::stream::unfold(source, move |mut source| async move {
        loop {
            match source {
                Source::Waiting(state, job) => match OutputStream::start(&state, *job).await {
                    Ok(running) => source = Source::Running(Box::new(running)),
                    Err(error) => {
                        let item = Item {
                            prompt,
                            output: Err(error),
                            usage: Usage::default(),
                            timeline: None,
                        };
                        return Some((item, Source::Failed));
                    }
                },
                Source::Running(mut running) => {
                    let output = running.next().await?;
                    let is_last = matches!(output, Ok(Output::Finished(_)));
                    let item = Item {
                        prompt,
                        output,
                        usage: running.usage(),
                        timeline: is_last.then(|| TimelineBody::of(running.timeline())).flatten(),
                    };
                    return Some((item, Source::Running(running)));
                }
                Source::Failed => return None,
            }
        }
    })
}
