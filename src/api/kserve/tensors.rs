//! Tensors of the Open Inference Protocol to JSON values and back, in both of its forms: typed contents, and raw bytes in
//! little endian. What a tensor means is not known here.

use baton_proto::inference::infer_parameter::ParameterChoice;
use baton_proto::inference::model_infer_request::InferInputTensor;
use baton_proto::inference::model_infer_response::InferOutputTensor;
use baton_proto::inference::{InferParameter, InferTensorContents};
use serde_json::Value;

use super::super::error::ApiError;

/// Most elements of an input: text is one element, and options are few.
const MAX_ELEMENTS: u64 = 4096;

/// The elements of an input; `raw` holds them when the request uses raw contents.
pub(super) fn elements(tensor: &InferInputTensor, raw: Option<&[u8]>) -> Result<Vec<Value>, ApiError> {
    let n = n_elements(tensor)?;
    let values = match raw {
        Some(raw) => from_raw(tensor, raw)?,
        None => from_contents(tensor)?,
    };
    if values.len() as u64 != n {
        let found = format!("{} elements", values.len());
        return Err(wrong(
            tensor,
            &found,
            &format!("{n}, as its shape {:?} says", tensor.shape),
        ));
    }
    Ok(values)
}

fn n_elements(tensor: &InferInputTensor) -> Result<u64, ApiError> {
    let product = tensor.shape.iter().try_fold(1_u64, |product, &dimension| {
        product
            .checked_mul(u64::try_from(dimension).ok()?)
            .filter(|n| *n <= MAX_ELEMENTS)
    });
    product.ok_or_else(|| {
        let found = format!("of shape {:?}", tensor.shape);
        wrong(tensor, &found, &format!("at most {MAX_ELEMENTS} elements"))
    })
}

/// A wrong input, by name; names come from outside and are cut.
fn wrong(tensor: &InferInputTensor, found: &str, expected: &str) -> ApiError {
    let name: String = tensor.name.chars().take(64).collect();
    let message = format!("input {name} is {found}, expected {expected}");
    ApiError::field(name, message)
}

fn text(tensor: &InferInputTensor, bytes: Vec<u8>) -> Result<Value, ApiError> {
    String::from_utf8(bytes)
        .map(Value::String)
        .map_err(|_| wrong(tensor, "not UTF-8", "text"))
}

fn from_contents(tensor: &InferInputTensor) -> Result<Vec<Value>, ApiError> {
    let Some(contents) = tensor.contents.clone() else {
        return Ok(Vec::new());
    };
    fn all<T: Into<Value>>(list: Vec<T>) -> Vec<Value> {
        list.into_iter().map(Into::into).collect()
    }
    Ok(match tensor.datatype.as_str() {
        "BOOL" => all(contents.bool_contents),
        "INT8" | "INT16" | "INT32" => all(contents.int_contents),
        "INT64" => all(contents.int64_contents),
        "UINT8" | "UINT16" | "UINT32" => all(contents.uint_contents),
        "UINT64" => all(contents.uint64_contents),
        "FP32" => contents.fp32_contents.into_iter().map(float).collect(),
        "FP64" => all(contents.fp64_contents),
        "BYTES" => {
            let list = contents.bytes_contents.into_iter();
            list.map(|bytes| text(tensor, bytes)).collect::<Result<_, _>>()?
        }
        other => return Err(unknown_datatype(tensor, other)),
    })
}

/// The decimal that was meant: 0.1 as f32 is not 0.1 as f64.
fn float(number: f32) -> Value {
    number.to_string().parse::<f64>().unwrap_or(f64::NAN).into()
}

fn unknown_datatype(tensor: &InferInputTensor, datatype: &str) -> ApiError {
    let datatype: String = datatype.chars().take(16).collect();
    let expected = "BOOL, INT8 to INT64, UINT8 to UINT64, FP32, FP64 or BYTES";
    wrong(tensor, &format!("of datatype {datatype:?}"), expected)
}

