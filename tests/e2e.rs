//! The whole system, installed from `manifests/` on a real control plane: whole stories, and what may go wrong
//! around them.
//!
//! Each test has a cluster of its own, one after the other, and its scenarios share it in sequence. Nothing
//! here asserts a time: things are waited for, and are either seen or not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "e2e/apply.rs"]
mod apply;
#[path = "e2e/cards.rs"]
mod cards;
#[path = "e2e/fail_open.rs"]
mod fail_open;
#[path = "e2e/stage.rs"]
mod stage;
#[path = "e2e/starts.rs"]
mod starts;

use ebb_lab::demo::story;
use stage::{on_a_site, on_a_site_of};

/// The story that `hack/demo` tells: models sleep, wake on a request and answer, 100 requests at once are one
/// wake, two models share a GPU and see it, no bind promises more than a GPU has, streams are not cut, the
/// emptied node goes once and only when empty, and the next request gets one back.
#[test]
fn e2e_story() {
    on_a_site(|stage| Box::pin(async move { story::tell(stage.site, stage.timeline).await }));
}

/// People and their tools apply the same manifests again and again; nothing may be woken, put to sleep,
/// rolled or fought over by that.
#[test]
fn e2e_apply_is_clean() {
    on_a_site(|stage| Box::pin(apply::all(stage)));
}

/// Parts of Ebb are taken away, gently and not; an awake model goes on answering through its ClusterIP.
#[test]
fn e2e_fail_open() {
    on_a_site(|stage| Box::pin(fail_open::all(stage)));
}

/// One manifest on cards of two sizes is told the right share of each; the cluster's own scheduler packs as well as
/// Ebb's once it has the configuration that the program writes.
#[test]
fn e2e_cards_and_schedulers() {
    on_a_site(|stage| Box::pin(cards::all(stage)));
}

/// Two models that declare the same bytes of one card are woken at the same moment, and loading takes more than what
/// they declare.
#[test]
fn e2e_one_start_at_a_time() {
    on_a_site_of(|plan| plan.gpus = 1, |stage| Box::pin(starts::all(stage)));
}
