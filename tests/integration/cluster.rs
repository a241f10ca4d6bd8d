//! Starts `baton` processes on free ports and asks them; everything ends with the value that holds it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use baton_proto::cluster::operator_client::OperatorClient;
use baton_proto::cluster::{InstanceStatus, ListInstancesRequest};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Long enough for a slow machine that runs other tests; a test that meets it has failed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A file of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A folder that all tests of this run share, for packed weights.
fn cache_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache")
}

/// A running process with the address it announced.
pub struct Process {
    child: Child,
    pub url: String,
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BATON_")) {
        command.env_remove(name);
    }
    if matches!(arguments.first(), Some(&("serve" | "scheduler" | "worker"))) {
        command.env("BATON_LOG_LEVEL", "warn");
    }
    command
        .args(arguments)
        .env("XDG_CACHE_HOME", cache_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command
}

impl Process {
    /// Starts `baton` with `arguments` and waits for its ready line.
    pub async fn start(arguments: &[&str]) -> Process {
        Process::start_with(arguments, &[], Stdio::inherit()).await
    }

    /// The same, with more in its environment and with its log going to `stderr`.
    pub async fn start_with(arguments: &[&str], variables: &[(&str, &str)], stderr: Stdio) -> Process {
        let mut command = command(arguments);
        command.envs(variables.iter().copied());
        let mut child = command.stderr(stderr).spawn().expect("baton starts");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let waiting = async {
            loop {
                match lines.next_line().await.expect("stdout is readable") {
                    Some(line) if line.contains("ready: ") => return line,
                    Some(_) => {}
                    None => panic!("baton {arguments:?} ended before it was ready"),
                }
            }
        };
        let line = tokio::time::timeout(PATIENCE, waiting).await.expect("ready in time");
        let url = line.rsplit(' ').next().expect("a line has words").to_owned();
        // Keeps the pipe open and empty.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Process { child, url }
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("the process runs")
    }

    /// Waits for the process's end.
    pub async fn wait(&mut self) -> std::process::ExitStatus {
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("ends in time")
            .expect("is waited for")
    }
}

