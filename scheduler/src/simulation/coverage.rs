//! Which transitions of which machines happened while which faults were felt.

use std::collections::BTreeMap;
use std::fmt;

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

    /// Pairs that were met although they cannot be.
    pub fn surprises(&self) -> Vec<(Transition, FaultKind)> {
        let pairs = self
            .each_pair()
            .filter(|&(transition, fault, n)| n > 0 && unreachable(transition, fault).is_some());
        pairs.map(|(transition, fault, _)| (transition, fault)).collect()
    }

    /// Pairs that can be and were met less than `at_least` times.
    pub fn shortfalls(&self, at_least: u64) -> Vec<(Transition, FaultKind, u64)> {
        let is_short = |&(transition, fault, n): &(Transition, FaultKind, u64)| {
            n < at_least && unreachable(transition, fault).is_none()
        };
        self.each_pair().filter(is_short).collect()
    }

    fn each_pair(&self) -> impl Iterator<Item = (Transition, FaultKind, u64)> {
        self.pairs.iter().flat_map(|(&transition, counts)| {
            let counts = FaultKind::ALL.into_iter().zip(counts);
            counts.map(move |(fault, &n)| (transition, fault, n))
        })
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

/// Why a transition that happens cannot happen while a fault is felt.
pub fn unreachable(transition: Transition, fault: FaultKind) -> Option<&'static str> {
    let Transition { machine, fact, .. } = transition;
    match fault {
        FaultKind::ClientLeaves if machine == "arbiter" && fact != "client gone" => {
            Some("the arbiter ends when it hears that its client has left")
        }
        FaultKind::DeadlinePasses if machine == "arbiter" && fact != "deadline passed" => {
            Some("the arbiter ends when it hears that its deadline has passed")
        }
        _ => None,
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
