//! Holds: memory that a pod is about to have. It counts as taken, so that the next pod's answer does not wait for the
//! watch to tell of this one.

use std::sync::Arc;

use super::facts::{Claim, Entry};
use super::{Ledger, NodeState};
use crate::api::units::{NodeName, PodUid};

/// How sure it is that the pod gets what is held for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It is the likely winner of a scheduling cycle; the hold ends by itself.
    Reserved {
        /// When.
        until_ms: u64,
    },
    /// Its Binding is on its way; whoever sent it says how it went.
    Posted,
    /// Its Binding was sent, and nobody knows whether it arrived.
    Doubtful {
        /// When it can no longer arrive.
        until_ms: u64,
    },
    /// The API server took its Binding; the watch is about to tell.
    Bound,
}

/// What is held for one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// On which node.
    pub node: NodeName,
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// On which GPUs, and what.
    pub claim: Claim,
    /// How sure it is.
    pub stage: Stage,
}

impl Hold {
    fn ends_ms(&self) -> Option<u64> {
        match self.stage {
            Stage::Reserved { until_ms } | Stage::Doubtful { until_ms } => Some(until_ms),
            Stage::Posted | Stage::Bound => None,
        }
    }
}

impl Ledger {
    /// Holds this for the pod, in place of what was held for it before. A pod that is bound has no hold, and a
    /// reservation never replaces a Binding that may be on its way; then this does nothing and returns false.
    pub fn hold(&mut self, node: &NodeName, entry: Entry, stage: Stage) -> bool {
        let uid = entry.uid.clone();
        let reserved = |stage: Stage| matches!(stage, Stage::Reserved { .. });
        if self.bound.contains_key(&uid)
            || self.gone.contains(&uid)
            || reserved(stage) && self.holds.get(&uid).is_some_and(|hold| !reserved(hold.stage))
        {
            return false;
        }
        let hold = Hold {
            node: node.clone(),
            namespace: entry.namespace.clone(),
            name: entry.name.clone(),
            claim: entry.claim.clone(),
            stage,
        };
        let earlier = self.holds.insert(uid.clone(), hold);
        if let Some(earlier) = earlier
            && earlier.node != *node
        {
            self.change(&earlier.node, |node| drop_hold(node, &uid));
        }
        self.change(node, |node| {
            node.holds.insert(uid, entry);
        });
        true
    }

    /// Everything that is held, by pod.
    pub fn holds(&self) -> impl Iterator<Item = (&PodUid, &Hold)> {
        self.holds.iter()
    }

    /// What is held for a pod.
    #[must_use]
    pub fn hold_of(&self, uid: &PodUid) -> Option<&Hold> {
        self.holds.get(uid)
    }

    /// Says how sure a hold is now. Nothing happens if it has ended, as when the watch was faster.
    pub fn set_stage(&mut self, uid: &PodUid, stage: Stage) {
        if let Some(hold) = self.holds.get_mut(uid) {
            hold.stage = stage;
        }
    }

    /// Ends a hold.
    pub fn release(&mut self, uid: &PodUid) {
        if let Some(hold) = self.holds.remove(uid) {
            self.change(&hold.node, |node| drop_hold(node, uid));
        }
    }

    /// Ends a hold for a Binding that will not be sent again. One that may still arrive stays, and so does a reservation.
    pub fn release_posted(&mut self, uid: &PodUid) {
        if self
            .holds
            .get(uid)
            .is_some_and(|hold| hold.stage == Stage::Posted)
        {
            self.release(uid);
        }
    }

    /// Ends all holds whose time is over.
    pub(super) fn expire_holds(&mut self, now_ms: u64) {
        self.release_where(|hold| hold.ends_ms().is_some_and(|end| end <= now_ms));
    }

    /// Ends all reservations: their scheduling cycles were another leader's.
    pub fn release_reservations(&mut self) {
        self.release_where(|hold| matches!(hold.stage, Stage::Reserved { .. }));
    }

    fn release_where(&mut self, over: impl Fn(&Hold) -> bool) {
        let ended: Vec<PodUid> = self
            .holds
            .iter()
            .filter(|(_, hold)| over(hold))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in ended {
            self.release(&uid);
        }
    }
}

fn drop_hold(node: &mut NodeState, uid: &PodUid) {
    node.holds.remove(uid);
}
