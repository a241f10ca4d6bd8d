//! What each policy chooses, and that the view forgets nothing and keeps nothing.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::cost::{CostModel, StepSample};
use crate::ids::{Fingerprint, Incarnation, RequestId};
use crate::prefix_cache::{PrefixEvent, PrefixHasher};
use crate::request::SamplingParams;

fn info(name: &str, role: Role) -> InstanceInfo {
    InstanceInfo {
        id: InstanceId::new(name),
        incarnation: Incarnation(1),
        protocol_version: 2,
        role,
        fingerprint: Fingerprint([1; 32]),
        numerics_class: "test".into(),
        block_size: 16,
        n_blocks_total: 100,
        max_num_seqs: 4,
        max_model_len: 1000,
        short_context: None,
        kv_bytes_per_token: 65_536,
        most_blocks: vec![None],
    }
}

fn cluster(instances: &[(&str, Role)]) -> ClusterView {
    let mut view = ClusterView::new();
    for (name, role) in instances {
        view.apply(ViewEvent::Joined(info(name, *role)));
    }
    view
}

fn request(id: u128, n_tokens: u32) -> (Request, Vec<PrefixKey>) {
    let prompt: Vec<u32> = (0..n_tokens).collect();
    let keys = PrefixHasher::new(Fingerprint([1; 32]), 16).keys(0, &prompt);
    let request = Request {
        id: RequestId(id),
        prompt_ids: Arc::from(prompt),
        sampling: SamplingParams::default(),
        cache_salt: 0,
    };
    (request, keys)
}

fn place(policy: &mut dyn Policy, view: &ClusterView, n_tokens: u32, avoided: &[InstanceId]) -> Option<Placement> {
    place_with(policy, view, n_tokens, avoided, RequestObjectives::default())
}

fn place_with(
    policy: &mut dyn Policy,
    view: &ClusterView,
    n_tokens: u32,
    avoided: &[InstanceId],
    objectives: RequestObjectives,
) -> Option<Placement> {
    let (request, keys) = request(1, n_tokens);
    policy.place(
        Nanos::ZERO,
        PlacementRequest {
            request: &request,
            prefix_keys: &keys,
            n_tokens,
            avoided,
            needs_version: 1,
            may_hand_over: true,
            objectives,
        },
        view,
    )
}

fn open(decode: &str, prefill: Option<&str>, n_tokens: u32) -> OpenPlacement {
    OpenPlacement {
        placement: Placement {
            decode: InstanceId::new(decode),
            prefill: prefill.map(InstanceId::new),
        },
        n_blocks: n_tokens.div_ceil(16) + 1,
        n_choices: 1,
        n_prefill_tokens: n_tokens,
        prefix_keys: Vec::new(),
    }
}

const POOLS: [(&str, Role); 4] = [
    ("p0", Role::Prefill),
    ("p1", Role::Prefill),
    ("d0", Role::Decode),
    ("d1", Role::Decode),
];

#[test]
fn round_robin_takes_turns_in_both_pools() {
    let view = cluster(&POOLS);
    let mut policy = RoundRobin::new(Disaggregation::ALWAYS);
    let chosen: Vec<(String, String)> = (0..4)
        .map(|_| place(&mut policy, &view, 40, &[]).unwrap())
        .map(|placement| (placement.decode.to_string(), placement.prefill.unwrap().to_string()))
        .collect();
    let expected = [("d0", "p0"), ("d1", "p1"), ("d0", "p0"), ("d1", "p1")];
    assert_eq!(
        chosen,
        expected.map(|(decode, prefill)| (decode.to_string(), prefill.to_string()))
    );
}

