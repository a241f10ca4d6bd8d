//! The wire: generated code of the `.proto` files, and `convert`, the one place where wire types meet domain types.
//! No policy, no I/O.

pub mod convert;
pub mod link;

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

/// Encoded `FileDescriptorSet` of both packages, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The newest protocol version this build speaks; it also speaks the one before.
pub const PROTOCOL_VERSION: u32 = 1;

/// Whether this build can speak with a peer of `version`.
pub const fn speaks(version: u32) -> bool {
    // An absent field reads as 0, which is no version.
    version != 0 && (version == PROTOCOL_VERSION || version + 1 == PROTOCOL_VERSION)
}
