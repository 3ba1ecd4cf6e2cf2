//! Decisions: data in, decision and reason out. No tokio, no kube client, no clock, no environment in here, so that
//! a simulator and the controller call the very same functions; `tests/layers.rs` guards that.

pub mod admission;
pub mod gating;
