//! config.json: numbers that were accepted give layers, windows and rotary tables.
#![no_main]

use std::path::Path;

use baton_engine::model::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(config) = ModelConfig::parse(Path::new("config.json"), data) {
        assert_eq!(config.layers.len(), config.n_layers);
        for layer in &config.layers {
            assert!(layer.rope < config.ropes.len());
        }
        for rope in &config.ropes {
            let variants = rope.variants();
            assert!(variants.iter().all(|params| params.inv_freq.len() == rope.rotary_dim / 2));
        }
        let _ = (config.sliding_windows(), config.layer_groups(), config.short_context());
    }
});
