//! What is sent and when, as a pure function of its description and the seed: sessions of turns, their lengths, prefixes and
//! arrival times. No I/O but the reading of a trace, no clock.

mod arrivals;
mod lengths;
mod prompt;
mod trace;

use std::sync::Arc;
use std::time::Duration;

pub use arrivals::{ArrivalProcess, Arrivals};
pub use lengths::{LENGTH_LIMIT, Lengths, SHAREGPT_OUTPUTS, SHAREGPT_PROMPTS};
pub use prompt::{Message, PromptMaker, Segment, Source, Speaker};
pub use trace::{TRACE_BLOCK_TOKENS, TraceError, TraceRequest, read as read_trace};

use super::random::SplitMix64;

/// Most turns of a session: each repeats those before it, so their prompts grow with the square of their number.
pub const TURNS_LIMIT: u32 = 1000;

/// What load to make.
#[derive(Clone, Debug)]
pub struct WorkloadSpec {
    /// Requests in all, at least 1, and at most those of the trace. The last session is cut where they end.
    pub n_requests: usize,
    /// How sessions arrive; recorded arrivals need a trace.
    pub arrivals: Arrivals,
    /// Tokens of a prompt, or of a session's first; the trace's lengths go before.
    pub input: Lengths,
    /// Tokens to generate; the trace's lengths go before.
    pub output: Lengths,
    /// Longer prompts are cut to this.
    pub max_input_len: u32,
    /// Longer outputs are cut to this.
    pub max_output_len: u32,
    /// Leading tokens of a prompt that others share; shorter prompts consist of them. Prompts of hash ids have none.
    pub prefix_len: u32,
    /// How many different prefixes there are, at least 1; each session has one of them.
    pub n_prefixes: u32,
    /// Requests of a session, each of which repeats all that was said before; at most [`TURNS_LIMIT`] are made. A trace has
    /// sessions of one.
    pub turns: Lengths,
    /// What the user adds with each further turn.
    pub turn_input: Lengths,
    /// Mean of the exponential pause between an answer and the next turn.
    pub think_time: Duration,
    /// Recorded requests.
    pub trace: Option<Arc<[TraceRequest]>>,
    /// Where everything random comes from.
    pub seed: u64,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its number among all requests.
    pub index: usize,
    /// From the end of the turn before, or from the session's start.
    pub pause: Duration,
    /// The conversation so far; the last message is the user's.
    pub messages: Vec<Message>,
    /// Tokens to generate, at least 1.
    pub output_len: u32,
}

impl Turn {
    /// Tokens of the prompt.
    pub fn input_len(&self) -> u64 {
        self.messages.iter().map(Message::n_tokens).sum()
    }
}

/// Requests of which each waits for the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// When the first one is due; zero in a closed loop.
    pub at: Duration,
    /// In order, at least one.
    pub turns: Vec<Turn>,
}

/// Numbers are drawn from streams of their own, so that another length does not change the arrivals.
#[derive(Clone, Copy)]
enum Stream {
    Arrivals,
    Lengths,
    Prefixes,
    Pauses,
}

impl WorkloadSpec {
    /// All sessions, in the order in which they are due.
    pub fn sessions(&self) -> Vec<Session> {
        let mut lengths = self.random(Stream::Lengths);
        let mut prefixes = self.random(Stream::Prefixes);
        let mut pauses = self.random(Stream::Pauses);
        let mut sessions = Vec::new();
        let mut index = 0;
        while index < self.n_requests {
            let turns = match &self.trace {
                Some(trace) => vec![self.recorded(index, &trace[index], prefixes.below(self.n_prefixes))],
                None => {
                    let n_turns = self.turns.draw(&mut lengths).min(TURNS_LIMIT) as usize;
                    let n_turns = n_turns.min(self.n_requests - index);
                    self.conversation(
                        index,
                        n_turns,
                        &mut lengths,
                        prefixes.below(self.n_prefixes),
                        &mut pauses,
                    )
                }
            };
            index += turns.len();
            sessions.push(Session {
                at: Duration::ZERO,
                turns,
            });
        }
        for (session, at) in sessions.iter_mut().zip(self.times()) {
            session.at = at;
        }
        sessions
    }

