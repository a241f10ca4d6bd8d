//! What a prompt is made of: runs of random tokens, named so that equal names are equal tokens. All of it follows from the
//! seed.

use super::super::random::SplitMix64;

/// Where a run of tokens comes from. Two runs of one source begin with the same tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A prefix that many prompts share.
    Prefix(u32),
    /// A hash id of a trace.
    Block(u64),
    /// What the user says in this request.
    Request(u64),
    /// What the server is taken to have answered to this request, in the history of the next.
    Answer(u64),
    /// A warm-up request.
    WarmUp(u64),
}

impl Source {
    fn random(self, seed: u64) -> SplitMix64 {
        let (kind, id) = match self {
            Source::Prefix(id) => (0, u64::from(id)),
            Source::Block(id) => (1, id),
            Source::Request(id) => (2, id),
            Source::Answer(id) => (3, id),
            Source::WarmUp(id) => (4, id),
        };
        // A seed of its own for each kind, so that ids of two kinds never meet.
        SplitMix64::new(SplitMix64::new(seed, u64::MAX - kind).next_u64(), id)
    }
}

/// The first `n_tokens` of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where they come from.
    pub source: Source,
    /// How many, at least 1.
    pub n_tokens: u32,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// The user.
    User,
    /// The server, in a history.
    Assistant,
}

/// What one side says at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub speaker: Speaker,
    /// What is said, in order; not empty.
    pub segments: Vec<Segment>,
}

impl Message {
    /// Its length.
    pub fn n_tokens(&self) -> u64 {
        self.segments.iter().map(|segment| u64::from(segment.n_tokens)).sum()
    }
}

/// Stand-ins for tokens where a prompt must be text.
const WORDS: [&str; 32] = [
    "runner", "hands", "the", "next", "stone", "river", "light", "seven", "under", "green", "walks", "north", "paper",
    "sound", "early", "bread", "glass", "small", "house", "tree", "water", "moves", "over", "quiet", "field", "clock",
    "wind", "open", "door", "road", "blue", "near",
];

/// Makes tokens or words of segments.
#[derive(Clone, Debug)]
pub struct PromptMaker {
    /// Token ids to draw from; only words can be made if there are none.
    pub vocabulary: std::sync::Arc<[u32]>,
    /// Where everything random comes from.
    pub seed: u64,
}

impl PromptMaker {
    /// The token ids of `messages`, one after the other. The vocabulary is not empty.
    pub fn ids(&self, messages: &[Message]) -> Vec<u32> {
        let n_tokens: u64 = messages.iter().map(Message::n_tokens).sum();
        let mut ids = Vec::with_capacity(usize::try_from(n_tokens).unwrap_or(0));
        for segment in messages.iter().flat_map(|message| &message.segments) {
            ids.extend(
                self.draws(segment, self.vocabulary.len())
                    .map(|draw| self.vocabulary[draw]),
            );
        }
        ids
    }

    /// The words of `message`, as many as it has tokens.
    pub fn text(&self, message: &Message) -> String {
        let words = message
            .segments
            .iter()
            .flat_map(|segment| self.draws(segment, WORDS.len()));
        words.map(|draw| WORDS[draw]).collect::<Vec<_>>().join(" ")
    }

    fn draws(&self, segment: &Segment, bound: usize) -> impl Iterator<Item = usize> + use<> {
        let bound = u32::try_from(bound).unwrap_or(u32::MAX);
        let mut random = segment.source.random(self.seed);
        (0..segment.n_tokens).map(move |_| random.below(bound) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(segments: &[(Source, u32)]) -> Message {
        let segments = segments.iter().map(|&(source, n_tokens)| Segment { source, n_tokens });
        Message {
            speaker: Speaker::User,
            segments: segments.collect(),
        }
    }

    #[test]
    fn equal_sources_are_equal_tokens_and_others_differ() {
        let maker = PromptMaker {
            vocabulary: (100..200).collect(),
            seed: 7,
        };
        let a = maker.ids(&[message(&[(Source::Prefix(0), 8), (Source::Request(1), 12)])]);
        let b = maker.ids(&[message(&[(Source::Prefix(0), 8), (Source::Request(2), 12)])]);
        assert_eq!((a.len(), b.len()), (20, 20));
        assert_eq!(a[..8], b[..8]);
        assert_ne!(a[8..], b[8..]);
        assert!(a.iter().all(|id| (100..200).contains(id)));
        let short = maker.ids(&[message(&[(Source::Request(1), 5)])]);
        assert_eq!(a[8..13], short, "a shorter run is the beginning of a longer one");
        let sources = [
            Source::Prefix(3),
            Source::Block(3),
            Source::Request(3),
            Source::Answer(3),
            Source::WarmUp(3),
        ];
        let runs: std::collections::BTreeSet<Vec<u32>> = sources
            .iter()
            .map(|&source| maker.ids(&[message(&[(source, 12)])]))
            .collect();
        assert_eq!(runs.len(), sources.len());
        let other = PromptMaker { seed: 8, ..maker };
        assert_ne!(other.ids(&[message(&[(Source::Request(1), 12)])]), a[8..]);
    }

    #[test]
    fn words_are_as_many_as_tokens() {
        let maker = PromptMaker {
            vocabulary: [].into(),
            seed: 7,
        };
        let text = maker.text(&message(&[(Source::Prefix(0), 3), (Source::Request(0), 17)]));
        assert_eq!(text.split(' ').count(), 20);
    }
}
