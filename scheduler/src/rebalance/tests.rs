//! Proposals even out what is uneven, make room for what waits, and come to rest.

use proptest::prelude::*;

use super::*;
use crate::ids::{Fingerprint, Incarnation};
use crate::placement::{InstanceInfo, OpenPlacement, Placement, ViewEvent};

const N_BLOCKS: u32 = 1000;

fn join(view: &mut ClusterView, name: &str, role: Role) {
    view.apply(ViewEvent::Joined(InstanceInfo {
        id: InstanceId::new(name),
        incarnation: Incarnation(1),
        protocol_version: 2,
        role,
        fingerprint: Fingerprint([1; 32]),
        numerics_class: "test".into(),
        block_size: 16,
        n_blocks_total: N_BLOCKS,
        max_num_seqs: 64,
        max_model_len: 16_000,
        kv_bytes_per_token: 1,
    }));
}

/// Two decode instances and a prefill instance, with requests of these sizes on the first.
fn cluster(sizes: &[u32]) -> (ClusterView, Vec<RunningRequest>) {
    let mut view = ClusterView::new();
    join(&mut view, "d0", Role::Decode);
    join(&mut view, "d1", Role::Decode);
    join(&mut view, "p0", Role::Prefill);
    let mut running = Vec::new();
    for (id, &n_blocks) in (0..).zip(sizes) {
        run(&mut view, &mut running, id, "d0", n_blocks);
    }
    (view, running)
}

fn run(view: &mut ClusterView, running: &mut Vec<RunningRequest>, id: u128, instance: &str, n_blocks: u32) {
    let instance = InstanceId::new(instance);
    let placement = Placement {
        decode: instance.clone(),
        prefill: None,
    };
    let open = OpenPlacement {
        placement,
        n_blocks,
        n_choices: 1,
        n_prefill_tokens: 0,
        prefix_keys: Vec::new(),
    };
    view.apply(ViewEvent::Placed(RequestId(id), open));
    running.push(RunningRequest {
        id: RequestId(id),
        instance,
        n_blocks,
        n_choices: 1,
        needs_version: 1,
    });
}

/// Carries a proposal out.
fn carry_out(view: &mut ClusterView, running: &mut [RunningRequest], proposal: &MoveProposal) {
    view.apply(ViewEvent::MoveStarted(proposal.request, proposal.to.clone()));
    view.apply(ViewEvent::Moved(proposal.request, proposal.to.clone()));
    let request = running.iter_mut().find(|request| request.id == proposal.request);
    let request = request.expect("a running request is proposed");
    assert_eq!(request.instance, proposal.from);
    request.instance = proposal.to.clone();
}

/// Moves until nothing is proposed. Returns how many.
fn settle(view: &mut ClusterView, running: &mut [RunningRequest]) -> usize {
    let mut rebalancer = Rebalancer::new(RebalanceConfig {
        cooldown: Nanos::ZERO,
        ..RebalanceConfig::default()
    });
    for n_moves in 0.. {
        assert!(n_moves <= 4 * running.len(), "it never comes to rest");
        let Some(proposal) = rebalancer.propose(Nanos::ZERO, view, running, None) else {
            return n_moves;
        };
        assert_eq!(proposal.reason, RebalanceReason::Balance);
        assert_ne!(proposal.to, InstanceId::new("p0"));
        carry_out(view, running, &proposal);
        rebalancer.ended(Nanos::ZERO, proposal.request, true);
    }
    unreachable!()
}

fn n_on(running: &[RunningRequest], name: &str) -> usize {
    running.iter().filter(|request| *request.instance.0 == *name).count()
}

#[test]
fn equal_requests_are_divided_so_that_neither_is_half_as_free_again() {
    for n in 2..40 {
        let (mut view, mut running) = cluster(&vec![10; n]);
        let n_moves = settle(&mut view, &mut running);
        let [less, more] = {
            let mut both = [n_on(&running, "d0"), n_on(&running, "d1")];
            both.sort_unstable();
            both
        };
        assert_eq!(n_moves, n_on(&running, "d1"), "nothing moves twice");
        assert!(more <= less + less / 2 + 1, "{n}: {less} and {more}");
    }
}

