//! Plans against what every plan must be: whole, without overlap, balanced, and in deterministic mode blind to the batch.

use proptest::prelude::*;

use super::*;

fn shape() -> impl Strategy<Value = Shape> {
    let heads = (1_u32..5, prop::sample::select(vec![1_u32, 2, 3, 7, 8, 16, 17, 71]));
    let kernels = prop::sample::select(vec![Kernels::TensorCore, Kernels::Scalar]);
    let head_dim = prop::sample::select(super::super::sources::HEAD_DIMS.to_vec());
    (heads, head_dim, prop::option::of(1_u32..400), kernels).prop_map(
        |((n_kv_heads, group), head_dim, window, kernels)| Shape {
            n_heads: n_kv_heads * group,
            n_kv_heads,
            head_dim,
            window,
            kernels,
        },
    )
}

fn sequences() -> impl Strategy<Value = Vec<Sequence>> {
    let n_tokens = prop_oneof![3 => Just(1_u32), 1 => 2_u32..90];
    prop::collection::vec((0_u32..3000, n_tokens), 0..7).prop_map(|sizes| {
        let (mut first_row, mut first_block) = (0, 0);
        let mut sequences = Vec::new();
        for (start_pos, n_tokens) in sizes {
            sequences.push(Sequence {
                first_row,
                start_pos,
                n_tokens,
                first_block,
            });
            first_row += n_tokens;
            first_block += (start_pos + n_tokens).div_ceil(16);
        }
        sequences
    })
}

fn splits() -> impl Strategy<Value = Splits> {
    prop_oneof![
        (1_u32..300).prop_map(|n_ctas| Splits::Balanced { n_ctas }),
        (1_u32..9).prop_map(|n| Splits::Fixed { tokens: n * GRAIN }),
    ]
}

fn planned(shape: Shape, splits: Splits, sequences: &[Sequence]) -> Plan {
    let mut plan = Plan::default();
    plan.refresh(shape, splits, sequences);
    plan
}

/// The token ranges of one sequence's packed query and KV head, in order.
fn ranges(plan: &Plan, sequence: Sequence, kv_head: u32, query: u32) -> Vec<(u32, u32)> {
    let mut ranges: Vec<(u32, u32)> = plan
        .decode
        .iter()
        .chain(&plan.prefill)
        .filter(|item| item.first_row == sequence.first_row && item.kv_head == kv_head)
        .filter(|item| (item.first_query..item.first_query + item.n_queries).contains(&query))
        .map(|item| (item.kv_start, item.kv_end))
        .collect();
    ranges.sort_unstable();
    ranges
}