#[test]
fn least_loaded_counts_own_placements_before_any_report() {
    let mut view = cluster(&POOLS);
    let mut policy = LeastLoaded::new(Disaggregation::ALWAYS);
    view.apply(ViewEvent::Placed(RequestId(9), open("d0", Some("p0"), 64)));
    let placement = place(&mut policy, &view, 40, &[]).unwrap();
    assert_eq!((&*placement.decode.0, &*placement.prefill.unwrap().0), ("d1", "p1"));
    view.apply(ViewEvent::Closed(RequestId(9)));
    assert_eq!(&*place(&mut policy, &view, 40, &[]).unwrap().decode.0, "d0");
}

#[test]
fn every_policy_waits_when_all_are_full_and_avoids_when_it_can() {
    for name in POLICIES {
        let mut policy = policy(name, Disaggregation::ALWAYS).unwrap();
        let mut view = cluster(&[("p0", Role::Prefill), ("d0", Role::Decode), ("d1", Role::Decode)]);
        let avoided = [InstanceId::new("d0"), InstanceId::new("p0")];
        let placement = place(policy.as_mut(), &view, 40, &avoided).unwrap();
        assert_eq!(placement.decode, InstanceId::new("d1"), "{name}");
        assert_eq!(
            placement.prefill, None,
            "{name}: the prompt is computed where it is decoded"
        );
        assert!(
            place(policy.as_mut(), &view, 1601, &[]).is_none(),
            "{name}: 101 blocks do not fit"
        );
        for id in 0..8 {
            view.apply(ViewEvent::Placed(
                RequestId(id),
                open(if id < 4 { "d0" } else { "d1" }, None, 16),
            ));
        }
        assert!(place(policy.as_mut(), &view, 40, &[]).is_none(), "{name}");
        view.apply(ViewEvent::Closed(RequestId(2)));
        assert_eq!(
            place(policy.as_mut(), &view, 40, &[]).unwrap().decode,
            InstanceId::new("d0"),
            "{name}"
        );
        view.apply(ViewEvent::Busy(InstanceId::new("d0")));
        assert!(
            place(policy.as_mut(), &view, 40, &[]).is_none(),
            "{name}: busy until its next report"
        );
    }
}

#[test]
fn without_a_prefill_pool_decode_instances_do_both() {
    for name in POLICIES {
        let mut policy = policy(name, Disaggregation::ALWAYS).unwrap();
        let placement = place(policy.as_mut(), &cluster(&[("d0", Role::Decode)]), 400, &[]).unwrap();
        assert_eq!(placement.prefill, None, "{name}");
        assert!(
            place(policy.as_mut(), &cluster(&[("p0", Role::Prefill)]), 400, &[]).is_none(),
            "{name}"
        );
    }
}

#[test]
fn a_prefill_instance_of_another_fingerprint_is_not_paired() {
    let mut view = cluster(&[("d0", Role::Decode)]);
    view.apply(ViewEvent::Joined(InstanceInfo {
        fingerprint: Fingerprint([2; 32]),
        ..info("p0", Role::Prefill)
    }));
    for name in POLICIES {
        let mut policy = policy(name, Disaggregation::ALWAYS).unwrap();
        assert_eq!(place(policy.as_mut(), &view, 400, &[]).unwrap().prefill, None, "{name}");
    }
}

#[test]
fn prefix_aware_follows_the_prefix_and_forgets_a_dead_incarnation() {
    let (_, keys) = request(1, 400);
    let stored: Vec<PrefixEvent> = keys.iter().copied().map(PrefixEvent::Stored).collect();
    let mut view = cluster(&POOLS);
    view.apply(ViewEvent::Prefix(InstanceId::new("p1"), Incarnation(1), stored.clone()));
    view.apply(ViewEvent::Prefix(InstanceId::new("d1"), Incarnation(9), stored));
    let mut policy = PrefixAware::new(Disaggregation::ALWAYS);
    let placement = place(&mut policy, &view, 400, &[]).unwrap();
    assert_eq!(placement.prefill, Some(InstanceId::new("p1")));
    assert_eq!(
        placement.decode,
        InstanceId::new("d0"),
        "another incarnation's events are ignored"
    );
    view.apply(ViewEvent::Joined(InstanceInfo {
        incarnation: Incarnation(2),
        ..info("p1", Role::Prefill)
    }));
    assert_eq!(
        place(&mut policy, &view, 400, &[]).unwrap().prefill,
        Some(InstanceId::new("p0"))
    );
    view.apply(ViewEvent::Left(InstanceId::new("p1"), Incarnation(1)));
    assert!(
        view.instances().contains_key(&InstanceId::new("p1")),
        "the old incarnation left, the new one stays"
    );
}

