//! The answer of one choice as a chat message: reasoning, content and tool calls, taken out of its text as it comes.

use std::sync::Arc;

use baton_scheduler::ids::TokenId;
use serde::Serialize;
use uuid::Uuid;

use super::parsers::{OutputParsers, ToolCalls};
use super::reasoning::{Reasoned, ReasoningParser, is_opened_by};
use super::tool_calls::{Piece, ToolCallFormat, ToolCallParser};
use super::tools::OfferedTools;

/// What the answers of a request are parsed for.
#[derive(Clone, Debug, Default)]
pub struct MessageShape {
    /// `Some` parts reasoning from the answer; whether the prompt has opened it.
    reasoning: Option<bool>,
    shows_reasoning: bool,
    calls: Option<(ToolCallFormat, OfferedTools)>,
}

impl MessageShape {
    /// What a model with `parsers` may answer to `prompt`, which tells of `tools`.
    pub fn new(
        parsers: &OutputParsers,
        prompt: &str,
        tools: Option<&OfferedTools>,
        shows_reasoning: bool,
    ) -> MessageShape {
        let calls = match parsers.tool_calls {
            ToolCalls::Parsed(format) => tools.map(|tools| (format, tools.clone())),
            ToolCalls::Unknown | ToolCalls::InContent => None,
        };
        MessageShape {
            reasoning: parsers.has_reasoning.then(|| is_opened_by(prompt)),
            shows_reasoning,
            calls,
        }
    }

    /// Whether anything is looked for.
    pub fn is_parsed(&self) -> bool {
        self.reasoning.is_some() || self.calls.is_some()
    }

    /// Whether the answers begin inside reasoning.
    pub fn is_in_reasoning(&self) -> bool {
        self.reasoning == Some(true)
    }

    /// Special tokens that must be in the text.
    pub fn shown_special_tokens(&self, parsers: &OutputParsers) -> Arc<[TokenId]> {
        let reasoning = self.reasoning.iter().flat_map(|_| &*parsers.reasoning_markers);
        let calls = self.calls.iter().flat_map(|_| &*parsers.tool_markers);
        reasoning.chain(calls).copied().collect()
    }

    /// A parser of one answer.
    pub fn parser(&self) -> MessageParser {
        MessageParser {
            reasoning: self.reasoning.map(ReasoningParser::new),
            shows_reasoning: self.shows_reasoning,
            calls: self.calls.as_ref().map(|(format, tools)| Calls {
                format: *format,
                parser: ToolCallParser::new(*format, tools.names.clone()),
                limit: if tools.may_be_parallel { u32::MAX } else { 1 },
                n: 0,
            }),
        }
    }
}

/// What became known with a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MessagePart {
    /// More of the reasoning.
    pub reasoning: String,
    /// More of the content.
    pub content: String,
    /// More of calls, one entry for each.
    pub calls: Vec<CallPart>,
}

