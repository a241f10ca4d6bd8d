//! Structural tags: free text in which parts between given marks are constrained, in both of the shapes that vLLM takes,
//! written as a grammar in llguidance's variant of Lark. Nothing is compiled here.

use baton_engine::constraint::MAX_CONSTRAINT_BYTES;
use baton_engine::text::Tokenizer;
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::Constraint;
use serde_json::{Value, json};

use super::constraints::json_schema;
use super::error::ApiError;
use super::fields::{kind_of, shown};

/// Ways to say what a part is; token-level ways and EBNF are not among them.
const FORMATS: &str = "const_string, json_schema, regex, any_text, sequence, or, optional, plus, star, repeat, tag, \
                       triggered_tags or tags_with_separator";
/// Most repeats that are counted.
const MAX_REPEATS: i64 = 1024;

/// The grammar of a structural tag: `{"structures": [{"begin", "schema", "end"}], "triggers"}`, or `{"format": ...}`.
/// Special tokens of `tokenizer` that are written in it are meant as tokens.
///
/// # Errors
/// What is wrong or not done, by its place in `field`.
pub fn constraint(field: &'static str, tag: &Value, tokenizer: Option<&Tokenizer>) -> Result<Constraint, ApiError> {
    // A grammar that is longer than that is refused, too; here it would take long to write.
    let n_bytes = tag.to_string().len();
    if n_bytes > MAX_CONSTRAINT_BYTES {
        let found = format!("a structural tag of {n_bytes} bytes");
        return Err(ApiError::expected(
            field,
            found,
            format!("at most {MAX_CONSTRAINT_BYTES}"),
        ));
    }
    let mut writer = Writer {
        field,
        tokenizer,
        rules: String::new(),
        n_rules: 0,
    };
    let at = Place {
        path: String::new(),
        is_last: true,
    };
    let start = match (tag.get("format"), tag.get("structures")) {
        (Some(format), None) => writer.format(format, &at.inner(".format", true))?,
        (None, Some(_)) => {
            let mut tags = Vec::new();
            for (idx, structure) in writer.list(tag, "structures", &at)?.iter().enumerate() {
                let path = at.inner(&format!(".structures[{idx}]"), false);
                if !structure.is_object() {
                    return Err(writer.wrong(&path, kind_of(structure), "an object"));
                }
                let (begin, end) = (
                    writer.text(structure, "begin", &path)?,
                    writer.text(structure, "end", &path)?,
                );
                let schema = structure.get("schema").filter(|schema| !schema.is_null());
                let schema = schema.cloned().unwrap_or_else(|| json!({}));
                tags.push(json!({
                    "type": "tag", "begin": begin, "end": end,
                    "content": {"type": "json_schema", "json_schema": schema},
                }));
            }
            let triggered = json!({"type": "triggered_tags", "tags": tags, "triggers": tag["triggers"]});
            writer.format(&triggered, &at)?
        }
        _ => return Err(writer.wrong(&at, "without format", "format, or structures with triggers")),
    };
    let rules = writer.rules;
    let grammar = format!("%llguidance {{}}\nstart: {start}\nTEXT: /(.|\\n)*/\n{rules}");
    Ok(Constraint::Grammar(grammar.into()))
}

/// Where something stands in the field, for errors; and whether nothing can follow it, so that it may go on freely.
struct Place {
    path: String,
    is_last: bool,
}

impl Place {
    fn inner(&self, path: &str, is_last: bool) -> Place {
        Place {
            path: format!("{}{path}", self.path),
            is_last: is_last && self.is_last,
        }
    }
}

/// A text as a grammar sees it: special tokens are not made of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    Special(TokenId),
}

impl Piece<'_> {
    fn written(&self) -> String {
        match self {
            Piece::Text(text) => json!(text).to_string(),
            Piece::Special(id) => format!("<[{id}]>"),
        }
    }
}

fn written(pieces: &[Piece<'_>]) -> String {
    match pieces {
        [] => r#""""#.to_owned(),
        pieces => pieces.iter().map(Piece::written).collect::<Vec<_>>().join(" "),
    }
}

struct Writer<'a> {
    field: &'static str,
    tokenizer: Option<&'a Tokenizer>,
    rules: String,
    n_rules: usize,
}