#[test]
fn simultaneous_requests_with_one_new_prefix_go_to_the_same_pair() {
    let mut view = cluster(&POOLS);
    let mut policy = PrefixAware::new(Disaggregation::ALWAYS);
    let first = place(&mut policy, &view, 400, &[]).unwrap();
    let (_, keys) = request(1, 400);
    view.apply(ViewEvent::Placed(
        RequestId(1),
        OpenPlacement {
            placement: first.clone(),
            n_blocks: 26,
            n_choices: 1,
            n_prefill_tokens: 400,
            prefix_keys: keys,
        },
    ));
    assert_eq!(place(&mut policy, &view, 400, &[]).unwrap(), first);
}

#[test]
fn a_short_prompt_stays_and_a_long_one_beside_decodes_goes() {
    let quick = CostModel {
        step_base_ns: 1e6,
        prefill_ns_per_token: 1e6,
        transfer_base_ns: 5e6,
        ..CostModel::default()
    };
    for name in POLICIES {
        let mut view = cluster(&[("p0", Role::Prefill), ("d0", Role::Decode)]);
        for id in ["p0", "d0"] {
            view.set_cost(&InstanceId::new(id), quick.clone());
        }
        view.apply(ViewEvent::Placed(RequestId(7), open("d0", None, 16)));
        view.apply(ViewEvent::PrefillDone(RequestId(7)));
        let mut policy = policy(name, Disaggregation::Auto).unwrap();
        assert_eq!(place(policy.as_mut(), &view, 3, &[]).unwrap().prefill, None, "{name}");
        let long = place(policy.as_mut(), &view, 600, &[]).unwrap();
        assert_eq!(long.prefill, Some(InstanceId::new("p0")), "{name}");
    }
}

/// Reports of steps that take `ns_per_token`, enough of them to be believed.
fn measured(view: &mut ClusterView, instance: &str, ns_per_token: u64) {
    let step = |i: u32| StepSample {
        n_prefill_tokens: i % 64,
        n_decode_tokens: 1 + i % 3,
        n_context_tokens: 100,
        duration: Nanos(1_000_000 + u64::from(i % 64 + 1 + i % 3) * ns_per_token),
    };
    let load = InstanceLoad {
        n_blocks_free: 100,
        healthy: true,
        step_samples: (0..100).map(step).collect(),
        ..InstanceLoad::default()
    };
    view.apply(ViewEvent::Load(InstanceId::new(instance), Incarnation(1), load));
}

#[test]
fn an_instance_that_never_computed_is_judged_by_its_kin() {
    // Quicker than the default: by that, p1 and what joins later would never be chosen, and so never be measured.
    let mut view = cluster(&POOLS);
    measured(&mut view, "p0", 20_000);
    measured(&mut view, "d0", 20_000);
    view.apply(ViewEvent::Joined(info("p2", Role::Prefill)));
    let cost = |view: &ClusterView, id: &str| view.instances()[&InstanceId::new(id)].cost.prefill(400, 0);
    for id in ["p1", "p2", "d1"] {
        assert_eq!(cost(&view, id), cost(&view, "d0"), "{id}");
    }
    let mut policy = PrefixAware::new(Disaggregation::ALWAYS);
    view.apply(ViewEvent::Placed(RequestId(9), open("d0", Some("p0"), 400)));
    let placement = place(&mut policy, &view, 400, &[]).unwrap();
    assert_eq!((&*placement.decode.0, &*placement.prefill.unwrap().0), ("d1", "p1"));

    // What was measured itself keeps its own, and another class lends nothing.
    measured(&mut view, "p1", 900_000);
    measured(&mut view, "p0", 20_000);
    assert!(cost(&view, "p1") > cost(&view, "p0"));
    view.apply(ViewEvent::Joined(InstanceInfo {
        numerics_class: "other".into(),
        ..info("p3", Role::Prefill)
    }));
    assert_eq!(cost(&view, "p3"), CostModel::default().prefill(400, 0));
}