    /// The `index`-th request to send before measuring: of the lengths of the measured ones, with their prefix, and else
    /// with tokens that no measured request has.
    pub fn warm_up(&self, index: u64) -> Turn {
        let mut random = SplitMix64::new(self.random(Stream::Lengths).next_u64(), index);
        let input_len = self.input.draw(&mut random).min(self.max_input_len);
        Turn {
            index: 0,
            pause: Duration::ZERO,
            messages: vec![self.opening(input_len, 0, Source::WarmUp(index))],
            output_len: self.output.draw(&mut random).min(self.max_output_len),
        }
    }

    fn random(&self, stream: Stream) -> SplitMix64 {
        SplitMix64::new(self.seed, stream as u64)
    }

    fn times(&self) -> Vec<Duration> {
        match (self.arrivals, &self.trace) {
            (Arrivals::Open { rate, process }, _) => {
                process.times(rate, self.n_requests, &mut self.random(Stream::Arrivals))
            }
            (Arrivals::Recorded { scale }, Some(trace)) => {
                let scaled =
                    |at: Duration| Duration::try_from_secs_f64(at.as_secs_f64() * scale).unwrap_or(Duration::MAX);
                trace.iter().map(|request| scaled(request.at)).collect()
            }
            (Arrivals::Closed { .. } | Arrivals::Recorded { .. }, _) => Vec::new(),
        }
    }

    /// A user's message of `input_len` tokens that begins with shared ones.
    fn opening(&self, input_len: u32, prefix: u32, source: Source) -> Message {
        let prefix_len = self.prefix_len.min(input_len);
        let parts = [(Source::Prefix(prefix), prefix_len), (source, input_len - prefix_len)];
        message(Speaker::User, parts.into_iter())
    }

    fn conversation(
        &self,
        first_index: usize,
        n_turns: usize,
        lengths: &mut SplitMix64,
        prefix: u32,
        pauses: &mut SplitMix64,
    ) -> Vec<Turn> {
        let input_len = self.input.draw(lengths).min(self.max_input_len);
        let mut messages = vec![self.opening(input_len, prefix, Source::Request(first_index as u64))];
        let mut turns: Vec<Turn> = Vec::with_capacity(n_turns);
        for index in first_index..first_index + n_turns {
            let mut pause = Duration::ZERO;
            if let Some(before) = turns.last() {
                let answered = (Source::Answer(before.index as u64), before.output_len);
                let asked = (Source::Request(index as u64), self.turn_input.draw(lengths));
                messages.push(message(Speaker::Assistant, [answered].into_iter()));
                messages.push(message(Speaker::User, [asked].into_iter()));
                pause = self.think_time.mul_f64(pauses.exponential());
            }
            let input_len: u64 = messages.iter().map(Message::n_tokens).sum();
            if input_len > u64::from(self.max_input_len) {
                // The user starts anew; a session does not outgrow what a prompt may be.
                break;
            }
            turns.push(Turn {
                index,
                pause,
                messages: messages.clone(),
                output_len: self.output.draw(lengths).min(self.max_output_len),
            });
        }
        turns
    }

    fn recorded(&self, index: usize, request: &TraceRequest, prefix: u32) -> Turn {
        let input_len = request.input_len.min(self.max_input_len);
        let own = Source::Request(index as u64);
        let mut left = input_len;
        let mut blocks: Vec<(Source, u32)> = Vec::with_capacity(request.hash_ids.len() + 1);
        for &id in &request.hash_ids {
            let n_tokens = left.min(TRACE_BLOCK_TOKENS);
            blocks.push((Source::Block(id), n_tokens));
            left -= n_tokens;
        }
        blocks.push((own, left));
        let message = match request.hash_ids.is_empty() {
            true => self.opening(input_len, prefix, own),
            false => message(Speaker::User, blocks.into_iter()),
        };
        Turn {
            index,
            pause: Duration::ZERO,
            messages: vec![message],
            output_len: request.output_len.min(self.max_output_len),
        }
    }
}

