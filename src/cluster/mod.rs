//! Kubernetes objects in and out of `plan`'s types: reflectors and writes.

pub mod agents;
pub mod call;
pub mod client;
pub mod events;
pub mod ledger_feed;
pub mod rooms;
pub mod scale;
pub mod slices;
pub mod view;
pub mod waiting;
pub mod workloads;
