//! Nodes: the empty ones released, the missing ones asked for.
//!
//! One pass reads everything from the view, simulates where unbound pods would go, takes one step with every node, and
//! then asks. What must outlive this process stands in the cluster first: the mark on a Node before its removal is
//! asked for, the request in the policy's status before the provider hears of it.

mod asks;
mod groups;
mod marks;
mod steps;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use parking_lot::Mutex;
use tokio::sync::watch;

use self::asks::resolve;
use self::groups::{Group, Groups, Learned};
use super::metrics::Part;
use super::reconcile::{Backoff, Context, Reconciler, sooner};
use crate::api::units::{Bytes, PodUid};
use crate::cluster::events::{self, Told};
use crate::cluster::rooms::{self, PodsByNode};
use crate::plan::ledger::Hold;
use crate::plan::nodes_wanted::{self, PendingPod, Standing, Wanted};
use crate::plan::release;
use crate::plan::room::GpuRoom;

/// How often the provider is looked at while something is under way there.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Pods that no node will ever take, and why: found here, told by whoever watches over wakes.
#[derive(Clone)]
pub struct Unplaceable {
    pods: Arc<Mutex<BTreeMap<String, String>>>,
    changed: Arc<watch::Sender<u64>>,
}

impl Default for Unplaceable {
    fn default() -> Self {
        Self {
            pods: Arc::default(),
            changed: Arc::new(watch::Sender::new(0)),
        }
    }
}

impl Unplaceable {
    /// Why no node will ever take the pod with this UID, if none will.
    #[must_use]
    pub fn reason(&self, uid: &str) -> Option<String> {
        self.pods.lock().get(uid).cloned()
    }

    /// Grows when the answer for some pod changes.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn set(&self, pods: &BTreeMap<String, String>) {
        let mut current = self.pods.lock();
        if *current != *pods {
            current.clone_from(pods);
            drop(current);
            self.changed.send_modify(|n| *n += 1);
        }
    }
}

/// Pods that the scheduler is about to bind, by UID.
type Expected = HashMap<String, Hold>;

fn about_to_come(expected: &Expected, node: &str) -> Option<String> {
    let mut coming = expected.values().filter(|hold| hold.node.as_str() == node);
    coming
        .next()
        .map(|hold| format!("pod {}/{}", hold.namespace, hold.name))
}

/// Releases nodes and asks for them.
pub struct Nodes {
    context: Context,
    unplaceable: Unplaceable,
    groups: Groups,
    backoff: Backoff<String>,
    /// Nodes that a dry run was told about, by UID.
    told: HashSet<String>,
    /// What each waiting pod was told, by UID.
    waits: HashMap<String, String>,
}

/// A node of the view with what the plans need of it.
struct Seen {
    node: Arc<Node>,
    policy: Option<String>,
    mark: Option<release::Mark>,
    ready: bool,
    gpus: Vec<GpuRoom>,
}

impl Seen {
    fn standing(&self) -> Standing {
        match self.mark.as_ref().map(|mark| mark.state) {
            None => Standing::Active,
            Some(release::State::Candidate) => Standing::Candidate,
            Some(release::State::Fenced) => Standing::Fenced,
            Some(release::State::Releasing | release::State::Released) => Standing::Leaving,
        }
    }

    fn plan(&self) -> nodes_wanted::Node {
        nodes_wanted::Node {
            name: self.node.name_any(),
            labels: self.node.labels().clone(),
            taints: rooms::taints(&self.node),
            usable: self.ready && !rooms::is_cordoned(&self.node),
            standing: self.standing(),
            // What the scheduler does not know of yet takes no pod.
            gpus: if rooms::offers_gpu_memory(&self.node) {
                self.gpus.clone()
            } else {
                Vec::new()
            },
        }
    }

    fn takes_pods(&self) -> bool {
        self.ready && !self.gpus.is_empty() && rooms::offers_gpu_memory(&self.node)
    }
}

impl Nodes {
    /// A reconciler that has done nothing yet.
    #[must_use]
    pub fn new(context: Context, unplaceable: Unplaceable) -> Self {
        Self {
            context,
            unplaceable,
            groups: Groups::default(),
            backoff: Backoff::default(),
            told: HashSet::new(),
            waits: HashMap::new(),
        }
    }

    fn look(&self, leaving: &HashSet<PodUid>) -> Vec<Seen> {
        let view = &self.context.view;
        let gpus = |name: &str| {
            self.context
                .ledger
                .read(|ledger| rooms::gpus(ledger, name, leaving))
        };
        let mut nodes = view.nodes.all();
        nodes.sort_by_key(|node| node.name_any());
        nodes
            .into_iter()
            .filter(|node| node.metadata.deletion_timestamp.is_none())
            .map(|node| Seen {
                policy: self.groups.of(&node).map(str::to_owned),
                mark: marks::read(&node),
                ready: rooms::is_ready(&node),
                gpus: gpus(&node.name_any()),
                node,
            })
            .collect()
    }

    /// What the ledger expects, without what it has waited for too long.
    fn expected(&self) -> Expected {
        let now = self.context.clock.now_ms();
        self.context.ledger.update(|ledger| {
            ledger.expire(now);
            rooms::expected(ledger)
        })
    }

    /// Takes from the newest node of each group what such nodes offer.
    fn learn(&mut self, seen: &[Seen]) {
        let mut newest: Vec<&Seen> = seen.iter().filter(|seen| seen.takes_pods()).collect();
        newest.sort_by_key(|seen| seen.node.creation_timestamp().map(|created| created.0));
        for seen in newest {
            if let Some(group) = seen
                .policy
                .as_ref()
                .and_then(|policy| self.groups.get_mut(policy))
            {
                group.learned = Some(Learned {
                    gpus: seen.gpus.iter().map(|gpu| GpuRoom::empty(gpu.usable)).collect(),
                    taints: rooms::taints(&seen.node),
                });
            }
        }
    }

