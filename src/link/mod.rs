//! What a gate and the controller's leader tell each other, as JSON lines over one long HTTP/2 exchange
//! (`POST /v1/link` on the link port: the request body streams [`FromGate`], the answer streams [`ToGate`]).
//!
//! The gate dials. A controller that does not lead answers 421 with [`Misdirected`]; the gate then dials the leader.
//! A lost link means *no data*, which is never taken for idleness.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::workload::WorkloadRef;

/// Path of the exchange on the link port.
pub const PATH: &str = "/v1/link";
/// A gate reports at least this often; a leader that hears nothing for three times as long drops the link.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// A gate reports changes at most this often.
pub const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Longest line that either side takes.
pub const MAX_LINE: usize = 1 << 20;

/// From a gate to the leader.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum FromGate {
    /// First line: who this is.
    #[serde(rename_all = "camelCase")]
    Hello {
        /// Name of the gate's pod.
        pod: String,
        /// Address that EndpointSlices can point at.
        ip: IpAddr,
    },
    /// The second line holds every workload that the gate knows; later ones those that changed. Sent even when empty,
    /// as a heartbeat.
    Report {
        /// Gate ports that accept connections now (all of them, every time).
        ports: Vec<u16>,
        /// Workloads whose numbers changed.
        workloads: Vec<Activity>,
    },
    /// Answer to [`ToGate::Hold`].
    Held {
        /// The id of the hold.
        id: u64,
        /// `None`: nothing is in flight or queued here, and new requests are held from now on. Otherwise why not.
        busy: Option<String>,
    },
    /// The gate was told to stop: take it out of the slices. It finishes what it holds.
    Stopping,
}

/// One workload as one gate sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// The workload.
    pub workload: WorkloadRef,
    /// Requests accepted and forwarded, not answered yet.
    pub in_flight: u32,
    /// Requests held.
    pub queued: u32,
    /// Milliseconds since the last request ended or arrived; `None`: this gate has seen none since it started.
    pub idle_ms: Option<u64>,
}

/// From the leader to a gate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum ToGate {
    /// The last look before a sleep: if nothing is in flight or queued, hold new requests of this workload (forward
    /// none) until its scale is seen at 0, a [`ToGate::Resume`] comes, or `for_ms` are over; then answer
    /// [`FromGate::Held`].
    #[serde(rename_all = "camelCase")]
    Hold {
        /// Names this hold.
        id: u64,
        /// The workload that is about to sleep.
        workload: WorkloadRef,
        /// The hold ends by itself after this many milliseconds.
        for_ms: u64,
    },
    /// The sleep did not come about: forward again.
    Resume {
        /// The hold that ends.
        id: u64,
    },
    /// A wake of this workload cannot succeed: answer its held requests with the reason.
    #[serde(rename_all = "camelCase")]
    WakeFailed {
        /// The workload.
        workload: WorkloadRef,
        /// Why, in the decision's own words.
        reason: String,
    },
}

/// Body of a 421: where the leader is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Misdirected {
    /// `IP:PORT` of the leader's link, if one is known.
    pub leader: Option<String>,
}
