//! The stream of cached blocks: the union of instances that come, change, fall behind and go.

use baton_scheduler::block_events::{BlockEvent, StoredBlock};
use baton_scheduler::ids::Incarnation;
use baton_scheduler::prefix_cache::PrefixKey;
use baton_scheduler::request::Failure;
use futures::StreamExt as _;
use futures::stream::BoxStream;

use super::fake_worker::Listener;
use super::*;

fn stored(key: u128) -> BlockEvent {
    BlockEvent::Stored(StoredBlock {
        key: PrefixKey(key),
        parent: key.checked_sub(1).map(PrefixKey),
        tokens: Arc::from([key as u32; 16]),
    })
}

fn removed(key: u128) -> BlockEvent {
    BlockEvent::Removed(PrefixKey(key))
}

/// The listeners of some instances, by name, while the subscriber reads: it asks them.
async fn listening(bench: &mut Bench, n: usize, events: &mut BoxStream<'static, Vec<BlockEvent>>) -> Vec<Listener> {
    let mut listeners = Vec::new();
    while listeners.len() < n {
        tokio::select! {
            call = bench.call() => match call {
                Call::KvEvents(listener) => listeners.push(listener),
                other => panic!("{other:?} where blocks were to be told"),
            },
            told = events.next() => panic!("{told:?} before anybody said anything"),
        }
    }
    listeners.sort_by(|a, b| a.instance.cmp(&b.instance));
    listeners
}

async fn told(events: &mut BoxStream<'static, Vec<BlockEvent>>) -> Vec<BlockEvent> {
    soon("events", events.next()).await.expect("the stream has no end")
}

#[tokio::test]
async fn a_block_is_stored_with_its_first_holder_and_removed_with_its_last() {
    let mut bench = Bench::new(&[64, 64], FrontDoorOptions::default()).await;
    bench.add("old-0", "decode", 1).await;
    let mut events = bench.door.kv_events().unwrap();
    assert_eq!(told(&mut events).await, [BlockEvent::Cleared]);
    let listeners = listening(&mut bench, 2, &mut events).await;
    let names: Vec<&str> = listeners.iter().map(|listener| &*listener.instance).collect();
    assert_eq!(names, ["decode-0", "decode-1"], "never a peer of version 1");
    let [first, second] = listeners.try_into().unwrap();

    first.say(&[BlockEvent::Cleared, stored(0), stored(1)]);
    assert_eq!(told(&mut events).await, [stored(0), stored(1)]);
    second.say(&[BlockEvent::Cleared, stored(0), stored(5)]);
    assert_eq!(told(&mut events).await, [stored(5)]);
    first.say(&[removed(0), removed(1)]);
    assert_eq!(told(&mut events).await, [removed(1)]);
    second.say(&[removed(0)]);
    assert_eq!(told(&mut events).await, [removed(0)]);

    // One that falls behind is asked again, and says all it has.
    second.lose();
    let [again] = listening(&mut bench, 1, &mut events).await.try_into().unwrap();
    assert_eq!(again.instance, "decode-1");
    again.say(&[BlockEvent::Cleared, stored(7)]);
    assert_eq!(told(&mut events).await, [removed(5), stored(7)]);

    // One that has gone has lost all; another incarnation begins with nothing.
    bench.cluster.leave(&InstanceId::new("decode-1"), Incarnation(3));
    assert_eq!(told(&mut events).await, [removed(7)]);
    again.closed().await;
    drop(events);
    first.closed().await;
}

#[tokio::test]
async fn instances_that_come_later_are_listened_to_and_nobody_is_asked_without_a_subscriber() {
    let mut bench = Bench::new(&[], FrontDoorOptions::default()).await;
    let mut events = bench.door.kv_events().unwrap();
    assert_eq!(told(&mut events).await, [BlockEvent::Cleared]);
    bench.add("late-0", "mixed", baton_proto::PROTOCOL_VERSION).await;
    let [late] = listening(&mut bench, 1, &mut events).await.try_into().unwrap();
    late.say(&(0..600).map(stored).collect::<Vec<_>>());
    let mut all = Vec::new();
    while all.len() < 600 {
        all.extend(told(&mut events).await);
    }
    assert_eq!(all, (0..600).map(stored).collect::<Vec<_>>());
    // As many subscribers as are allowed, and a place again when one leaves.
    let others: Vec<_> = (1..8).map(|_| bench.door.kv_events().unwrap()).collect();
    match bench.door.kv_events().map(|_| ()) {
        Err(Failure::Busy(message)) => assert!(message.contains("8 subscribers"), "{message}"),
        other => panic!("{other:?}"),
    }
    drop(others);
    assert!(bench.door.kv_events().is_ok());
    assert!(bench.calls.try_recv().is_err(), "streams that nobody read asked nobody");
}