#[test]
fn a_threshold_decides_by_uncached_tokens() {
    let (_, keys) = request(1, 400);
    for name in POLICIES {
        let mut view = cluster(&[("p0", Role::Prefill), ("d0", Role::Decode)]);
        let mut policy = policy(name, Disaggregation::Threshold(100)).unwrap();
        assert_eq!(place(policy.as_mut(), &view, 99, &[]).unwrap().prefill, None, "{name}");
        assert!(
            place(policy.as_mut(), &view, 400, &[]).unwrap().prefill.is_some(),
            "{name}"
        );
        let stored = keys.iter().take(20).copied().map(PrefixEvent::Stored).collect();
        view.apply(ViewEvent::Prefix(InstanceId::new("d0"), Incarnation(1), stored));
        assert_eq!(
            place(policy.as_mut(), &view, 400, &[]).unwrap().prefill,
            None,
            "{name}: 80 are not cached"
        );
    }
}

#[test]
fn a_draining_or_older_instance_is_neither_chosen_nor_moved_to() {
    let d = |name: &str| InstanceId::new(name);
    for name in POLICIES {
        let mut policy = policy(name, Disaggregation::ALWAYS).unwrap();
        let mut view = cluster(&[("d0", Role::Decode), ("d1", Role::Decode), ("d2", Role::Decode)]);
        view.apply(ViewEvent::Draining(d("d0"), true));
        view.apply(ViewEvent::Joined(InstanceInfo {
            protocol_version: 1,
            ..info("d1", Role::Decode)
        }));
        let (mut request, keys) = request(1, 40);
        request.sampling.n = 2;
        let asked = PlacementRequest {
            request: &request,
            prefix_keys: &keys,
            n_tokens: 40,
            avoided: &[],
            needs_version: min_protocol_version(&request.sampling),
            may_hand_over: true,
            objectives: RequestObjectives::default(),
        };
        let chosen = policy.place(Nanos::ZERO, asked, &view).unwrap();
        assert_eq!(chosen.decode, d("d2"), "{name}");
        assert_eq!(choose_destination(&view, &d("d0"), 4, 1, 1), Some(d("d2")));
        assert_eq!(choose_destination(&view, &d("d2"), 4, 1, 1), None);
        view.apply(ViewEvent::Draining(d("d0"), false));
        assert_eq!(choose_destination(&view, &d("d2"), 4, 5, 1), None, "four places");
        assert_eq!(choose_destination(&view, &d("d2"), 4, 4, 1), Some(d("d0")));
        view.apply(ViewEvent::RoleChanged(d("d0"), Incarnation(9), Role::Prefill));
        assert!(
            choose_destination(&view, &d("d2"), 4, 4, 1).is_some(),
            "of another life"
        );
        view.apply(ViewEvent::RoleChanged(d("d0"), Incarnation(1), Role::Prefill));
        assert_eq!(choose_destination(&view, &d("d2"), 4, 4, 1), None);
    }
}

