//! What the engine service says of the model and of the load.

use std::time::SystemTime;

use baton_proto::vllm::grpc::engine as wire;
use serde_json::{Map, Value};

use super::super::ApiState;
use super::super::error::{ApiError, ErrorKind};
use super::super::served_model::ServedModel;
use super::super::unix_time_s;

pub(super) fn model(model: &ServedModel) -> Result<wire::GetModelInfoResponse, ApiError> {
    let config = match &model.folder {
        None => None,
        Some(folder) => folder
            .file("config.json")
            .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?,
    };
    let config: Value = config
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let id = |name: &str| config[name].as_i64().and_then(|id| i32::try_from(id).ok()).unwrap_or(0);
    let architectures = config["architectures"].as_array().into_iter().flatten();
    let limit = model.max_model_len;
    Ok(wire::GetModelInfoResponse {
        model_path: model.root.clone(),
        is_generation: true,
        max_context_length: limit,
        vocab_size: model.vocab_size,
        supports_vision: false,
        served_model_name: model.name().to_owned(),
        tokenizer_path: if model.tokenizer.is_some() {
            model.root.clone()
        } else {
            String::new()
        },
        model_type: config["model_type"].as_str().unwrap_or_default().to_owned(),
        architectures: architectures.filter_map(Value::as_str).map(str::to_owned).collect(),
        eos_token_ids: model.eos_token_ids.iter().map(|id| *id as i32).collect(),
        pad_token_id: id("pad_token_id"),
        bos_token_id: id("bos_token_id"),
        max_req_input_len: i32::try_from(limit).unwrap_or(i32::MAX),
        default_sampling_params_json: default_sampling(model),
    })
}

fn default_sampling(model: &ServedModel) -> String {
    let defaults = model.default_sampling;
    // The shortest decimal, which is the one in the model's file.
    let number = |value: Option<f32>| value.and_then(|value| serde_json::from_str::<Value>(&value.to_string()).ok());
    let all = [
        ("temperature", number(defaults.temperature)),
        ("top_k", defaults.top_k.map(Value::from)),
        ("top_p", number(defaults.top_p)),
        ("repetition_penalty", number(defaults.repetition_penalty)),
    ];
    let set: Map<String, Value> = all
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect();
    match set.is_empty() {
        true => String::new(),
        false => Value::Object(set).to_string(),
    }
}

pub(super) fn server(state: &ApiState) -> wire::GetServerInfoResponse {
    let load = state.generator().load();
    wire::GetServerInfoResponse {
        active_requests: u32::try_from(load.n_running + load.n_queued).unwrap_or(u32::MAX),
        is_paused: state.is_stopping(),
        uptime_seconds: unix_time_s().saturating_sub(state.inner.created_s) as f64,
        server_type: "baton".to_owned(),
        data_parallel_size: 1,
        ..wire::GetServerInfoResponse::default()
    }
}

/// The whole cluster as one rank.
pub(super) fn loads(state: &ApiState) -> wire::GetLoadsResponse {
    let load = state.generator().load();
    let count = |n: u64| i32::try_from(n).unwrap_or(i32::MAX);
    let tokens = |blocks: fn(&crate::door::InstanceView) -> u32| {
        let instances = load.instances.iter();
        instances
            .map(|instance| instance.n_tokens_of(blocks(instance)))
            .sum::<u64>()
    };
    let (used, total) = (
        tokens(|instance| instance.n_blocks_held()),
        tokens(|instance| instance.n_blocks_total),
    );
    let (running, waiting) = (load.n_running as u64, load.n_queued as u64);
    let one = wire::SchedulerLoad {
        num_running_reqs: count(running),
        num_waiting_reqs: count(waiting),
        num_total_reqs: count(running + waiting),
        num_used_tokens: count(used),
        max_total_num_tokens: count(total),
        token_usage: load.kv_usage(),
        ..wire::SchedulerLoad::default()
    };
    wire::GetLoadsResponse {
        timestamp: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        dp_rank_count: 1,
        loads: vec![one],
    }
}
