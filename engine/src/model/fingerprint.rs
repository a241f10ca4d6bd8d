//! Who is who: which packed file belongs to a model, and whether two instances may exchange KV. Hashes, no I/O of its own.

use std::ffi::OsStr;
use std::path::PathBuf;

use baton_kernels::{DType, KvLayout};
use baton_scheduler::ids::Fingerprint;
use baton_scheduler::layer_groups::LayerGroups;

use super::folder::ModelFolder;
use super::safetensors::TensorTable;

/// Of each tensor, this much of its beginning and of its end is hashed: enough to tell fine-tunes apart, and quick.
const SAMPLED_BYTES: usize = 64 << 10;

/// Changes whenever our use of a model's tensors does, so that older packed files are not taken for new ones.
const PACKING_VERSION: u32 = 2;

/// Identity of a model's numbers: config, tensor table, and the first and last 64 KiB of each tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModelFingerprint([u8; 32]);

impl ModelFingerprint {
    /// Of weights from files.
    pub fn of_files(folder: &ModelFolder, table: &TensorTable) -> ModelFingerprint {
        let mut hasher = Fields::new("baton model files 1");
        hasher.bytes(folder.config_bytes());
        for name in table.names() {
            let Some(tensor) = table.get(name) else { continue };
            hasher.bytes(name.as_bytes());
            hasher.bytes(format!("{:?} {:?}", tensor.dtype, tensor.shape).as_bytes());
            let sampled = tensor.data.len().min(SAMPLED_BYTES);
            hasher.bytes(&tensor.data[..sampled]);
            hasher.bytes(&tensor.data[tensor.data.len() - sampled..]);
        }
        ModelFingerprint(hasher.finish())
    }

    /// Of weights that a generator makes from the configuration.
    pub fn of_dummy(folder: &ModelFolder, seed: u64) -> ModelFingerprint {
        let mut hasher = Fields::new("baton model dummy 1");
        hasher.bytes(folder.config_bytes());
        hasher.bytes(&seed.to_le_bytes());
        ModelFingerprint(hasher.finish())
    }

    /// Name of the packed file for a compute dtype, in hexadecimal.
    pub fn packed_key(&self, dtype: DType) -> String {
        let mut hasher = Fields::new("baton packed weights 1");
        hasher.bytes(&self.0);
        hasher.bytes(dtype.as_str().as_bytes());
        hasher.bytes(&PACKING_VERSION.to_le_bytes());
        blake3::Hash::from(hasher.finish()).to_hex().to_string()
    }

    /// What two instances compare before KV travels: the model, what it is computed in, how its KV lies in memory, and which
    /// layers share blocks where not all do.
    pub fn transfer_fingerprint(
        &self,
        compute_dtype: DType,
        layout: &KvLayout,
        layer_groups: &LayerGroups,
    ) -> Fingerprint {
        let KvLayout {
            n_layers,
            n_kv_heads,
            block_size,
            head_dim,
            dtype,
        } = *layout;
        let mut hasher = Fields::new("baton transfer 1");
        hasher.bytes(&self.0);
        hasher.bytes(compute_dtype.as_str().as_bytes());
        hasher.bytes(dtype.as_str().as_bytes());
        for size in [n_layers, n_kv_heads, block_size, head_dim] {
            hasher.bytes(&(size as u64).to_le_bytes());
        }
        if layer_groups.n_groups() > 1 {
            for place in layer_groups.places() {
                hasher.bytes(&(place.layer_group as u64).to_le_bytes());
                hasher.bytes(&(place.slot as u64).to_le_bytes());
            }
        }
        Fingerprint(hasher.finish())
    }
}

/// A hash over fields with their lengths, so that no two sequences of fields are the same bytes.
struct Fields(blake3::Hasher);

impl Fields {
    fn new(purpose: &str) -> Fields {
        let mut fields = Fields(blake3::Hasher::new());
        fields.bytes(purpose.as_bytes());
        fields
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn finish(self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

/// Where packed weights go by default: `$XDG_CACHE_HOME/baton/packed`, else `$HOME/.cache/baton/packed`.
///
/// As the specification of XDG says, a value that is empty or not absolute counts as unset.
pub fn default_packed_dir(xdg_cache_home: Option<&OsStr>, home: Option<&OsStr>) -> Option<PathBuf> {
    let absolute = |value: Option<&OsStr>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute(xdg_cache_home).or_else(|| Some(absolute(home)?.join(".cache")))?;
    Some(cache.join("baton").join("packed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_dir_follows_xdg() {
        let dir = |xdg: Option<&str>, home: Option<&str>| default_packed_dir(xdg.map(OsStr::new), home.map(OsStr::new));
        assert_eq!(dir(Some("/c"), Some("/h")), Some(PathBuf::from("/c/baton/packed")));
        assert_eq!(dir(Some(""), Some("/h")), Some(PathBuf::from("/h/.cache/baton/packed")));
        assert_eq!(dir(Some("relative"), None), None);
        assert_eq!(dir(None, None), None);
    }

    #[test]
    fn every_part_counts() {
        let layout = KvLayout {
            n_layers: 2,
            n_kv_heads: 3,
            block_size: 16,
            head_dim: 8,
            dtype: DType::Bf16,
        };
        let model = ModelFingerprint([1; 32]);
        let one = LayerGroups::one(2);
        let base = model.transfer_fingerprint(DType::Bf16, &layout, &one);
        let other = ModelFingerprint([2; 32]);
        assert_ne!(base, other.transfer_fingerprint(DType::Bf16, &layout, &one));
        assert_ne!(base, model.transfer_fingerprint(DType::F32, &layout, &one));
        for changed in [
            KvLayout {
                block_size: 32,
                ..layout
            },
            KvLayout {
                dtype: DType::F32,
                ..layout
            },
        ] {
            assert_ne!(base, model.transfer_fingerprint(DType::Bf16, &changed, &one));
        }
        // Which layer lies where, with the same layout.
        let groups = |windows: [Option<usize>; 4]| LayerGroups::of_windows(&windows);
        let alternating = groups([Some(8), None, Some(8), None]);
        let in_halves = groups([Some(8), Some(8), None, None]);
        let of_groups = |groups: &LayerGroups| model.transfer_fingerprint(DType::Bf16, &layout, groups);
        assert_ne!(of_groups(&alternating), of_groups(&in_halves));
        assert_ne!(of_groups(&alternating), base);
        assert_eq!(base, of_groups(&one));
        assert_ne!(model.packed_key(DType::Bf16), model.packed_key(DType::F32));
    }
}
