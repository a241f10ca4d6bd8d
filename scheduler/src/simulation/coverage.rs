//! Which transitions of which machines happened while which faults were felt.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::reachable::{every_transition, never, never_with, rare};
use crate::arbiter::ArbiterFact;
use crate::transfer::{DestinationFact, MigrationFact, SourceFact};

/// What goes wrong in a simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FaultKind {
    /// An instance dies and comes back as another incarnation.
    InstanceDies,
    /// An instance stands still for a while, as after SIGSTOP, and then goes on.
    InstanceHangs,
    /// Nothing passes between two parties for a while; what was under way is lost.
    LinkCut,
    /// Everything between two parties takes twenty times as long for a while.
    LinkSlow,
    /// Unary calls are lost, or their answers.
    CallLost,
    /// Unary calls arrive twice, the second time late.
    CallDoubled,
    /// An instance had no blocks or no place for somebody.
    NoRoom,
    /// A client goes away.
    ClientLeaves,
    /// A request's own deadline passes.
    DeadlinePasses,
    /// An instance is emptied, and later taken back into use.
    Drain,
    /// An instance is used for something else.
    RoleChanges,
    /// The front door dies with all its requests; another one begins with nothing.
    DoorDies,
}

impl FaultKind {
    /// All kinds, in order.
    pub const ALL: [FaultKind; 12] = [
        FaultKind::InstanceDies,
        FaultKind::InstanceHangs,
        FaultKind::LinkCut,
        FaultKind::LinkSlow,
        FaultKind::CallLost,
        FaultKind::CallDoubled,
        FaultKind::NoRoom,
        FaultKind::ClientLeaves,
        FaultKind::DeadlinePasses,
        FaultKind::Drain,
        FaultKind::RoleChanges,
        FaultKind::DoorDies,
    ];

    /// Its name in tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            FaultKind::InstanceDies => "dies",
            FaultKind::InstanceHangs => "hangs",
            FaultKind::LinkCut => "cut",
            FaultKind::LinkSlow => "slow",
            FaultKind::CallLost => "lost",
            FaultKind::CallDoubled => "doubled",
            FaultKind::NoRoom => "no room",
            FaultKind::ClientLeaves => "leaves",
            FaultKind::DeadlinePasses => "deadline",
            FaultKind::Drain => "drain",
            FaultKind::RoleChanges => "role",
            FaultKind::DoorDies => "door",
        }
    }
}

/// A machine took a fact in a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Transition {
    /// Which machine.
    pub machine: &'static str,
    /// Its stage before.
    pub stage: &'static str,
    /// The kind of the fact.
    pub fact: &'static str,
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} / {} / {}", self.machine, self.stage, self.fact)
    }
}

/// Counts of transitions, alone and together with each kind of fault that was felt then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Alone.
    pub transitions: BTreeMap<Transition, u64>,
    /// With a fault, in the order of [`FaultKind::ALL`].
    pub pairs: BTreeMap<Transition, [u64; FaultKind::ALL.len()]>,
}

impl Coverage {
    pub(super) fn count(&mut self, transition: Transition, felt: &[FaultKind]) {
        *self.transitions.entry(transition).or_default() += 1;
        let pairs = self.pairs.entry(transition).or_default();
        for fault in felt {
            pairs[*fault as usize] += 1;
        }
    }

    /// Pairs of a transition and a fault that were met.
    pub fn n_pairs(&self) -> usize {
        self.pairs.values().flatten().filter(|&&n| n > 0).count()
    }

    /// Pairs that were met although they cannot be, and transitions that nobody knows.
    pub fn surprises(&self) -> Vec<(Transition, Option<FaultKind>)> {
        let known: BTreeSet<Transition> = every_transition().collect();
        let alone = self.transitions.keys().copied();
        let alone = alone.filter(|transition| !known.contains(transition) || never(*transition).is_some());
        let pairs = self.pairs.iter().flat_map(|(&transition, counts)| {
            let met = FaultKind::ALL.into_iter().zip(counts).filter(|&(_, &n)| n > 0);
            met.map(move |(fault, _)| (transition, fault))
        });
        let pairs = pairs.filter(|&(transition, fault)| never_with(transition, fault).is_some());
        let pairs = pairs.map(|(transition, fault)| (transition, Some(fault)));
        alone.map(|transition| (transition, None)).chain(pairs).collect()
    }