#[test]
fn windowed_layers_need_only_what_their_windows_hold() {
    // A full group, and two that hold five blocks at most.
    let mixed = InstanceInfo {
        most_blocks: vec![None, Some(5), Some(5)],
        ..info("decode", Role::Decode)
    };
    assert_eq!(mixed.n_blocks_for(33), 3 * 3);
    assert_eq!(mixed.n_blocks_for(1000), 63 + 2 * 5);
    assert_eq!(mixed.longest_sequence(), 1000, "in 100 blocks");
    let (request, keys) = request(1, 400);
    let asked = PlacementRequest {
        request: &request,
        prefix_keys: &keys,
        n_tokens: 400,
        avoided: &[],
        needs_version: 2,
        may_hand_over: true,
        objectives: RequestObjectives::default(),
    };
    assert_eq!(
        asked.n_blocks(&mixed),
        25 + 2 * 5 + 3,
        "and one of each group to grow into"
    );
    // Without windows it would not fit: 75 blocks and three, beside 30 that are held.
    let mut view = ClusterView::new();
    view.apply(ViewEvent::Joined(mixed));
    let load = InstanceLoad {
        n_blocks_free: 70,
        healthy: true,
        ..InstanceLoad::default()
    };
    view.apply(ViewEvent::Load(InstanceId::new("decode"), Incarnation(1), load));
    let mut policy = policy("least-loaded", Disaggregation::Auto).unwrap();
    assert!(policy.place(Nanos::ZERO, asked, &view).is_some());
}

#[test]
fn choices_with_tokens_of_their_own_are_not_handed_over_and_need_more_blocks() {
    let (mut request, keys) = request(1, 40);
    request.sampling.n = 3;
    let asked = |n_tokens, may_hand_over| PlacementRequest {
        request: &request,
        prefix_keys: &keys,
        n_tokens,
        avoided: &[],
        needs_version: 2,
        may_hand_over,
        objectives: RequestObjectives::default(),
    };
    let info = info("decode", Role::Decode);
    assert_eq!(asked(40, true).n_blocks(&info), 3 + 3);
    assert_eq!(
        asked(50, false).n_blocks(&info),
        2 + 3 * 2 + 3,
        "two full blocks of the prompt are shared"
    );
    for name in POLICIES {
        let mut policy = policy(name, Disaggregation::ALWAYS).unwrap();
        let view = cluster(&[("d0", Role::Decode), ("p0", Role::Prefill)]);
        let mut place = |may| policy.place(Nanos::ZERO, asked(50, may), &view).unwrap().prefill;
        assert!(place(true).is_some(), "{name}");
        assert_eq!(place(false), None, "{name}");
    }
}

#[test]
fn a_move_counts_at_both_ends_until_it_settles() {
    let mut view = cluster(&POOLS);
    let n_available = |view: &ClusterView, id: &str| view.instances()[&InstanceId::new(id)].n_blocks_available();
    view.apply(ViewEvent::Placed(RequestId(9), open("d0", Some("p0"), 19 * 16)));
    view.apply(ViewEvent::MoveStarted(RequestId(9), InstanceId::new("d1")));
    view.apply(ViewEvent::MoveStarted(RequestId(8), InstanceId::new("d1")));
    assert_eq!((n_available(&view, "d0"), n_available(&view, "d1")), (80, 80));
    let load = InstanceLoad {
        n_blocks_free: 100,
        healthy: true,
        ..InstanceLoad::default()
    };
    view.apply(ViewEvent::Load(InstanceId::new("d1"), Incarnation(1), load.clone()));
    view.apply(ViewEvent::MoveEnded(RequestId(9)));
    assert_eq!((n_available(&view, "d0"), n_available(&view, "d1")), (80, 100));
    view.apply(ViewEvent::MoveStarted(RequestId(9), InstanceId::new("d1")));
    view.apply(ViewEvent::Load(InstanceId::new("d1"), Incarnation(1), load));
    view.apply(ViewEvent::Moved(RequestId(9), InstanceId::new("d1")));
    assert_eq!((n_available(&view, "d0"), n_available(&view, "d1")), (100, 80));
    view.apply(ViewEvent::Closed(RequestId(9)));
    assert_eq!(n_available(&view, "d1"), 100);
    assert!(view.moves().is_empty());
}