/// Runs `baton` to its end; answers exit code, stdout and stderr.
pub async fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = command(arguments)
        .stderr(Stdio::piped())
        .output()
        .await
        .expect("baton runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A server under test: `baton serve`, or a scheduler whose workers are started one by one.
pub struct Cluster {
    pub door_url: String,
    /// The process behind the URL, when the cluster is its owner.
    pub door: Option<Process>,
    pub http: reqwest::Client,
}

/// One token as reported: id and log-probability, exactly as the server wrote it.
pub type Answer = Vec<(u32, f64)>;

impl Cluster {
    /// `baton serve` on a free port.
    pub async fn serve(arguments: &[&str]) -> Cluster {
        let mut all = vec!["serve", "--port", "0", "--threads", "1"];
        all.extend(arguments);
        let door = Process::start(&all).await;
        let cluster = Cluster::of(door.url.clone());
        Cluster {
            door: Some(door),
            ..cluster
        }
    }

    /// A cluster whose processes others hold.
    pub fn of(door_url: String) -> Cluster {
        let http = reqwest::Client::builder().timeout(PATIENCE).build().expect("a client");
        Cluster {
            door_url,
            door: None,
            http,
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.door_url)
    }

    /// Posts JSON; answers status and JSON.
    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self
            .http
            .post(self.url(path))
            .json(body)
            .send()
            .await
            .expect("an answer");
        let status = response.status().as_u16();
        (status, response.json().await.expect("JSON"))
    }

    /// Completes token ids and answers every generated token with its log-probability.
    pub async fn complete(&self, prompt: &[u32], options: &Value) -> Answer {
        let mut body = json!({ "prompt": prompt, "logprobs": 1, "return_token_ids": true, "ignore_eos": true });
        merge(&mut body, options);
        let (status, answer) = self.post("/v1/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        let choice = &answer["choices"][0];
        let ids = choice["token_ids"]
            .as_array()
            .unwrap_or_else(|| panic!("no token_ids in {answer}"));
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("token_logprobs");
        assert_eq!(ids.len(), logprobs.len());
        let number = |value: &Value| value.as_f64().expect("a number");
        ids.iter()
            .zip(logprobs)
            .map(|(id, logprob)| (id.as_u64().expect("an id") as u32, number(logprob)))
            .collect()
    }

    /// What an operator talks to.
    pub fn operator(&self) -> OperatorClient<tonic::transport::Channel> {
        let channel = tonic::transport::Endpoint::from_shared(self.door_url.clone())
            .expect("a URL")
            .connect_lazy();
        OperatorClient::new(channel)
    }

    /// The instances as operators see them.
    pub async fn instances(&self) -> Vec<InstanceStatus> {
        self.operator()
            .list_instances(ListInstancesRequest {})
            .await
            .expect("an answer")
            .into_inner()
            .instances
    }

    /// The process id of an instance.
    pub async fn pid(&self, instance: &str) -> u32 {
        let instances = self.instances().await;
        let joins = instances.iter().filter_map(|status| status.join.as_ref());
        joins
            .into_iter()
            .find(|join| join.instance_id == instance)
            .unwrap_or_else(|| panic!("no {instance}"))
            .pid
    }

    /// A counter of an instance, as last reported.
    pub async fn counter(&self, instance: &str, name: &str) -> u64 {
        let instances = self.instances().await;
        let of_name = |status: &&InstanceStatus| status.join.as_ref().is_some_and(|join| join.instance_id == instance);
        let Some(status) = instances.iter().find(of_name) else {
            return 0;
        };
        let load = status.load.as_ref().expect("a load");
        *load
            .counters
            .get(name)
            .unwrap_or_else(|| panic!("{instance} reports no {name}"))
    }

    /// Waits until `holds` of the instances' reports.
    pub async fn until(&self, what: &str, mut holds: impl FnMut(&[InstanceStatus]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let instances = self.instances().await;
            if holds(&instances) {
                return;
            }
            assert!(Instant::now() < deadline, "never {what}: {instances:#?}");
            tokio::task::yield_now().await;
        }
    }

    /// Waits until a counter of an instance satisfies `holds`: reports lag behind events by up to a tenth of a second.
    pub async fn until_counter(&self, instance: &str, name: &str, holds: impl Fn(u64) -> bool) {
        self.until(&format!("{name} of {instance}"), |instances| {
            instances
                .iter()
                .filter(|status| status.join.as_ref().is_some_and(|join| join.instance_id == instance))
                .filter_map(|status| status.load.as_ref()?.counters.get(name))
                .any(|&value| holds(value))
        })
        .await;
    }

    /// Waits until every instance is idle, and asserts that its ledger is whole: every block free or cached.
    pub async fn until_idle_and_whole(&self) {
        self.until("idle with a whole ledger", |instances| {
            instances.iter().all(|status| {
                let (Some(join), Some(load)) = (&status.join, &status.load) else {
                    return false;
                };
                let idle = load.n_running == 0 && load.n_waiting == 0 && load.n_prefill_tokens_pending == 0;
                idle && load.ledger_whole && load.n_blocks_free + load.n_blocks_cached == join.n_blocks_total
            })
        })
        .await;
    }
}

/// Adds the fields of `more` to `body`.
pub fn merge(body: &mut Value, more: &Value) {
    let fields = body.as_object_mut().expect("an object");
    for (name, value) in more.as_object().expect("an object") {
        fields.insert(name.clone(), value.clone());
    }
}

/// Sends a signal.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("the process is there");
}

/// A folder with the config.json of a Llama without weights, for `--load-format dummy`.
pub fn dummy_model(name: &str, n_layers: u32, hidden: u32) -> PathBuf {
    dummy_model_with(name, n_layers, hidden, &json!({}))
}

/// The same with other fields, or more of them.
pub fn dummy_model_with(name: &str, n_layers: u32, hidden: u32, more: &Value) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models").join(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": n_layers, "num_attention_heads": hidden / 64,
        "num_key_value_heads": hidden / 128, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2
    });
    merge(&mut config, more);
    // Tests of one run may write it at the same time: the same bytes, put in place in one move.
    static N_WRITTEN: AtomicU32 = AtomicU32::new(0);
    let unique = (std::process::id(), N_WRITTEN.fetch_add(1, Ordering::Relaxed));
    let temporary = folder.join(format!("config.{}.{}.tmp", unique.0, unique.1));
    std::fs::write(&temporary, config.to_string()).expect("written");
    std::fs::rename(&temporary, folder.join("config.json")).expect("moved");
    folder
}

/// Token ids that look random and are the same in every run.
pub fn prompt(seed: u32, n_tokens: usize) -> Vec<u32> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % 2000) as u32 + 10
    };
    (0..n_tokens).map(|_| next()).collect()
}
