//! One instance: its engine, and the requests, moves and prefills that it serves.

use std::collections::{BTreeMap, VecDeque};

use super::engine::Engine;
use super::mover::Mover;
use super::network::{Event, Life};
use super::prefill::Prefill;
use super::task::Task;
use crate::ids::{InstanceId, Nanos, Role};
use crate::transfer::EndsBy;

pub(super) struct Instance {
    pub(super) id: InstanceId,
    pub(super) incarnation: u64,
    pub(super) is_up: bool,
    /// What it was started as, or told to be since.
    pub(super) role: Role,
    pub(super) numerics_class: &'static str,
    /// How its KV is fetched.
    pub(super) ends_by: EndsBy,
    /// Its steps take this many times as long as a quick instance's, in percent.
    pub(super) slowness: u64,
    pub(super) engine: Engine,
    pub(super) tasks: BTreeMap<u64, Task>,
    pub(super) movers: BTreeMap<usize, Mover>,
    pub(super) prefills: BTreeMap<usize, Prefill>,
    /// The task that a move or a word for a request finds: the newest.
    pub(super) registered: BTreeMap<usize, u64>,
    pub(super) hung_until: Option<Nanos>,
    /// What came while it hung.
    pub(super) backlog: VecDeque<Event>,
    /// Whether the front door counts it as a member, as it knows itself.
    pub(super) is_member: bool,
    /// When the last word of its membership arrives.
    pub(super) report_arrival: Nanos,
    /// Its next report names the whole prefix cache.
    pub(super) has_to_tell_all: bool,
}

impl Instance {
    pub(super) fn life(&self, instance: usize) -> Life {
        Life {
            instance,
            incarnation: self.incarnation,
        }
    }

    /// Whether nothing is served or held.
    pub(super) fn is_idle(&self) -> bool {
        self.tasks.is_empty()
            && self.movers.is_empty()
            && self.prefills.is_empty()
            && self.registered.is_empty()
            && self.engine.is_idle()
    }
}
