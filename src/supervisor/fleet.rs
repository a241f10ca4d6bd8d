//! Keeps one child of `serve` alive: starts, watches, restarts after the policy's pause, stops when told.

use std::time::{Duration, Instant};

use baton_scheduler::ids::{InstanceId, Nanos};
use tokio_util::sync::CancellationToken;

use super::child::{ChildCommand, ChildProcess, exit_of};
use super::restart::{Exit, GiveUp, RestartPolicy, Verdict};
use crate::config::LogFormat;

/// A child that will not be started again.
#[derive(Debug, thiserror::Error)]
#[error("instance {id} {}: {message}", reason(.why))]
pub struct GaveUp {
    /// The instance.
    pub id: InstanceId,
    /// Why it was given up.
    pub why: GiveUp,
    /// What the child said last, or else how it ended.
    pub message: String,
}

fn reason(why: &GiveUp) -> String {
    match why {
        GiveUp::Configuration => "refused its configuration".to_owned(),
        GiveUp::NeverReady(n_starts) => format!("ended {n_starts} times before it was ready"),
    }
}

/// What happens to a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildEvent {
    /// It was started, for the n-th time counted from 1.
    Started {
        /// Starts so far.
        n_starts: u32,
        /// Process id.
        pid: u32,
    },
    /// It said that it is ready.
    Ready,
    /// It ended, not asked to.
    Ended,
}

/// One child and how to treat it.
pub struct Supervision<'a> {
    /// The instance.
    pub id: &'a InstanceId,
    /// The command of the n-th start, counted from 1.
    pub command: &'a dyn Fn(u32) -> ChildCommand,
    /// When to start again.
    pub policy: RestartPolicy,
    /// How long it may take to end when asked to.
    pub stop_grace: Duration,
    /// The form of its log lines.
    pub log_format: LogFormat,
}

