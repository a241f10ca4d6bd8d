//! Workers against each other, and against peers written to misbehave, over real sockets. The model's tokens depend on
//! every byte of KV (`engine::hash_model`), so a block lost or misplaced on the way gives other tokens.

mod broken_sources;
mod cluster;
mod departures;
mod ends;
mod handoffs;
mod membership;
mod moves;
