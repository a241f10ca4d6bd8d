//! Compiles the .proto files with a compiler written in Rust: no `protoc` is needed.

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/baton/v1/baton.proto",
        "proto/baton/cluster/v1/cluster.proto",
        "proto/inference/grpc_service.proto",
        "proto/vllm/vllm_engine.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    let out_dir = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out_dir.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes("baton.cluster.v1.KvFrame.data")
        .bytes("smg.grpc.common.GetTokenizerChunk.data")
        .compile_fds(descriptors)?;
    Ok(())
}
