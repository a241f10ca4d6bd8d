//! Which transitions there are, and why some of them, alone or together with a fault, cannot be.

use super::coverage::{FaultKind, Transition};

const ARBITER_STAGES: [&str; 7] = [
    "placing",
    "streaming",
    "resumed",
    "moving",
    "pausing",
    "source lost",
    "ended",
];
const ARBITER_FACTS: [&str; 14] = [
    "placed",
    "token",
    "choice finished",
    "finished",
    "failed",
    "move wanted",
    "moving",
    "move cancelled",
    "joined",
    "resume failed",
    "no room",
    "client gone",
    "deadline passed",
    "tick",
];
const MOVER_STAGES: [&str; 6] = ["pinning", "streaming", "pausing", "paused", "handed over", "closed"];
const MOVER_FACTS: [&str; 8] = [
    "full",
    "paused",
    "sent",
    "interrupted",
    "dropped",
    "resume",
    "gone",
    "tick",
];
const SOURCE_STAGES: [&str; 4] = ["computing", "sending", "awaiting close", "closed"];
const SOURCE_FACTS: [&str; 6] = ["ready", "token", "sent", "compute failed", "dropped", "tick"];
const DESTINATION_STAGES: [&str; 4] = ["opening", "receiving", "settled", "closed"];
const DESTINATION_FACTS: [&str; 10] = [
    "accepted",
    "progress",
    "kv",
    "token",
    "state",
    "ended well",
    "ended badly",
    "dropped",
    "cancelled",
    "tick",
];

/// Every stage of every machine with every fact that there is for it.
pub fn every_transition() -> impl Iterator<Item = Transition> {
    let machines: [(&str, &[&str], &[&str]); 5] = [
        ("arbiter", &ARBITER_STAGES, &ARBITER_FACTS),
        ("source", &SOURCE_STAGES, &SOURCE_FACTS),
        ("source of a move", &MOVER_STAGES, &MOVER_FACTS),
        ("destination", &DESTINATION_STAGES, &DESTINATION_FACTS),
        ("destination of a move", &DESTINATION_STAGES, &DESTINATION_FACTS),
    ];
    machines.into_iter().flat_map(|(machine, stages, facts)| {
        stages
            .iter()
            .flat_map(move |&stage| facts.iter().map(move |&fact| Transition { machine, stage, fact }))
    })
}

/// Why a transition cannot happen in a run, whatever goes wrong.
pub fn never(transition: Transition) -> Option<&'static str> {
    let Transition { machine, stage, fact } = transition;
    match machine {
        "arbiter" => never_of_an_arbiter(stage, fact),
        "source" => match (stage, fact) {
            ("closed", _) => Some("its task ends with it"),
            ("sending" | "awaiting close", "ready" | "token" | "compute failed") => {
                Some("the first token is the last that the engine says of a prompt")
            }
            _ => None,
        },
        "source of a move" => match (stage, fact) {
            ("closed", _) => Some("its task ends with it"),
            ("streaming" | "pausing" | "paused" | "handed over", "full") => Some("nobody asked which blocks are full"),
            ("pinning" | "streaming" | "paused" | "handed over", "paused") => Some("nobody asked for a pause"),
            ("streaming" | "paused" | "handed over", "interrupted") => {
                Some("the engine answers only what it was asked, and frames can always be packed here")
            }
            _ => None,
        },
        "destination" | "destination of a move" => never_of_a_destination(machine, stage, fact),
        _ => None,
    }
}

fn never_of_an_arbiter(stage: &str, fact: &str) -> Option<&'static str> {
    match (stage, fact) {
        ("ended", _) => Some("its driver ends with it"),
        ("placing", "placed" | "no room" | "client gone" | "deadline passed") => None,
        ("placing", _) => Some("a driver that places has no stream and takes no orders"),
        (_, "placed" | "no room") => Some("nothing is being placed while a stream is open"),
        ("streaming" | "resumed", "joined") => Some("a destination's stream is dropped with its move"),
        ("streaming" | "resumed" | "moving", "tick") => Some("only a source that pauses or is lost sets a deadline"),
        ("moving" | "pausing" | "source lost", "move wanted") => Some("a driver that moves refuses further orders"),
        ("source lost", "token" | "choice finished" | "finished") => {
            Some("the source's stream is closed, and a destination's first word is that it joined")
        }
        ("source lost", "moving" | "move cancelled" | "resume failed") => Some("the source's stream is closed"),
        _ => None,
    }
}

fn never_of_a_destination(machine: &str, stage: &str, fact: &str) -> Option<&'static str> {
    match (stage, fact) {
        ("closed", "cancelled") => None,
        ("closed", _) => Some("its stream is dropped with it"),
        ("opening", "progress" | "kv" | "token" | "state" | "ended well") => {
            Some("frames come in order, and the answer is the first")
        }
        ("receiving" | "settled", "accepted") => Some("the answer comes once"),
        (_, "state") if machine == "destination" => Some("only the source of a move says what it has generated"),
        (_, "token") if machine == "destination of a move" => Some("only the source of a prompt says a first token"),
        ("receiving", "ended well") => Some("frames come in order, and a source ends well when all is sent"),
        ("settled", "progress" | "kv" | "token" | "state") => {
            Some("all was sent before, and who has sent all says only that it ends")
        }
        ("settled", "ended badly") if machine == "destination" => Some("a prompt that was sent cannot fail any more"),
        _ => None,
    }
}

/// Why a transition that happens cannot happen while a fault is felt.
pub fn never_with(transition: Transition, fault: FaultKind) -> Option<&'static str> {
    let Transition { machine, fact, .. } = transition;
    match fault {
        FaultKind::ClientLeaves if machine == "arbiter" && fact != "client gone" => {
            Some("the arbiter ends when it hears that its client has left")
        }
        FaultKind::DeadlinePasses if machine == "arbiter" && fact != "deadline passed" => {
            Some("the arbiter ends when it hears that its deadline has passed")
        }
        _ => never(transition),
    }
}

/// Why a transition happens so seldom that its pairs with faults are counted and not demanded.
pub fn rare(transition: Transition) -> Option<&'static str> {
    let Transition { machine, stage, fact } = transition;
    match (machine, stage, fact) {
        ("arbiter", "streaming" | "pausing", "moving") | ("arbiter", "streaming", "move cancelled") => {
            Some("a word of one move has to cross the failure of it and the begin of the next on the way")
        }
        ("arbiter", "streaming" | "pausing", "resume failed") | ("source of a move", "pausing", "resume") => {
            Some("a word to resume has to cross the next word of who is to resume")
        }
        ("arbiter", "source lost", "joined") => {
            Some("the source has to die between its last frame and the destination's first word")
        }
        ("destination" | "destination of a move", "settled", "tick" | "ended badly") => {
            Some("the source's end has to stay away or be bad after everything has arrived")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_reachable_in_every_stage_that_outlives_its_end() {
        for (stage, machine) in ARBITER_STAGES.map(|stage| (stage, "arbiter")) {
            let mut all = every_transition().filter(|found| found.machine == machine && found.stage == stage);
            assert_eq!(
                all.any(|transition| never(transition).is_none()),
                stage != "ended",
                "{stage}"
            );
        }
        let all: Vec<Transition> = every_transition().collect();
        assert_eq!(all.len(), 7 * 14 + 4 * 6 + 6 * 8 + 2 * 4 * 10);
    }
}
