//! Kubernetes objects in and out of `plan`'s types: reflectors and writes.

pub mod ledger_feed;
pub mod view;
pub mod workloads;