/// Of the parts that have any tokens.
fn message(speaker: Speaker, parts: impl Iterator<Item = (Source, u32)>) -> Message {
    let segments = parts.filter(|(_, n_tokens)| *n_tokens > 0);
    Message {
        speaker,
        segments: segments
            .map(|(source, n_tokens)| Segment { source, n_tokens })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(n_requests: usize) -> WorkloadSpec {
        WorkloadSpec {
            n_requests,
            arrivals: Arrivals::Closed { concurrency: 1 },
            input: Lengths::Fixed(20),
            output: Lengths::Fixed(5),
            max_input_len: LENGTH_LIMIT,
            max_output_len: LENGTH_LIMIT,
            prefix_len: 8,
            n_prefixes: 1,
            turns: Lengths::Fixed(1),
            turn_input: Lengths::Fixed(6),
            think_time: Duration::ZERO,
            trace: None,
            seed: 7,
        }
    }

    fn maker() -> PromptMaker {
        PromptMaker {
            vocabulary: (0..1000).collect(),
            seed: 7,
        }
    }

    fn ids(turn: &Turn) -> Vec<u32> {
        maker().ids(&turn.messages)
    }

    #[test]
    fn prompts_have_their_length_share_their_prefix_and_repeat() {
        let sessions = spec(3).sessions();
        assert_eq!(sessions.len(), 3);
        let (a, b) = (ids(&sessions[0].turns[0]), ids(&sessions[1].turns[0]));
        assert_eq!((a.len(), b.len()), (20, 20));
        assert_eq!(a[..8], b[..8]);
        assert_ne!(a[8..], b[8..]);
        assert_eq!(sessions, spec(3).sessions(), "the same again");
        let warm_up = ids(&spec(3).warm_up(0));
        assert_eq!(warm_up[..8], a[..8]);
        assert_ne!(warm_up[8..], a[8..]);
    }

    #[test]
    fn another_length_leaves_the_arrivals_as_they_were() {
        let arrivals = Arrivals::Open {
            rate: 3.0,
            process: ArrivalProcess::Poisson,
        };
        let fixed = WorkloadSpec { arrivals, ..spec(50) };
        let drawn = WorkloadSpec {
            input: SHAREGPT_PROMPTS,
            output: SHAREGPT_OUTPUTS,
            ..fixed.clone()
        };
        let times = |spec: &WorkloadSpec| spec.sessions().iter().map(|session| session.at).collect::<Vec<_>>();
        assert_eq!(times(&fixed), times(&drawn));
        let other = WorkloadSpec {
            seed: 8,
            ..fixed.clone()
        };
        assert_ne!(times(&fixed), times(&other));
    }

    #[test]
    fn each_turn_begins_with_all_that_was_said_before() {
        let spec = WorkloadSpec {
            turns: Lengths::Fixed(3),
            think_time: Duration::from_secs(2),
            ..spec(8)
        };
        let sessions = spec.sessions();
        let counts: Vec<usize> = sessions.iter().map(|session| session.turns.len()).collect();
        assert_eq!(counts, [3, 3, 2], "the last session is cut");
        let indexes: Vec<usize> = sessions.iter().flat_map(|s| &s.turns).map(|turn| turn.index).collect();
        assert_eq!(indexes, (0..8).collect::<Vec<_>>());
        let turns = &sessions[0].turns;
        assert_eq!(turns.iter().map(Turn::input_len).collect::<Vec<_>>(), [20, 31, 42]);
        assert_eq!(ids(&turns[1])[..20], ids(&turns[0]));
        assert_eq!(ids(&turns[2])[..31], ids(&turns[1]));
        let speakers: Vec<Speaker> = turns[2].messages.iter().map(|message| message.speaker).collect();
        use Speaker::{Assistant, User};
        assert_eq!(speakers, [User, Assistant, User, Assistant, User]);
        assert_eq!(turns[0].pause, Duration::ZERO);
        assert!(turns[1].pause > Duration::ZERO && turns[1].pause != turns[2].pause);
    }

    #[test]
    fn a_session_that_outgrows_the_longest_prompt_starts_anew() {
        let spec = WorkloadSpec {
            turns: Lengths::Fixed(100),
            max_input_len: 40,
            ..spec(7)
        };
        let sessions = spec.sessions();
        let counts: Vec<usize> = sessions.iter().map(|session| session.turns.len()).collect();
        assert_eq!(counts, [2, 2, 2, 1]);
        assert!(
            sessions
                .iter()
                .flat_map(|s| &s.turns)
                .all(|turn| turn.input_len() <= 40)
        );
    }

    #[test]
    fn several_prefixes_are_all_used_and_none_other() {
        let spec = WorkloadSpec {
            n_prefixes: 4,
            ..spec(200)
        };
        let beginnings: std::collections::BTreeSet<Vec<u32>> = spec
            .sessions()
            .iter()
            .map(|session| ids(&session.turns[0])[..8].to_vec())
            .collect();
        assert_eq!(beginnings.len(), 4);
    }

    #[test]
    fn hash_ids_become_shared_beginnings() {
        let request = |at: u64, input_len: u32, hash_ids: &[u64]| TraceRequest {
            at: Duration::from_secs(at),
            input_len,
            output_len: 30,
            hash_ids: hash_ids.to_vec(),
        };
        let trace = [
            request(0, 1300, &[5, 6, 7]),
            request(4, 1100, &[5, 6, 8]),
            request(10, 600, &[9, 6]),
            request(11, 700, &[5]),
        ];
        let spec = WorkloadSpec {
            trace: Some(trace.into()),
            arrivals: Arrivals::Recorded { scale: 0.5 },
            max_output_len: 20,
            ..spec(4)
        };
        let sessions = spec.sessions();
        let at: Vec<f64> = sessions.iter().map(|session| session.at.as_secs_f64()).collect();
        assert_eq!(at, [0.0, 2.0, 5.0, 5.5]);
        let prompts: Vec<Vec<u32>> = sessions.iter().map(|session| ids(&session.turns[0])).collect();
        assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [1300, 1100, 600, 700]);
        assert_eq!(prompts[0][..1024], prompts[1][..1024], "two blocks are shared");
        assert_ne!(prompts[0][1024..1100], prompts[1][1024..]);
        assert_ne!(prompts[2][..512], prompts[0][..512]);
        assert_eq!(
            prompts[3][..512],
            prompts[0][..512],
            "what no hash id names is the request's own"
        );
        assert_ne!(prompts[3][512..700], prompts[0][512..700]);
        assert!(sessions.iter().all(|session| session.turns[0].output_len == 20));
    }

    #[test]
    fn a_traces_lengths_can_be_sent_with_other_arrivals() {
        let trace = (0..5).map(|i| TraceRequest {
            at: Duration::from_secs(i),
            input_len: 100 + i as u32,
            output_len: 1,
            hash_ids: vec![],
        });
        let spec = WorkloadSpec {
            trace: Some(trace.collect()),
            arrivals: Arrivals::Open {
                rate: 10.0,
                process: ArrivalProcess::Uniform,
            },
            ..spec(5)
        };
        let sessions = spec.sessions();
        assert_eq!(sessions[4].at, Duration::from_millis(400));
        let lengths: Vec<u64> = sessions.iter().map(|session| session.turns[0].input_len()).collect();
        assert_eq!(lengths, [100, 101, 102, 103, 104]);
        let (a, b) = (ids(&sessions[0].turns[0]), ids(&sessions[1].turns[0]));
        assert_eq!(a[..8], b[..8], "without hash ids the shared prefix holds");
    }
}