/// A tag whose begin has been read.
struct Tag<'a> {
    begin: &'a str,
    /// Name of the rule of all that follows `begin`.
    rest: String,
}

impl Writer<'_> {
    fn wrong(&self, at: &Place, found: &str, expected: &str) -> ApiError {
        let (field, path) = (self.field, &at.path);
        ApiError::field(field, format!("{field}{path} is {found}, expected {expected}"))
    }

    fn rule(&mut self, options: &str, body: &str) -> String {
        let name = format!("part_{}", self.n_rules);
        self.n_rules += 1;
        self.rules.push_str(&format!("{name}{options}: {body}\n"));
        name
    }

    fn member<'v>(&self, value: &'v Value, name: &str, at: &Place) -> Result<&'v Value, ApiError> {
        let member = value.get(name).filter(|member| !member.is_null());
        member.ok_or_else(|| self.wrong(&at.inner(&format!(".{name}"), false), "missing", "a value"))
    }

    fn text<'v>(&self, value: &'v Value, name: &str, at: &Place) -> Result<&'v str, ApiError> {
        let member = self.member(value, name, at)?;
        let at = at.inner(&format!(".{name}"), false);
        member
            .as_str()
            .ok_or_else(|| self.wrong(&at, &shown(member), "a string"))
    }

    fn list<'v>(&self, value: &'v Value, name: &str, at: &Place) -> Result<&'v [Value], ApiError> {
        let member = self.member(value, name, at)?;
        let at = at.inner(&format!(".{name}"), false);
        match member.as_array() {
            Some(list) if !list.is_empty() => Ok(list),
            _ => Err(self.wrong(&at, &shown(member), "an array that is not empty")),
        }
    }

    fn texts<'v>(&self, value: &'v Value, name: &str, at: &Place) -> Result<Vec<&'v str>, ApiError> {
        let texts = self.list(value, name, at)?.iter().enumerate().map(|(idx, text)| {
            let at = at.inner(&format!(".{name}[{idx}]"), false);
            let text = text.as_str().filter(|text| !text.is_empty());
            text.ok_or_else(|| self.wrong(&at, "not a text", "a string that is not empty"))
        });
        texts.collect()
    }

    fn flag(&self, value: &Value, name: &str, at: &Place) -> Result<bool, ApiError> {
        let member = value.get(name).filter(|member| !member.is_null());
        let at = at.inner(&format!(".{name}"), false);
        member.map_or(Ok(false), |member| {
            member
                .as_bool()
                .ok_or_else(|| self.wrong(&at, &shown(member), "a boolean"))
        })
    }

    /// Refuses a member that asks for what is not done.
    fn refuse(&self, value: &Value, name: &str, neutral: &[Value], at: &Place) -> Result<(), ApiError> {
        match value.get(name) {
            Some(member) if !member.is_null() && !neutral.contains(member) => {
                let at = at.inner(&format!(".{name}"), false);
                Err(self.wrong(&at, &shown(member), "nothing: it is not supported here"))
            }
            _ => Ok(()),
        }
    }

    fn pieces<'t>(&self, text: &'t str) -> Vec<Piece<'t>> {
        let mut pieces = Vec::new();
        let mut end = 0;
        let special = self.tokenizer.map(|tokenizer| tokenizer.special_tokens_in(text));
        for (at, id) in special.into_iter().flatten() {
            if at.start > end {
                pieces.push(Piece::Text(&text[end..at.start]));
            }
            pieces.push(Piece::Special(id));
            end = at.end;
        }
        if end < text.len() {
            pieces.push(Piece::Text(&text[end..]));
        }
        pieces
    }

    /// What a format is, as the body of a rule.
    fn format(&mut self, format: &Value, at: &Place) -> Result<String, ApiError> {
        let kind = self.text(format, "type", at)?;
        let open = |writer: &Self| match at.is_last {
            true => Ok(()),
            false => Err(writer.wrong(
                at,
                kind,
                "at the end, or any_text right inside a tag: it goes on freely",
            )),
        };
        match kind {
            "const_string" => Ok(written(&self.pieces(self.text(format, "value", at)?))),
            "json_schema" => self.json_schema(format, at),
            "regex" => self.regex(self.text(format, "pattern", at)?, at),
            "any_text" => {
                open(self)?;
                self.refuse(format, "excludes", &[json!([])], at)?;
                Ok("TEXT".to_owned())
            }
            "sequence" => self.each(format, " ", at),
            "or" => Ok(format!("({})", self.each(format, " | ", at)?)),
            "optional" => self.repeated(format, "?", at),
            "plus" => self.repeated(format, "+", at),
            "star" => self.repeated(format, "*", at),
            "repeat" => {
                let bound = |name: &str| self.member(format, name, at).map(Value::as_i64);
                let count = match (bound("min")?, bound("max")?) {
                    (Some(min @ 0..=MAX_REPEATS), Some(-1)) => format!("{{{min},}}"),
                    (Some(min @ 0..), Some(max @ 0..=MAX_REPEATS)) if min <= max => format!("{{{min},{max}}}"),
                    _ => {
                        let expected = format!("min and max to be 0 to {MAX_REPEATS}, or max to be -1");
                        return Err(self.wrong(at, "a repeat of other counts", &expected));
                    }
                };
                self.repeated(format, &count, at)
            }
            "tag" => {
                let tag = self.tag(format, at)?;
                Ok(format!("{} {}", written(&self.pieces(tag.begin)), tag.rest))
            }
            "tags_with_separator" => self.separated(format, at),
            "triggered_tags" => {
                open(self)?;
                self.triggered(format, at)
            }
            other => {
                let at = at.inner(".type", false);
                Err(self.wrong(&at, &shown(&other.into()), FORMATS))
            }
        }
    }

    fn json_schema(&mut self, format: &Value, at: &Place) -> Result<String, ApiError> {
        self.refuse(format, "style", &[json!("json")], at)?;
        self.refuse(format, "any_order", &[json!(false)], at)?;
        let schema = match self.member(format, "json_schema", at)? {
            Value::Bool(true) => json!({}),
            schema => schema.clone(),
        };
        let schema = json_schema(self.field, schema)?;
        Ok(self.rule("", &format!("%json {}", schema.text())))
    }

    fn regex(&mut self, pattern: &str, at: &Place) -> Result<String, ApiError> {
        if pattern.is_empty() {
            return Err(self.wrong(&at.inner(".pattern", false), "empty", "a regular expression"));
        }
        let mut literal = String::new();
        let mut is_escaped = false;
        for character in pattern.chars() {
            match character {
                '/' if !is_escaped => literal.push_str("\\/"),
                '\n' => literal.push_str(if is_escaped { "n" } else { "\\n" }),
                other => literal.push(other),
            }
            is_escaped = character == '\\' && !is_escaped;
        }
        Ok(self.rule("", &format!("/{literal}/")))
    }

    fn each(&mut self, format: &Value, separator: &str, at: &Place) -> Result<String, ApiError> {
        let elements = self.list(format, "elements", at)?;
        let mut bodies = Vec::new();
        for (idx, element) in elements.iter().enumerate() {
            let is_last = separator != " " || idx + 1 == elements.len();
            let at = at.inner(&format!(".elements[{idx}]"), is_last);
            bodies.push(self.format(element, &at)?);
        }
        Ok(bodies.join(separator))
    }

    fn repeated(&mut self, format: &Value, count: &str, at: &Place) -> Result<String, ApiError> {
        let content = self.member(format, "content", at)?;
        let body = self.format(content, &at.inner(".content", count == "?"))?;
        Ok(format!("({body}){count}"))
    }

    /// Reads a tag, and writes the rule of what follows its begin.
    fn tag<'v>(&mut self, tag: &'v Value, at: &Place) -> Result<Tag<'v>, ApiError> {
        let kind = self.text(tag, "type", at)?;
        if kind != "tag" {
            return Err(self.wrong(&at.inner(".type", false), &shown(&kind.into()), "\"tag\""));
        }
        let begin = self.text(tag, "begin", at)?;
        let ends = match self.member(tag, "end", at)? {
            Value::Array(_) => self.texts(tag, "end", at)?,
            _ => vec![self.text(tag, "end", at)?],
        };
        let content = self.member(tag, "content", at)?;
        let within = at.inner(".content", false);
        let rest = match self.text(content, "type", &within)? {
            "any_text" => {
                self.refuse(content, "excludes", &[json!([])], &within)?;
                let mut ways = Vec::new();
                for end in ends {
                    ways.push(self.text_until(end, end, &at.inner(".end", false))?);
                }
                ways.join(" | ")
            }
            _ => {
                let ends: Vec<String> = ends.iter().map(|end| written(&self.pieces(end))).collect();
                format!("{} ({})", self.format(content, &within)?, ends.join(" | "))
            }
        };
        let rest = self.rule("", &rest);
        Ok(Tag { begin, rest })
    }

    /// Free text up to the first `mark`, and then the rest of `whole`, which begins with it.
    fn text_until(&mut self, mark: &str, whole: &str, at: &Place) -> Result<String, ApiError> {
        let mut pieces = self.pieces(whole);
        match pieces.first() {
            Some(Piece::Special(_)) => Ok(format!("TEXT {}", written(&pieces))),
            Some(Piece::Text(text)) if text.len() >= mark.len() => {
                let after = &text[mark.len()..];
                match after {
                    "" => drop(pieces.remove(0)),
                    after => pieces[0] = Piece::Text(after),
                }
                let rest = written(&pieces);
                let until = self.rule("[lazy]", &format!("TEXT {}", json!(mark)));
                Ok(format!("{until} {rest}"))
            }
            Some(Piece::Text(_)) => Err(self.wrong(at, "text before a special token", "one or the other")),
            None => Err(self.wrong(at, "empty", "a text that says where free text ends")),
        }
    }

    fn tags<'v>(&mut self, format: &'v Value, at: &Place) -> Result<Vec<Tag<'v>>, ApiError> {
        let tags = self.list(format, "tags", at)?.iter().enumerate();
        tags.map(|(idx, tag)| self.tag(tag, &at.inner(&format!(".tags[{idx}]"), false)))
            .collect()
    }

    fn separated(&mut self, format: &Value, at: &Place) -> Result<String, ApiError> {
        let separator = written(&self.pieces(self.text(format, "separator", at)?));
        let (needs_one, has_one) = (
            self.flag(format, "at_least_one", at)?,
            self.flag(format, "stop_after_first", at)?,
        );
        let tags = self.tags(format, at)?;
        let one = self.any_of(&tags);
        let more = if has_one {
            String::new()
        } else {
            format!(" ({separator} {one})*")
        };
        Ok(format!("({one}{more}){}", if needs_one { "" } else { "?" }))
    }

    /// A rule of any of these tags.
    fn any_of(&mut self, tags: &[Tag<'_>]) -> String {
        let ways = tags
            .iter()
            .map(|tag| format!("{} {}", written(&self.pieces(tag.begin)), tag.rest));
        let ways: Vec<String> = ways.collect();
        self.rule("", &ways.join(" | "))
    }

    fn triggered(&mut self, format: &Value, at: &Place) -> Result<String, ApiError> {
        self.refuse(format, "excludes", &[json!([])], at)?;
        let triggers = self.texts(format, "triggers", at)?;
        let (needs_one, has_one) = (
            self.flag(format, "at_least_one", at)?,
            self.flag(format, "stop_after_first", at)?,
        );
        let tags = self.tags(format, at)?;
        let mut ways = Vec::new();
        for (idx, tag) in tags.iter().enumerate() {
            let at = at.inner(&format!(".tags[{idx}].begin"), false);
            let Some(trigger) = triggers.iter().find(|trigger| tag.begin.starts_with(*trigger)) else {
                return Err(self.wrong(
                    &at,
                    &shown(&tag.begin.into()),
                    "a text that begins with one of triggers",
                ));
            };
            ways.push(format!("{} {}", self.text_until(trigger, tag.begin, &at)?, tag.rest));
        }
        let one = self.rule("", &ways.join(" | "));
        // A trigger in the free text is the begin of a tag, also where the text only might go on without one.
        Ok(match (needs_one, has_one) {
            (false, false) => format!("({one})* TEXT"),
            (false, true) => format!("({one} | TEXT)"),
            (true, false) => format!("{} ({one})* TEXT", self.any_of(&tags)),
            (true, true) => self.any_of(&tags),
        })
    }
}

#[cfg(test)]
mod tests;
