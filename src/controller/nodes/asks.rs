//! Asking for nodes: the request is written into the policy's status first, then brought to the provider. A leader that
//! finds a request there which the provider has not heard of brings it again, under the same id.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::groups::{Group, Groups};
use super::{Nodes, Seen};
use crate::api::names;
use crate::api::node_policy::{AskedNode, NodePolicy, NodePolicyStatus};
use crate::cluster::call::{CallError, limited};
use crate::cluster::events::{self, Told};
use crate::controller::conditions;
use crate::controller::reconcile::{Context, Reconciler};
use crate::plan::nodes_wanted::{Ask, PendingPod};
use crate::provider::{AddRequest, Provider};

/// What changes in the policies' statuses, by policy.
#[derive(Default)]
pub struct Changes {
    /// Nodes to ask for.
    pub new: BTreeMap<String, Vec<Ask>>,
}

/// Drops requests whose node has come, or has not come in time.
pub fn resolve(groups: &mut Groups, seen: &[Seen], context: &Context, now: Timestamp) -> Changes {
    for name in groups.names() {
        let Some(group) = groups.get_mut(&name) else {
            continue;
        };
        let timeout = group.policy.spec.boot_timeout;
        let policy = group.policy.clone();
        group.asked.retain(|asked| {
            let arrived = seen
                .iter()
                .any(|seen| seen.node.name_any() == asked.node && seen.takes_pods());
            if arrived {
                tracing::info!(
                    policy = name,
                    node = asked.node,
                    request = asked.entry.request_id,
                    "a node has come"
                );
                return false;
            }
            let age = now.duration_since(asked.entry.at.0);
            let late = std::time::Duration::try_from(age).is_ok_and(|age| age > timeout.0);
            if late {
                let note = format!(
                    "node {} (request {}) cannot take pods {timeout} after it was asked for: given up on",
                    asked.node, asked.entry.request_id
                );
                tracing::warn!(policy = name, reason = note, "NodeLate");
                context.events.tell(Told {
                    regarding: events::reference(policy.as_ref()),
                    warning: true,
                    reason: "NodeLate",
                    note,
                });
            }
            !late
        });
    }
    Changes::default()
}

impl Nodes {
    /// Writes the statuses and asks the providers. Whether something failed and has to be tried again.
    pub(super) async fn ask(
        &mut self,
        mut changes: Changes,
        seen: &[Seen],
        pending: &[PendingPod],
        now: Timestamp,
    ) -> bool {
        let mut failed = false;
        for name in self.groups.names() {
            let asks = changes.new.remove(&name).unwrap_or_default();
            let selected = seen
                .iter()
                .filter(|seen| seen.policy.as_deref() == Some(name.as_str()))
                .count();
            let context = self.context.clone();
            let Some(group) = self.groups.get_mut(&name) else {
                continue;
            };
            let new: Vec<(Ask, AskedNode)> = asks
                .into_iter()
                .enumerate()
                .map(|(number, ask)| {
                    let entry = AskedNode {
                        request_id: format!("{name}-{}-{number}", now.as_millisecond()),
                        at: Time(now),
                        reason: ask.reason.clone(),
                    };
                    (ask, entry)
                })
                .collect();
            let status = status(group, u32::try_from(selected).unwrap_or(u32::MAX), &new, now);
            if group.policy.status.as_ref() != Some(&status) {
                match write(&context, &group.policy, &status).await {
                    Ok(()) => {}
                    // The view is behind; nothing was asked, and the next pass decides anew.
                    Err(CallError::Conflict | CallError::Gone) => {
                        failed = true;
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(policy = name, %error, "cannot write the status of a NodePolicy");
                        context.failed(Self::PART);
                        failed = true;
                        continue;
                    }
                }
            }
            let mut due: Vec<AskedNode> = group
                .asked
                .iter()
                .map(|asked| &asked.entry)
                .filter(|entry| !group.acknowledged.contains(&entry.request_id))
                .filter(|entry| group.knows(&entry.request_id) == Some(false))
                .cloned()
                .collect();
            due.extend(new.iter().map(|(_, entry)| entry.clone()));
            for entry in due {
                failed |= !bring(&context, group, &entry).await;
            }
            for (ask, _) in new {
                for uid in &ask.pods {
                    tell(&context, pending, uid, &ask);
                }
            }
        }
        failed
    }
}

