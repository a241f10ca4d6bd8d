//! Who this instance is, and whether a caller means it and agrees with it.

use baton_proto::{PROTOCOL_VERSION, cluster, common_version, speaks};
use baton_scheduler::ids::{Fingerprint, Incarnation, InstanceId};
use baton_scheduler::request::Failure;

/// Who this instance is, for as long as the process lives.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its name in the cluster.
    pub instance: InstanceId,
    /// This life.
    pub incarnation: Incarnation,
    /// Model, dtype, block size, layout.
    pub fingerprint: Fingerprint,
    /// Whose bits equal ours.
    pub numerics_class: String,
}

impl Identity {
    /// What we say first when we call `callee`, in a version that it speaks.
    pub fn handshake(&self, callee: &cluster::Peer) -> cluster::Handshake {
        cluster::Handshake {
            protocol_version: common_version(callee.protocol_version),
            fingerprint: self.fingerprint.0.to_vec(),
            callee_incarnation: callee.incarnation,
        }
    }

    /// What we say first when we are called by `caller`, in its version.
    pub fn accepted(&self, caller: Option<&cluster::Handshake>) -> cluster::Accepted {
        cluster::Accepted {
            incarnation: self.incarnation.0,
            protocol_version: common_version(caller.map_or(0, |caller| caller.protocol_version)),
            fingerprint: self.fingerprint.0.to_vec(),
            numerics_class: self.numerics_class.clone(),
            transport: String::new(),
        }
    }

    /// Whether a caller means this incarnation and speaks our protocol about our model.
    ///
    /// # Errors
    /// `Incompatible`, or `InstanceLost` when it means an earlier life of this instance.
    pub fn check_caller(&self, handshake: Option<&cluster::Handshake>) -> Result<(), Failure> {
        let handshake = handshake.ok_or_else(|| Failure::Invalid("field handshake is missing".into()))?;
        self.check_peer(handshake.protocol_version, &handshake.fingerprint)?;
        let meant = handshake.callee_incarnation;
        if meant != 0 && meant != self.incarnation.0 {
            return Err(Failure::InstanceLost(format!(
                "{} is incarnation {} now, the caller means {}",
                self.instance,
                self.incarnation,
                Incarnation(meant)
            )));
        }
        Ok(())
    }

    /// Whether `source`, whom we called, is the incarnation we meant and agrees with us.
    ///
    /// # Errors
    /// As [`Identity::check_caller`].
    pub fn check_source(&self, source: &cluster::Peer, accepted: &cluster::Accepted) -> Result<(), Failure> {
        self.check_peer(accepted.protocol_version, &accepted.fingerprint)?;
        if accepted.incarnation != source.incarnation {
            return Err(Failure::InstanceLost(format!(
                "{} answered as incarnation {}, expected {}",
                source.instance_id,
                Incarnation(accepted.incarnation),
                Incarnation(source.incarnation)
            )));
        }
        Ok(())
    }

    fn check_peer(&self, protocol_version: u32, fingerprint: &[u8]) -> Result<(), Failure> {
        if !speaks(protocol_version) {
            return Err(Failure::Incompatible(format!(
                "protocol version {protocol_version}, expected {PROTOCOL_VERSION}"
            )));
        }
        if fingerprint != self.fingerprint.0 {
            let found: String = fingerprint.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            return Err(Failure::Incompatible(format!(
                "fingerprint {found:?} of model, dtype, block size and layout, expected {}",
                self.fingerprint
            )));
        }
        Ok(())
    }
}
