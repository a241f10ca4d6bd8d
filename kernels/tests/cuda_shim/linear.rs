//! Products without a split of k, and mixtures of experts made of them.

use baton_kernels::cuda::launch::{self, NARROW_ROWS};
use baton_kernels::{Activation, DType, MoeParams, reference};

use crate::args;
use crate::harness::*;

#[derive(Clone, Copy, Debug)]
enum Tiling {
    Wide,
    Narrow,
}

/// What a device's product gives, in `out` elements.
fn product(dtype: DType, out: DType, tiling: Tiling, x: &[f32], w: &[f32], k: usize, order: Order) -> Matrix {
    let (m, n) = (x.len() / k, w.len() / k);
    let suffix = if out == dtype { "" } else { "_f32" };
    let mut out = Matrix::unwritten(out, m * n);
    let (x, w) = (Matrix::new(dtype, x), Matrix::new(dtype, w));
    let args = args![&mut out, &x, &w, m as u32, n as u32, k as u32];
    let (name, grid) = match tiling {
        Tiling::Narrow => ("linear_narrow", launch::linear_narrow(m as u32, n as u32)),
        Tiling::Wide => ("linear", launch::linear(m as u32, n as u32)),
    };
    launch(&format!("{name}_{dtype}{suffix}"), grid, order, args);
    out
}

#[test]
fn products_are_the_references() {
    if !has_compiler() {
        return;
    }
    // One, primes, one past a tile's rows, columns and stage; k in whole chunks and not.
    let shapes = [
        (1, 1, 1),
        (3, 7, 8),
        (16, 65, 72),
        (17, 129, 40),
        (5, 131, 129),
        (129, 67, 104),
    ];
    for dtype in DTYPES {
        for (m, n, k) in shapes {
            let (x, w) = (values(31, dtype, m * k), values(32, dtype, n * k));
            let expected = reference::linear(&x, &w, k);
            for out in [dtype, DType::F32] {
                let what = format!("{dtype} to {out}, {m} x {n} x {k}");
                let of = |tiling| in_both_orders(&what, |order| product(dtype, out, tiling, &x, &w, k, order));
                let found = of(Tiling::Wide);
                assert_close(&what, out, &found.values(), &expected);
                if dtype != DType::F32 && m <= NARROW_ROWS as usize {
                    assert!(
                        of(Tiling::Narrow) == found,
                        "{what}: the narrow tiling gives other bits"
                    );
                }
            }
        }
    }
}

#[test]
fn a_product_knows_its_row_alone() {
    if !has_compiler() {
        return;
    }
    let (m, n, k) = (33, 70, 88);
    for dtype in DTYPES {
        let (x, w) = (values(33, dtype, m * k), values(34, dtype, n * k));
        let all = product(dtype, dtype, Tiling::Wide, &x, &w, k, Order::Forward).values();
        for row in [0, 15, 16, 32] {
            let alone = product(dtype, dtype, Tiling::Wide, &x[row * k..][..k], &w, k, Order::Forward).values();
            assert_eq!(alone, &all[row * n..][..n], "{dtype}, row {row}");
        }
    }
}

struct Moe {
    dtype: DType,
    n_rows: usize,
    hidden: usize,
    ffn: usize,
    n_experts: usize,
    params: MoeParams,
    /// Every third row is no token.
    is_padded: bool,
}

/// One expert's `[gate_up, gate_up_bias, down, down_bias]`.
type Expert = [Vec<f32>; 4];

impl Moe {
    fn experts(&self) -> Vec<Expert> {
        let of = |i: usize| {
            let seed = 40 + 4 * i as u64;
            [
                values(seed, self.dtype, 2 * self.ffn * self.hidden),
                values(seed + 1, DType::F32, 2 * self.ffn),
                values(seed + 2, self.dtype, self.hidden * self.ffn),
                values(seed + 3, DType::F32, self.hidden),
            ]
        };
        (0..self.n_experts).map(of).collect()
    }

    fn is_token(&self, row: usize) -> bool {
        !self.is_padded || row % 3 != 1
    }

    fn logits(&self) -> Vec<f32> {
        let mut logits = values(35, self.dtype, self.n_rows * self.n_experts);
        // Equal logits: the smaller number wins.
        for row in logits.chunks_exact_mut(self.n_experts).step_by(2) {
            let last = row[self.n_experts - 1];
            row[0] = last;
        }
        logits
    }

