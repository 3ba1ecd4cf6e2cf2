//! One step at a time out of the cluster: what `plan::release` decides for each node, carried out.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;

use super::{Expected, Nodes, Seen, about_to_come, marks};
use crate::cluster::call::CallError;
use crate::cluster::events::{self, Told};
use crate::cluster::rooms::PodsByNode;
use crate::controller::reconcile::{Reconciler, sooner};
use crate::plan::nodes_wanted::{Standing, Wanted};
use crate::plan::release::{self, Step};
use crate::provider::{Provider, ProviderError};

impl Nodes {
    /// One step with every node of every group.
    pub(super) async fn release(
        &mut self,
        seen: &[Seen],
        pods: &PodsByNode,
        expected: &Expected,
        wanted: &Wanted,
        now: Timestamp,
    ) -> Option<Duration> {
        let mut staying: HashMap<String, u32> = HashMap::new();
        for seen in seen {
            if let Some(policy) = &seen.policy
                && seen.ready
                && matches!(seen.standing(), Standing::Active | Standing::Candidate)
            {
                *staying.entry(policy.clone()).or_default() += 1;
            }
        }
        let mut next = None;
        for seen in seen {
            let tainted = marks::is_fenced(&seen.node);
            let group = seen.policy.as_ref().and_then(|policy| self.groups.get(policy));
            if group.is_none() && seen.mark.is_none() && !tainted {
                continue;
            }
            let name = seen.node.name_any();
            if !self.backoff.open(&name) {
                continue;
            }
            let facts = release::Facts {
                mark: seen.mark.clone(),
                tainted,
                selected: group.is_some(),
                ready: seen.ready,
                occupied: pods.occupied(&name).or_else(|| about_to_come(expected, &name)),
                wanted: wanted.keep.get(&name).cloned(),
                blocked: group.and_then(|group| group.blocked(&seen.node)),
                at_provider: group.map_or(release::AtProvider::Unknown, |group| {
                    group.at_provider(&seen.node)
                }),
            };
            let bounds = release::Group {
                settle_time: group.map_or(Duration::ZERO, |group| group.policy.spec.settle_time.0),
                min_nodes: group.map_or(0, |group| group.policy.spec.min_nodes),
                staying: seen
                    .policy
                    .as_ref()
                    .and_then(|policy| staying.get(policy).copied())
                    .unwrap_or(0),
                dry_run: group.is_some_and(|group| group.policy.spec.dry_run),
            };
            let step = release::step(&facts, &bounds, now.as_millisecond());
            if let Step::Mark {
                state: release::State::Fenced,
                ..
            } = step
                && let Some(policy) = &seen.policy
                && let Some(count) = staying.get_mut(policy)
            {
                *count = count.saturating_sub(1);
            }
            next = sooner(next, self.take(seen, step, now).await);
        }
        next
    }

    /// Carries out one step.
    async fn take(&mut self, seen: &Seen, step: Step, now: Timestamp) -> Option<Duration> {
        let name = seen.node.name_any();
        let uid = seen.node.uid().unwrap_or_default();
        let result = match step {
            Step::Stay { again_in } => return again_in,
            Step::Tell { reason } => {
                if self.told.insert(uid) {
                    let note = format!("dry run: it would be released: {reason}");
                    self.tell_node(&seen.node, "WouldRelease", &note);
                }
                return None;
            }
            Step::Mark { state, reason } => {
                let result = self.mark(seen, Some((state, &reason)), now).await;
                if result.is_ok() {
                    match state {
                        release::State::Fenced => self.tell_node(&seen.node, "Fenced", &reason),
                        _ => tracing::info!(node = name, ?state, reason, "a node is on its way out"),
                    }
                }
                result.map_err(|error| error.to_string())
            }
            Step::Restore { reason } => {
                let result = self.mark(seen, None, now).await;
                if result.is_ok() {
                    if reason.contains("does not know it") {
                        self.groups.shun(&uid);
                    }
                    // A candidate that is used again is nobody's news.
                    if seen.standing() == Standing::Candidate {
                        tracing::info!(node = name, reason, "a node stays");
                    } else {
                        self.tell_node(&seen.node, "Kept", &reason);
                    }
                }
                result.map_err(|error| error.to_string())
            }
            Step::Remove { reason } => self.remove(seen, &reason, now).await,
            Step::Removed { reason } => self
                .mark(seen, Some((release::State::Released, &reason)), now)
                .await
                .map_err(|error| error.to_string()),
        };
        match result {
            Ok(()) => self.backoff.went_well(&name),
            Err(error) => {
                tracing::warn!(node = name, error, "a step with a node failed; trying again");
                self.context.failed(Self::PART);
                self.backoff.failed(&name);
            }
        }
        None
    }

    async fn mark(
        &self,
        seen: &Seen,
        mark: Option<(release::State, &str)>,
        now: Timestamp,
    ) -> Result<(), CallError> {
        if !self.context.leads() {
            return Err(CallError::Conflict);
        }
        let mark = mark.map(|(state, reason)| release::Mark {
            state,
            since_ms: now.as_millisecond(),
            reason: reason.to_owned(),
        });
        marks::write(&self.context.client, &seen.node, mark.as_ref()).await
    }

    /// Asks the provider to remove a node whose mark says so already.
    async fn remove(&mut self, seen: &Seen, reason: &str, now: Timestamp) -> Result<(), String> {
        let name = seen.node.name_any();
        let Some(group) = seen
            .policy
            .as_ref()
            .and_then(|policy| self.groups.get_mut(policy))
        else {
            return Ok(());
        };
        if !self.context.leads() {
            return Ok(());
        }
        let (provider, at) = group.provider().map_err(|error| error.to_string())?;
        let removed: Result<(), ProviderError> = provider.remove(&at, &name, reason).await;
        // Whatever came of it, what the provider said before is old now.
        group.forget_listing();
        removed.map_err(|error| error.to_string())?;
        group.note_removed(&seen.node);
        self.context.metrics.nodes_released.inc();
        self.tell_node(&seen.node, "Released", reason);
        self.mark(seen, Some((release::State::Released, reason)), now)
            .await
            .map_err(|error| error.to_string())
    }

    fn tell_node(&self, node: &Node, reason: &'static str, note: &str) {
        tracing::info!(node = node.name_any(), reason = note, "{reason}");
        self.context.events.tell(Told {
            regarding: events::reference(node),
            warning: false,
            reason,
            note: note.to_owned(),
        });
    }
}
