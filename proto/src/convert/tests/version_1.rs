//! Bytes that a build of protocol version 1 wrote still mean what they meant, and what this build says to such a peer is
//! what it would have said itself.

use baton_scheduler::request::SamplingParams;
use prost::Message;

use super::*;
use crate::cluster::{ended::How, generate_event::Event, transfer_frame::Frame};

macro_rules! bytes {
    ($name:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/v1/", $name, ".bin")).as_slice()
    };
}

fn event(bytes: &[u8]) -> Event {
    let event = cluster::GenerateEvent::decode(bytes).unwrap();
    assert_eq!(event.epoch, 3);
    event.event.unwrap()
}

fn frame(bytes: &[u8]) -> Frame {
    cluster::TransferFrame::decode(bytes).unwrap().frame.unwrap()
}

fn state() -> PortableState {
    let token = |index, id| Token {
        index,
        id,
        logprobs: Some(logprobs()),
    };
    PortableState {
        request: Request {
            id: RequestId(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
            prompt_ids: Arc::from([5, 600, 70_000]),
            sampling: SamplingParams {
                max_tokens: 32,
                temperature: 0.75,
                top_k: 40,
                top_p: 0.9,
                seed: 1_234_567_890_123,
                stop_token_ids: vec![2, 128_001],
                logprobs: Some(2),
                prompt_logprobs: Some(0),
                n: 1,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                repetition_penalty: 1.0,
                ..SamplingParams::default()
            },
            cache_salt: 77,
        },
        choices: vec![ChoiceState {
            output: vec![token(0, 7), token(1, 8)],
            finish: None,
        }],
        epoch: Epoch(3),
    }
}

fn logprobs() -> TokenLogprobs {
    TokenLogprobs {
        logprob: -0.5,
        rank: 1,
        top: vec![(7, -0.5), (9, -1.5)],
    }
}

#[test]
fn requests_mean_what_they_meant() {
    let request = cluster::GenerateRequest::decode(bytes!("generate_request")).unwrap();
    assert!(crate::speaks(request.handshake.unwrap().protocol_version));
    assert_eq!(PortableState::try_from(request.state.unwrap()).unwrap(), state());
    let peer = request.prefill.unwrap();
    assert_eq!((peer.instance_id.as_str(), peer.incarnation), ("prefill-0", 0xbeef));
    let request = cluster::PrefillRequest::decode(bytes!("prefill_request")).unwrap();
    assert_eq!((request.transfer_id, request.first_block), (11, 2));
    assert_eq!(request.offer, None, "no offer is gRPC alone");
}

#[test]
fn events_and_frames_mean_what_they_meant() {
    let Event::Token(token) = event(bytes!("event_token")) else {
        panic!()
    };
    let (choice, token) = token_from_wire(token);
    assert_eq!(
        (choice, token.index, token.id, token.logprobs),
        (0, 2, 9, Some(logprobs()))
    );
    let Event::Ended(ended) = event(bytes!("event_finished")) else {
        panic!()
    };
    let Some(How::Finish(finish)) = ended.how else { panic!() };
    assert_eq!(Finish::try_from(finish), Ok(Finish::Stop(2)));
    assert_eq!((ended.n_cached_tokens, ended.kv_bytes_received), (48, 4096));
    let Event::Ended(ended) = event(bytes!("event_failed")) else {
        panic!()
    };
    let Some(How::Failure(failure)) = ended.how else {
        panic!()
    };
    assert_eq!(failure.instance_id, "prefill-0");
    assert_eq!(Failure::from(failure), Failure::InstanceLost("reset".into()));
    let Event::Accepted(accepted) = event(bytes!("event_accepted")) else {
        panic!()
    };
    assert_eq!((accepted.incarnation, accepted.transport.as_str()), (0xbeef, ""));
    assert!(matches!(event(bytes!("event_moment")), Event::Moment(moment) if moment.moment == 4));
    assert!(matches!(event(bytes!("event_prompt_logprobs")), Event::PromptLogprobs(all) if all.tokens.len() == 2));

    let Frame::Kv(kv) = frame(bytes!("frame_kv")) else {
        panic!()
    };
    assert_eq!(
        (kv.transfer_id, kv.choice, kv.layer, kv.first_block, kv.n_blocks),
        (11, 0, 1, 2, 1)
    );
    assert_eq!(
        (kv.data.len(), kv.checksum),
        (64, None),
        "no checksum is not a checksum of 0"
    );
    let Frame::FirstToken(first) = frame(bytes!("frame_first_token")) else {
        panic!()
    };
    assert_eq!(
        (first.token.unwrap().id, first.more.len(), first.n_cached_tokens),
        (9, 0, 16)
    );
    assert_eq!(Finish::try_from(first.finish.unwrap()), Ok(Finish::Length));
    assert!(matches!(frame(bytes!("frame_progress")), Frame::Progress(progress) if progress.n_steps == 99));
    assert!(matches!(frame(bytes!("frame_accepted")), Frame::Accepted(_)));
    assert!(matches!(frame(bytes!("frame_moment")), Frame::Moment(_)));
    assert!(matches!(
        frame(bytes!("frame_prompt_logprobs")),
        Frame::PromptLogprobs(_)
    ));
    assert!(matches!(frame(bytes!("frame_ended")), Frame::Ended(ended) if ended.failure.is_some()));
    assert!(matches!(frame(bytes!("frame_ended_well")), Frame::Ended(ended) if ended.failure.is_none()));
}

#[test]
fn a_worker_of_version_1_may_join() {
    let report = cluster::WorkerReport::decode(bytes!("worker_report")).unwrap();
    let join = report.join.unwrap();
    assert!(crate::speaks(join.protocol_version));
    let info = instance_info_from_wire(&join).unwrap();
    assert_eq!(
        (info.role, info.block_size, info.n_blocks_total),
        (Role::Decode, 16, 512)
    );
    let load = report.load.unwrap();
    assert!(!load.leaving, "it does not know how to ask");
    assert_eq!(InstanceLoad::from(&load).step_samples.len(), 1);
    let events = prefix_events_from_wire(&report.prefix.unwrap()).unwrap();
    assert_eq!(events.len(), 3);
    let command = cluster::RegistryCommand::decode(bytes!("registry_welcome")).unwrap();
    assert_eq!(command.command, Some(cluster::registry_command::Command::Welcome(true)));
}

/// A request that needs nothing of version 2 is written byte for byte as version 1 wrote it.
#[test]
fn what_needs_nothing_new_is_said_as_before() {
    let old = cluster::GenerateRequest::decode(bytes!("generate_request")).unwrap();
    let said = cluster::PortableState::from(&state());
    assert_eq!(said.encode_to_vec(), old.state.unwrap().encode_to_vec());
}