proptest! {
    #[test]
    fn every_query_meets_every_token_once(shape in shape(), splits in splits(), sequences in sequences()) {
        let plan = planned(shape, splits, &sequences);
        for sequence in &sequences {
            for kv_head in 0..shape.n_kv_heads {
                for query in 0..sequence.n_tokens * shape.group() {
                    let end = sequence.start_pos + query / shape.group() + 1;
                    let first_seen = shape.window.map_or(0, |window| end.saturating_sub(window));
                    let ranges = ranges(&plan, *sequence, kv_head, query);
                    prop_assert!(ranges.windows(2).all(|pair| pair[0].1 == pair[1].0), "{ranges:?}");
                    let (first, last) = (ranges.first().unwrap().0, ranges.last().unwrap().1);
                    prop_assert!(first <= first_seen && end <= last, "{first_seen}..{end} in {ranges:?}");
                    // What the contract of attention allows to be read.
                    let step_sees = shape.window.map_or(0, |window| (sequence.start_pos + 1).saturating_sub(window));
                    prop_assert!(first >= step_sees / GRAIN * GRAIN && last <= sequence.start_pos + sequence.n_tokens);
                    prop_assert!(ranges.iter().all(|(start, end)| start.is_multiple_of(GRAIN) && start < end));
                }
            }
        }
    }

    #[test]
    fn partial_rows_of_a_wave_are_disjoint_and_all_merged(
        shape in shape(), splits in splits(), sequences in sequences(), bound in prop::option::of(0_u32..2000)
    ) {
        let least = PlanSize::least_partial_rows(shape, splits, 3100);
        let mut plan = bound.map_or_else(Plan::default, |bound| Plan::bounded(bound.max(least)));
        plan.refresh(shape, splits, &sequences);
        if let (Some(bound), Splits::Fixed { .. }) = (bound, splits) {
            prop_assert!(plan.n_partial_rows <= bound.max(least));
        } else {
            prop_assert_eq!(plan.waves.len(), 1);
        }
        let (mut n_items, mut n_merges, mut n_rows) = (0, 0, 0);
        for (wave_idx, wave) in plan.waves.iter().enumerate() {
            prop_assert_eq!((wave.prefill.start, wave.merges.start), (n_items, n_merges));
            (n_items, n_merges) = (wave.prefill.end, wave.merges.end);
            let merges = &plan.merges[wave.merges.clone()];
            let decode = if wave_idx == 0 { &plan.decode[..] } else { &[] };
            let mut written = vec![0; plan.n_partial_rows as usize];
            let mut merged = written.clone();
            for item in decode.iter().chain(&plan.prefill[wave.prefill.clone()]).filter(|item| item.partial != NONE) {
                written[item.partial as usize..][..item.n_queries as usize].iter_mut().for_each(|row| *row += 1);
                let merge = merges.iter().find(|merge| {
                    (merge.first_row, merge.first_query, merge.kv_head, merge.n_queries)
                        == (item.first_row, item.first_query, item.kv_head, item.n_queries)
                });
                let merge = merge.expect("a partial state is merged");
                prop_assert!((item.partial - merge.partial).is_multiple_of(merge.n_queries));
                prop_assert!((item.partial - merge.partial) / merge.n_queries < merge.n_splits);
            }
            for merge in merges {
                let rows = (merge.n_splits * merge.n_queries) as usize;
                merged[merge.partial as usize..][..rows].iter_mut().for_each(|row| *row += 1);
            }
            prop_assert_eq!(&written, &merged);
            prop_assert!(written.iter().all(|times| *times <= 1), "{written:?}");
            n_rows = n_rows.max(written.iter().sum::<u32>());
        }
        prop_assert_eq!((n_items, n_merges, n_rows), (plan.prefill.len(), plan.merges.len(), plan.n_partial_rows));
    }

    /// What memory is set aside for is enough for every step within the limits.
    #[test]
    fn no_step_is_larger_than_its_limits_say(
        shape in shape(), splits in splits(), sequences in sequences(), max_partial_rows in 0_u32..3000
    ) {
        let n_rows: u32 = sequences.iter().map(|sequence| sequence.n_tokens).sum();
        let max_context = sequences.iter().map(|s| s.start_pos + s.n_tokens).max().unwrap_or(0);
        let size = PlanSize::of_step(shape, splits, sequences.len() as u32, n_rows, max_context, max_partial_rows);
        let mut plan = Plan::bounded(size.n_partial_rows);
        plan.refresh(shape, splits, &sequences);
        prop_assert!(plan.decode.len() <= size.decode && plan.prefill.len() <= size.prefill, "{size:?}");
        prop_assert!(plan.merges.len() <= size.merges && plan.n_partial_rows <= size.n_partial_rows, "{size:?}");
        prop_assert!(
            size.n_bytes() >= size_of_val(&plan.decode[..])
                + size_of_val(&plan.prefill[..]) + size_of_val(&plan.merges[..])
        );
    }

    /// No item is longer than the work divided by the CTAs that are left over for cutting, or by half of all if that is more.
    #[test]
    fn balanced_items_fit_the_card_and_are_short(shape in shape(), n_ctas in 1_u32..400, sequences in sequences()) {
        let plan = planned(shape, Splits::Balanced { n_ctas }, &sequences);
        for (items, kernel) in [(&plan.decode, Kernel::Decode), (&plan.prefill, Kernel::Prefill)] {
            let is_its = |s: &&Sequence| shape.kernel_of(Splits::Balanced { n_ctas }, s.n_tokens) == kernel;
            let tile_queries = shape.tile_queries(kernel);
            let tiles: Vec<Item> = sequences.iter().filter(is_its).flat_map(|s| tiles(shape, *s, tile_queries)).collect();
            let n_parts = (n_ctas / shape.n_kv_heads) as usize;
            let n_for_cutting = n_parts.saturating_sub(tiles.len()).max(n_parts / 2);
            prop_assert!(items.len() <= shape.n_kv_heads as usize * (tiles.len() + n_for_cutting));
            let longest = items.iter().map(|item| item.kv_end - item.kv_start).max().unwrap_or(0);
            if n_for_cutting > 0 {
                let work: u32 = tiles.iter().map(|tile| tile.kv_end - tile.kv_start).sum();
                let bound = work.div_ceil(n_for_cutting as u32).next_multiple_of(GRAIN);
                prop_assert!(longest <= bound.max(SMALLEST_SPLIT), "{longest} > {bound}");
            }
        }
    }

    /// In deterministic mode a query's cuts are those it has alone, and lie at fixed positions, however it is chunked.
    #[test]
    fn fixed_cuts_do_not_know_the_batch(shape in shape(), n in 1_u32..9, sequences in sequences()) {
        let splits = Splits::Fixed { tokens: n * GRAIN };
        let plan = planned(shape, splits, &sequences);
        prop_assert!(plan.decode.is_empty());
        for sequence in &sequences {
            let alone = planned(shape, splits, &[*sequence]);
            for query in 0..sequence.n_tokens * shape.group() {
                let in_batch = ranges(&plan, *sequence, 0, query);
                prop_assert_eq!(&in_batch, &ranges(&alone, *sequence, 0, query));
                prop_assert!(in_batch[1..].iter().all(|(start, _)| start.is_multiple_of(n * GRAIN)));
            }
        }
    }

    /// A plan of a decode step fits the grid its graph was captured with, whatever the contexts have become.
    #[test]
    fn a_refreshed_plan_keeps_its_grid(
        shape in shape(), splits in splits(),
        contexts in prop::collection::vec(prop::collection::vec(0_u32..3000, 9), 1..4), counts in prop::collection::vec(1_usize..=9, 4)
    ) {
        let size = PlanSize::of_decode(shape, splits, 9, 3000);
        let mut plan = Plan::default();
        let mut launches = Vec::new();
        for (mut contexts, count) in contexts.into_iter().zip(counts) {
            contexts.truncate(count);
            let of = |(row, start_pos): (usize, &u32)| Sequence {
                first_row: row as u32, start_pos: *start_pos, n_tokens: 1, first_block: 188 * row as u32,
            };
            let sequences: Vec<Sequence> = contexts.iter().enumerate().map(of).collect();
            plan.refresh(shape, splits, &sequences);
            prop_assert_eq!(&plan, &{ let mut fresh = planned(shape, splits, &sequences); fresh.tiles = plan.tiles.clone(); fresh });
            plan.pad_to(size);
            launches.push((plan.decode.len(), plan.prefill.len(), plan.merge_launch(shape, plan.merges.len())));
        }
        prop_assert!(launches.iter().all(|launch| *launch == launches[0]));
    }
}

/// A step of 64 sequences, more than the card runs at once: one of 100,000 tokens must not be read by one CTA a head.
#[test]
fn a_long_context_among_many_is_cut_and_like_ones_are_not() {
    let shape = Shape {
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        window: None,
        kernels: Kernels::TensorCore,
    };
    let splits = Splits::Balanced { n_ctas: 264 };
    let longest = |first_context: u32| {
        let of = |row: u32| Sequence {
            first_row: row,
            start_pos: if row == 0 { first_context } else { 499 },
            n_tokens: 1,
            first_block: 0,
        };
        let plan = planned(shape, splits, &(0..64).map(of).collect::<Vec<_>>());
        let lengths = plan.decode.iter().map(|item| item.kv_end - item.kv_start);
        (lengths.max().unwrap(), plan.merges.len())
    };
    assert_eq!(longest(499), (500, 0));
    assert_eq!(longest(99_999), (5888, 8));
}