fn from_raw(tensor: &InferInputTensor, raw: &[u8]) -> Result<Vec<Value>, ApiError> {
    fn numbers<const N: usize, T: Into<Value>>(
        tensor: &InferInputTensor,
        raw: &[u8],
        read: fn([u8; N]) -> T,
    ) -> Result<Vec<Value>, ApiError> {
        let (chunks, rest) = raw.as_chunks::<N>();
        match rest.is_empty() {
            true => Ok(chunks.iter().map(|chunk| read(*chunk).into()).collect()),
            false => Err(wrong(
                tensor,
                &format!("of {} bytes", raw.len()),
                &format!("{N} for each element"),
            )),
        }
    }
    match tensor.datatype.as_str() {
        "BOOL" => numbers(tensor, raw, |[byte]| byte != 0),
        "INT8" => numbers(tensor, raw, i8::from_le_bytes),
        "INT16" => numbers(tensor, raw, i16::from_le_bytes),
        "INT32" => numbers(tensor, raw, i32::from_le_bytes),
        "INT64" => numbers(tensor, raw, i64::from_le_bytes),
        "UINT8" => numbers(tensor, raw, u8::from_le_bytes),
        "UINT16" => numbers(tensor, raw, u16::from_le_bytes),
        "UINT32" => numbers(tensor, raw, u32::from_le_bytes),
        "UINT64" => numbers(tensor, raw, u64::from_le_bytes),
        "FP32" => numbers(tensor, raw, |bytes| float(f32::from_le_bytes(bytes))),
        "FP64" => numbers(tensor, raw, f64::from_le_bytes),
        "BYTES" => texts_from_raw(tensor, raw),
        other => Err(unknown_datatype(tensor, other)),
    }
}

fn texts_from_raw(tensor: &InferInputTensor, mut raw: &[u8]) -> Result<Vec<Value>, ApiError> {
    let mut values = Vec::new();
    while !raw.is_empty() {
        let element = raw.split_first_chunk().and_then(|(length, rest)| {
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            rest.split_at_checked(length)
        });
        let (element, rest) =
            element.ok_or_else(|| wrong(tensor, "cut short", "a length of 4 bytes before each element"))?;
        values.push(text(tensor, element.to_vec())?);
        raw = rest;
    }
    Ok(values)
}

/// A parameter's value; `None` when it holds none.
pub(super) fn parameter(parameter: InferParameter) -> Option<Value> {
    Some(match parameter.parameter_choice? {
        ParameterChoice::BoolParam(value) => value.into(),
        ParameterChoice::Int64Param(value) => value.into(),
        ParameterChoice::StringParam(value) => value.into(),
        ParameterChoice::DoubleParam(value) => value.into(),
        ParameterChoice::Uint64Param(value) => value.into(),
    })
}

/// What an output holds, in one dimension.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Elements {
    /// BYTES.
    Texts(Vec<String>),
    /// FP32.
    Floats(Vec<f32>),
    /// UINT32.
    Counts(Vec<u32>),
}

impl Elements {
    /// As an output with typed contents.
    pub(super) fn into_output(self, name: &str) -> InferOutputTensor {
        let default = InferTensorContents::default;
        let (datatype, n, contents) = match self {
            Elements::Texts(texts) => {
                let n = texts.len();
                let bytes_contents = texts.into_iter().map(String::into_bytes).collect();
                (
                    "BYTES",
                    n,
                    InferTensorContents {
                        bytes_contents,
                        ..default()
                    },
                )
            }
            Elements::Floats(fp32_contents) => {
                let n = fp32_contents.len();
                (
                    "FP32",
                    n,
                    InferTensorContents {
                        fp32_contents,
                        ..default()
                    },
                )
            }
            Elements::Counts(uint_contents) => {
                let n = uint_contents.len();
                (
                    "UINT32",
                    n,
                    InferTensorContents {
                        uint_contents,
                        ..default()
                    },
                )
            }
        };
        InferOutputTensor {
            name: name.to_owned(),
            datatype: datatype.to_owned(),
            shape: vec![n as i64],
            contents: Some(contents),
            ..InferOutputTensor::default()
        }
    }

    /// As JSON: the element where there is one, else a list.
    pub(super) fn into_json(self) -> Value {
        fn one_or_all<T: Into<Value>>(mut list: Vec<T>) -> Value {
            match list.len() {
                1 => list.remove(0).into(),
                _ => list.into_iter().map(Into::into).collect(),
            }
        }
        match self {
            Elements::Texts(texts) => one_or_all(texts),
            Elements::Floats(floats) => one_or_all(floats.into_iter().map(float).collect()),
            Elements::Counts(counts) => one_or_all(counts),
        }
    }
}

