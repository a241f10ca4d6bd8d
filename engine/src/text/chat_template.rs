//! Jinja chat templates as transformers renders them: messages -> one prompt text. No tokenization.

use std::io;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use serde_json::Map;

use super::python_format::{JsonStyle, json_dumps, python_str};
use super::strftime::strftime;

/// Why a template could not be compiled or rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChatTemplateError {
    /// The template itself is broken.
    #[error("chat template does not parse: {0}")]
    Syntax(String),
    /// The template refused the messages by `raise_exception`; the message is the template's own.
    #[error("{0}")]
    Raised(String),
    /// Rendering failed: the messages do not have the shape the template expects.
    #[error("chat template failed: {0}")]
    Render(String),
    /// A client's template is too long, or a template asks for more than is done for one.
    #[error("chat template {found}, expected at most {limit}")]
    TooMuch {
        /// What it does.
        found: String,
        /// What it may.
        limit: String,
    },
}

/// The templates of one model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_use: bool,
    uses_tools: bool,
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// Longest prompt, bytes; a template of the model's own is trusted.
    longest: Option<usize>,
}

/// Longest template that a client may send, bytes: several times the longest of published models.
pub const MAX_CLIENT_TEMPLATE_BYTES: usize = 256 << 10;
/// Instructions that a template may execute, whoever wrote it: a few hundred for each message and tool of the longest chats.
const FUEL: u64 = 10_000_000;
/// Spaces and digits that a template may ask for at once.
const MAX_WIDTH: usize = 1000;
/// Longest prompt that a client's template may make, bytes: twice what a request may hold.
const LONGEST_CLIENT_PROMPT: usize = 32 << 20;

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Compiles `(name, source)` templates. `default` renders; `tool_use`, if there, renders chats with tools.
    pub fn new(
        templates: &[(String, String)],
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<ChatTemplate, ChatTemplateError> {
        let mut environment = environment().map_err(|error| ChatTemplateError::Syntax(one_line(&error)))?;
        environment.set_fuel(Some(FUEL));
        for (name, source) in templates {
            environment
                .add_template_owned(name.clone(), without_generation_tags(source))
                .map_err(|error| ChatTemplateError::Syntax(one_line(&error)))?;
        }
        let has = |name: &str| templates.iter().any(|(other, _)| other == name);
        if !has(DEFAULT) {
            return Err(ChatTemplateError::Syntax("no template is named `default`".to_owned()));
        }
        let has_tool_use = has(TOOL_USE);
        let uses_tools = environment
            .get_template(if has_tool_use { TOOL_USE } else { DEFAULT })
            .is_ok_and(|template| template.undeclared_variables(false).contains("tools"));
        Ok(ChatTemplate {
            environment,
            has_tool_use,
            uses_tools,
            bos_token: bos_token.map(str::to_owned),
            eos_token: eos_token.map(str::to_owned),
            longest: None,
        })
    }

    /// A template that a client sent. Its length, and that of its prompt, is bounded besides; what it may keep in variables is
    /// not, so clients must be trusted.
    pub fn of_client(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<ChatTemplate, ChatTemplateError> {
        if source.len() > MAX_CLIENT_TEMPLATE_BYTES {
            return Err(ChatTemplateError::TooMuch {
                found: format!("has {} bytes", source.len()),
                limit: MAX_CLIENT_TEMPLATE_BYTES.to_string(),
            });
        }
        let mut template = ChatTemplate::new(&[(DEFAULT.to_owned(), source.to_owned())], bos_token, eos_token)?;
        template.longest = Some(LONGEST_CLIENT_PROMPT);
        Ok(template)
    }

    /// A client's template in place of these, for the same model.
    pub fn replaced_by(&self, source: &str) -> Result<ChatTemplate, ChatTemplateError> {
        ChatTemplate::of_client(source, self.bos_token.as_deref(), self.eos_token.as_deref())
    }

    /// Whether chats that offer tools are rendered with them.
    pub fn uses_tools(&self) -> bool {
        self.uses_tools
    }

    /// Whether the source of a template holds `text`.
    pub fn mentions(&self, text: &str) -> bool {
        let mut templates = self.environment.templates();
        templates.any(|(_, template)| template.source().contains(text))
    }

    /// The prompt of `messages` (a list of objects), ready to be encoded without adding special tokens.
    ///
    /// `tools` is what the request offers, if anything; `extra` are further variables of the template.
    pub fn render(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, ChatTemplateError> {
        let name = if tools.is_some() && self.has_tool_use {
            TOOL_USE
        } else {
            DEFAULT
        };
        let template = self
            .environment
            .get_template(name)
            .map_err(|error| ChatTemplateError::Syntax(one_line(&error)))?;
        let standard = context! {
            messages => Value::from(Serde(messages)),
            tools => tools.map(|tools| Value::from(Serde(tools))),
            add_generation_prompt,
            bos_token => self.bos_token.as_deref().unwrap_or_default(),
            eos_token => self.eos_token.as_deref().unwrap_or_default(),
        };
        let context = context! { ..Value::from(Serde(extra)), ..standard };
        let Some(longest) = self.longest else {
            return template.render(context).map_err(|error| render_error(&error));
        };
        let mut prompt = BoundedPrompt {
            bytes: Vec::new(),
            longest,
        };
        let rendered = template.render_captured_to(context, &mut prompt).map(drop);
        match rendered {
            Ok(()) => String::from_utf8(prompt.bytes).map_err(|error| ChatTemplateError::Render(error.to_string())),
            Err(error) if error.kind() == ErrorKind::WriteFailure => Err(ChatTemplateError::TooMuch {
                found: "makes a long prompt".to_owned(),
                limit: format!("{longest} bytes"),
            }),
            Err(error) => Err(render_error(&error)),
        }
    }
}

/// The prompt of a client's template as it grows.
struct BoundedPrompt {
    bytes: Vec<u8>,
    longest: usize,
}

impl io::Write for BoundedPrompt {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if piece.len() > self.longest - self.bytes.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment() -> Result<Environment<'static>, Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(|state, value, method, args| {
        if method == "format"
            && let Some(text) = value.as_str()
        {
            check_format(text, BRACES)?;
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
    environment.set_formatter(|out, _state, value| {
        let written = match value.as_str() {
            Some(string) => out.write_str(string),
            None if value.is_undefined() => Ok(()),
            None => out.write_str(&to_python_str(value)?),
        };
        written.map_err(|_| Error::new(ErrorKind::WriteFailure, "cannot write the prompt"))
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: Value| to_python_str(&value));
    environment.add_filter("trim", trim);
    environment.add_filter("indent", indent);
    environment.add_filter(
        "format",
        |state: &mut State, text: &Value, args: Rest<ValueOrKwargs>| {
            text.as_str().map_or(Ok(()), |text| check_format(text, PERCENT))?;
            minijinja::filters::format(state, text, args)
        },
    );
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        strftime(&format, now.as_secs() as i64)
    });
    Ok(environment)
}

/// What `raise_exception` said, kept apart from errors of the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn render_error(error: &Error) -> ChatTemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return ChatTemplateError::TooMuch {
            found: "goes on".to_owned(),
            limit: format!("{FUEL} instructions"),
        };
    }
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return ChatTemplateError::Raised(message.clone());
        }
        source = inner.source();
    }
    ChatTemplateError::Render(one_line(error))
}