#[test]
fn llumnix_takes_the_freest_and_slo_aware_what_keeps_the_objectives() {
    let mut view = cluster(&[("d0", Role::Mixed), ("d1", Role::Mixed)]);
    // d0 has more blocks left in all, d1 more for each of its sequences.
    view.apply(ViewEvent::Placed(RequestId(1), open("d0", None, 16)));
    view.apply(ViewEvent::Placed(RequestId(2), open("d0", None, 16)));
    view.apply(ViewEvent::Placed(RequestId(3), open("d1", None, 400)));
    for id in 1..4 {
        view.apply(ViewEvent::PrefillDone(RequestId(id)));
    }
    let mut llumnix = Llumnix::new(Disaggregation::Auto);
    assert_eq!(
        place(&mut llumnix, &view, 40, &[]).unwrap().decode,
        InstanceId::new("d1")
    );

    // d0 computes prompts quicker and decodes slowly; only the other keeps the time of each token.
    let cost = |prefill, decode| CostModel {
        step_base_ns: 0.0,
        prefill_ns_per_token: prefill,
        decode_ns_per_token: decode,
        attention_ns_per_context_token: 0.0,
        ..CostModel::default()
    };
    view.set_cost(&InstanceId::new("d0"), cost(1e5, 4e7));
    view.set_cost(&InstanceId::new("d1"), cost(1e6, 1e6));
    let decode = |ttft, tpot| {
        let objectives = SloObjectives {
            ttft: Nanos::from_millis(ttft),
            tpot: Nanos::from_millis(tpot),
        };
        let mut policy = policy_with_objectives("slo-aware", Disaggregation::Auto, objectives).unwrap();
        place(policy.as_mut(), &view, 400, &[]).unwrap().decode.to_string()
    };
    assert_eq!(decode(1000, 100), "d1", "d0 takes 120 ms a token");
    assert_eq!(decode(100, 200), "d0", "d1 takes 400 ms to the first");
    assert_eq!(decode(10, 10), "d0", "none keeps both: 12 times too slow against 40");

    // A request's own objectives come before those for all, one by one.
    let of_all = SloObjectives {
        ttft: Nanos::from_millis(1000),
        tpot: Nanos::from_millis(100),
    };
    let mut policy = policy_with_objectives("slo-aware", Disaggregation::Auto, of_all).unwrap();
    let mut decode = |ttft: Option<u64>, tpot: Option<u64>| {
        let objectives = RequestObjectives {
            ttft: ttft.map(Nanos::from_millis),
            tpot: tpot.map(Nanos::from_millis),
        };
        let placement = place_with(policy.as_mut(), &view, 400, &[], objectives);
        placement.unwrap().decode.to_string()
    };
    assert_eq!(decode(None, None), "d1");
    assert_eq!(
        decode(None, Some(200)),
        "d0",
        "both keep them, and d0 computes prompts quicker"
    );
    assert_eq!(decode(Some(100), None), "d0", "1.2 times too slow against 4");
    assert_eq!(decode(Some(10), Some(5)), "d0", "24 times too slow against 40");
}