/// Brings one request to the provider. Whether it took it.
async fn bring(context: &Context, group: &mut Group, entry: &AskedNode) -> bool {
    if !group.open() || !context.leads() {
        return false;
    }
    let (provider, at) = match group.provider() {
        Ok(provider) => provider,
        Err(error) => {
            group.failed(&error);
            return false;
        }
    };
    let request = AddRequest {
        group: at,
        request_id: entry.request_id.clone(),
        labels: group.policy.spec.node.labels.clone(),
        reason: entry.reason.clone(),
    };
    match provider.add(&request).await {
        Ok(()) => {
            group.went_well();
            group.acknowledged.insert(entry.request_id.clone());
            group.forget_listing();
            context.metrics.nodes_asked.inc();
            tracing::info!(
                policy = group.name,
                request = entry.request_id,
                reason = entry.reason,
                "asked for a node"
            );
            context.events.tell(Told {
                regarding: events::reference(group.policy.as_ref()),
                warning: false,
                reason: "NodeAsked",
                note: entry.reason.clone(),
            });
            true
        }
        Err(error) => {
            group.failed(&error);
            group.forget_listing();
            context.failed(Nodes::PART);
            context.events.tell(Told {
                regarding: events::reference(group.policy.as_ref()),
                warning: true,
                reason: "NodeNotAsked",
                note: error.to_string(),
            });
            false
        }
    }
}

fn tell(context: &Context, pending: &[PendingPod], uid: &str, ask: &Ask) {
    let Some(pod) = pending.iter().find(|pod| pod.uid == uid) else {
        return;
    };
    if let Some((namespace, name)) = pod.name.split_once('/')
        && let Some(pod) = context.view.pods.get(namespace, name)
    {
        context.events.tell(Told {
            regarding: events::reference::<Pod>(&pod),
            warning: false,
            reason: "NodeAsked",
            note: format!("NodePolicy {}: {}", ask.group, ask.reason),
        });
    }
}

fn status(group: &Group, selected: u32, new: &[(Ask, AskedNode)], now: Timestamp) -> NodePolicyStatus {
    let before = group.policy.status.clone().unwrap_or_default();
    let generation = group.policy.metadata.generation.unwrap_or(0);
    let usable = group.usable();
    let result = match (&usable, &group.trouble) {
        (Err(error), _) | (Ok(()), Some(error)) => Err(error.as_str()),
        (Ok(()), None) if group.policy.spec.dry_run => Ok("decides and tells, but changes nothing (dry run)"),
        (Ok(()), None) => Ok("nodes are asked for and released"),
    };
    let mut asked: Vec<AskedNode> = group.asked.iter().map(|asked| asked.entry.clone()).collect();
    asked.extend(new.iter().map(|(_, entry)| entry.clone()));
    NodePolicyStatus {
        selected,
        asked,
        conditions: conditions::with_ready(&before.conditions, result, generation, now),
        observed_generation: generation,
    }
}

async fn write(context: &Context, policy: &NodePolicy, status: &NodePolicyStatus) -> Result<(), CallError> {
    if !context.leads() {
        return Err(CallError::Conflict);
    }
    let patch = json!({
        "metadata": {"resourceVersion": policy.resource_version()},
        "status": status,
    });
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let api: Api<NodePolicy> = Api::all(context.client.clone());
    limited(api.patch_status(&policy.name_any(), &params, &Patch::Merge(patch))).await?;
    Ok(())
}