impl Supervision<'_> {
    /// Runs the child until `stop`, or until the policy gives it up. `on_event` sees what happens.
    ///
    /// Poll this on a thread that lives as long as the process: the kernel takes the end of the thread that started a
    /// child for the end of its parent.
    pub async fn run(mut self, stop: &CancellationToken, mut on_event: impl FnMut(ChildEvent)) -> Result<(), GaveUp> {
        let origin = Instant::now();
        let now = || Nanos(u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX));
        let id = self.id;
        let mut n_starts = 0;
        loop {
            n_starts += 1;
            let (exit, message) = match ChildProcess::start(id, &(self.command)(n_starts), self.log_format) {
                Err(error) => (Exit::NotStarted, format!("cannot start: {error}")),
                Ok((mut child, mut on_ready)) => {
                    let pid = child.pid().unwrap_or(0);
                    tracing::info!(instance = %id, pid, n_starts, "instance started");
                    on_event(ChildEvent::Started { n_starts, pid });
                    let mut is_ready = false;
                    let status = loop {
                        tokio::select! {
                            status = child.wait() => break status,
                            ready = &mut on_ready, if !is_ready => {
                                is_ready = true;
                                if ready.is_ok() {
                                    self.policy.on_ready(now());
                                    on_event(ChildEvent::Ready);
                                }
                            }
                            () = stop.cancelled() => {
                                match child.stop(self.stop_grace).await {
                                    Ok(status) => tracing::info!(instance = %id, %status, "instance stopped"),
                                    Err(error) => tracing::error!(instance = %id, %error, "instance cannot be stopped"),
                                }
                                return Ok(());
                            }
                        }
                    };
                    on_event(ChildEvent::Ended);
                    match status {
                        Ok(status) => {
                            let message = child.last_error().await.unwrap_or_else(|| status.to_string());
                            if status.success() {
                                tracing::info!(instance = %id, pid, "instance ended in order");
                            } else {
                                tracing::error!(instance = %id, pid, %status, "instance ended");
                            }
                            (exit_of(status), message)
                        }
                        Err(error) => (Exit::NotStarted, format!("cannot be waited for: {error}")),
                    }
                }
            };
            match self.policy.on_exit(now(), exit) {
                Verdict::GiveUp(why) => {
                    return Err(GaveUp {
                        id: id.clone(),
                        why,
                        message,
                    });
                }
                Verdict::RestartAfter(pause) => {
                    let pause = Duration::from_nanos(pause.0);
                    tracing::warn!(instance = %id, pause_ms = pause.as_millis(), "instance will be restarted: {message}");
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = stop.cancelled() => return Ok(()),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    fn shell(script: &'static str) -> impl Fn(u32) -> ChildCommand {
        move |n_starts| ChildCommand {
            program: "/bin/sh".into(),
            arguments: ["-c", script, "sh", &n_starts.to_string()].map(Into::into).to_vec(),
            secrets: Vec::new(),
            ready_lines: vec!["baton worker ready: decode-0".into()],
        }
    }

    async fn supervise(
        command: &dyn Fn(u32) -> ChildCommand,
        stop: &CancellationToken,
        on_event: impl FnMut(ChildEvent),
    ) -> Result<(), GaveUp> {
        let (policy, log_format) = (RestartPolicy::of_serve(), LogFormat::Text);
        let id = &InstanceId::new("decode-0");
        let stop_grace = Duration::from_secs(20);
        let supervision = Supervision {
            id,
            command,
            policy,
            stop_grace,
            log_format,
        };
        tokio::time::timeout(Duration::from_secs(60), supervision.run(stop, on_event))
            .await
            .expect("ends in time")
    }

    /// `read` returns when the lifeline ends, so such a child never outlives the test.
    const READY_CHILD: &str = "echo 'baton worker ready: decode-0'; read ignored";

    #[tokio::test]
    async fn a_killed_child_is_started_again_and_stopped_at_the_end() {
        let stop = CancellationToken::new();
        let events = RefCell::new(Vec::new());
        let mut pid = 0;
        let outcome = supervise(&shell(READY_CHILD), &stop, |event| {
            match &event {
                ChildEvent::Started { pid: started, .. } => pid = *started,
                ChildEvent::Ready if events.borrow().len() == 1 => {
                    let pid = Pid::from_raw(pid.cast_signed()).expect("a process id");
                    kill_process(pid, Signal::KILL).expect("the child runs");
                }
                ChildEvent::Ready => stop.cancel(),
                ChildEvent::Ended => {}
            }
            events.borrow_mut().push(event);
        })
        .await;
        outcome.expect("stopped, not given up");
        let events = events.into_inner();
        assert!(
            matches!(
                events[..],
                [
                    ChildEvent::Started { n_starts: 1, pid: first },
                    ChildEvent::Ready,
                    ChildEvent::Ended,
                    ChildEvent::Started { n_starts: 2, pid: second },
                    ChildEvent::Ready,
                ] if first != second
            ),
            "{events:?}"
        );
    }

    #[tokio::test]
    async fn a_refused_configuration_ends_supervision_with_the_childs_words() {
        let script = "echo 'config.json: no such file' >&2; echo 'error: model folder /x: no config.json' >&2; exit 2";
        let stop = CancellationToken::new();
        let gave_up = supervise(&shell(script), &stop, |_| {}).await.expect_err("given up");
        assert_eq!(
            gave_up.to_string(),
            "instance decode-0 refused its configuration: model folder /x: no config.json"
        );
    }

    #[tokio::test]
    async fn a_child_that_never_gets_ready_is_given_up_after_three_starts() {
        let stop = CancellationToken::new();
        let mut n_started = 0;
        let gave_up = supervise(&shell("exit 7"), &stop, |event| {
            n_started += u32::from(matches!(event, ChildEvent::Started { .. }));
        })
        .await;
        let message = gave_up.expect_err("given up").to_string();
        assert_eq!(n_started, 3);
        assert_eq!(
            message,
            "instance decode-0 ended 3 times before it was ready: exit status: 7"
        );
    }

    #[tokio::test]
    async fn a_missing_program_is_given_up() {
        let command = |_| ChildCommand {
            program: "/no/such/program".into(),
            arguments: vec![],
            secrets: vec![],
            ready_lines: vec![],
        };
        let message = supervise(&command, &CancellationToken::new(), |_| {})
            .await
            .expect_err("given up")
            .to_string();
        assert!(message.contains("cannot start"), "{message}");
    }

    #[tokio::test]
    async fn a_child_that_ignores_sigterm_is_killed_after_the_grace() {
        let script = "trap '' TERM; echo 'baton worker ready: decode-0'; while read ignored; do :; done; sleep 100";
        let (id, command, stop) = (InstanceId::new("decode-0"), shell(script), CancellationToken::new());
        let supervision = Supervision {
            id: &id,
            command: &command,
            policy: RestartPolicy::of_serve(),
            stop_grace: Duration::from_millis(50),
            log_format: LogFormat::Text,
        };
        let run = supervision.run(&stop, |event| {
            if event == ChildEvent::Ready {
                stop.cancel();
            }
        });
        tokio::time::timeout(Duration::from_secs(30), run)
            .await
            .expect("killed in time")
            .expect("stopped");
    }
}
