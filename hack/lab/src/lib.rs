//! The development cluster: a real Kubernetes control plane in a network
//! namespace of its own, and stand-ins for what a laptop does not have (nodes,
//! GPUs, model servers, a cloud's node group) that behave like the real ones.
//!
//! Nothing in here knows Ebb's code. It meets Ebb the way a cluster does:
//! through Kubernetes objects, a C library and HTTP.

pub mod bench;
pub mod client;
pub mod cluster;
pub mod demo;
pub mod ebb_install;
pub mod fleet;
pub mod group;
pub mod model;
pub mod node;
pub mod nvml_state;
pub mod soak;
