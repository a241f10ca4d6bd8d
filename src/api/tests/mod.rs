//! The APIs over real sockets, in front of a null model or of a script of events. What an id means here: ids 0 to 255 are
//! bytes, 256 ends a text, 257 begins one, 258 and 259 are unknown to the tokenizer.

mod chat;
mod choices;
mod completions;
mod embeddings;
mod failures;
mod grpc;
mod kserve;
mod operations;
mod prompts;
mod sampling;
mod stop_strings;
mod timelines;
mod tools;
mod vllm_engine;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use baton_engine::text::{ChatTemplate, Tokenizer};
use baton_scheduler::block_events::BlockEvent;
use baton_scheduler::ids::{Nanos, TokenId};
use baton_scheduler::request::{Failure, Finish, Token};
use baton_scheduler::timeline::Timeline;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::metrics::MetricsRegistry;
use super::{ApiOptions, ApiState, DefaultSampling, OutputParsers, ServeOptions, ServedModel, router, serve};
use crate::door::{DoorEvent, DoorLoad, EmbedError, Generator, Rejection, RequestStream, Submission, Usage};
use crate::null_generator::{NullGenerator, NullOptions};

pub(super) const EOS: TokenId = 256;
pub(super) const BOS: TokenId = 257;

/// A byte-level tokenizer whose ids are bytes.
pub(super) fn byte_tokenizer() -> Tokenizer {
    let mut vocab = Map::new();
    for code in 0..0x200 {
        let character = char::from_u32(code).unwrap();
        if let Some(byte) = super::served_model::byte_level_byte(character) {
            vocab.insert(character.to_string(), json!(byte));
        }
    }
    let added = |id: TokenId, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let begin = json!({"SpecialToken": {"id": "<|begin|>", "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(EOS, "<|end|>"), added(BOS, "<|begin|>")],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, sequence("A")],
            "pair": [begin, sequence("A"), sequence("B")],
            "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [BOS], "tokens": ["<|begin|>"]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(&serde_json::to_vec(&tokenizer).unwrap()).unwrap()
}

const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}\
    {% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}\
    <{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

pub(super) fn byte_model() -> ServedModel {
    let templates = [("default".to_owned(), TEMPLATE.to_owned())];
    ServedModel {
        names: vec!["bytes".to_owned()],
        root: "/models/bytes".to_owned(),
        folder: None,
        tokenizer: Some(byte_tokenizer()),
        chat_template: Some(ChatTemplate::new(&templates, Some("<|begin|>"), Some("<|end|>")).unwrap()),
        eos_token_ids: vec![EOS],
        default_sampling: DefaultSampling::default(),
        max_model_len: 1000,
        vocab_size: 260,
        hidden_size: 4,
        dtype: "f32".to_owned(),
        parsers: OutputParsers::default(),
    }
}

/// Ids of a text, and the end after it.
pub(super) fn says(text: &str) -> Vec<TokenId> {
    text.bytes().map(TokenId::from).chain([EOS]).collect()
}

/// A null model that says `text` at once.
pub(super) fn null(text: &str) -> Arc<NullGenerator> {
    Arc::new(NullGenerator::new(NullOptions {
        token_ids: says(text),
        ..NullOptions::default()
    }))
}

/// A null model that never ends by itself: a token every millisecond.
pub(super) fn endless() -> Arc<NullGenerator> {
    let token_every = Duration::from_millis(1);
    Arc::new(NullGenerator::new(NullOptions {
        token_ids: vec![97],
        token_every,
        ..NullOptions::default()
    }))
}

/// Plays a fixed list of events for every request, and remembers what was submitted.
#[derive(Default)]
pub(super) struct Script {
    pub(super) events: Vec<DoorEvent>,
    pub(super) rejection: Option<Rejection>,
    /// Changes of cached blocks; without them nobody may subscribe.
    pub(super) blocks: Option<Vec<Vec<BlockEvent>>>,
    pub(super) submissions: Mutex<Vec<Submission>>,
    pub(super) not_ready: Mutex<Option<String>>,
    /// Each event after the first `n_free` costs a permit; none is given out by itself.
    pub(super) gate: Option<Arc<Semaphore>>,
    pub(super) n_free: usize,
}

impl Script {
    pub(super) fn of(events: Vec<DoorEvent>) -> Arc<Script> {
        Arc::new(Script {
            events,
            ..Script::default()
        })
    }

    /// Tokens of `ids`, then their end; `finish` is that of the only choice.
    pub(super) fn ids(n_prompt: u32, ids: &[TokenId], finish: Finish) -> Vec<DoorEvent> {
        let usage = Usage {
            n_prompt_tokens: n_prompt,
            n_completion_tokens: ids.len() as u32,
            n_cached_tokens: n_prompt / 2,
        };
        let tokens = (0..).zip(ids).map(|(index, &id)| Script::token(0, index, id));
        let ended = DoorEvent::Ended {
            finish,
            usage,
            timeline: Timeline::default(),
        };
        tokens
            .chain([DoorEvent::ChoiceFinished { choice: 0, finish }, ended])
            .collect()
    }

    pub(super) fn token(choice: u32, index: u32, id: TokenId) -> DoorEvent {
        let logprobs = None;
        DoorEvent::Token {
            choice,
            token: Token { index, id, logprobs },
        }
    }

    pub(super) fn last(&self) -> Submission {
        self.submissions.lock().last().expect("something was submitted").clone()
    }
}

impl Generator for Script {
    fn submit(&self, submission: Submission) -> BoxFuture<'_, Result<RequestStream, Rejection>> {
        self.submissions.lock().push(submission);
        if let Some(rejection) = self.rejection.clone() {
            return async { Err(rejection) }.boxed();
        }
        let (sender, stream) = RequestStream::channel(1);
        let (events, gate, n_free) = (self.events.clone(), self.gate.clone(), self.n_free);
        tokio::spawn(play(sender, events, gate, n_free));
        async { Ok(stream) }.boxed()
    }

    fn embed(&self, submission: Submission) -> BoxFuture<'_, Result<Vec<f32>, EmbedError>> {
        // Longer prompts have smaller embeddings, and each begins with its first token.
        let (first, n_tokens) = (submission.request.prompt_ids[0], submission.request.prompt_ids.len());
        self.submissions.lock().push(submission);
        let rejection = self.rejection.clone();
        let failed = self.events.iter().find_map(|event| match event {
            DoorEvent::Failed(failure) => Some(failure.clone()),
            _ => None,
        });
        async move {
            match (rejection, failed) {
                (Some(rejection), _) => Err(rejection.into()),
                (None, Some(failure)) => Err(failure.into()),
                (None, None) => Ok(vec![first as f32, 0.0, -3.0, 1.0 / n_tokens as f32]),
            }
        }
        .boxed()
    }

    fn kv_events(&self) -> Result<BoxStream<'static, Vec<BlockEvent>>, Failure> {
        match self.blocks.clone() {
            Some(blocks) => Ok(Box::pin(futures::stream::select(
                futures::stream::iter(blocks),
                futures::stream::pending(),
            ))),
            None => Err(Failure::Busy("too many listen".into())),
        }
    }

    fn load(&self) -> DoorLoad {
        DoorLoad {
            not_ready: self.not_ready.lock().clone(),
            ..DoorLoad::default()
        }
    }

    fn now(&self) -> Nanos {
        Nanos::ZERO
    }
}