proptest! {
    /// After any events, closing every placement leaves the view as if nothing had been placed.
    #[test]
    fn the_view_keeps_nothing_of_closed_placements(
        events in prop::collection::vec((0u8..12, 0u128..6, 0usize..4, 1u32..200), 0..80),
    ) {
        let names = ["p0", "p1", "d0", "d1"];
        let mut view = cluster(&POOLS);
        for (kind, id, instance, n_tokens) in events {
            let name = names[instance];
            let event = match kind {
                0 | 1 => {
                    let (_, keys) = request(id, n_tokens);
                    let prefill = (n_tokens % 2 == 0).then_some(names[n_tokens as usize / 2 % 2]);
                    let decode = names[2 + instance % 2];
                    ViewEvent::Placed(RequestId(id), OpenPlacement { prefix_keys: keys, ..open(decode, prefill, n_tokens) })
                }
                2 => ViewEvent::PrefillDone(RequestId(id)),
                3 => ViewEvent::Closed(RequestId(id)),
                4 => ViewEvent::Left(InstanceId::new(name), Incarnation(1)),
                5 => ViewEvent::Joined(info(name, if name.starts_with('p') { Role::Prefill } else { Role::Decode })),
                6 => ViewEvent::MoveStarted(RequestId(id), InstanceId::new(name)),
                7 => ViewEvent::MoveEnded(RequestId(id)),
                8 => ViewEvent::Moved(RequestId(id), InstanceId::new(name)),
                9 => ViewEvent::Draining(InstanceId::new(name), n_tokens % 2 == 0),
                _ => ViewEvent::Busy(InstanceId::new(name)),
            };
            view.apply(event);
        }
        for id in 0..6 {
            view.apply(ViewEvent::Closed(RequestId(id)));
        }
        prop_assert!(view.open_placements().is_empty() && view.moves().is_empty());
        // What moves brought counts until the next report.
        let idle = InstanceLoad { n_blocks_free: 100, healthy: true, ..InstanceLoad::default() };
        for name in names {
            view.apply(ViewEvent::Load(InstanceId::new(name), Incarnation(1), idle.clone()));
        }
        let (_, keys) = request(1, 200);
        for (id, state) in view.instances() {
            prop_assert_eq!(state.n_sequences(), 0);
            prop_assert_eq!(state.n_prefill_tokens_pending(), 0);
            prop_assert_eq!(state.n_blocks_available(), 100);
            prop_assert_eq!(view.n_cached_tokens(id, &keys, 200), 0);
        }
    }
}

#[test]
fn only_what_version_1_can_say_is_given_to_it() {
    use crate::request::{Constraint, SamplingParams};
    let plain = SamplingParams {
        temperature: 0.7,
        top_k: 5,
        top_p: 0.9,
        stop_token_ids: vec![2],
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    assert_eq!(min_protocol_version(&plain), 1);
    let changes: [fn(&mut SamplingParams); 10] = [
        |it| it.n = 2,
        |it| it.presence_penalty = 0.1,
        |it| it.frequency_penalty = 0.1,
        |it| it.repetition_penalty = 1.1,
        |it| it.min_p = 0.1,
        |it| it.min_tokens = 1,
        |it| it.logit_bias = vec![(1, 1.0)],
        |it| it.allowed_token_ids = [1].into(),
        |it| it.bad_words = vec![vec![1]],
        |it| it.constraint = Some(Constraint::Regex("a".into())),
    ];
    for change in changes {
        let mut asked = plain.clone();
        change(&mut asked);
        assert_eq!(min_protocol_version(&asked), 2, "{asked:?}");
    }
}

#[test]
fn room_leaves_a_block_for_each_running_sequence_to_grow_into() {
    let mut view = cluster(&[("d0", Role::Decode)]);
    let mut has_room = |n_running| {
        let load = InstanceLoad {
            n_running,
            n_blocks_free: 20,
            n_blocks_cached: 10,
            healthy: true,
            ..InstanceLoad::default()
        };
        let d0 = InstanceId::new("d0");
        view.apply(ViewEvent::Load(d0.clone(), Incarnation(1), load));
        [28, 29, 30, 31].map(|n_blocks| view.instances()[&d0].has_room(n_blocks, 1))
    };
    assert_eq!(has_room(0), [true, true, true, false]);
    assert_eq!(has_room(2), [true, false, false, false]);
}

#[test]
fn what_fills_an_instance_is_placed_on_an_empty_one() {
    let view = cluster(&[("d0", Role::Mixed)]);
    let mut policy = policy("least-loaded", Disaggregation::NEVER).unwrap();
    let total = 100 * 16;
    for n_tokens in [total - 17, total - 1, total] {
        assert!(place(&mut *policy, &view, n_tokens, &[]).is_some(), "{n_tokens} tokens");
    }
    assert!(place(&mut *policy, &view, total + 1, &[]).is_none());
}
