//! The node groups: one per NodePolicy, with the client of its provider and what that said last.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::core::{Selector, SelectorExt};
use tokio::time::Instant;

use crate::api::node_policy::{AskedNode, NodePolicy, ProviderKind};
use crate::api::units::Bytes;
use crate::plan::nodes_wanted::Taint;
use crate::plan::release::AtProvider;
use crate::plan::room::GpuRoom;
use crate::provider::http::HttpProvider;
use crate::provider::{NodeState, Provider, ProviderError, ProviderNode};

/// So long a listing is believed while something is under way.
const FRESH: Duration = Duration::from_millis(900);
/// A provider that failed is asked again after this long, doubling up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A node that its provider does not know is left alone for this long.
const SHUNNED: Duration = Duration::from_secs(600);

/// A node that was asked for, with its name once the provider has told it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// As it stands in the policy's status.
    pub entry: AskedNode,
    /// The node's name; empty while unknown.
    pub node: String,
}

/// What nodes of a group really offer: less than the card's label says, and with taints that no policy mentions. Learned
/// from those that came, since asking again for what does not help would go on for ever.
#[derive(Clone, Debug)]
pub struct Learned {
    /// GPUs, each as if empty.
    pub gpus: Vec<GpuRoom>,
    /// Taints.
    pub taints: Vec<Taint>,
}

/// One group.
pub struct Group {
    /// The policy's name.
    pub name: String,
    /// The policy.
    pub policy: Arc<NodePolicy>,
    /// Nodes that were asked for and cannot take pods yet.
    pub asked: Vec<Asked>,
    /// What went wrong last with the provider.
    pub trouble: Option<String>,
    /// What its nodes offer, once one was seen.
    pub learned: Option<Learned>,
    selector: Option<Selector>,
    client: Result<Arc<HttpProvider>, String>,
    url: String,
    listing: Option<(Instant, Vec<ProviderNode>)>,
    quiet_until: Option<(Instant, Duration)>,
    /// Requests that this process has brought to the provider.
    pub acknowledged: HashSet<String>,
    removed: HashSet<String>,
    shunned: HashMap<String, Instant>,
}

impl Group {
    fn new(policy: Arc<NodePolicy>) -> Self {
        let mut this = Self {
            name: policy.name_any(),
            asked: Vec::new(),
            trouble: None,
            learned: None,
            selector: None,
            client: Err(String::new()),
            url: String::new(),
            listing: None,
            quiet_until: None,
            acknowledged: HashSet::new(),
            removed: HashSet::new(),
            shunned: HashMap::new(),
            policy: policy.clone(),
        };
        this.connect();
        this.update(policy);
        this
    }

    fn connect(&mut self) {
        self.url.clone_from(&self.policy.spec.provider.url);
        self.client = match self.policy.spec.provider.kind {
            ProviderKind::Http => HttpProvider::new(&self.url)
                .map(Arc::new)
                .map_err(|error| error.to_string()),
        };
        self.listing = None;
        self.quiet_until = None;
    }

    fn update(&mut self, policy: Arc<NodePolicy>) {
        self.policy = policy;
        if self.policy.spec.provider.url != self.url {
            self.connect();
        }
        let wanted = &self.policy.spec.node_selector;
        let empty = wanted.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
            && wanted.match_expressions.as_ref().is_none_or(Vec::is_empty);
        self.selector = if empty {
            None
        } else {
            Selector::try_from(wanted.clone()).ok()
        };
        let entries = self
            .policy
            .status
            .as_ref()
            .map(|status| status.asked.clone())
            .unwrap_or_default();
        self.asked = entries
            .into_iter()
            .map(|entry| Asked {
                node: self.node_of(&entry.request_id).unwrap_or_default(),
                entry,
            })
            .collect();
        let ids: HashSet<&str> = self
            .asked
            .iter()
            .map(|asked| asked.entry.request_id.as_str())
            .collect();
        self.acknowledged.retain(|id| ids.contains(id.as_str()));
    }

    fn node_of(&self, request_id: &str) -> Option<String> {
        let (_, nodes) = self.listing.as_ref()?;
        let node = nodes.iter().find(|node| node.request_id == request_id)?;
        Some(node.name.clone())
    }

    /// Whether the provider knows of a request; `None`: it did not say.
    #[must_use]
    pub fn knows(&self, request_id: &str) -> Option<bool> {
        let (_, nodes) = self.listing.as_ref()?;
        Some(nodes.iter().any(|node| node.request_id == request_id))
    }

    /// The client, and the group's name at the provider.
    ///
    /// # Errors
    /// Why there is none.
    pub fn provider(&self) -> Result<(Arc<HttpProvider>, String), ProviderError> {
        match &self.client {
            Ok(client) => Ok((client.clone(), self.policy.spec.provider.group.clone())),
            Err(error) => Err(ProviderError::Settings(error.clone())),
        }
    }

