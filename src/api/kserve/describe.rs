//! What the server says of itself and of its model in the Open Inference Protocol.

use baton_proto::inference as wire;
use baton_proto::inference::DataType;
use baton_proto::inference::model_metadata_response::TensorMetadata;

use super::super::served_model::ServedModel;
use super::outputs::OutputKind;
use super::query::{TEXT_INPUT, VERSION};

/// The platform of every model here.
const PLATFORM: &str = "baton";

/// A described tensor: name, datatype of requests and of configurations, elements, whether it may be left out.
type Row = (&'static str, &'static str, DataType, i64, bool);

/// Inputs that generic clients look for. Every option of `/v1/completions` is an input too.
const INPUTS: [Row; 10] = [
    (TEXT_INPUT, "BYTES", DataType::TypeString, 1, false),
    ("stream", "BOOL", DataType::TypeBool, 1, true),
    ("sampling_parameters", "BYTES", DataType::TypeString, 1, true),
    ("exclude_input_in_output", "BOOL", DataType::TypeBool, 1, true),
    ("max_tokens", "INT32", DataType::TypeInt32, 1, true),
    ("temperature", "FP32", DataType::TypeFp32, 1, true),
    ("top_p", "FP32", DataType::TypeFp32, 1, true),
    ("top_k", "INT32", DataType::TypeInt32, 1, true),
    ("seed", "INT64", DataType::TypeInt64, 1, true),
    ("stop", "BYTES", DataType::TypeString, -1, true),
];

const OUTPUTS: [Row; 6] = [
    (OutputKind::Text.name(), "BYTES", DataType::TypeString, -1, false),
    (OutputKind::FinishReason.name(), "BYTES", DataType::TypeString, -1, true),
    (
        OutputKind::CumulativeLogprob.name(),
        "FP32",
        DataType::TypeFp32,
        -1,
        true,
    ),
    (OutputKind::Logprobs.name(), "BYTES", DataType::TypeString, -1, true),
    (
        OutputKind::NumInputTokens.name(),
        "UINT32",
        DataType::TypeUint32,
        1,
        true,
    ),
    (
        OutputKind::NumOutputTokens.name(),
        "UINT32",
        DataType::TypeUint32,
        -1,
        true,
    ),
];

pub(super) fn server() -> wire::ServerMetadataResponse {
    wire::ServerMetadataResponse {
        name: "baton".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: ["model_configuration", "generate", "binary_tensor_data", "parameters"]
            .map(str::to_owned)
            .to_vec(),
    }
}

pub(super) fn metadata(model: &ServedModel) -> wire::ModelMetadataResponse {
    let tensor = |(name, datatype, _, n, _): &Row| TensorMetadata {
        name: (*name).to_owned(),
        datatype: (*datatype).to_owned(),
        shape: vec![*n],
    };
    wire::ModelMetadataResponse {
        name: model.name().to_owned(),
        versions: vec![VERSION.to_owned()],
        platform: PLATFORM.to_owned(),
        inputs: INPUTS.iter().map(tensor).collect(),
        outputs: OUTPUTS.iter().map(tensor).collect(),
        properties: [
            ("dtype".to_owned(), model.dtype.clone()),
            ("max_model_len".to_owned(), model.max_model_len.to_string()),
            ("root".to_owned(), model.root.clone()),
        ]
        .into(),
    }
}

pub(super) fn config(model: &ServedModel) -> wire::ModelConfig {
    let input = |(name, _, data_type, n, optional): &Row| wire::ModelInput {
        name: (*name).to_owned(),
        data_type: (*data_type).into(),
        dims: vec![*n],
        optional: *optional,
    };
    let output = |(name, _, data_type, n, _): &Row| wire::ModelOutput {
        name: (*name).to_owned(),
        data_type: (*data_type).into(),
        dims: vec![*n],
    };
    wire::ModelConfig {
        name: model.name().to_owned(),
        platform: PLATFORM.to_owned(),
        backend: PLATFORM.to_owned(),
        max_batch_size: 0,
        input: INPUTS.iter().map(input).collect(),
        output: OUTPUTS.iter().map(output).collect(),
        model_transaction_policy: Some(wire::ModelTransactionPolicy { decoupled: true }),
        ..wire::ModelConfig::default()
    }
}