    /// Pairs that can be, with how often each was met.
    pub fn reachable_pairs(&self) -> impl Iterator<Item = (Transition, FaultKind, u64)> {
        let pairs = every_transition().flat_map(|transition| {
            let counts = self.pairs.get(&transition).copied().unwrap_or_default();
            let counts = FaultKind::ALL.into_iter().zip(counts);
            counts.map(move |(fault, n)| (transition, fault, n))
        });
        pairs.filter(|&(transition, fault, _)| never_with(transition, fault).is_none())
    }

    /// Pairs that can be and were met less than `at_least` times, and rare transitions that were never met at all.
    pub fn shortfalls(&self, at_least: u64) -> Vec<(Transition, FaultKind, u64)> {
        let is_short = |&(transition, _, n): &(Transition, FaultKind, u64)| match rare(transition) {
            None => n < at_least,
            Some(_) => !self.transitions.contains_key(&transition),
        };
        self.reachable_pairs().filter(is_short).collect()
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Coverage) {
        for (transition, n) in &other.transitions {
            *self.transitions.entry(*transition).or_default() += n;
        }
        for (transition, others) in &other.pairs {
            let pairs = self.pairs.entry(*transition).or_default();
            pairs.iter_mut().zip(others).for_each(|(pair, n)| *pair += n);
        }
    }
}

pub(super) fn arbiter_fact(fact: &ArbiterFact) -> &'static str {
    match fact {
        ArbiterFact::Placed => "placed",
        ArbiterFact::Token { .. } => "token",
        ArbiterFact::ChoiceFinished { .. } => "choice finished",
        ArbiterFact::Finished { .. } => "finished",
        ArbiterFact::Failed { .. } => "failed",
        ArbiterFact::MoveWanted => "move wanted",
        ArbiterFact::Moving { .. } => "moving",
        ArbiterFact::MoveCancelled { .. } => "move cancelled",
        ArbiterFact::Joined { .. } => "joined",
        ArbiterFact::ResumeFailed { .. } => "resume failed",
        ArbiterFact::NoRoom => "no room",
        ArbiterFact::ClientGone => "client gone",
        ArbiterFact::DeadlinePassed => "deadline passed",
        ArbiterFact::Tick => "tick",
    }
}

pub(super) fn migration_fact(fact: &MigrationFact) -> &'static str {
    match fact {
        MigrationFact::Full { .. } => "full",
        MigrationFact::Paused { .. } => "paused",
        MigrationFact::Sent => "sent",
        MigrationFact::Interrupted(_) => "interrupted",
        MigrationFact::Dropped => "dropped",
        MigrationFact::Resume(_) => "resume",
        MigrationFact::Gone => "gone",
        MigrationFact::Tick => "tick",
    }
}

pub(super) fn source_fact(fact: &SourceFact) -> &'static str {
    match fact {
        SourceFact::Ready(_) => "ready",
        SourceFact::Token { .. } => "token",
        SourceFact::Sent => "sent",
        SourceFact::ComputeFailed(_) => "compute failed",
        SourceFact::Dropped => "dropped",
        SourceFact::Tick => "tick",
    }
}

pub(super) fn destination_fact(fact: &DestinationFact) -> &'static str {
    match fact {
        DestinationFact::Accepted { .. } => "accepted",
        DestinationFact::Progress { .. } => "progress",
        DestinationFact::Kv { .. } => "kv",
        DestinationFact::Token { .. } => "token",
        DestinationFact::State { .. } => "state",
        DestinationFact::Ended { failure: None } => "ended well",
        DestinationFact::Ended { failure: Some(_) } => "ended badly",
        DestinationFact::Dropped { .. } => "dropped",
        DestinationFact::Cancelled => "cancelled",
        DestinationFact::Tick => "tick",
    }
}