    /// Where the unbound pods would go.
    fn simulate(&mut self, seen: &[Seen], pending: &[PendingPod]) -> Wanted {
        let nodes: Vec<nodes_wanted::Node> = seen.iter().map(Seen::plan).collect();
        let shapes = |dry: bool| -> Vec<nodes_wanted::Group> {
            self.groups
                .all()
                .filter(|group| dry || !group.policy.spec.dry_run)
                .filter_map(|group| shape(group, seen))
                .collect()
        };
        let wanted = nodes_wanted::decide(pending, &nodes, &shapes(false));
        let waiting: Vec<PendingPod> = pending
            .iter()
            .filter(|pod| wanted.never.contains_key(&pod.uid) || wanted.wait.contains_key(&pod.uid))
            .cloned()
            .collect();
        let told = if waiting.is_empty() {
            Vec::new()
        } else {
            nodes_wanted::decide(&waiting, &nodes, &shapes(true)).ask
        };
        for ask in told {
            for uid in &ask.pods {
                let note = format!(
                    "dry run of NodePolicy {}: a node would be asked for: {}",
                    ask.group, ask.reason
                );
                self.tell_pod(uid, pending, false, "WouldAskForNode", note);
            }
        }
        wanted
    }

    fn tell_pod(
        &mut self,
        uid: &str,
        pending: &[PendingPod],
        warning: bool,
        reason: &'static str,
        note: String,
    ) {
        if self.waits.get(uid) == Some(&note) {
            return;
        }
        let Some(pod) = pending.iter().find(|pod| pod.uid == uid) else {
            return;
        };
        tracing::info!(pod = pod.name, reason = note, "{reason}");
        if let Some((namespace, name)) = pod.name.split_once('/')
            && let Some(pod) = self.context.view.pods.get(namespace, name)
        {
            self.context.events.tell(Told {
                regarding: events::reference::<Pod>(&pod),
                warning,
                reason,
                note: note.clone(),
            });
        }
        self.waits.insert(uid.to_owned(), note);
    }
}

/// The group as the simulation sees it; `None`: it cannot have nodes now.
fn shape(group: &Group, seen: &[Seen]) -> Option<nodes_wanted::Group> {
    let spec = &group.policy.spec;
    let memory: Bytes = spec.node.gpu_memory.parse().ok()?;
    group.usable().ok()?;
    let mine: HashSet<String> = seen
        .iter()
        .filter(|seen| seen.policy.as_deref() == Some(&group.name))
        .map(|seen| seen.node.name_any())
        .collect();
    let unseen = group
        .asked
        .iter()
        .filter(|asked| !mine.contains(&asked.node))
        .count();
    Some(nodes_wanted::Group {
        name: group.name.clone(),
        gpus: match &group.learned {
            Some(learned) => learned.gpus.clone(),
            None => vec![GpuRoom::empty(memory); usize::try_from(spec.node.gpus).unwrap_or(0)],
        },
        labels: spec.node.labels.clone(),
        taints: group
            .learned
            .as_ref()
            .map(|learned| learned.taints.clone())
            .unwrap_or_default(),
        booting: u32::try_from(group.asked.len()).unwrap_or(u32::MAX),
        nodes: u32::try_from(mine.len() + unseen).unwrap_or(u32::MAX),
        max_nodes: spec.max_nodes,
    })
}

impl Reconciler for Nodes {
    const PART: Part = Part::Nodes;
    const GATHER: Duration = Duration::from_millis(10);

    async fn pass(&mut self) -> Option<Duration> {
        let now = Timestamp::now();
        let view = self.context.view.clone();
        self.groups.refresh(&view.node_policies.all());
        let all = view.pods.all();
        let pods = PodsByNode::new(&all);
        let expected = self.expected();
        let seen = self.look(&rooms::leaving(&all, now));
        let busy = seen.iter().any(|seen| {
            matches!(
                seen.mark.as_ref().map(|mark| mark.state),
                Some(release::State::Fenced | release::State::Releasing)
            )
        });
        let listing = self.groups.list(busy).await;
        let mut changes = resolve(&mut self.groups, &seen, &self.context, now);

        self.learn(&seen);
        let pending: Vec<PendingPod> = all
            .iter()
            .filter_map(|pod| rooms::pending(pod))
            // Those that the scheduler is about to bind have their place.
            .filter(|pod| !expected.contains_key(&pod.uid))
            .collect();
        let wanted = self.simulate(&seen, &pending);
        self.unplaceable.set(&wanted.never);
        let uids: HashSet<&str> = pending.iter().map(|pod| pod.uid.as_str()).collect();
        self.waits.retain(|uid, _| uids.contains(uid.as_str()));
        for (uid, reason) in &wanted.never {
            self.tell_pod(uid, &pending, true, "NoNodeFits", reason.clone());
        }
        for (uid, reason) in &wanted.wait {
            self.tell_pod(uid, &pending, false, "WaitsForRoom", reason.clone());
        }

        // Asking first: it is what somebody waits for.
        for ask in &wanted.ask {
            changes
                .new
                .entry(ask.group.clone())
                .or_default()
                .push(ask.clone());
        }
        let failed = self.ask(changes, &seen, &pending, now).await;
        let steps = self.release(&seen, &pods, &expected, &wanted, now).await;
        self.backoff.forget_old();
        let waits = (listing || failed).then_some(LOOK_AGAIN);
        sooner(sooner(steps, self.backoff.next()), waits)
    }
}