/// Moves the contents of outputs into their raw form, one entry for each.
pub(super) fn to_raw(outputs: &mut [InferOutputTensor]) -> Vec<Vec<u8>> {
    let raw = |output: &mut InferOutputTensor| {
        let contents = output.contents.take().unwrap_or_default();
        let mut bytes = Vec::new();
        for element in contents.bytes_contents {
            let length = u32::try_from(element.len()).expect("an answer is shorter than 4 GiB");
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&element);
        }
        bytes.extend(contents.fp32_contents.into_iter().flat_map(f32::to_le_bytes));
        bytes.extend(contents.uint_contents.into_iter().flat_map(u32::to_le_bytes));
        bytes
    };
    outputs.iter_mut().map(raw).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tensor(datatype: &str, shape: &[i64]) -> InferInputTensor {
        InferInputTensor {
            name: "x".to_owned(),
            datatype: datatype.to_owned(),
            shape: shape.to_vec(),
            ..InferInputTensor::default()
        }
    }

    fn with(datatype: &str, shape: &[i64], contents: InferTensorContents) -> InferInputTensor {
        InferInputTensor {
            contents: Some(contents),
            ..tensor(datatype, shape)
        }
    }

    #[test]
    fn both_forms_say_the_same() {
        let default = InferTensorContents::default;
        let bools = InferTensorContents {
            bool_contents: vec![true, false],
            ..default()
        };
        let floats = InferTensorContents {
            fp32_contents: vec![0.1],
            ..default()
        };
        let texts = InferTensorContents {
            bytes_contents: vec![b"h\xc3\xa9".to_vec(), Vec::new()],
            ..default()
        };
        type Case = (&'static str, &'static [i64], InferTensorContents, Vec<u8>, Value);
        let cases: [Case; 3] = [
            ("BOOL", &[2], bools, vec![1, 0], json!([true, false])),
            ("FP32", &[1, 1], floats, 0.1_f32.to_le_bytes().to_vec(), json!([0.1])),
            (
                "BYTES",
                &[2],
                texts,
                b"\x03\0\0\0h\xc3\xa9\0\0\0\0".to_vec(),
                json!(["hé", ""]),
            ),
        ];
        for (datatype, shape, contents, raw, expected) in cases {
            let typed = elements(&with(datatype, shape, contents), None).unwrap();
            assert_eq!(json!(typed), expected, "{datatype}");
            let raw = elements(&tensor(datatype, shape), Some(&raw)).unwrap();
            assert_eq!(json!(raw), expected, "{datatype} raw");
        }
        for (datatype, raw) in [
            ("INT16", vec![0xff, 0xff]),
            ("INT64", vec![0xff; 8]),
            ("INT8", vec![0xff]),
        ] {
            let value = elements(&tensor(datatype, &[1]), Some(&raw)).unwrap();
            assert_eq!(json!(value), json!([-1]), "{datatype}");
        }
        let value = elements(&tensor("UINT32", &[1]), Some(&[1, 1, 0, 0])).unwrap();
        assert_eq!(json!(value), json!([257]));
    }

    #[test]
    fn what_does_not_add_up_is_refused_by_name() {
        let cases: [(&str, &[i64], &[u8]); 9] = [
            ("BYTES", &[1], b"\x05\0\0\0hi"),
            ("BYTES", &[1], b"\x05\0"),
            ("BYTES", &[1], b"\xff\xff\xff\xffx"),
            ("BYTES", &[1], b"\x01\0\0\0\xff"),
            ("BYTES", &[2], b"\x01\0\0\0a"),
            ("INT32", &[1], b"abc"),
            ("FP16", &[1], b"ab"),
            ("BOOL", &[-1], b"a"),
            ("BOOL", &[1 << 40, 1 << 40], b"a"),
        ];
        for (datatype, shape, raw) in cases {
            let error = elements(&tensor(datatype, shape), Some(raw)).expect_err(datatype);
            assert!(error.message.starts_with("input x is "), "{error}");
            assert_eq!(error.param.as_deref(), Some("x"));
        }
        assert!(
            elements(&tensor("BYTES", &[1]), None).is_err(),
            "no contents are no elements"
        );
        assert_eq!(elements(&tensor("BYTES", &[0]), None), Ok(Vec::new()));
    }

    #[test]
    fn outputs_are_the_same_in_raw_form() {
        let mut outputs = [
            Elements::Texts(vec!["hé".into(), String::new()]).into_output("a"),
            Elements::Texts(vec!["x".into()]).into_output("b"),
            Elements::Floats(vec![-0.5]).into_output("c"),
            Elements::Counts(vec![1, 258]).into_output("d"),
        ];
        assert_eq!(outputs[0].shape, [2]);
        assert_eq!(
            (outputs[2].datatype.as_str(), outputs[3].datatype.as_str()),
            ("FP32", "UINT32")
        );
        let raw = to_raw(&mut outputs);
        let expected: [&[u8]; 4] = [
            b"\x03\0\0\0h\xc3\xa9\0\0\0\0",
            b"\x01\0\0\0x",
            &(-0.5_f32).to_le_bytes(),
            &[1, 0, 0, 0, 2, 1, 0, 0],
        ];
        assert_eq!(raw, expected);
        assert!(outputs.iter().all(|output| output.contents.is_none()));
    }
}
