//! Folders as they come: whole, sharded, embedded, and broken in every way we could think of.

use std::path::Path;

use baton_kernels::DType;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::*;
use crate::model::weights::{RequiredTensor, check_tensors, weight_specs};
use crate::model::{CpuLoadOptions, DecoderLimits, LoadFormat, LoadOptions, load_cpu};

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "eos_token_id": 7
    })
}

fn required(config: &Value) -> Vec<RequiredTensor> {
    let config = ModelConfig::parse(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    weight_specs(&config)
        .into_iter()
        .flat_map(|(_, parts)| parts)
        .flat_map(|part| part.tensors)
        .collect()
}

/// A safetensors file of small numbers, each exact in every dtype.
fn safetensors_of(tensors: &[RequiredTensor], dtype: Dtype) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|tensor| {
            let n: usize = tensor.shape.iter().product();
            let value = |i: usize| ((i * 37 % 11) as f32 - 5.0) / 64.0;
            (0..n)
                .flat_map(|i| match dtype {
                    Dtype::F32 => value(i).to_le_bytes().to_vec(),
                    Dtype::F16 => half::f16::from_f32(value(i)).to_le_bytes().to_vec(),
                    _ => half::bf16::from_f32(value(i)).to_le_bytes().to_vec(),
                })
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|(tensor, data)| {
        (
            tensor.name.clone(),
            TensorView::new(dtype, tensor.shape.clone(), data).unwrap(),
        )
    });
    safetensors::serialize(views, None).unwrap()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new(config: &Value) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("config.json", config.to_string());
        folder
    }

    fn whole(dtype: Dtype) -> Folder {
        let folder = Folder::new(&config());
        folder.write("model.safetensors", safetensors_of(&required(&config()), dtype));
        folder
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.path().join(name), bytes).unwrap();
    }

    /// Opens the folder and everything a server would.
    fn open_all(&self) -> Result<ModelFolder, ModelError> {
        let folder = ModelFolder::open(self.0.path())?;
        folder.tokenizer()?;
        folder.chat_template()?;
        check_tensors(&folder.config, &folder.open_weights()?)?;
        Ok(folder)
    }

    /// The one-line refusal; it names a file of the folder and has all `parts`.
    fn refusal(&self, parts: &[&str]) {
        let message = self.open_all().unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        for part in parts {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}

#[test]
fn stored_dtypes_give_the_same_numbers() {
    let logits = [Dtype::F32, Dtype::F16, Dtype::BF16].map(|dtype| {
        let on_disk = Folder::whole(dtype);
        let folder = on_disk.open_all().unwrap();
        let options = CpuLoadOptions {
            model: LoadOptions {
                dtype: DType::F32,
                block_size: 16,
                limits: DecoderLimits {
                    max_batch_tokens: 16,
                    max_model_len: 64,
                },
                packed_dir: None,
                load_format: LoadFormat::Safetensors,
            },
            n_threads: 1,
            isa: None,
            n_kv_blocks: 4,
        };
        let mut decoder = load_cpu(&folder, &options, &mut |_, _| {}).unwrap();
        let sequence = crate::forward::StepSequence {
            tokens: crate::forward::NewTokens::Known(&[1, 2, 3]),
            start_pos: 0,
            block_tables: &[vec![2]],
            rope_variant: 0,
            logits: crate::forward::LogitsWanted::Last,
        };
        crate::forward::ForwardPass::step(&mut decoder, &[sequence], &mut |_, _| {})
            .unwrap()
            .logits
            .to_vec()
    });
    assert!(logits[0].iter().any(|&logit| logit != 0.0));
    assert_eq!(logits[0], logits[1]);
    assert_eq!(logits[0], logits[2]);
}

#[test]
fn a_folder_without_tokenizer_serves_ids_only() {
    let folder = Folder::whole(Dtype::BF16).open_all().unwrap();
    assert!(folder.tokenizer().unwrap().is_none());
    assert!(folder.chat_template().unwrap().is_none());
    assert_eq!(folder.eos_token_ids(None), [7]);
}

#[test]
fn generation_config_wins_over_config_and_its_own_template_file_over_all() {
    let folder = Folder::whole(Dtype::BF16);
    folder.write("generation_config.json", r#"{"eos_token_id": [9, 8]}"#);
    folder.write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "old"}]}"#,
    );
    folder.write("chat_template.jinja", "{{ bos_token }}new");
    let folder = folder.open_all().unwrap();
    assert_eq!(folder.eos_token_ids(None), [8, 9]);
    let rendered = folder
        .chat_template()
        .unwrap()
        .unwrap()
        .render(&json!([]), None, true, &serde_json::Map::new());
    assert_eq!(rendered.unwrap(), "<s>new");
}

