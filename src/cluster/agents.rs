//! The agents' Leases, watched: a node whose agent is silent is closed in the ledger, until it is heard again.
//!
//! They are no part of the view: each is renewed every few seconds, and none of that is a change to decide on.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::ledger_feed::SharedLedger;
use super::view::Kind;
use crate::api::gpu_node::GpuNode;
use crate::api::names;
use crate::api::units::NodeName;
use crate::plan::heartbeats::{Heartbeats, Renewal, Silence};
use crate::plan::ledger::Event;

/// How often it is looked whether somebody fell silent.
const LOOK: Duration = Duration::from_secs(1);

/// Closes and opens nodes in the ledger until `shutdown`, and tells of each. `gpu_nodes` say whose agent renews a Lease.
pub async fn follow(
    client: Client,
    namespace: &str,
    gpu_nodes: Kind<GpuNode>,
    ledger: SharedLedger,
    tell: impl Fn(&NodeName, Option<Silence>),
    shutdown: CancellationToken,
) {
    let leases: Api<Lease> = Api::namespaced(client, namespace);
    let config = watcher::Config::default().labels(&format!("{}={}", names::NAME_LABEL, names::AGENT));
    let mut events = std::pin::pin!(watcher(leases, config).default_backoff());
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let began = Instant::now();
    let mut ears = Ears::default();
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => None,
            event = events.next() => event,
        };
        let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        // A renewal like thousands of others changes nothing; only who was silent is waited for.
        if event.is_some_and(|event| !ears.hear(event, now_ms)) {
            continue;
        }
        let nodes = gpu_nodes.all();
        let renews = |node: &GpuNode| node.status.as_ref().is_some_and(|status| status.lease.is_some());
        let renewing = nodes
            .iter()
            .filter(|node| renews(node))
            .map(|node| NodeName::from(node.name_any().as_str()));
        for (node, silence) in ears.heartbeats.look(renewing, now_ms) {
            ledger.update(|ledger| {
                ledger.apply(Event::Agent {
                    node: node.clone(),
                    silent: silence.map(|silence| silence.to_string().into()),
                });
            });
            tell(&node, silence);
        }
    }
}

/// What the watch says, as the plan takes it.
struct Ears {
    heartbeats: Heartbeats,
    /// A full list that is being read.
    listed: BTreeMap<NodeName, Renewal>,
}

impl Default for Ears {
    fn default() -> Self {
        Self {
            heartbeats: Heartbeats::new(),
            listed: BTreeMap::new(),
        }
    }
}

impl Ears {
    /// Takes an event in, and tells whether to look at once.
    fn hear(&mut self, event: watcher::Result<watcher::Event<Lease>>, now_ms: u64) -> bool {
        match event {
            Ok(watcher::Event::Init) => {
                self.listed.clear();
                self.heartbeats.blinded();
            }
            Ok(watcher::Event::InitApply(lease)) => self.listed.extend(renewal(&lease)),
            Ok(watcher::Event::InitDone) => {
                self.heartbeats.sees(&std::mem::take(&mut self.listed), now_ms);
                return true;
            }
            Ok(watcher::Event::Apply(lease)) => {
                if let Some((node, renewal)) = renewal(&lease) {
                    return self.heartbeats.renewed(&node, renewal, now_ms);
                }
            }
            Ok(watcher::Event::Delete(lease)) => {
                if let Some((node, _)) = renewal(&lease) {
                    self.heartbeats.lease_gone(&node);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot watch the agents' Leases; trying again");
                self.heartbeats.excuse(now_ms);
            }
        }
        false
    }
}

fn renewal(lease: &Lease) -> Option<(NodeName, Renewal)> {
    let node = names::node_of_agent_lease(lease.metadata.name.as_deref()?)?;
    let spec = lease.spec.as_ref()?;
    let seconds = u64::try_from(spec.lease_duration_seconds?).ok()?;
    let renewal = Renewal {
        stamp: spec.renew_time.as_ref()?.0.to_string(),
        lasts_ms: seconds.saturating_mul(1000),
    };
    Some((NodeName::from(node), renewal))
}