    /// Whether the policy can be followed.
    ///
    /// # Errors
    /// Why not.
    pub fn usable(&self) -> Result<(), String> {
        self.client.as_ref().map_err(Clone::clone)?;
        if self.selector.is_none() {
            return Err("spec.nodeSelector cannot be used: name at least one label".to_owned());
        }
        let memory = &self.policy.spec.node.gpu_memory;
        memory
            .parse::<Bytes>()
            .map_err(|error| format!("spec.node.gpuMemory: {error}"))?;
        Ok(())
    }

    /// What the provider says of a node.
    #[must_use]
    pub fn at_provider(&self, node: &Node) -> AtProvider {
        if self.removed.contains(&node.uid().unwrap_or_default()) {
            return AtProvider::Leaving;
        }
        let Some((_, nodes)) = &self.listing else {
            return AtProvider::Unknown;
        };
        match nodes.iter().find(|listed| listed.name == node.name_any()) {
            Some(listed) if listed.state == NodeState::Leaving => AtProvider::Leaving,
            Some(_) => AtProvider::Present,
            None => AtProvider::Absent,
        }
    }

    /// Why the provider could not take a node away.
    #[must_use]
    pub fn blocked(&self, node: &Node) -> Option<String> {
        if let Err(error) = self.usable() {
            return Some(error);
        }
        let shunned = self.shunned.get(&node.uid().unwrap_or_default())?;
        (shunned.elapsed() < SHUNNED).then(|| "its provider does not know it".to_owned())
    }

    /// The provider was asked to remove the node, and said yes.
    pub fn note_removed(&mut self, node: &Node) {
        self.removed.insert(node.uid().unwrap_or_default());
    }

    /// What the provider said is old.
    pub fn forget_listing(&mut self) {
        self.listing = None;
    }

    /// The provider failed: it is left alone for a while.
    pub fn failed(&mut self, error: &ProviderError) {
        let pause = self
            .quiet_until
            .map_or(FIRST_PAUSE, |(_, pause)| (pause * 2).min(LONGEST_PAUSE));
        self.quiet_until = Some((Instant::now() + pause, pause));
        let error = error.to_string();
        if self.trouble.as_ref() != Some(&error) {
            tracing::warn!(policy = self.name, error, "the provider failed");
        }
        self.trouble = Some(error);
    }

    /// The provider answered.
    pub fn went_well(&mut self) {
        self.quiet_until = None;
        self.trouble = None;
    }

    /// Whether the provider may be called now.
    #[must_use]
    pub fn open(&self) -> bool {
        self.quiet_until.is_none_or(|(until, _)| until <= Instant::now())
    }

    async fn list(&mut self) {
        if self.listing.as_ref().is_some_and(|(at, _)| at.elapsed() < FRESH) || !self.open() {
            return;
        }
        let Ok((provider, group)) = self.provider() else {
            return;
        };
        match provider.list(&group).await {
            Ok(nodes) => {
                self.listing = Some((Instant::now(), nodes));
                self.went_well();
                self.update(self.policy.clone());
            }
            Err(error) => {
                self.listing = None;
                self.failed(&error);
            }
        }
    }
}

/// All groups, by policy name.
#[derive(Default)]
pub struct Groups(BTreeMap<String, Group>);

impl Groups {
    /// Takes over the policies as they are now.
    pub fn refresh(&mut self, policies: &[Arc<NodePolicy>]) {
        let names: HashSet<String> = policies.iter().map(|policy| policy.name_any()).collect();
        self.0.retain(|name, _| names.contains(name));
        for policy in policies {
            match self.0.get_mut(&policy.name_any()) {
                Some(group) => group.update(policy.clone()),
                None => {
                    self.0.insert(policy.name_any(), Group::new(policy.clone()));
                }
            }
        }
    }

    /// The policy that a node belongs to: the first by name that selects it.
    #[must_use]
    pub fn of(&self, node: &Node) -> Option<&str> {
        self.0
            .values()
            .find(|group| {
                group
                    .selector
                    .as_ref()
                    .is_some_and(|selector| selector.matches(node.labels()))
            })
            .map(|group| group.name.as_str())
    }

    /// All groups.
    pub fn all(&self) -> impl Iterator<Item = &Group> {
        self.0.values()
    }

    /// One group.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Group> {
        self.0.get(name)
    }

    /// One group, to change.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Group> {
        self.0.get_mut(name)
    }

    /// Names of all groups.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    /// Leaves a node alone that its provider does not know.
    pub fn shun(&mut self, uid: &str) {
        for group in self.0.values_mut() {
            group.shunned.retain(|_, since| since.elapsed() < SHUNNED);
            group.shunned.insert(uid.to_owned(), Instant::now());
        }
    }

    /// Looks at the providers where something is under way; `releasing`: some node is on its way out. Says whether
    /// anything is.
    pub async fn list(&mut self, releasing: bool) -> bool {
        let due = self
            .0
            .values_mut()
            .filter(|group| releasing || !group.asked.is_empty())
            .map(Group::list);
        let results = futures::future::join_all(due).await;
        !results.is_empty()
    }
}
