//! `baton top`: a live view of a running cluster in the terminal, or one frame of it as text. It only looks.

mod draw;
mod snapshot;
mod terminal;
mod view;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use self::snapshot::{Rates, Snapshot};
use self::view::{Polled, View};
use crate::announce;
use crate::config::ConfigError;
use crate::ctl::CtlConfig;
use crate::ctl::client::{CallError, OperatorLink};

/// Columns of a frame as text when stdout is no terminal.
const TEXT_WIDTH: u16 = 140;

/// Whose cluster to show, and how.
#[derive(Clone, Debug)]
pub struct TopConfig {
    /// Whom to ask.
    pub ctl: CtlConfig,
    /// From one question to the next.
    pub interval: Duration,
    /// Print one frame as text, and end.
    pub once: bool,
}

/// Shows the cluster until it is told to end.
///
/// # Errors
/// A terminal that cannot be used, and with `once` a server that does not answer. A live view waits for its server.
pub async fn run(config: TopConfig) -> anyhow::Result<()> {
    let link = OperatorLink::open(&config.ctl)?;
    let server = config.ctl.server.to_string();
    let mut poller = Poller::new(link);
    if config.once {
        let text = once(&mut poller, &server, config.interval).await;
        announce::print(text.with_context(|| format!("scheduler at {server}"))?.trim_end());
        return Ok(());
    }
    if !std::io::stdout().is_terminal() {
        let message = "stdout is not a terminal; --once prints one frame as text".to_owned();
        return Err(ConfigError::Impossible(message).into());
    }
    let (polls, receiver) = mpsc::channel(1);
    let _polling = AbortOnDropHandle::new(tokio::spawn(poller.run(config.interval, polls)));
    terminal::show(View::new(server), receiver).await.context("terminal")
}

/// One frame, after two polls an interval apart: rates need both.
async fn once(poller: &mut Poller, server: &str, interval: Duration) -> Result<String, CallError> {
    poller.poll().await?;
    tokio::time::sleep(interval).await;
    let snapshot = poller.poll().await?;
    let mut view = View::new(server.to_owned());
    view.snapshot = Some(snapshot);
    let width = match std::io::stdout().is_terminal() {
        true => crossterm::terminal::size().map_or(TEXT_WIDTH, |(width, _)| width),
        false => TEXT_WIDTH,
    };
    Ok(view.to_text(width))
}

/// Asks again and again.
struct Poller {
    link: OperatorLink,
    rates: Rates,
    polled_at: Option<Instant>,
}

impl Poller {
    fn new(link: OperatorLink) -> Poller {
        Poller {
            link,
            rates: Rates::default(),
            polled_at: None,
        }
    }

    async fn poll(&mut self) -> Result<Snapshot, CallError> {
        let (instances, requests) = tokio::try_join!(self.link.instances(), self.link.requests_if_told())?;
        let now = Instant::now();
        let before = self.polled_at.replace(now);
        let seconds = before.map_or(0.0, |before| (now - before).as_secs_f64());
        Ok(self.rates.snapshot(seconds, instances, requests))
    }

    /// Polls until nobody listens. A view that is busy gets no second snapshot meanwhile.
    async fn run(mut self, every: Duration, polls: mpsc::Sender<Polled>) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let outcome = self.poll().await.map_err(|error| error.to_string());
            let at = Instant::now();
            if polls.send(Polled { at, outcome }).await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::cluster::RequestStatus;

    use super::*;
    use crate::config::{Address, Setting as _};
    use crate::ctl::tests::{FakeOperator, config, request};

    fn poller(server: Address) -> Poller {
        Poller::new(OperatorLink::open(&config(server, Some("s3cret"))).expect("a valid configuration"))
    }

    #[tokio::test]
    async fn one_frame_is_text_with_everything_in_it() {
        let operator = FakeOperator::with_two_instances();
        let moving = RequestStatus {
            destination_instance: "decode-1".into(),
            ..request("r-1", "moving", 2.0)
        };
        operator.0.lock().requests = Some(vec![moving]);
        let server = operator.start().await;
        let text = once(
            &mut poller(server.clone()),
            &server.to_string(),
            Duration::from_millis(1),
        )
        .await
        .expect("a frame");
        assert!(
            text.starts_with(&format!(
                "baton top  {server}\n2 instances   1 requests, 0 queued, 1 moving"
            )),
            "{text}"
        );
        for part in ["prefill-0", "decode-0", "decode-0 -> decode-1", "client r-1", "STEPS/S"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // Two polls of one life: rates, though they are 0.
        let line = text
            .lines()
            .find(|line| line.starts_with("decode-0"))
            .expect("its line");
        assert_eq!(line.split_whitespace().nth(7), Some("0.0"));
    }

    #[tokio::test]
    async fn a_server_that_comes_back_is_found_again() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound");
        let server = Address::parse(&port.to_string()).expect("an address");
        drop(listener);
        let (polls, mut receiver) = mpsc::channel(1);
        let _polling = AbortOnDropHandle::new(tokio::spawn(poller(server).run(Duration::from_millis(5), polls)));
        let first = receiver.recv().await.expect("a poll");
        let reason = first.outcome.expect_err("nobody listens");
        assert!(!reason.contains('\n') && reason.contains("refused"), "{reason}");

        let listener = tokio::net::TcpListener::bind(port).await.expect("the same port");
        let serving = FakeOperator::with_two_instances().serve(listener);
        let found = tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                if let Ok(snapshot) = receiver.recv().await.expect("a poll").outcome {
                    return snapshot;
                }
            }
        });
        assert_eq!(found.await.expect("found again").instances.len(), 2);
        serving.abort();
    }
}
