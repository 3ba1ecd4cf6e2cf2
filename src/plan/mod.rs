//! Decisions: data in, decision and reason out. No tokio, no kube client, no clock, no environment in here, so that
//! a simulator and the controller call the very same functions; `tests/layers.rs` guards that.

pub mod admission;
pub mod autoscale;
pub mod balance;
pub mod endpoints;
pub mod gate_ports;
pub mod gating;
pub mod heartbeats;
pub mod hold;
pub mod ledger;
pub mod nodes_wanted;
pub mod over_use;
pub mod placement;
pub mod release;
pub mod room;
pub mod sleep;
pub mod waiting;
pub mod wake_failure;
