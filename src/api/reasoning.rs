//! A model's reasoning, which it writes between `<think>` and `</think>` before its answer. Pure, like the parsers of tool
//! calls: what comes out does not depend on how the text was cut. Blanks around the reasoning are dropped.

/// The texts around reasoning. A vocabulary may have them as special tokens.
pub const MARKERS: &[&str] = &[OPEN, CLOSE];

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Most bytes of blanks that are held back, since the end may follow.
const LONGEST_BLANK: usize = 256;

/// Whether a rendered prompt ends inside reasoning, so that the answer begins there.
pub fn is_opened_by(prompt: &str) -> bool {
    prompt.trim_end().ends_with(OPEN)
}

/// What a text turned out to be; the reasoning comes before the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasoned {
    /// More of the reasoning.
    pub reasoning: String,
    /// More of what follows it.
    pub text: String,
}

/// Parts the reasoning of one answer from the rest.
#[derive(Clone, Debug)]
pub struct ReasoningParser {
    state: State,
    /// Text that is neither yet.
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but blanks has come. The prompt may have opened the reasoning.
    Start { is_opened: bool },
    /// In the reasoning, of which something has been said or not.
    Reasoning { has_said: bool },
    /// After it: blanks before the answer.
    Gap,
    /// In the answer.
    Answer,
}

impl ReasoningParser {
    /// A parser of one answer, which begins inside reasoning if the prompt `is_opened` there.
    pub fn new(is_opened: bool) -> ReasoningParser {
        ReasoningParser {
            state: State::Start { is_opened },
            held: String::new(),
        }
    }

    /// Takes the next text; gives what has become known.
    pub fn push(&mut self, text: &str) -> Reasoned {
        self.held.push_str(text);
        self.run(false)
    }

    /// No more comes.
    pub fn finish(&mut self) -> Reasoned {
        self.run(true)
    }

    fn run(&mut self, is_end: bool) -> Reasoned {
        let mut said = Reasoned::default();
        loop {
            let before = self.state;
            match before {
                State::Start { is_opened } => self.start(is_opened, is_end),
                State::Reasoning { has_said } => self.reason(has_said, is_end, &mut said.reasoning),
                State::Gap => {
                    let n_blank = self.held.len() - self.held.trim_start().len();
                    self.held.drain(..n_blank);
                    if !self.held.is_empty() {
                        self.state = State::Answer;
                    }
                }
                State::Answer => said.text.push_str(&std::mem::take(&mut self.held)),
            }
            if self.state == before {
                return said;
            }
        }
    }

    fn start(&mut self, is_opened: bool, is_end: bool) {
        let text = self.held.trim_start();
        let is_near = self.held.len() - text.len() <= LONGEST_BLANK;
        if let Some(rest) = text.strip_prefix(OPEN).filter(|_| is_near) {
            self.held = rest.to_owned();
            self.state = State::Reasoning { has_said: false };
        } else if is_end || !is_near || !OPEN.starts_with(text) {
            self.state = match is_opened {
                true => State::Reasoning { has_said: false },
                false => State::Answer,
            };
        }
    }

    fn reason(&mut self, has_said: bool, is_end: bool, said: &mut String) {
        let (n_said, rest) = match self.held.find(CLOSE) {
            Some(at) => (at, Some(at + CLOSE.len())),
            None if is_end => (self.held.len(), None),
            None => (self.held.len() - n_of_close(&self.held), None),
        };
        let text = &self.held[..n_said];
        let from = if has_said { 0 } else { n_said - text.trim_start().len() };
        let longest = text.ceil_char_boundary(n_said.saturating_sub(LONGEST_BLANK));
        let to = text.trim_end().len().max(longest).max(from);
        said.push_str(&text[from..to]);
        let has_said = has_said || to > from;
        match rest {
            Some(rest) => {
                self.held.drain(..rest);
                self.state = State::Gap;
            }
            None => {
                self.held.drain(..to);
                if !has_said {
                    // Blanks before the reasoning are dropped as they come.
                    self.held = self.held.trim_start().to_owned();
                }
                self.state = State::Reasoning { has_said };
            }
        }
    }
}

