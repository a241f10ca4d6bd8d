//! The wire: generated code of the `.proto` files, `convert`, the one place where wire types meet domain types, and how KV is
//! framed. No policy, no I/O.

pub mod convert;
pub mod link;
mod raw_frames;

pub use raw_frames::RawFrames;

/// The public API, `baton.v1`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod api {
    tonic::include_proto!("baton.v1");
}

/// Between processes of a cluster, `baton.cluster.v1`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod cluster {
    tonic::include_proto!("baton.cluster.v1");
}

/// The Open Inference Protocol (KServe v2) with Triton's streams, `inference`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The engine service of the SMG gateway. Modules lie as its packages do: the generated code finds one from the other.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod vllm {
    /// `vllm.grpc`
    pub mod grpc {
        /// `vllm.grpc.engine`
        pub mod engine {
            tonic::include_proto!("vllm.grpc.engine");
        }
    }
}

/// What engine services of the SMG gateway share.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod smg {
    /// `smg.grpc`
    pub mod grpc {
        /// `smg.grpc.common`
        pub mod common {
            tonic::include_proto!("smg.grpc.common");
        }
    }
}

/// Encoded `FileDescriptorSet` of all packages, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The newest protocol version this build speaks; it also speaks the one before.
///
/// Version 2 added groups of choices, penalties, the other adjustments of the distribution, constraints, checksums, moves and embeddings.
/// A request that needs them is not given to a peer of version 1, which would not see the fields. A release settles a version;
/// 2 is not released yet.
pub const PROTOCOL_VERSION: u32 = 2;

/// The version in which to speak to a peer that speaks `version` at best, or an unknown one (0).
pub const fn common_version(version: u32) -> u32 {
    if version == 0 || version + 1 == PROTOCOL_VERSION {
        PROTOCOL_VERSION - 1
    } else {
        PROTOCOL_VERSION
    }
}

/// Whether this build can speak with a peer of `version`.
pub const fn speaks(version: u32) -> bool {
    // An absent field reads as 0, which is no version.
    version != 0 && (version == PROTOCOL_VERSION || version + 1 == PROTOCOL_VERSION)
}
