//! The line of one workload at one gate: who waits, who is in flight, which replicas may take a request now, and
//! whether the workload has to be woken.
//!
//! Every question whose answer must be the same for all requests is decided here, one at a time and without IO: a
//! request is either granted a replica (and counts as in flight from that moment) or waits. That is what makes the
//! last look before a sleep safe: [`Line::hold`] finds a request in flight, or every later one waits.

mod line;
mod replicas;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::api::units::{Bytes, PodUid};

pub use line::Line;

/// Names a request in its line; they are handed out in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// The port of a pod that a request is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// By number.
    Number(u16),
    /// By the name that the pod's container gives it.
    Name(String),
}

/// How many requests may wait, and how many a replica may have in flight from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait.
    pub queue_requests: u32,
    /// Bytes of waiting requests.
    pub queue_bytes: Bytes,
    /// Requests in flight per replica.
    pub target_in_flight: u32,
}

/// A pod as the watch shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenPod {
    /// Its UID.
    pub uid: PodUid,
    /// Its address, once it has one.
    pub ip: Option<IpAddr>,
    /// The version of the object, where it can be compared with other objects' versions.
    pub version: Option<u64>,
    /// It was told to stop.
    pub terminating: bool,
    /// The kubelet calls it Ready.
    pub ready: bool,
    /// Its named ports.
    pub ports: BTreeMap<String, u16>,
}

/// A workload as the watches show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// `spec.replicas`.
    pub desired: u32,
    /// The newest version of the workload that had `spec.replicas` at 0.
    pub zero_version: Option<u64>,
    /// Its controller has acted on the newest spec.
    pub settled: bool,
    /// Ebb may scale it up from 0.
    pub wakeable: bool,
    /// Its bounds.
    pub limits: Limits,
    /// Its pods.
    pub pods: Vec<SeenPod>,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The replica.
    pub pod: PodUid,
    /// Where it listens.
    pub address: SocketAddr,
}

/// What becomes of a request that arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It goes to a replica at once.
    Go(Ticket, Grant),
    /// It waits; [`Line::next`] grants it later.
    Wait(Ticket),
    /// The line is full.
    Full(String),
    /// The workload is at 0 and may not be woken.
    NotWakeable,
}

/// What has to be done so that those who wait get on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Scale the workload up from 0.
    pub wake: bool,
    /// Ask these pods whether they are ready, more often than the kubelet does.
    pub probe: Vec<PodUid>,
    /// These replicas refused a connection: find out when they accept again.
    pub reach: Vec<Grant>,
    /// Call [`Line::tick`] at this time, in milliseconds.
    pub tick_at: Option<u64>,
}
