//! Agents that are not heard of, told where people look: on the `GpuNode`, and in the log.

use super::reconcile::Context;
use crate::api::units::NodeName;
use crate::cluster::agents;
use crate::cluster::events::{Told, reference};
use crate::plan::heartbeats::Silence;
use tokio_util::sync::CancellationToken;

/// Closes nodes whose agents are silent, on every replica, so that the next leader knows; the leader tells.
pub async fn follow(context: Context, end: CancellationToken) {
    let tell = |node: &NodeName, silence: Option<Silence>| tell(&context, node, silence);
    let (client, namespace) = (context.client.clone(), context.namespace.clone());
    let (gpu_nodes, ledger) = (context.view.gpu_nodes.clone(), context.ledger.clone());
    agents::follow(client, &namespace, gpu_nodes, ledger, tell, end).await;
}

fn tell(context: &Context, node: &NodeName, silence: Option<Silence>) {
    let (reason, note) = match silence {
        Some(silence) => ("AgentSilent", silence.to_string()),
        None => ("AgentHeard", "its agent is heard of again".to_owned()),
    };
    tracing::info!(%node, reason, note);
    let object = context.view.gpu_nodes.get("", node.as_str());
    if let Some(object) = object.filter(|_| context.leads()) {
        context.events.tell(Told {
            regarding: reference(&*object),
            warning: silence.is_some(),
            reason,
            note,
        });
    }
}