#[test]
fn a_request_that_fits_nowhere_finds_room_after_the_smallest_move() {
    let (mut view, mut running) = cluster(&[300, 200, 400]);
    run(&mut view, &mut running, 9, "d1", 500);
    // 100 blocks are free on one, 500 on the other.
    let mut rebalancer = Rebalancer::new(RebalanceConfig {
        max_ratio: 1e9,
        ..RebalanceConfig::default()
    });
    let waiting = |n_blocks| WaitingRequest { n_blocks, n_choices: 1 };
    let proposal = rebalancer.propose(Nanos::ZERO, &view, &running, Some(&waiting(300)));
    assert_eq!(proposal, None, "it has room on the second");
    let proposal = rebalancer.propose(Nanos::ZERO, &view, &running, Some(&waiting(550)));
    assert_eq!(proposal, None, "no one move makes that much room");
    running.retain(|request| request.id != RequestId(2));
    view.apply(ViewEvent::Closed(RequestId(2)));
    let proposal = rebalancer
        .propose(Nanos::ZERO, &view, &running, Some(&waiting(650)))
        .unwrap();
    assert_eq!(proposal.reason, RebalanceReason::Defragment);
    assert_eq!(
        (proposal.request, &*proposal.to.0),
        (RequestId(1), "d1"),
        "the smallest that makes room"
    );
}

#[test]
fn who_moved_or_failed_is_left_alone_for_a_while() {
    let (view, running) = cluster(&[10, 10, 10, 10]);
    let mut rebalancer = Rebalancer::new(RebalanceConfig::default());
    let proposal = rebalancer.propose(Nanos::ZERO, &view, &running[..1], None);
    let proposal = proposal.expect("it is one of four");
    rebalancer.ended(Nanos::ZERO, proposal.request, false);
    rebalancer.ended(Nanos::ZERO, proposal.request, false);
    let at = |rebalancer: &mut Rebalancer, seconds| {
        let proposal = rebalancer.propose(Nanos::from_secs(seconds), &view, &running[..1], None);
        proposal.is_some()
    };
    assert!(!at(&mut rebalancer, 3), "the second failure doubles the wait");
    assert!(at(&mut rebalancer, 4));
}

#[test]
fn a_draining_full_or_older_instance_takes_nothing() {
    let (mut view, running) = cluster(&[10; 8]);
    let mut rebalancer = Rebalancer::new(RebalanceConfig::default());
    assert!(rebalancer.propose(Nanos::ZERO, &view, &running, None).is_some());
    view.apply(ViewEvent::Draining(InstanceId::new("d1"), true));
    assert_eq!(rebalancer.propose(Nanos::ZERO, &view, &running, None), None);
    view.apply(ViewEvent::Draining(InstanceId::new("d1"), false));
    view.apply(ViewEvent::Busy(InstanceId::new("d1")));
    assert_eq!(rebalancer.propose(Nanos::ZERO, &view, &running, None), None);
}

#[test]
fn moves_under_way_are_bounded() {
    let (mut view, running) = cluster(&[10; 8]);
    let mut rebalancer = Rebalancer::new(RebalanceConfig::default());
    for id in 0..2 {
        view.apply(ViewEvent::MoveStarted(RequestId(id), InstanceId::new("d1")));
    }
    assert_eq!(rebalancer.propose(Nanos::ZERO, &view, &running, None), None);
}

proptest! {
    /// Whatever the sizes and wherever they are: it comes to rest, and the lower freeness of the two has not fallen.
    #[test]
    fn it_comes_to_rest_and_does_no_harm(sizes in prop::collection::vec((1u32..60, any::<bool>()), 1..24)) {
        let (mut view, mut running) = cluster(&[]);
        for (id, &(n_blocks, first)) in (0..).zip(&sizes) {
            run(&mut view, &mut running, id, if first { "d0" } else { "d1" }, n_blocks);
        }
        let lower = |view: &ClusterView| {
            let free = ["d0", "d1"].map(|name| view.instances()[&InstanceId::new(name)].freeness(0));
            free[0].min(free[1])
        };
        let before = lower(&view);
        settle(&mut view, &mut running);
        prop_assert!(lower(&view) >= before);
    }
}