    fn run(&self, order: Order) -> Matrix {
        let Moe {
            dtype,
            n_rows,
            hidden,
            ffn,
            n_experts,
            params,
            is_padded,
        } = *self;
        let slot = |row: usize| if self.is_token(row) { row as u64 } else { u64::MAX };
        let slots: Vec<u64> = (0..n_rows).map(slot).collect();
        let n_pairs = n_rows * params.top_k;
        let (x, logits) = (
            Matrix::new(dtype, &values(36, dtype, n_rows * hidden)),
            Matrix::new(dtype, &self.logits()),
        );
        let experts = self.experts();
        let matrix = |which: usize| -> Vec<Matrix> { experts.iter().map(|e| Matrix::new(dtype, &e[which])).collect() };
        let (gate_up, down) = (matrix(0), matrix(2));
        let addresses = |matrices: &[Matrix]| -> Vec<u64> { matrices.iter().map(Matrix::address).collect() };
        let biases = |which: usize| -> Vec<u64> { experts.iter().map(|e| e[which].as_ptr() as u64).collect() };
        let mut chosen = vec![u32::MAX; n_pairs];
        let mut weights = vec![f32::NAN; n_pairs];
        let (n_rows, n_pairs, n_experts) = (n_rows as u32, n_pairs as u32, n_experts as u32);
        let top_k = params.top_k as u32;
        let renormalize = u32::from(params.renormalize);
        let args = args![
            &mut chosen,
            &mut weights,
            &logits,
            n_rows,
            n_experts,
            top_k,
            renormalize,
            if is_padded { Arg::from(&slots) } else { NULL }
        ];
        launch(
            &format!("moe_route_{dtype}"),
            launch::moe_route(n_rows, n_experts),
            order,
            args,
        );

        let max_tiles = launch::moe_tiles(n_pairs, n_experts);
        let mut offsets = vec![u32::MAX; n_experts as usize + 1];
        let mut pair_of_slot = vec![u32::MAX; n_pairs as usize];
        let mut slot_of_pair = pair_of_slot.clone();
        let mut tiles = vec![0xdead_u32; 2 * max_tiles as usize];
        let args = args![
            &mut offsets,
            &mut pair_of_slot,
            &mut slot_of_pair,
            &mut tiles,
            &chosen,
            n_pairs,
            n_experts,
            max_tiles
        ];
        launch("moe_permute", launch::moe_permute(n_experts), order, args);
        self.check_permutation(&chosen, &offsets, &pair_of_slot, &slot_of_pair);

        let linear = |x: &Matrix, weights: &[Matrix], biases: &Vec<u64>, gather: Arg, n: usize, k: usize| {
            let mut out = Matrix::unwritten(dtype, n_pairs as usize * n);
            let weights = addresses(weights);
            let args = args![
                &mut out, x, &weights, biases, &offsets, gather, &tiles, top_k, n as u32, k as u32
            ];
            launch(
                &format!("moe_linear_{dtype}"),
                launch::moe_linear(max_tiles, n as u32),
                order,
                args,
            );
            out
        };
        let up = linear(&x, &gate_up, &biases(1), Arg::from(&pair_of_slot), 2 * ffn, hidden);
        let mut activated = Matrix::unwritten(dtype, n_pairs as usize * ffn);
        let n_activated = u64::from(n_pairs) * ffn as u64;
        let args = args![&mut activated, &up, n_activated, ffn as u32, 0_u32, 0.0_f32, 0.0_f32];
        launch(&format!("gated_{dtype}"), launch::elements(n_activated), order, args);
        let y = linear(&activated, &down, &biases(3), NULL, hidden, ffn);
        let mut out = Matrix::unwritten(dtype, n_rows as usize * hidden);
        let args = args![&mut out, &y, &slot_of_pair, &weights, top_k, hidden as u32];
        launch(&format!("moe_combine_{dtype}"), launch::rows(n_rows), order, args);
        out
    }

    /// Slots are by expert, then by pair, and each pair has one.
    fn check_permutation(&self, chosen: &[u32], offsets: &[u32], pair_of_slot: &[u32], slot_of_pair: &[u32]) {
        let has_slot = |pair: u32| self.is_token(pair as usize / self.params.top_k);
        let mut expected: Vec<u32> = (0..chosen.len() as u32).filter(|pair| has_slot(*pair)).collect();
        expected.sort_by_key(|pair| chosen[*pair as usize]);
        let n_slots = expected.len();
        assert_eq!(pair_of_slot[..n_slots], expected);
        for (pair, &slot) in (0..).zip(slot_of_pair) {
            match has_slot(pair) {
                true => assert_eq!(pair_of_slot[slot as usize], pair),
                false => assert_eq!((slot, chosen[pair as usize]), (u32::MAX, u32::MAX)),
            }
        }
        for (expert, range) in offsets.windows(2).enumerate() {
            let slots = range[0] as usize..range[1] as usize;
            assert!(
                pair_of_slot[slots]
                    .iter()
                    .all(|pair| chosen[*pair as usize] == expert as u32)
            );
        }
        assert_eq!((offsets[0], *offsets.last().unwrap() as usize), (0, n_slots));
    }

    fn expected(&self) -> Vec<f32> {
        let experts = self.experts();
        let experts: Vec<reference::Expert<'_>> = experts
            .iter()
            .map(|[gate_up, gate_up_bias, down, down_bias]| reference::Expert {
                gate_up,
                gate_up_bias,
                down,
                down_bias,
            })
            .collect();
        let x = values(36, self.dtype, self.n_rows * self.hidden);
        let logits = self.logits();
        let rows = x.chunks_exact(self.hidden).zip(logits.chunks_exact(self.n_experts));
        rows.enumerate()
            .flat_map(|(row, (x, logits))| match self.is_token(row) {
                true => reference::moe_row(x, logits, &experts, self.params),
                false => vec![0.0; self.hidden],
            })
            .collect()
    }
}

#[test]
fn mixtures_are_the_references() {
    if !has_compiler() {
        return;
    }
    for dtype in DTYPES {
        for (n_rows, hidden, ffn, n_experts, top_k, renormalize, is_padded) in [
            (1, 8, 16, 4, 2, true, false),
            (7, 40, 24, 5, 3, false, true),
            (131, 16, 8, 3, 1, false, false),
            (9, 7, 13, 40, 32, true, true),
        ] {
            let params = MoeParams {
                top_k,
                renormalize,
                activation: Activation::Silu,
            };
            let moe = Moe {
                dtype,
                n_rows,
                hidden,
                ffn,
                n_experts,
                params,
                is_padded,
            };
            let what = format!("{dtype}, {n_rows} rows, {top_k} of {n_experts} experts of {hidden} and {ffn}");
            let found = in_both_orders(&what, |order| moe.run(order)).values();
            // Product, activation, product: each is rounded.
            assert_close_after(&what, dtype, 3.0, &found, &moe.expected());
        }
    }
}
