//! Stop strings over pieces of text: what may be sent now, what must wait, and where the text ends. Knows no tokens.

/// Finds the first of several strings in text that comes in pieces. The result does not depend on how it was cut.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    include_stop: bool,
    /// Text not yet given out: it may be the beginning of a stop string.
    held: String,
    /// Bytes at the beginning of `held` in which no stop string may end.
    n_exempt: usize,
    stopped: bool,
}

/// What one piece of text leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that is safe to send.
    pub text: String,
    /// Index of the stop string that was found; all text before it has been given out, and no more follows.
    pub stopped_by: Option<usize>,
}

impl StopStrings {
    /// `include_stop_str_in_output` keeps the found stop string at the end of the text. Empty strings never match.
    pub fn new(stops: Vec<String>, include_stop_str_in_output: bool) -> StopStrings {
        StopStrings {
            stops,
            include_stop: include_stop_str_in_output,
            held: String::new(),
            n_exempt: 0,
            stopped: false,
        }
    }

    /// Adds a piece in which no stop string may end, though one may begin.
    pub fn pass(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        self.n_exempt = self.held.len();
        self.release()
    }

    /// Adds a piece. The match that ends first wins; of those that end together, the longest.
    pub fn push(&mut self, piece: &str) -> StopOutput {
        if self.stopped {
            return StopOutput::default();
        }
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(idx, stop)| {
                // Its first place from here on ends after what is exempt.
                let from = self
                    .held
                    .ceil_char_boundary((self.n_exempt + 1).saturating_sub(stop.len()));
                let start = from + self.held[from..].find(stop.as_str())?;
                Some((start + stop.len(), start, idx))
            })
            .min();
        if let Some((end, start, idx)) = found {
            self.stopped = true;
            self.held.truncate(if self.include_stop { end } else { start });
            return StopOutput {
                text: std::mem::take(&mut self.held),
                stopped_by: Some(idx),
            };
        }
        StopOutput {
            text: self.release(),
            stopped_by: None,
        }
    }

    /// Gives out what can be no part of a stop string.
    fn release(&mut self) -> String {
        let safe = self.held.len() - self.n_held_back();
        let rest = self.held.split_off(safe);
        self.n_exempt = self.n_exempt.saturating_sub(safe);
        std::mem::replace(&mut self.held, rest)
    }

    /// The held-back text, when generation ended without a stop string.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that begin a stop string.
    fn n_held_back(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        (first..self.held.len())
            .filter(|&start| self.held.is_char_boundary(start))
            .find(|&start| self.stops.iter().any(|stop| stop.starts_with(&self.held[start..])))
            .map_or(0, |start| self.held.len() - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(stops: &[&str]) -> Vec<String> {
        stops.iter().map(|&stop| stop.to_owned()).collect()
    }

    #[test]
    fn holds_back_only_what_may_begin_a_stop() {
        let mut matcher = StopStrings::new(stops(&["###", "end"]), false);
        assert_eq!(matcher.push("abc#").text, "abc");
        assert_eq!(matcher.push("#x").text, "##x");
        assert_eq!(matcher.push("the e").text, "the ");
        assert_eq!(
            matcher.push("nd of"),
            StopOutput {
                text: String::new(),
                stopped_by: Some(1)
            }
        );
        assert_eq!(matcher.push("more"), StopOutput::default());
        assert_eq!(matcher.flush(), "");
    }

    #[test]
    fn the_stop_string_can_be_kept() {
        let mut matcher = StopStrings::new(stops(&["\n\n"]), true);
        assert_eq!(matcher.push("a\n").text, "a");
        assert_eq!(
            matcher.push("\nb"),
            StopOutput {
                text: "\n\n".into(),
                stopped_by: Some(0)
            }
        );
    }

    #[test]
    fn without_stops_everything_passes() {
        let mut matcher = StopStrings::new(stops(&["", ""]), false);
        assert_eq!(
            matcher.push("héllo"),
            StopOutput {
                text: "héllo".into(),
                stopped_by: None
            }
        );
    }

    proptest! {
        /// Whatever the pieces: the text and the stop are those of the whole text, found character by character.
        #[test]
        fn cutting_does_not_matter(
            text in "[abé]{0,30}",
            stop_strings in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(0usize..31, 0..8),
            include in any::<bool>(),
        ) {
            let chars: Vec<char> = text.chars().collect();
            // The naive model: extend by one character until a stop string is the end of the text.
            let mut expected = (text.clone(), None);
            'grow: for n in 1..=chars.len() {
                let prefix: String = chars[..n].iter().collect();
                let mut matching: Vec<usize> = (0..stop_strings.len()).filter(|&i| prefix.ends_with(&stop_strings[i])).collect();
                matching.sort_by_key(|&i| (std::cmp::Reverse(stop_strings[i].len()), i));
                if let Some(&idx) = matching.first() {
                    let end = if include { prefix.len() } else { prefix.len() - stop_strings[idx].len() };
                    expected = (prefix[..end].to_owned(), Some(idx));
                    break 'grow;
                }
            }
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(chars.len())).collect();
            cuts.extend([0, chars.len()]);
            cuts.sort_unstable();
            let mut matcher = StopStrings::new(stop_strings, include);
            let (mut got, mut stopped_by) = (String::new(), None);
            for pair in cuts.windows(2) {
                let piece: String = chars[pair[0]..pair[1]].iter().collect();
                let output = matcher.push(&piece);
                got.push_str(&output.text);
                stopped_by = stopped_by.or(output.stopped_by);
            }
            got.push_str(&matcher.flush());
            prop_assert_eq!((got, stopped_by), expected);
        }

        /// The first piece is exempt: a stop string counts only where it ends after it.
        #[test]
        fn nothing_stops_in_what_passes(
            (early, late) in ("[ab]{0,12}", "[ab]{0,12}"),
            stop_strings in prop::collection::vec("[ab]{1,4}", 0..4),
            cut in 0usize..13,
        ) {
            let text = format!("{early}{late}");
            let mut expected = (text.clone(), None);
            'grow: for end in early.len() + 1..=text.len() {
                let matching = (0..stop_strings.len()).filter(|&i| text[..end].ends_with(&stop_strings[i]));
                if let Some(idx) = matching.min_by_key(|&i| (std::cmp::Reverse(stop_strings[i].len()), i)) {
                    expected = (text[..end - stop_strings[idx].len()].to_owned(), Some(idx));
                    break 'grow;
                }
            }
            let mut matcher = StopStrings::new(stop_strings, false);
            let cut = cut.min(early.len());
            let mut got = matcher.pass(&early[..cut]);
            got += &matcher.pass(&early[cut..]);
            let output = matcher.push(&late);
            got += &output.text;
            got += &matcher.flush();
            prop_assert_eq!((got, output.stopped_by), expected);
        }
    }
}