/// More of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CallPart {
    index: u32,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    begins: Option<CallBegins>,
    function: FunctionPart,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct CallBegins {
    id: String,
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct FunctionPart {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

/// Parses one answer.
#[derive(Debug)]
pub struct MessageParser {
    reasoning: Option<ReasoningParser>,
    shows_reasoning: bool,
    calls: Option<Calls>,
}

#[derive(Debug)]
struct Calls {
    format: ToolCallFormat,
    parser: ToolCallParser,
    /// Calls after so many are left out.
    limit: u32,
    /// Calls that have begun.
    n: u32,
}

impl MessageParser {
    /// Takes the next text.
    pub fn push(&mut self, text: String) -> MessagePart {
        let reasoned = match &mut self.reasoning {
            Some(parser) => parser.push(&text),
            None => Reasoned {
                reasoning: String::new(),
                text,
            },
        };
        self.answer(reasoned)
    }

    /// Takes the last text.
    pub fn finish(&mut self, text: String) -> MessagePart {
        let mut part = self.push(text);
        if let Some(parser) = &mut self.reasoning {
            let reasoned = parser.finish();
            part.add(self.answer(reasoned));
        }
        if let Some(calls) = &mut self.calls {
            let pieces = calls.parser.finish();
            calls.take(pieces, &mut part);
        }
        part
    }

    /// Calls that have begun, those that are left out too.
    pub fn n_calls(&self) -> u32 {
        self.calls.as_ref().map_or(0, |calls| calls.n)
    }

    fn answer(&mut self, Reasoned { reasoning, text }: Reasoned) -> MessagePart {
        let mut part = MessagePart {
            reasoning: if self.shows_reasoning { reasoning } else { String::new() },
            ..MessagePart::default()
        };
        match &mut self.calls {
            None => part.content = text,
            Some(calls) => {
                let pieces = calls.parser.push(&text);
                calls.take(pieces, &mut part);
            }
        }
        part
    }
}

impl Calls {
    fn take(&mut self, pieces: Vec<Piece>, part: &mut MessagePart) {
        for piece in pieces {
            match piece {
                Piece::Text(text) => part.content.push_str(&text),
                Piece::Call { name, id } => {
                    self.n += 1;
                    if self.n <= self.limit {
                        let id = id.unwrap_or_else(|| fresh_call_id(self.format));
                        part.calls.push(CallPart {
                            index: self.n - 1,
                            begins: Some(CallBegins { id, r#type: "function" }),
                            function: FunctionPart {
                                name: Some(name),
                                arguments: String::new(),
                            },
                        });
                    }
                }
                Piece::Arguments(arguments) if self.n <= self.limit => part.add_arguments(self.n - 1, &arguments),
                Piece::Arguments(_) => {}
            }
        }
    }
}

impl MessagePart {
    fn add_arguments(&mut self, index: u32, arguments: &str) {
        match self.calls.last_mut().filter(|call| call.index == index) {
            Some(call) => call.function.arguments.push_str(arguments),
            None => self.calls.push(CallPart {
                index,
                begins: None,
                function: FunctionPart {
                    name: None,
                    arguments: arguments.to_owned(),
                },
            }),
        }
    }

    fn add(&mut self, more: MessagePart) {
        self.reasoning.push_str(&more.reasoning);
        self.content.push_str(&more.content);
        for call in more.calls {
            match call.begins {
                Some(_) => self.calls.push(call),
                None => self.add_arguments(call.index, &call.function.arguments),
            }
        }
    }
}

/// A name for a call. Mistral's templates take nine letters and digits and nothing else.
fn fresh_call_id(format: ToolCallFormat) -> String {
    let random = Uuid::new_v4();
    match format {
        ToolCallFormat::Hermes | ToolCallFormat::Llama3 => format!("call_{}", &random.simple().to_string()[..24]),
        // The last nine of 32 hexadecimal digits are random.
        ToolCallFormat::Mistral => random.simple().to_string()[23..].to_owned(),
    }
}

/// A whole message, added up from its parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message(MessagePart);

impl Message {
    /// Adds the next part.
    pub fn add(&mut self, part: MessagePart) {
        self.0.add(part);
    }

    /// The message as it is written.
    pub fn body(&self) -> MessageBody<'_> {
        let MessagePart {
            reasoning,
            content,
            calls,
        } = &self.0;
        let shown = (!reasoning.is_empty()).then_some(reasoning.as_str());
        let is_other = shown.is_some() || !calls.is_empty();
        MessageBody {
            role: "assistant",
            content: (!is_other || !content.is_empty()).then_some(content.as_str()),
            reasoning_content: shown,
            reasoning: shown,
            tool_calls: calls.iter().map(WholeCall::of).collect(),
        }
    }
}

/// `message` of a choice.
#[derive(Debug, Serialize)]
pub struct MessageBody<'a> {
    role: &'static str,
    /// `null` when there is something else instead.
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    /// The newer name of the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WholeCall<'a>>,
}

#[derive(Debug, Serialize)]
struct WholeCall<'a> {
    #[serde(flatten)]
    begins: Option<&'a CallBegins>,
    function: &'a FunctionPart,
}

impl<'a> WholeCall<'a> {
    fn of(call: &'a CallPart) -> WholeCall<'a> {
        WholeCall {
            begins: call.begins.as_ref(),
            function: &call.function,
        }
    }
}
