//! Kubernetes objects in and out of `plan`'s types: reflectors and writes.

pub mod agents;
pub mod call;
pub mod client;
pub mod clock;
pub mod events;
pub mod evict;
pub mod ledger_feed;
pub mod pod_life;
pub mod rooms;
pub mod scale;
pub mod slices;
pub mod view;
pub mod waiting;
pub mod workloads;
