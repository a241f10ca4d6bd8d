//! Which layers of a model share blocks. Layers that see equally far back form groups of one size, so that a block of any
//! group has as many bytes as one of any other, and one pool serves them all. Knows no memory and gives nothing out.

/// Where a layer's KV lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerPlace {
    /// The group whose blocks contain it.
    pub layer_group: usize,
    /// Its place in each of those blocks.
    pub slot: usize,
}

/// The layers of a model in groups. All layers of a group have the same window, or none; a sequence has a block table for each
/// group. Full groups come first, then those of wider windows. A model with one kind of layer has one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerGroups {
    windows: Vec<Option<usize>>,
    n_slots: usize,
    places: Vec<LayerPlace>,
}

/// For each slot that nothing is written to, there are at least this many layers of the same kind.
const LAYERS_FOR_PADDING: usize = 10;

impl LayerGroups {
    /// One group of layers without a window.
    pub fn one(n_layers: usize) -> LayerGroups {
        LayerGroups::of_windows(&vec![None; n_layers])
    }

    /// The groups of a model whose layers have these windows: a query sees itself and the `window - 1` tokens before it.
    ///
    /// With `c` layers of a kind and groups of `s`, the kind has `ceil(c / s)` groups and `ceil(c / s) * s - c` slots of padding.
    /// `s` is the largest number, at most the layers of the rarest kind, for which no kind's padding is more than a tenth of
    /// its layers: few tables, and little memory that holds nothing. 1 always is such a number.
    ///
    /// Groups of one size in one pool are those of vLLM's hybrid KV cache manager; Jenga (arXiv:2503.18292) allows for several
    /// sizes by pages of their least common multiple.
    pub fn of_windows(windows: &[Option<usize>]) -> LayerGroups {
        let mut kinds: Vec<Option<usize>> = Vec::new();
        for window in windows {
            if !kinds.contains(window) {
                kinds.push(*window);
            }
        }
        kinds.sort_by_key(|window| std::cmp::Reverse(window.unwrap_or(usize::MAX)));
        let count = |kind: &Option<usize>| windows.iter().filter(|window| *window == kind).count();
        let counts: Vec<usize> = kinds.iter().map(count).collect();
        let is_padded_little = |n_slots: &usize| {
            let padding = |n_layers: usize| n_layers.next_multiple_of(*n_slots) - n_layers;
            let mut counts = counts.iter();
            counts.all(|&n_layers| LAYERS_FOR_PADDING * padding(n_layers) <= n_layers)
        };
        let rarest = counts.iter().copied().min().unwrap_or(1);
        let n_slots = (1..=rarest).rev().find(is_padded_little).unwrap_or(1);
        let mut groups = LayerGroups {
            windows: Vec::new(),
            n_slots,
            places: vec![
                LayerPlace {
                    layer_group: 0,
                    slot: 0
                };
                windows.len()
            ],
        };
        for kind in kinds {
            let layers = (0..windows.len()).filter(|&layer| windows[layer] == kind);
            let first_group = groups.windows.len();
            for (i, layer) in layers.enumerate() {
                let place = LayerPlace {
                    layer_group: first_group + i / n_slots,
                    slot: i % n_slots,
                };
                groups.places[layer] = place;
                groups.windows.resize(place.layer_group + 1, kind);
            }
        }
        groups
    }

    /// Layers of the model.
    pub fn n_layers(&self) -> usize {
        self.places.len()
    }

    /// Groups, and so block tables of a sequence.
    pub fn n_groups(&self) -> usize {
        self.windows.len()
    }

    /// Layers of a block, those that are padding included.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Where a layer's KV lies.
    pub fn place(&self, layer: usize) -> LayerPlace {
        self.places[layer]
    }

    /// Where each layer's KV lies, in the order of the layers.
    pub fn places(&self) -> &[LayerPlace] {
        &self.places
    }

    /// How far back the layers of each group see.
    pub fn windows(&self) -> &[Option<usize>] {
        &self.windows
    }

    /// The group of each layer, in the order of the layers.
    pub fn of_layers(&self) -> Vec<u32> {
        self.places.iter().map(|place| place.layer_group as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All but every `n`-th layer have a window.
    fn all_but_every(n: usize, n_layers: usize) -> LayerGroups {
        let window = |layer: usize| (!(layer + 1).is_multiple_of(n)).then_some(1024);
        LayerGroups::of_windows(&(0..n_layers).map(window).collect::<Vec<_>>())
    }

    #[test]
    fn published_models_have_few_groups_and_little_padding() {
        // Layers and patterns as in the models' published config.json: (name, n, layers) -> (slots, full, windowed groups).
        for (name, n, n_layers, expected) in [
            ("Gemma 2 9B", 2, 42, (21, 1, 1)),
            ("Gemma 2 27B", 2, 46, (23, 1, 1)),
            ("Gemma 3 1B", 6, 26, (4, 1, 6)),
            ("Gemma 3 4B", 6, 34, (5, 1, 6)),
            ("Gemma 3 12B", 6, 48, (8, 1, 5)),
            ("Gemma 3 27B", 6, 62, (5, 2, 11)),
            ("gpt-oss 20B", 2, 24, (12, 1, 1)),
            ("gpt-oss 120B", 2, 36, (18, 1, 1)),
        ] {
            let groups = all_but_every(n, n_layers);
            let n_full = groups.windows().iter().filter(|window| window.is_none()).count();
            let found = (groups.n_slots(), n_full, groups.n_groups() - n_full);
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn one_kind_is_one_group_in_the_order_of_the_layers() {
        for windows in [vec![None; 5], vec![Some(8); 5]] {
            let groups = LayerGroups::of_windows(&windows);
            assert_eq!((groups.n_groups(), groups.n_slots()), (1, 5));
            assert_eq!(groups.windows(), &windows[..1]);
            for (layer, place) in groups.places().iter().enumerate() {
                assert_eq!((place.layer_group, place.slot), (0, layer));
            }
        }
    }

    proptest! {
        /// Every layer has a place of its own in a group of its window, and no kind is padded by more than a tenth.
        #[test]
        fn every_layer_has_its_place(
            windows in prop::collection::vec(prop_oneof![Just(None), Just(Some(8)), Just(Some(64))], 1..70),
        ) {
            let groups = LayerGroups::of_windows(&windows);
            let mut taken = std::collections::BTreeSet::new();
            for (place, window) in groups.places().iter().zip(&windows) {
                prop_assert!(place.slot < groups.n_slots());
                prop_assert_eq!(groups.windows()[place.layer_group], *window);
                prop_assert!(taken.insert((place.layer_group, place.slot)));
            }
            for kind in [None, Some(8), Some(64)] {
                let n_layers = windows.iter().filter(|window| **window == kind).count();
                let n_groups = groups.windows().iter().filter(|window| **window == kind).count();
                prop_assert!(10 * (n_groups * groups.n_slots() - n_layers) <= n_layers);
            }
            let is_sorted = groups.windows().is_sorted_by_key(|window| std::cmp::Reverse(window.unwrap_or(usize::MAX)));
            prop_assert!(is_sorted, "the full ones first");
        }
    }
}
