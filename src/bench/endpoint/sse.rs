//! Server-sent events out of a byte stream, wherever the network cut it. Knows nothing of what events mean.

/// An event longer than this is not one of an inference server.
const EVENT_LIMIT_BYTES: usize = 16 << 20;

/// The stream holds an event that never ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {EVENT_LIMIT_BYTES} bytes")]
pub struct EventTooLong;

/// Collects bytes and gives back the data of whole events. Comments and fields other than `data` are skipped.
#[derive(Clone, Debug, Default)]
pub struct SseParser {
    /// The line being read, without its end.
    line: Vec<u8>,
    /// The data of the event being read.
    data: Vec<u8>,
    has_data: bool,
    after_carriage_return: bool,
}

impl SseParser {
    /// Reads `bytes`; calls `on_event` with the data of each event that they complete.
    pub fn push(&mut self, bytes: &[u8], mut on_event: impl FnMut(&[u8])) -> Result<(), EventTooLong> {
        for &byte in bytes {
            let ends_pair = std::mem::replace(&mut self.after_carriage_return, byte == b'\r') && byte == b'\n';
            if ends_pair {
                continue;
            }
            if byte != b'\n' && byte != b'\r' {
                if self.line.len() + self.data.len() >= EVENT_LIMIT_BYTES {
                    return Err(EventTooLong);
                }
                self.line.push(byte);
                continue;
            }
            if self.line.is_empty() {
                if std::mem::take(&mut self.has_data) {
                    on_event(&self.data);
                }
                self.data.clear();
            } else if let Some(value) = self.line.strip_prefix(b"data:") {
                if std::mem::replace(&mut self.has_data, true) {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            }
            self.line.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for chunk in chunks {
            parser
                .push(chunk, |data| events.push(String::from_utf8_lossy(data).into_owned()))
                .expect("short events");
        }
        events
    }

    #[test]
    fn comments_other_fields_and_line_ends_are_understood() {
        let text =
            b": ping\n\ndata: {\"a\":1}\n\nevent: x\r\ndata:one\r\ndata: two\r\n\r\nid: 3\n\ndata: [DONE]\n\ndata: cut";
        assert_eq!(events(&[text]), ["{\"a\":1}", "one\ntwo", "[DONE]"]);
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = SseParser::default();
        let chunk = vec![b'x'; 1 << 20];
        let outcome = (0..17).try_for_each(|_| parser.push(&chunk, |_| {}));
        assert_eq!(outcome, Err(EventTooLong));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            data in proptest::collection::vec("[a-z :\u{e9}]{0,9}", 0..6),
            line_end in prop_oneof![Just("\n"), Just("\r\n"), Just("\r")],
            cuts in proptest::collection::vec(0_usize..200, 0..12),
        ) {
            let text: String = data.iter().map(|data| format!("data: {data}{line_end}{line_end}")).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut <= text.len()).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &text.as_bytes()[pair[0]..pair[1]]).collect();
            prop_assert_eq!(events(&chunks), data);
        }
    }
}
