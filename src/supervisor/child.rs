//! One child process: started with a lifeline on stdin, its output passed on with its name, stopped within a bound.
//! Whether it is started again is decided elsewhere.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use baton_scheduler::ids::InstanceId;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::restart::Exit;
use crate::config::{LogFormat, Secret, setting_variables};

/// A longer line of a child is cut into pieces of this many bytes.
const LINE_LIMIT_BYTES: u64 = 64 << 10;

/// How long the last output of a dead child may take to arrive: a process it left behind may hold the pipes open.
const LAST_OUTPUT_WAIT: Duration = Duration::from_millis(250);

/// What to start.
#[derive(Clone, Debug)]
pub struct ChildCommand {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Settings for its environment, where no process list shows them: name of the variable, value.
    pub secrets: Vec<(String, Secret)>,
    /// What it prints when it is ready, each of its instances a line.
    pub ready_lines: Vec<String>,
}

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct ChildProcess {
    child: Child,
    _lifeline: Option<ChildStdin>,
    readers: JoinSet<()>,
    last_error: Arc<Mutex<Option<String>>>,
}

impl ChildProcess {
    /// Starts `command` as instance `id`. The receiver fires when the child has printed all its
    /// ready lines.
    pub fn start(
        id: &InstanceId,
        command: &ChildCommand,
        log_format: LogFormat,
    ) -> io::Result<(ChildProcess, oneshot::Receiver<()>)> {
        let mut builder = Command::new(&command.program);
        builder.arg0("baton").args(&command.arguments);
        // The parent has resolved every setting, and the child's flags name them all.
        for name in setting_variables() {
            builder.env_remove(name);
        }
        builder.envs(command.secrets.iter().map(|(name, secret)| (name, secret.expose())));
        builder
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // Its own group, so that Ctrl-C in a terminal reaches the parent alone, which then stops things in order.
        builder.process_group(0);
        let mut child = builder.spawn()?;

        let last_error = Arc::new(Mutex::new(None));
        let (ready, on_ready) = oneshot::channel();
        let mut readers = JoinSet::new();
        let writer = LineWriter {
            id: id.clone(),
            log_format,
        };
        if let Some(stdout) = child.stdout.take() {
            let ready_lines = command.ready_lines.clone();
            let mut awaited = ready_lines.clone();
            let mut ready = Some(ready);
            readers.spawn(for_each_line(BufReader::new(stdout), writer.clone(), move |line| {
                let is_ready = ready_lines.iter().any(|ready_line| ready_line == line);
                awaited.retain(|ready_line| ready_line != line);
                if let Some(ready) = ready.take_if(|_| is_ready && awaited.is_empty()) {
                    // The supervisor stops listening once it has decided to stop the child.
                    let _ = ready.send(());
                }
                !is_ready
            }));
        }
        if let Some(stderr) = child.stderr.take() {
            let last_error = last_error.clone();
            readers.spawn(for_each_line(BufReader::new(stderr), writer, move |line| {
                if let Some(message) = line.strip_prefix("error: ") {
                    *last_error.lock() = Some(message.to_owned());
                }
                true
            }));
        }
        let lifeline = child.stdin.take();
        Ok((
            ChildProcess {
                child,
                _lifeline: lifeline,
                readers,
                last_error,
            },
            on_ready,
        ))
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for its end. Safe to cancel and call again.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// The last line that began with `error: `, once all output has come or been given up.
    pub async fn last_error(&mut self) -> Option<String> {
        let all_read = async { while self.readers.join_next().await.is_some() {} };
        let _given_up = tokio::time::timeout(LAST_OUTPUT_WAIT, all_read).await;
        self.last_error.lock().clone()
    }

    /// Asks it to end, and kills it after `grace`.
    pub async fn stop(&mut self, grace: Duration) -> io::Result<ExitStatus> {
        // The id is valid until `wait` has collected the child, which only this task does.
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            kill_process(pid, Signal::TERM)?;
        }
        if let Ok(status) = tokio::time::timeout(grace, self.child.wait()).await {
            return status;
        }
        self.child.kill().await?;
        self.child.wait().await
    }
}

/// How the restart policy sees `status`.
pub fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::NotStarted,
    }
}

#[derive(Clone, Debug)]
struct LineWriter {
    id: InstanceId,
    log_format: LogFormat,
}

impl LineWriter {
    /// The line with the instance's name, as it goes to stderr. JSON stays JSON, whatever the child printed.
    fn line(&self, line: &str) -> String {
        match (self.log_format, line.strip_prefix('{')) {
            (LogFormat::Text, _) => format!("{} | {line}\n", self.id),
            (LogFormat::Json, Some(rest)) => format!("{{\"instance\":\"{}\",{rest}\n", self.id),
            (LogFormat::Json, None) => {
                let object = serde_json::json!({"instance": self.id.to_string(), "level": "ERROR", "message": line});
                format!("{object}\n")
            }
        }
    }
}

/// Reads `reader` to its end; writes the lines that `wanted` wants to stderr.
async fn for_each_line(
    mut reader: impl AsyncBufRead + Unpin,
    writer: LineWriter,
    mut wanted: impl FnMut(&str) -> bool,
) {
    let mut stderr = tokio::io::stderr();
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        match (&mut reader)
            .take(LINE_LIMIT_BYTES)
            .read_until(b'\n', &mut buffer)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&buffer);
        let line = line.trim_end_matches(['\n', '\r']);
        if wanted(line) {
            // A stderr that cannot be written is no reason to stop a child.
            let _ = stderr.write_all(writer.line(line).as_bytes()).await;
            let _ = stderr.flush().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_carry_the_instance_and_json_stays_json() {
        let writer = |log_format| LineWriter {
            id: InstanceId::new("decode-0"),
            log_format,
        };
        assert_eq!(writer(LogFormat::Text).line("loaded"), "decode-0 | loaded\n");
        for printed in [r#"{"level":"INFO"}"#, "thread 'main' panicked at \"x\""] {
            let line = writer(LogFormat::Json).line(printed);
            let object: serde_json::Value = serde_json::from_str(&line).expect(&line);
            assert_eq!(object["instance"], "decode-0");
        }
    }

    #[tokio::test]
    async fn endless_lines_are_cut_not_collected() {
        let long = "x".repeat(3 * LINE_LIMIT_BYTES as usize);
        let mut lengths = Vec::new();
        let writer = LineWriter {
            id: InstanceId::new("x"),
            log_format: LogFormat::Text,
        };
        for_each_line(BufReader::new(long.as_bytes()), writer, |line| {
            lengths.push(line.len() as u64);
            false
        })
        .await;
        assert_eq!(lengths, [LINE_LIMIT_BYTES; 3]);
    }
}