/// Bytes at the end of `text` that begin the end of the reasoning.
fn n_of_close(text: &str) -> usize {
    (1..CLOSE.len())
        .rev()
        .find(|&n| text.ends_with(&CLOSE[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn in_parts<'a>(is_opened: bool, parts: impl IntoIterator<Item = &'a str>) -> (String, String) {
        let mut parser = ReasoningParser::new(is_opened);
        let mut all = Reasoned::default();
        let mut add = |said: Reasoned| {
            assert!(
                all.text.is_empty() || said.reasoning.is_empty(),
                "reasoning after the answer"
            );
            all.reasoning.push_str(&said.reasoning);
            all.text.push_str(&said.text);
        };
        parts.into_iter().for_each(|part| add(parser.push(part)));
        add(parser.finish());
        (all.reasoning, all.text)
    }

    #[test]
    fn reasoning_is_parted_from_the_answer() {
        let cases = [
            (false, "<think>\nHm, 1 < 2.\n</think>\n\nTwo.", "Hm, 1 < 2.", "Two."),
            (true, "\nHm.</think>Two. ", "Hm.", "Two. "),
            (true, "<think>Hm.</think>Two", "Hm.", "Two"),
            (false, "Two </think> <think>", "", "Two </think> <think>"),
            (false, " \n<thinker>", "", " \n<thinker>"),
            (false, "<think>cut \n", "cut", ""),
            (false, "<think></think>  x", "", "x"),
            (true, "no end </thin", "no end </thin", ""),
            (false, "<thi", "", "<thi"),
            (false, "", "", ""),
        ];
        for (is_opened, text, reasoning, answer) in cases {
            let expected = (reasoning.to_owned(), answer.to_owned());
            assert_eq!(in_parts(is_opened, [text]), expected, "{text:?}");
        }
    }

    #[test]
    fn nothing_is_held_back_but_the_possible_end() {
        let mut parser = ReasoningParser::new(true);
        let mut said = |text: &str| parser.push(text).reasoning;
        assert_eq!(said("\nSo "), "So");
        assert_eq!(said("far</"), " far");
        assert_eq!(said("x"), "</x");
        assert_eq!(said("</think"), "");
        assert_eq!(said(">"), "");
        assert_eq!(parser.push("\n\nYes ").text, "Yes ");
    }

    #[test]
    fn a_prompt_opens_reasoning_at_its_end() {
        assert!(is_opened_by("<assistant><think>\n"));
        assert!(!is_opened_by("<think>\n\n</think>\n\n") && !is_opened_by(""));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn cutting_does_not_matter(
            is_opened in any::<bool>(),
            fragments in prop::collection::vec(prop::sample::select(vec![
                "<think>", "</think>", "<", "think>", "</th", "\n\n", " ", "a", "é.", "\u{3000}",
            ]), 0..14),
            n_blank in prop::sample::select(vec![0, LONGEST_BLANK - 2, LONGEST_BLANK + 2]),
            cuts in prop::collection::vec(0usize..400, 0..8),
        ) {
            let text = fragments.join(&" ".repeat(n_blank));
            let expected = in_parts(is_opened, [text.as_str()]);
            let mut places: Vec<usize> = cuts.iter().map(|cut| text.floor_char_boundary(cut * 7 % (text.len() + 1))).collect();
            places.extend([0, text.len()]);
            places.sort_unstable();
            let parts = places.windows(2).map(|pair| &text[pair[0]..pair[1]]);
            prop_assert_eq!(&in_parts(is_opened, parts), &expected, "{:?}", text);
            let singly: Vec<String> = text.chars().map(String::from).collect();
            prop_assert_eq!(&in_parts(is_opened, singly.iter().map(String::as_str)), &expected, "{:?}", text);
            // What is neither a blank nor of a marker is somewhere.
            let solid = |text: &str| text.chars().filter(|c| "aé.".contains(*c)).collect::<String>();
            prop_assert_eq!(solid(&(expected.0 + &expected.1)), solid(&text));
        }
    }
}