async fn play(sender: mpsc::Sender<DoorEvent>, events: Vec<DoorEvent>, gate: Option<Arc<Semaphore>>, n_free: usize) {
    for (idx, event) in events.into_iter().enumerate() {
        if let Some(gate) = gate.as_ref().filter(|_| idx >= n_free) {
            gate.acquire().await.unwrap().forget();
        }
        if sender.send(event).await.is_err() {
            return;
        }
    }
}

/// A server on a free port.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) state: ApiState,
    pub(super) stopping: CancellationToken,
    pub(super) task: JoinHandle<std::io::Result<()>>,
    pub(super) client: reqwest::Client,
}

pub(super) async fn start(generator: Arc<dyn Generator>) -> Server {
    start_with(generator, byte_model(), ApiOptions::default(), ServeOptions::default()).await
}

/// A server whose answers are as good as endless: only a cancel ends them.
pub(super) async fn start_endless() -> (Arc<NullGenerator>, Server) {
    let generator = endless();
    let model = ServedModel {
        max_model_len: 1 << 30,
        ..byte_model()
    };
    let server = start_with(generator.clone(), model, ApiOptions::default(), ServeOptions::default()).await;
    (generator, server)
}

pub(super) async fn start_with(
    generator: Arc<dyn Generator>,
    model: ServedModel,
    options: ApiOptions,
    serve_options: ServeOptions,
) -> Server {
    let stopping = CancellationToken::new();
    let state = ApiState::new(generator, model, options, MetricsRegistry::default(), stopping.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = state.clone();
    let task = tokio::spawn(async move {
        serve(
            listener,
            router(served.clone(), axum::Router::new()),
            &served,
            serve_options,
        )
        .await
    });
    Server {
        address,
        state,
        stopping,
        task,
        client: reqwest::Client::new(),
    }
}

impl Server {
    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(self.url(path)).json(body).send().await.unwrap()
    }

    pub(super) async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    /// Posts and expects 200.
    pub(super) async fn ask(&self, path: &str, body: Value) -> Value {
        let response = self.post(path, &body).await;
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Posts, expects 200 and a stream that ends with `[DONE]`; gives the events before it.
    pub(super) async fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = json!(true);
        let response = self.post(path, &body).await;
        assert_eq!(response.status(), 200);
        assert!(
            response.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        let text = response.text().await.unwrap();
        let text = text
            .strip_suffix("data: [DONE]\n\n")
            .unwrap_or_else(|| panic!("no [DONE] in {text}"));
        let events = text.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        events
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }

    /// Posts and expects an error of that status; gives its inner object.
    pub(super) async fn refused(&self, path: &str, body: &Value, status: u16) -> Value {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), status, "{body}");
        let answer: Value = response.json().await.unwrap();
        assert_eq!(answer["error"]["code"], status);
        assert!(
            answer["error"]["type"].is_string() && answer["error"].get("param").is_some(),
            "{answer}"
        );
        answer["error"].clone()
    }

    /// One sample of `/metrics`, by its whole name with labels.
    pub(super) async fn metric(&self, sample: &str) -> Option<f64> {
        let text = self.get("/metrics").await.text().await.unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '))?;
        Some(line.parse().unwrap())
    }
}

/// Waits until `reached` holds of the null model's counts; a test that hangs here has found a request nobody cancelled.
pub(super) async fn until(generator: &NullGenerator, reached: impl Fn(&crate::null_generator::NullCounts) -> bool) {
    let mut counts = generator.counts();
    let waited = tokio::time::timeout(Duration::from_secs(20), counts.wait_for(reached)).await;
    assert!(waited.is_ok(), "not within 20 s: {:?}", *generator.counts().borrow());
}

pub(super) fn ask(content: &str) -> Value {
    json!({"model": "bytes", "messages": [{"role": "user", "content": content}]})
}

pub(super) const CHAT: &str = "/v1/chat/completions";
pub(super) const COMPLETIONS: &str = "/v1/completions";
