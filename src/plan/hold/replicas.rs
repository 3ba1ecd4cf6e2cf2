//! The replicas of one workload as a line sees them: which may take a request, and which have to be asked first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::{Grant, Seen, SeenPod, Target};
use crate::api::units::PodUid;
use crate::plan::balance;

#[derive(Debug)]
struct Replica {
    pod: SeenPod,
    /// The first version seen; pods of an earlier wake have one before the zero.
    first_version: Option<u64>,
    /// It answered a probe of ours.
    answered: bool,
    /// It belongs to the time before the last sleep.
    retired: bool,
    /// The watch still shows it.
    present: bool,
    in_flight: u32,
    /// Ports that refused a connection and were not reached since.
    down: BTreeSet<u16>,
}

impl Replica {
    fn alive(&self) -> bool {
        self.present && !self.retired && !self.pod.terminating && self.pod.ip.is_some()
    }

    fn usable(&self) -> bool {
        self.alive() && (self.pod.ready || self.answered)
    }

    fn address(&self, target: &Target) -> Option<SocketAddr> {
        let port = match target {
            Target::Number(port) => *port,
            Target::Name(name) => *self.pod.ports.get(name)?,
        };
        Some(SocketAddr::new(self.pod.ip?, port))
    }
}

/// All of them, by pod.
#[derive(Debug, Default)]
pub(super) struct Replicas {
    all: BTreeMap<PodUid, Replica>,
    last_picked: Option<PodUid>,
    /// The newest version of the workload that had no replicas.
    zero_version: Option<u64>,
}

impl Replicas {
    /// Takes in what the watches show. Returns whether the workload was at 0 since the last time.
    pub(super) fn observe(&mut self, seen: &Seen) -> bool {
        let slept = seen.zero_version > self.zero_version;
        self.zero_version = self.zero_version.max(seen.zero_version);
        let zero = self.zero_version;
        let older = |version: Option<u64>| match (version, zero) {
            (Some(version), Some(zero)) => version <= zero,
            // Without comparable versions: whatever is there when the zero is seen.
            (None, Some(_)) => slept || seen.desired == 0,
            (_, None) => false,
        };
        for replica in self.all.values_mut() {
            replica.present = false;
            replica.retired |= slept && older(replica.first_version);
        }
        for pod in &seen.pods {
            let replica = self.all.entry(pod.uid.clone()).or_insert_with(|| Replica {
                pod: pod.clone(),
                first_version: pod.version,
                answered: false,
                retired: older(pod.version),
                present: true,
                in_flight: 0,
                down: BTreeSet::new(),
            });
            if replica.pod.ready && !pod.ready {
                // The kubelet, which asks the same question, has seen it fail since.
                replica.answered = false;
            }
            replica.pod.clone_from(pod);
            replica.present = true;
        }
        self.all
            .retain(|_, replica| replica.present || replica.in_flight > 0);
        slept
    }

    /// Pods from before the sleep may be used again.
    pub(super) fn pardon(&mut self) {
        for replica in self.all.values_mut() {
            replica.retired = false;
        }
    }

    /// Whether any pod is left from before the sleep that shows no sign of going.
    pub(super) fn survivors(&self) -> bool {
        self.all
            .values()
            .any(|replica| replica.retired && replica.present && !replica.pod.terminating)
    }

    pub(super) fn any_usable(&self) -> bool {
        self.all.values().any(Replica::usable)
    }

    /// Whether there are usable replicas, and none of them has a port of that name.
    pub(super) fn none_has(&self, target: &Target) -> bool {
        let mut usable = self.all.values().filter(|replica| replica.usable()).peekable();
        usable.peek().is_some() && usable.all(|replica| replica.address(target).is_none())
    }

    pub(super) fn any_room(&self, limit: u32) -> bool {
        self.all
            .values()
            .any(|replica| replica.usable() && replica.in_flight < limit)
    }

    /// The replica for the next request to `target`, if any has less than `limit` in flight.
    pub(super) fn choose(&self, target: &Target, limit: u32) -> Option<Grant> {
        let able = self.all.iter().filter(|(_, replica)| {
            replica.usable()
                && replica
                    .address(target)
                    .is_some_and(|address| !replica.down.contains(&address.port()))
        });
        let pod = balance::pick(
            able.map(|(uid, replica)| (uid, replica.in_flight)),
            limit,
            self.last_picked.as_ref(),
        )?;
        Some(Grant {
            pod: pod.clone(),
            address: self.all.get(pod)?.address(target)?,
        })
    }

    /// A request goes there.
    pub(super) fn take(&mut self, grant: &Grant) {
        if let Some(replica) = self.all.get_mut(&grant.pod) {
            replica.in_flight += 1;
        }
        self.last_picked = Some(grant.pod.clone());
    }

    /// A request there has ended.
    pub(super) fn release(&mut self, pod: &PodUid) {
        if let Some(replica) = self.all.get_mut(pod) {
            replica.in_flight = replica.in_flight.saturating_sub(1);
            if !replica.present && replica.in_flight == 0 {
                self.all.remove(pod);
            }
        }
    }

    pub(super) fn unreachable(&mut self, grant: &Grant) {
        if let Some(replica) = self.all.get_mut(&grant.pod) {
            replica.down.insert(grant.address.port());
        }
    }

    pub(super) fn reached(&mut self, grant: &Grant) {
        if let Some(replica) = self.all.get_mut(&grant.pod) {
            replica.down.remove(&grant.address.port());
        }
    }

    pub(super) fn answered(&mut self, pod: &PodUid) {
        if let Some(replica) = self.all.get_mut(pod) {
            replica.answered = true;
        }
    }

    /// Pods that may become usable by answering a probe.
    pub(super) fn to_probe(&self) -> impl Iterator<Item = &PodUid> {
        self.all
            .iter()
            .filter(|(_, replica)| replica.alive() && !replica.usable())
            .map(|(uid, _)| uid)
    }

    pub(super) fn is_to_probe(&self, pod: &PodUid) -> bool {
        self.all
            .get(pod)
            .is_some_and(|replica| replica.alive() && !replica.usable())
    }

    /// Replicas and their ports that refused a connection.
    pub(super) fn to_reach(&self) -> impl Iterator<Item = Grant> {
        self.all
            .iter()
            .filter(|(_, replica)| replica.alive())
            .flat_map(|(uid, replica)| {
                replica.down.iter().filter_map(|port| {
                    Some(Grant {
                        pod: uid.clone(),
                        address: SocketAddr::new(replica.pod.ip?, *port),
                    })
                })
            })
    }

    pub(super) fn is_to_reach(&self, grant: &Grant) -> bool {
        self.all
            .get(&grant.pod)
            .is_some_and(|replica| replica.alive() && replica.down.contains(&grant.address.port()))
    }
}
