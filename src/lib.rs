//! Ebb lets GPU model servers on Kubernetes sleep when nobody calls them,
//! wakes them on the first request, packs them by GPU memory, and gives the
//! emptied GPU nodes back.
//!
//! The layers, from the bottom up; each may use those before it:
//!
//! | module | what lives there |
//! |---|---|
//! | [`api`] | what people write: resources, annotations, quantities |
//! | [`plan`] | decisions: pure functions that return a reason |
//! | [`link`] | what gate and controller tell each other |
//! | [`cluster`] | Kubernetes objects in and out of `plan`'s types |
//! | [`serve`] | TLS, health, metrics, shutdown, Lease |
//! | [`webhook`] [`extender`] [`gate`] [`agent`] [`provider`] | one part each |
//! | [`controller`] | the reconcilers, and the process that holds webhook and extender |

pub mod agent;
pub mod api;
pub mod cluster;
pub mod controller;
pub mod extender;
pub mod gate;
pub mod link;
pub mod plan;
pub mod provider;
pub mod serve;
pub mod webhook;
