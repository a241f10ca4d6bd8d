//! `--load-format dummy`: seeded random weights from config.json alone, for measuring real shapes without real files.

use half::bf16;

use crate::philox::philox4x32;

/// Standard deviation of the weights: that of the usual initialisation, so that logits stay of the order of one.
const STANDARD_DEVIATION: f32 = 0.02;

/// Elements filled by one thread at a time.
const CHUNK: usize = 1 << 16;

/// The elements of a tensor, bf16 little endian: uniform with the standard deviation of 0.02.
///
/// Each element is a function of (seed, tensor name, position), so any number of threads gives the same bytes.
pub(crate) fn random_tensor(seed: u64, name: &str, n_elements: usize) -> Vec<u8> {
    let hash = blake3::hash(name.as_bytes());
    let tensor_word = u32::from_le_bytes([
        hash.as_bytes()[0],
        hash.as_bytes()[1],
        hash.as_bytes()[2],
        hash.as_bytes()[3],
    ]);
    let mut bytes = vec![0u8; n_elements * 2];
    let n_threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(n_elements.div_ceil(CHUNK));
    let mut chunks: Vec<(usize, &mut [u8])> = bytes.chunks_mut(CHUNK * 2).enumerate().collect();
    let per_thread = chunks.len().div_ceil(n_threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let mut shares = chunks.chunks_mut(per_thread);
        let own = shares.next();
        for share in shares {
            scope.spawn(move || {
                share
                    .iter_mut()
                    .for_each(|(idx, chunk)| fill(seed, tensor_word, *idx, chunk))
            });
        }
        own.into_iter()
            .flatten()
            .for_each(|(idx, chunk)| fill(seed, tensor_word, *idx, chunk));
    });
    bytes
}

/// Eight elements of 16 random bits from each call of the generator.
fn fill(seed: u64, tensor_word: u32, chunk_idx: usize, chunk: &mut [u8]) {
    // Uniform on [-a, a) has the standard deviation a / sqrt(3).
    let half_width = STANDARD_DEVIATION * 3.0f32.sqrt();
    let step = half_width / 32_768.0;
    let first = (chunk_idx * CHUNK / 8) as u64;
    for (group, target) in chunk.chunks_mut(16).enumerate() {
        let counter = first + group as u64;
        let words = philox4x32(seed, [counter as u32, (counter >> 32) as u32, tensor_word, 1]);
        for (element, bytes) in target.chunks_exact_mut(2).enumerate() {
            let bits = (words[element / 2] >> (16 * (element % 2))) as u16;
            let value = (f32::from(bits) - 32_767.5) * step;
            bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }
    }
}

/// A vector of ones, bf16 little endian: norm weights.
pub(crate) fn ones(n_elements: usize) -> Vec<u8> {
    bf16::ONE.to_le_bytes().repeat(n_elements)
}

/// A vector of zeros, bf16: biases.
pub(crate) fn zeros(n_elements: usize) -> Vec<u8> {
    vec![0; 2 * n_elements]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(bytes: &[u8]) -> Vec<f32> {
        bytes
            .chunks_exact(2)
            .map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32())
            .collect()
    }

    #[test]
    fn values_have_the_asked_spread() {
        let values = values(&random_tensor(1, "a", 3 * CHUNK + 7));
        assert_eq!(values.len(), 3 * CHUNK + 7);
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let deviation = (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt();
        assert!(mean.abs() < 1e-3, "{mean}");
        assert!((deviation - STANDARD_DEVIATION).abs() < 1e-3, "{deviation}");
    }

    #[test]
    fn seed_name_and_position_decide() {
        let long = random_tensor(1, "a", 2 * CHUNK);
        assert_eq!(long[..100], random_tensor(1, "a", 50)[..]);
        assert_ne!(long[..100], random_tensor(2, "a", 50)[..]);
        assert_ne!(long[..100], random_tensor(1, "b", 50)[..]);
        assert_ne!(long[..100], long[2 * CHUNK..2 * CHUNK + 100]);
        assert_eq!(values(&ones(3)), [1.0; 3]);
    }
}
