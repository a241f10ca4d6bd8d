//! Messages between the processes of a cluster, from bytes to domain types.
#![no_main]

use baton_proto::cluster;
use baton_scheduler::request::PortableState;
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|data: &[u8]| {
    if let Ok(wire) = cluster::PortableState::decode(data)
        && let Ok(state) = PortableState::try_from(wire)
    {
        // What is understood is said again, and understood alike.
        let again = PortableState::try_from(cluster::PortableState::from(&state)).expect("its own words");
        assert_eq!(format!("{again:?}"), format!("{state:?}"));
    }
    let _ = cluster::GenerateRequest::decode(data);
    let _ = cluster::TransferFrame::decode(data);
    let _ = cluster::WorkerReport::decode(data);
    let _ = baton_proto::api::GenerateRequest::decode(data);
    let _ = baton_proto::inference::ModelInferRequest::decode(data);
    let _ = baton_proto::vllm::grpc::engine::GenerateRequest::decode(data);
});