#[test]
fn shards_are_found_by_the_index() {
    let tensors = required(&config());
    let folder = Folder::new(&config());
    let (first, second) = tensors.split_at(5);
    folder.write("a.safetensors", safetensors_of(first, Dtype::BF16));
    folder.write("b.safetensors", safetensors_of(second, Dtype::F32));
    let shard = |tensor: &RequiredTensor| {
        if first.contains(tensor) {
            "a.safetensors"
        } else {
            "b.safetensors"
        }
    };
    let weight_map: serde_json::Map<String, Value> = tensors
        .iter()
        .map(|tensor| (tensor.name.clone(), json!(shard(tensor))))
        .collect();
    folder.write(
        "model.safetensors.index.json",
        json!({"weight_map": weight_map}).to_string(),
    );
    folder.open_all().unwrap();

    std::fs::remove_file(folder.0.path().join("b.safetensors")).unwrap();
    folder.refusal(&["b.safetensors", "shard with tensor", "none"]);
    folder.write("b.safetensors", safetensors_of(&second[1..], Dtype::F32));
    folder.refusal(&["b.safetensors", &second[0].name, "index.json", "none"]);
    for shard in [
        json!("../b.safetensors"),
        json!("/etc/passwd"),
        json!(""),
        json!(".."),
        json!(3),
    ] {
        let index = json!({"weight_map": {"model.norm.weight": shard}});
        folder.write("model.safetensors.index.json", index.to_string());
        folder.refusal(&["index.json", "weight_map", "a file name", "model.norm.weight"]);
    }
    folder.write("model.safetensors.index.json", "{}");
    folder.refusal(&["index.json", "weight_map"]);
}

#[test]
fn wrong_tensors_are_named() {
    let tensors = required(&config());
    let folder = Folder::new(&config());
    folder.refusal(&["expected model.safetensors or model.safetensors.index.json"]);
    folder.write("model.safetensors", safetensors_of(&tensors[1..], Dtype::BF16));
    folder.refusal(&["model.safetensors", "model.embed_tokens.weight", "[32, 16]", "none"]);
    let mut misshapen = tensors.clone();
    misshapen[2].shape = vec![16, 15];
    folder.write("model.safetensors", safetensors_of(&misshapen, Dtype::BF16));
    folder.refusal(&["model.safetensors", &misshapen[2].name, "[16, 16]", "[16, 15]"]);

    let bytes = vec![0; 32 * 16];
    let view = TensorView::new(Dtype::I8, vec![32, 16], &bytes).unwrap();
    let file = safetensors::serialize([("model.embed_tokens.weight", view)], None).unwrap();
    folder.write("model.safetensors", file);
    folder.refusal(&[
        "model.safetensors",
        "model.embed_tokens.weight",
        "F32, F16 or BF16",
        "I8",
    ]);

    let whole = safetensors_of(&tensors, Dtype::BF16);
    folder.write("model.safetensors", &whole[..whole.len() - 1]);
    folder.refusal(&["model.safetensors", "not a whole safetensors file"]);
    folder.write("model.safetensors", "");
    folder.refusal(&["model.safetensors", "not a whole safetensors file"]);
}

#[test]
fn broken_small_files_are_named() {
    let missing = ModelFolder::open("/nonexistent/model").unwrap_err().to_string();
    assert!(missing.starts_with("/nonexistent/model: "), "{missing}");
    for (file, content, part) in [
        ("config.json", "{", "EOF"),
        ("generation_config.json", "[]", "JSON object"),
        ("generation_config.json", r#"{"top_p": 7}"#, "top_p"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", r#"{"bos_token": 4}"#, "bos_token"),
        (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "default"}]}"#,
            "chat_template",
        ),
        (
            "tokenizer_config.json",
            r#"{"chat_template": "{% if %}"}"#,
            "does not parse",
        ),
        ("chat_template.jinja", "{{", "does not parse"),
    ] {
        let folder = Folder::whole(Dtype::BF16);
        folder.write(file, content);
        folder.refusal(&[part]);
    }
    let folder = Folder::whole(Dtype::BF16);
    std::fs::remove_file(folder.0.path().join("config.json")).unwrap();
    folder.refusal(&["config.json", "none"]);
}

#[test]
fn a_longer_context_than_the_models_is_refused() {
    let folder = Folder::whole(Dtype::BF16).open_all().unwrap();
    let options = CpuLoadOptions {
        model: LoadOptions {
            dtype: DType::F32,
            block_size: 16,
            limits: DecoderLimits {
                max_batch_tokens: 16,
                max_model_len: 65,
            },
            packed_dir: None,
            load_format: LoadFormat::Safetensors,
        },
        n_threads: 1,
        isa: None,
        n_kv_blocks: 4,
    };
    let message = load_cpu(&folder, &options, &mut |_, _| {}).err().unwrap().to_string();
    assert!(
        message.contains("max_position_embeddings") && message.contains("65"),
        "{message}"
    );
}

#[test]
fn fingerprints_tell_models_apart() {
    use crate::model::ModelFingerprint;
    let of = |folder: &Folder| {
        let folder = folder.open_all().unwrap();
        ModelFingerprint::of_files(&folder, &folder.open_weights().unwrap())
    };
    let folder = Folder::whole(Dtype::BF16);
    assert_eq!(of(&folder), of(&Folder::whole(Dtype::BF16)));
    assert_ne!(of(&folder), of(&Folder::whole(Dtype::F32)));
    let mut bytes = safetensors_of(&required(&config()), Dtype::BF16);
    *bytes.last_mut().unwrap() ^= 1;
    let changed = Folder::new(&config());
    changed.write("model.safetensors", bytes);
    assert_ne!(of(&folder), of(&changed));
}
