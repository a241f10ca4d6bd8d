//! Latency objectives of a request, and whether it met them.

use std::fmt;
use std::time::Duration;

use super::endpoint::Completion;
use crate::config::{Setting, Span};

/// Upper bounds, both sides included; none set means that there are no objectives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Objectives {
    /// Time to the first token.
    pub ttft: Option<Duration>,
    /// Mean time per token after the first; a request without any meets it.
    pub tpot: Option<Duration>,
    /// Time to the last token.
    pub e2e: Option<Duration>,
}

impl Objectives {
    /// Whether any is set.
    pub fn is_set(&self) -> bool {
        *self != Objectives::default()
    }

    /// Whether `completion` is within all of them.
    pub fn are_met_by(&self, completion: &Completion) -> bool {
        let within = |objective: Option<Duration>, value: Option<Duration>| match (objective, value) {
            (Some(objective), Some(value)) => value <= objective,
            (None, _) | (_, None) => true,
        };
        within(self.ttft, Some(completion.ttft()))
            && within(self.tpot, completion.tpot())
            && within(self.e2e, Some(completion.e2e()))
    }

    /// Adds one, as `ttft:500ms`. A number without a unit is milliseconds, as in `vllm bench serve`; `e2el` is `e2e`.
    pub fn add(&mut self, text: &str) -> Option<()> {
        let (name, value) = text.trim().split_once(':')?;
        let with_unit = match value.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            true => format!("{value}ms"),
            false => value.to_owned(),
        };
        let objective = match name {
            "ttft" => &mut self.ttft,
            "tpot" => &mut self.tpot,
            "e2e" | "e2el" => &mut self.e2e,
            _ => return None,
        };
        match objective.replace(Span::parse(&with_unit)?.0) {
            None => Some(()),
            Some(_) => None,
        }
    }
}

impl Setting for Objectives {
    const EXPECTED: &'static str =
        "ttft:DURATION, tpot:DURATION or e2e:DURATION, each once, such as ttft:500ms,tpot:50ms";

    fn parse(text: &str) -> Option<Self> {
        let mut objectives = Objectives::default();
        text.split([',', ' '])
            .try_for_each(|objective| objectives.add(objective))?;
        Some(objectives)
    }
}

impl fmt::Display for Objectives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e)];
        let set = all
            .into_iter()
            .filter_map(|(name, objective)| Some(format!("{name}:{}", Span(objective?))));
        f.write_str(&set.collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objectives_are_read_as_ours_and_as_vllm_writes_them() {
        for (text, shown) in [
            ("ttft:500ms,tpot:50ms,e2e:10s", "ttft:500ms,tpot:50ms,e2e:10s"),
            ("tpot:50 ttft:1.5s", "ttft:1500ms,tpot:50ms"),
            ("e2el:2.5", "e2e:2500us"),
        ] {
            assert_eq!(Objectives::parse(text).expect(text).to_string(), shown);
        }
        for text in [
            "",
            "ttft",
            "ttft:",
            "ttft:-1",
            "itl:5ms",
            "ttft:1s,ttft:2s",
            "ttft:0",
            "ttft:5 parsecs",
        ] {
            assert_eq!(Objectives::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_request_must_meet_all_of_them() {
        let ms = Duration::from_millis;
        let completion = Completion {
            token_times: vec![ms(100), ms(110), ms(160)],
            n_input_tokens: 1,
            n_output_tokens: 3,
            n_cached_tokens: 0,
            text: String::new(),
        };
        let single = Completion {
            token_times: vec![ms(100)],
            n_output_tokens: 1,
            ..completion.clone()
        };
        for (text, met, met_by_single) in [
            ("ttft:100ms", true, true),
            ("ttft:99ms", false, false),
            ("tpot:30ms", true, true),
            ("tpot:29ms", false, true),
            ("e2e:160ms", true, true),
            ("e2e:159ms", false, true),
            ("ttft:100ms,tpot:29ms", false, true),
            ("ttft:1s,tpot:1s,e2e:1ms", false, false),
        ] {
            let objectives = Objectives::parse(text).expect(text);
            assert_eq!(objectives.are_met_by(&completion), met, "{text}");
            assert_eq!(objectives.are_met_by(&single), met_by_single, "{text}, one token");
        }
        assert!(Objectives::default().are_met_by(&completion));
    }
}
