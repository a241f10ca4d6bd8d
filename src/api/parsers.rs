//! What a model's text may hold besides content, and how that is found out at the start. The parsers themselves are in
//! [`super::tool_calls`] and [`super::reasoning`].

use std::sync::Arc;

use baton_engine::text::{ChatTemplate, Tokenizer};
use baton_scheduler::ids::TokenId;

use super::reasoning;
use super::tool_calls::ToolCallFormat;
use crate::config::{ReasoningParserKind, ToolCallParserKind};

/// Whether calls of tools are looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolCalls {
    /// How the model writes them is not known, so that requests with tools are refused.
    #[default]
    Unknown,
    /// They stay in the content.
    InContent,
    /// They are taken out of it.
    Parsed(ToolCallFormat),
}

/// The parsers of a served model.
#[derive(Clone, Debug, Default)]
pub struct OutputParsers {
    /// For requests that offer tools.
    pub tool_calls: ToolCalls,
    /// Whether reasoning is parted from the answer.
    pub has_reasoning: bool,
    /// Special tokens that the parser of tool calls must see.
    pub tool_markers: Arc<[TokenId]>,
    /// Special tokens that the parser of reasoning must see.
    pub reasoning_markers: Arc<[TokenId]>,
}

impl OutputParsers {
    /// Those that were asked for; `auto` is what template and vocabulary tell.
    pub fn resolve(
        tool_calls: ToolCallParserKind,
        reasoning: ReasoningParserKind,
        template: Option<&ChatTemplate>,
        tokenizer: Option<&Tokenizer>,
    ) -> OutputParsers {
        let tool_calls = match tool_calls {
            ToolCallParserKind::Auto => match template.and_then(|template| detect(template, tokenizer)) {
                Some(format) => ToolCalls::Parsed(format),
                None => ToolCalls::Unknown,
            },
            ToolCallParserKind::Hermes => ToolCalls::Parsed(ToolCallFormat::Hermes),
            ToolCallParserKind::Llama3 => ToolCalls::Parsed(ToolCallFormat::Llama3),
            ToolCallParserKind::Mistral => ToolCalls::Parsed(ToolCallFormat::Mistral),
            ToolCallParserKind::None => ToolCalls::InContent,
        };
        let has_reasoning = match reasoning {
            ReasoningParserKind::Auto => template.is_some_and(|template| template.mentions("</think>")),
            ReasoningParserKind::Think => true,
            ReasoningParserKind::None => false,
        };
        let special = |markers: &[&str]| -> Arc<[TokenId]> {
            let id = |marker: &&str| tokenizer.and_then(|tokenizer| tokenizer.token_to_id(marker));
            let is_special = |id: &TokenId| tokenizer.is_some_and(|tokenizer| tokenizer.is_special(*id));
            markers.iter().filter_map(id).filter(is_special).collect()
        };
        OutputParsers {
            tool_calls,
            has_reasoning,
            tool_markers: match tool_calls {
                ToolCalls::Parsed(format) => special(format.markers()),
                ToolCalls::Unknown | ToolCalls::InContent => Arc::default(),
            },
            reasoning_markers: match has_reasoning {
                true => special(reasoning::MARKERS),
                false => Arc::default(),
            },
        }
    }

    /// The parsers in words, for the log.
    pub fn describe(&self) -> (&'static str, &'static str) {
        let tool_calls = match self.tool_calls {
            ToolCalls::Unknown => "unknown",
            ToolCalls::InContent => "none",
            ToolCalls::Parsed(format) => format.as_str(),
        };
        (tool_calls, if self.has_reasoning { "think" } else { "none" })
    }
}

/// How a model with this template writes calls, if it is one of the known ways.
fn detect(template: &ChatTemplate, tokenizer: Option<&Tokenizer>) -> Option<ToolCallFormat> {
    let has_token = |token| tokenizer.is_some_and(|tokenizer| tokenizer.token_to_id(token).is_some());
    // Qwen3-Coder and GLM write other things than JSON between the same marks.
    let is_json = !["<function=", "<arg_key>"].iter().any(|other| template.mentions(other));
    if !template.uses_tools() {
        return None;
    }
    if template.mentions("[TOOL_CALLS]") {
        return Some(ToolCallFormat::Mistral);
    }
    if template.mentions("<tool_call>") {
        return is_json.then_some(ToolCallFormat::Hermes);
    }
    let is_llama =
        template.mentions("<|python_tag|>") || (has_token("<|python_tag|>") && template.mentions("parameters"));
    is_llama.then_some(ToolCallFormat::Llama3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detected(source: &str) -> (&'static str, &'static str) {
        let template = ChatTemplate::new(&[("default".to_owned(), source.to_owned())], None, None).unwrap();
        OutputParsers::resolve(
            ToolCallParserKind::Auto,
            ReasoningParserKind::Auto,
            Some(&template),
            None,
        )
        .describe()
    }

    #[test]
    fn templates_tell_how_their_models_write() {
        assert_eq!(detected("{{ tools }}<tool_call>{{ '</think>' }}"), ("hermes", "think"));
        assert_eq!(detected("{{ tools }}<tool_call><function=x>"), ("unknown", "none"));
        assert_eq!(detected("{{ tools }}[TOOL_CALLS]"), ("mistral", "none"));
        assert_eq!(detected("{{ tools }}{{ '<|python_tag|>' }}"), ("llama3", "none"));
        assert_eq!(
            detected("{{ messages }}<tool_call>"),
            ("unknown", "none"),
            "it shows no tools"
        );
        assert_eq!(detected("{{ tools }}"), ("unknown", "none"));
    }

    #[test]
    fn what_is_asked_for_wins() {
        let parsers = OutputParsers::resolve(ToolCallParserKind::Mistral, ReasoningParserKind::Think, None, None);
        assert_eq!(parsers.describe(), ("mistral", "think"));
        let parsers = OutputParsers::resolve(ToolCallParserKind::None, ReasoningParserKind::None, None, None);
        assert_eq!(parsers.describe(), ("none", "none"));
        assert_eq!(parsers.tool_calls, ToolCalls::InContent);
    }
}
