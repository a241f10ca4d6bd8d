//! What `sample` is told of each row and what it answers. Masks, penalties and biases are applied to the logits before.

use bytemuck::{Pod, Zeroable};

/// One row's request; `struct Sampling` of `sample.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Sampling {
    /// Key of the generator.
    pub seed: u64,
    /// Position of the token among its choice's.
    pub index: u32,
    /// Which of the request's choices.
    pub choice: u32,
    /// 0 takes the largest logit.
    pub temperature: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 and more are off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
}

/// A row's status.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowStatus {
    /// There is a token.
    Chosen = 0,
    /// A logit is NaN or +infinity.
    NotFinite = 1,
    /// Every logit is -infinity.
    NoCandidate = 2,
    /// More candidates than the kernel puts in order ([`MAX_CANDIDATES`], [`MAX_BAND`]): the host chooses.
    LeftToHost = 3,
}

/// Largest `top_k` that the device draws from.
pub const MAX_CANDIDATES: u32 = 256;

/// Most tokens of nearly equal probability (within a factor of e^(1/16)) where a nucleus of more than [`MAX_CANDIDATES`]
/// tokens ends.
pub const MAX_BAND: u32 = 1024;

impl RowStatus {
    /// The status that a kernel wrote.
    pub fn from_device(status: u32) -> Option<RowStatus> {
        use RowStatus::{Chosen, LeftToHost, NoCandidate, NotFinite};
        [Chosen, NotFinite, NoCandidate, LeftToHost]
            .into_iter()
            .find(|known| *known as u32 == status)
    }
}