fn one_line(error: &Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn to_json_value(value: &Value) -> Result<serde_json::Value, Error> {
    serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, "not a value of JSON").with_source(error))
}

fn to_python_str(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(string) => Ok(string.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None if matches!(value.kind(), ValueKind::Plain | ValueKind::Invalid) => Ok(value.to_string()),
        None => Ok(python_str(&to_json_value(value)?)),
    }
}

/// `trim`, of anything: Jinja's takes the string form first.
fn trim(value: Value, chars: Option<String>) -> Result<String, Error> {
    let text = to_python_str(&value)?;
    Ok(match chars {
        Some(chars) => text.trim_matches(|char| chars.contains(char)).to_owned(),
        None => text.trim().to_owned(),
    })
}

/// A number of spaces that a template asks for. More than a line has would let a template of a few words take all memory.
fn width_of(what: &str, value: &Value) -> Result<usize, Error> {
    let width = usize::try_from(value.clone())?;
    if width > MAX_WIDTH {
        let message = format!("{what} is {width}, expected at most {MAX_WIDTH}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(width)
}

/// How a format begins a field, and what stands around a key there.
type FormatStyle = [char; 3];

/// `'%(name)s'|format(...)`.
const PERCENT: FormatStyle = ['%', '(', ')'];
/// `'{0[name]}'.format(...)`.
const BRACES: FormatStyle = ['{', '[', ']'];

/// What the library does not check in a format: sizes, and keys that are not ASCII, at which it panics.
fn check_format(format: &str, style: FormatStyle) -> Result<(), Error> {
    check_widths(format)?;
    check_keys(format, style)
}

/// [`width_of`] for what is written in a format: widths, precisions and places of arguments.
fn check_widths(format: &str) -> Result<(), Error> {
    let mut numbers = format
        .split(|char: char| !char.is_ascii_digit())
        .filter(|number| !number.is_empty());
    if let Some(number) = numbers.find(|number| number.parse().map_or(true, |width: usize| width > MAX_WIDTH)) {
        let message = format!("format: a number is {number}, expected at most {MAX_WIDTH}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    if format.contains('*') {
        let message = "format: '*' takes a width from an argument, expected it in the format";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(())
}

fn check_keys(format: &str, [field, open, close]: FormatStyle) -> Result<(), Error> {
    let mut rest = format;
    while let Some((_, after)) = rest.split_once(field) {
        // Doubled, it stands for itself.
        if let Some(text) = after.strip_prefix(field) {
            rest = text;
            continue;
        }
        rest = after;
        loop {
            let is_of_path = |char: char| char.is_ascii_alphanumeric() || char == '_' || char == '.';
            let path = if field == '{' {
                rest.trim_start_matches(is_of_path)
            } else {
                rest
            };
            let Some(keyed) = path.strip_prefix(open) else { break };
            let (key, after) = keyed.split_once(close).unwrap_or((keyed, ""));
            if !key.is_ascii() {
                let message = format!("format: a key is {key:?}, expected ASCII");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
            rest = after;
        }
    }
    Ok(())
}

/// Jinja's `indent`: every line but the first, and but for blank ones, begins with `width` spaces.
fn indent(value: Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let by_name = kwargs.get::<Option<Value>>(name)?;
        Ok(by_name.or_else(|| positional.get(place).cloned()))
    };
    let width = argument(0, "width")?.map_or(Ok(4), |width| width_of("indent: width", &width))?;
    let first = argument(1, "first")?.is_some_and(|first| first.is_true());
    let blank = argument(2, "blank")?.is_some_and(|blank| blank.is_true());
    kwargs.assert_all_used()?;
    let text = to_python_str(&value)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let lines = text.split('\n').enumerate().map(|(i, line)| {
        let is_indented = if i == 0 { first } else { blank || !line.is_empty() };
        let spaces = if is_indented { width } else { 0 };
        format!("{:spaces$}{line}", "")
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// transformers' `tojson`: `json.dumps` with `ensure_ascii=False` and nothing escaped for HTML.
fn tojson(value: Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
    }
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        Some(indent) => Some(indent),
        None => positional.first().cloned(),
    };
    let indent = indent
        .filter(|indent| !indent.is_none())
        .map(|indent| width_of("tojson: indent", &indent))
        .transpose()?;
    let mut style = JsonStyle::new(indent);
    style.ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    style.sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
        let [item, key] = <[String; 2]>::try_from(separators)
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "separators: expected two strings"))?;
        (style.item_separator, style.key_separator) = (item, key);
    }
    kwargs.assert_all_used()?;
    Ok(json_dumps(&to_json_value(&value)?, &style))
}

/// Without `{% generation %}` and `{% endgeneration %}`, which mark trainable text and render as nothing.
///
/// The trimming that their dashes ask for is kept by leaving an empty comment in their place.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start + 2..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + 2 + length];
        let end = start + length + 4;
        out.push_str(&rest[..start]);
        match tag.trim_matches(['-', '+']).trim() {
            "generation" | "endgeneration" => {
                out.push_str(if tag.starts_with('-') { "{#-" } else { "{#" });
                out.push_str(if tag.ends_with('-') { "-#}" } else { "#}" });
            }
            _ => out.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: serde_json::Value) -> Result<String, ChatTemplateError> {
        let templates = [("default".to_owned(), source.to_owned())];
        ChatTemplate::new(&templates, Some("<s>"), None)?.render(&messages, None, true, &Map::new())
    }

    #[test]
    fn a_template_that_goes_on_and_on_is_stopped() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let error = render(source, json!([])).expect_err("ten thousand million turns");
        assert!(matches!(error, ChatTemplateError::TooMuch { .. }), "{error}");
    }

    #[test]
    fn a_tag_of_one_sign_is_an_error_and_no_panic() {
        for source in ["{%}", "{%}{% generation %}", "{%", "{%-%}"] {
            assert!(
                matches!(render(source, json!([])), Err(ChatTemplateError::Syntax(_))),
                "{source}"
            );
        }
    }

    #[test]
    fn a_few_words_do_not_take_all_memory() {
        for source in [
            "{{ messages|tojson(indent=3000000000000000) }}",
            "{{ messages|tojson(1001) }}",
            "{{ 'a\nb'|indent(3000000000000000) }}",
            "{{ 'a\nb'|indent(width=1001) }}",
            "{{ '%3000000000d'|format(1) }}",
            "{{ '%*d'|format(3000000000, 1) }}",
            "{{ '%099999999999999999999d'|format(1) }}",
            "{{ '{:3000000000}'.format('x') }}",
        ] {
            let error = render(source, json!([{"role": "user"}])).expect_err(source);
            assert!(error.to_string().contains("expected"), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_not_ascii_is_an_error_and_no_panic() {
        for source in [
            "{{ '{a[é]}'.format(a={}) }}",
            "{{ '{{ {a.b[0][é'.format(a={}) }}",
            "{{ '%(é)s'|format({}) }}",
            "{{ '%% %(é'|format({}) }}",
        ] {
            let error = render(source, json!([])).expect_err(source);
            assert!(error.to_string().contains("expected ASCII"), "{error}");
        }
        let source = "{{ '%%(é) %s(é)'|format(1) }} {{ '{{[é]}} {}[é] {a[b]}'.format(2, a={'b': 3}) }}";
        assert_eq!(render(source, json!([])).unwrap(), "%(é) 1(é) {[é]} 2[é] 3");
    }

    #[test]
    fn widths_that_lines_have_are_kept() {
        let source =
            "{{ 'a\n\nb\n'|indent(2) }}|{{ 'a\nb'|indent(1, true) }}|{{ '%4d'|format(7) }}|{{ '{:>3}'.format('x') }}";
        assert_eq!(render(source, json!([])).unwrap(), "a\n\n  b| a\n b|   7|  x");
    }

    #[test]
    fn values_print_as_python_prints_them() {
        let source = "{{ bos_token }}{{ eos_token }}|{{ true }}|{{ none }}|{{ 1.0 }}|{{ missing }}|{{ messages[0] }}|{{ tools }}";
        let messages = json!([{"role": "user", "n": [1, null]}]);
        assert_eq!(
            render(source, messages).unwrap(),
            "<s>|True|None|1.0||{'role': 'user', 'n': [1, None]}|None"
        );
    }

    #[test]
    fn tojson_arguments() {
        let source =
            "{{ messages|tojson }} {{ messages|tojson(indent=2) }} {{ messages|tojson(separators=(',', ':')) }}";
        let got = render(source, json!([{"b": "<é>", "a": 1}])).unwrap();
        assert_eq!(
            got,
            "[{\"b\": \"<é>\", \"a\": 1}] [\n  {\n    \"b\": \"<é>\",\n    \"a\": 1\n  }\n] [{\"b\":\"<é>\",\"a\":1}]"
        );
    }

    #[test]
    fn the_templates_own_refusal_is_told_apart() {
        let raised = render(
            "{% if true %}{{ raise_exception('no system role') }}{% endif %}",
            json!([]),
        );
        assert_eq!(raised, Err(ChatTemplateError::Raised("no system role".to_owned())));
        assert!(matches!(
            render("{{ messages.x.y }}", json!([])),
            Err(ChatTemplateError::Render(_))
        ));
        assert!(matches!(
            render("{% if %}", json!([])),
            Err(ChatTemplateError::Syntax(_))
        ));
        assert!(matches!(
            render("{{ 'a' + messages }}", json!([])),
            Err(ChatTemplateError::Render(_))
        ));
    }

    #[test]
    fn blocks_loops_and_generation_marks() {
        let source = "{%- for m in messages %}\n    {%- if loop.index0 == 1 %}{% break %}{% endif %}\n{% generation %}\n{{ m.c.strip().upper() }}{%- endgeneration %}\n{%- endfor %}\n";
        assert_eq!(render(source, json!([{"c": " a "}, {"c": "b"}])).unwrap(), "A");
        assert_eq!(render("{{ strftime_now('%Y')|length }}", json!([])).unwrap(), "4");
    }

    #[test]
    fn a_clients_template_is_bounded() {
        let client = |source: &str| {
            let own = [("default".to_owned(), "own".to_owned())];
            let own = ChatTemplate::new(&own, Some("<s>"), None).unwrap();
            own.replaced_by(source)?
                .render(&json!([{"content": "hi"}]), None, false, &Map::new())
        };
        assert_eq!(client("{{ bos_token }}{{ messages[0].content }}").unwrap(), "<s>hi");
        let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
        let long = "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}";
        for (source, expected) in [
            (endless, "chat template goes on, expected at most 10000000 instructions"),
            (
                long,
                "chat template makes a long prompt, expected at most 33554432 bytes",
            ),
            (
                &"x".repeat(MAX_CLIENT_TEMPLATE_BYTES + 1),
                "chat template has 262145 bytes, expected at most 262144",
            ),
        ] {
            assert_eq!(client(source).unwrap_err().to_string(), expected);
        }
        let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        for source in [
            recursive,
            "{{ messages.x.y }}",
            "{{ raise_exception('no') }}",
            "{% if %}",
        ] {
            assert!(client(source).is_err(), "{source}");
        }
    }

    #[test]
    fn tools_choose_their_template() {
        let templates = [
            ("default".to_owned(), "plain {{ x }}".to_owned()),
            ("tool_use".to_owned(), "{{ tools|tojson }}".to_owned()),
        ];
        let template = ChatTemplate::new(&templates, None, None).unwrap();
        let mut extra = Map::new();
        extra.insert("x".to_owned(), json!(false));
        assert_eq!(template.render(&json!([]), None, false, &extra).unwrap(), "plain False");
        assert_eq!(
            template
                .render(&json!([]), Some(&json!([{"a": 1}])), false, &extra)
                .unwrap(),
            r#"[{"a": 1}]"#
        );
        assert!(template.uses_tools() && template.mentions("tools|tojson"));
        let plain = ChatTemplate::new(&templates[..1], None, None).unwrap();
        assert!(!plain.uses_tools() && !plain.mentions("tools"));
        // As Llama 3.1's template begins: the name is also assigned to.
        let source = "{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}\
                      {%- if not tools is defined %}{%- set tools = none %}{%- endif %}{{ tools }}";
        let llama = ChatTemplate::new(&[("default".to_owned(), source.to_owned())], None, None).unwrap();
        assert!(llama.uses_tools());
        assert!(ChatTemplate::new(&templates[1..], None, None).is_err());
    }
}
