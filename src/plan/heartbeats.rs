//! Which agents have been heard of lately. A node whose agent is silent takes no new pods: what it published may not be
//! true any more. Its pods are kept.
//!
//! An agent renews its Lease. When that was is judged by when a renewal was *seen to change* here, not by the time
//! written in it: clocks of nodes differ. So whoever begins to watch gives every agent its full time first, and so does
//! one whose watch was broken for a while: what it missed says nothing about the agents.

use std::collections::BTreeMap;
use std::fmt;

use crate::api::units::NodeName;

/// How long an agent's word lasts where no Lease of its says so.
const LASTS_MS: u64 = 40_000;
/// Bounds on what a Lease says of itself.
const BOUNDS_MS: (u64, u64) = (1_000, 300_000);

/// What a Lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// The time written in it; only whether it is another one matters.
    pub stamp: String,
    /// How long it lasts, in milliseconds.
    pub lasts_ms: u64,
}

/// An agent that has not been heard of for longer than its word lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    lasts_ms: u64,
}

/// The same words for all nodes whose agents promise the same, so that they are counted together.
impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.lasts_ms.div_ceil(1000);
        write!(
            f,
            "its agent has not been heard of for over {seconds} s: new pods go elsewhere until it is"
        )
    }
}

/// What is known of one agent.
#[derive(Clone, Debug)]
struct Agent {
    /// Its inventory says that it renews a Lease.
    renews: bool,
    renewal: Option<Renewal>,
    heard_ms: u64,
    silent: bool,
}

impl Agent {
    fn new(now_ms: u64) -> Self {
        Self {
            renews: false,
            renewal: None,
            heard_ms: now_ms,
            silent: false,
        }
    }

    fn lasts_ms(&self) -> u64 {
        let lasts_ms = self.renewal.as_ref().map_or(LASTS_MS, |renewal| renewal.lasts_ms);
        lasts_ms.clamp(BOUNDS_MS.0, BOUNDS_MS.1)
    }

    /// Whether there is anything left to know.
    fn gone(&self) -> bool {
        !self.renews && self.renewal.is_none()
    }
}

/// All agents, by node.
#[derive(Clone, Debug, Default)]
pub struct Heartbeats {
    agents: BTreeMap<NodeName, Agent>,
    /// The watch is broken, or has not begun.
    blind: bool,
}

impl Heartbeats {
    /// Nobody known, nothing watched yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            agents: BTreeMap::new(),
            blind: true,
        }
    }

    /// Nothing is seen until [`Self::sees`].
    pub fn blinded(&mut self) {
        self.blind = true;
    }

    /// Something may have been missed up to now: who is not silent yet gets its full time again.
    pub fn excuse(&mut self, now_ms: u64) {
        for agent in self.agents.values_mut().filter(|agent| !agent.silent) {
            agent.heard_ms = now_ms;
        }
    }

    /// All Leases are seen as they are now: of these nodes and no others. Every agent gets its full time again, but for
    /// those that were silent before: they have to be heard.
    pub fn sees(&mut self, leases: &BTreeMap<NodeName, Renewal>, now_ms: u64) {
        self.excuse(now_ms);
        for (node, agent) in &mut self.agents {
            if !leases.contains_key(node) {
                agent.renewal = None;
            }
        }
        for (node, renewal) in leases {
            self.renewed(node, renewal.clone(), now_ms);
        }
        self.blind = false;
    }

    /// An agent's Lease is like this now. Tells whether a silent agent is heard again.
    pub fn renewed(&mut self, node: &NodeName, renewal: Renewal, now_ms: u64) -> bool {
        let agents = &mut self.agents;
        let agent = agents.entry(node.clone()).or_insert_with(|| Agent::new(now_ms));
        let stamp = |renewal: &Renewal| renewal.stamp.clone();
        let news = agent.renewal.as_ref().map(stamp) != Some(stamp(&renewal));
        agent.renewal = Some(renewal);
        if news {
            agent.heard_ms = now_ms;
        }
        news && agent.silent
    }

    /// An agent's Lease was deleted: it has what is left of its time to make another.
    pub fn lease_gone(&mut self, node: &NodeName) {
        if let Some(agent) = self.agents.get_mut(node) {
            agent.renewal = None;
        }
    }

    /// Which agents are silent by now: those of whom that is new, and those of whom it no longer is. `renewing` are the
    /// nodes whose inventories say that their agents renew a Lease.
    pub fn look(
        &mut self,
        renewing: impl IntoIterator<Item = NodeName>,
        now_ms: u64,
    ) -> Vec<(NodeName, Option<Silence>)> {
        for agent in self.agents.values_mut() {
            agent.renews = false;
        }
        for node in renewing {
            let agent = self.agents.entry(node).or_insert_with(|| Agent::new(now_ms));
            agent.renews = true;
        }
        let mut turned = Vec::new();
        for (node, agent) in &mut self.agents {
            let lasts_ms = agent.lasts_ms();
            let late = agent.renews && now_ms.saturating_sub(agent.heard_ms) > lasts_ms;
            // Who is blind finds nobody silent; who was silent before is so until heard.
            let silent = late && (agent.silent || !self.blind);
            if silent != agent.silent {
                agent.silent = silent;
                turned.push((node.clone(), silent.then_some(Silence { lasts_ms })));
            }
        }
        self.agents.retain(|_, agent| agent.silent || !agent.gone());
        turned
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
    use super::*;
    use crate::api::units::Bytes;
    use crate::plan::ledger::{Event, GpuFacts, Inventory, Ledger, NodeFacts, Shut};
    use proptest::prelude::*;
    use std::sync::Arc;

    const LASTS: u64 = 4_000;

    fn node() -> NodeName {
        "gpu-a".into()
    }

    fn renewal(stamp: u64) -> Renewal {
        Renewal {
            stamp: stamp.to_string(),
            lasts_ms: LASTS,
        }
    }

    fn seeing(now_ms: u64, stamp: u64) -> Heartbeats {
        let mut heartbeats = Heartbeats::new();
        heartbeats.sees(&[(node(), renewal(stamp))].into(), now_ms);
        heartbeats
    }

    /// Whether the node's agent turned silent (or was heard again) at that moment.
    fn turned(heartbeats: &mut Heartbeats, now_ms: u64) -> Option<bool> {
        let turned = heartbeats.look([node()], now_ms);
        turned.first().map(|(_, silence)| silence.is_some())
    }

    #[test]
    fn an_agent_that_stops_is_silent_and_heard_again() {
        let mut heartbeats = seeing(0, 1);
        heartbeats.renewed(&node(), renewal(2), 3_000);
        assert_eq!(turned(&mut heartbeats, 7_000), None);
        let silent = heartbeats.look([node()], 7_001);
        let words = silent[0].1.unwrap().to_string();
        assert!(
            words.starts_with("its agent has not been heard of for over 4 s"),
            "{words}"
        );
        assert_eq!(turned(&mut heartbeats, 8_000), None, "told once");
        assert!(heartbeats.renewed(&node(), renewal(3), 9_000));
        assert_eq!(turned(&mut heartbeats, 9_000), Some(false));
    }

    #[test]
    fn adversarial_times_written_in_leases_do_not_count() {
        // Renewed in the year 3000, and never again.
        let mut heartbeats = seeing(0, 32_503_680_000);
        assert_eq!(turned(&mut heartbeats, LASTS + 1), Some(true));
        // A clock that goes back is as good as any.
        heartbeats.renewed(&node(), renewal(7), LASTS + 2);
        assert_eq!(turned(&mut heartbeats, LASTS + 2), Some(false));
        // The same Lease seen again is no renewal.
        for now_ms in 0..=LASTS {
            heartbeats.renewed(&node(), renewal(7), LASTS + 2 + now_ms);
        }
        assert_eq!(turned(&mut heartbeats, 2 * LASTS + 3), Some(true));
        // Nor does one live for ever that says so.
        let eternal = Renewal {
            stamp: "x".to_owned(),
            lasts_ms: u64::MAX,
        };
        heartbeats.renewed(&node(), eternal, 10 * LASTS);
        assert_eq!(turned(&mut heartbeats, 10 * LASTS), Some(false));
        assert_eq!(turned(&mut heartbeats, 10 * LASTS + BOUNDS_MS.1 + 1), Some(true));
    }

    #[test]
    fn who_was_blind_gives_everybody_the_full_time() {
        let mut heartbeats = seeing(0, 1);
        heartbeats.blinded();
        assert_eq!(turned(&mut heartbeats, 100_000), None);
        heartbeats.sees(&[(node(), renewal(1))].into(), 100_000);
        assert_eq!(turned(&mut heartbeats, 100_000 + LASTS), None);
        assert_eq!(turned(&mut heartbeats, 100_001 + LASTS), Some(true));
        // Who was silent before is not heard by looking again.
        heartbeats.excuse(150_000);
        assert_eq!(turned(&mut heartbeats, 150_000), None);
        heartbeats.blinded();
        heartbeats.sees(&[(node(), renewal(1))].into(), 200_000);
        assert_eq!(turned(&mut heartbeats, 200_000), None);
        heartbeats.sees(&[(node(), renewal(2))].into(), 200_000);
        assert_eq!(turned(&mut heartbeats, 200_000), Some(false));
        heartbeats.excuse(203_000);
        assert_eq!(turned(&mut heartbeats, 203_000 + LASTS), None);
        // And who begins, to an agent that has no Lease at all.
        let mut fresh = Heartbeats::new();
        fresh.sees(&BTreeMap::new(), 0);
        assert_eq!(turned(&mut fresh, 0), None);
        assert_eq!(turned(&mut fresh, LASTS_MS), None);
        assert_eq!(turned(&mut fresh, LASTS_MS + 1), Some(true));
    }

    #[test]
    fn only_who_renews_a_lease_can_be_silent() {
        let mut heartbeats = seeing(0, 1);
        assert!(heartbeats.look([], LASTS * 10).is_empty());
        assert_eq!(turned(&mut heartbeats, LASTS * 10), Some(true));
        // Its node goes: it is told once more, and forgotten with its Lease.
        heartbeats.lease_gone(&node());
        assert_eq!(heartbeats.look([], LASTS * 11), [(node(), None)]);
        assert!(heartbeats.agents.is_empty());
    }

    #[test]
    fn the_ledger_closes_a_silent_node_and_opens_it_again() {
        let gpu = GpuFacts {
            id: "GPU-a".into(),
            index: 0,
            usable: Bytes(24),
            used: Some(Bytes(0)),
            foreign: None,
            used_by: BTreeMap::new(),
            closed: None,
        };
        let there = Event::Node(NodeFacts {
            name: node(),
            fence: None,
            allocatable: None,
            labels: Arc::default(),
        });
        let inventory = Event::Inventory(Inventory {
            node: node(),
            closed: None,
            gpus: vec![gpu],
        });
        let silent = |silence: Option<Silence>| Event::Agent {
            node: node(),
            silent: silence.map(|silence| silence.to_string().into()),
        };
        let mut ledger = Ledger::rebuild([there, inventory.clone()]);
        let freed = ledger.freed();
        let silence = Silence { lasts_ms: LASTS };
        ledger.apply(silent(Some(silence)));
        let shut = |ledger: &Ledger| ledger.node("gpu-a").unwrap().shut();
        assert_eq!(shut(&ledger), Some(Shut::Closed(silence.to_string().into())));
        // An old reading that is told again opens nothing.
        ledger.apply(inventory);
        assert!(shut(&ledger).is_some());
        assert_eq!(ledger.freed(), freed);
        ledger.apply(silent(None));
        assert_eq!(shut(&ledger), None);
        assert!(ledger.freed() > freed, "who waits is told");
        // Nothing is left of a node that is gone.
        ledger.apply(silent(Some(silence)));
        ledger.apply(Event::NodeGone(node()));
        ledger.apply(Event::InventoryGone(node()));
        ledger.apply(silent(None));
        assert!(ledger.node("gpu-a").is_none());
    }

    proptest! {
        /// Renewals with gaps: silent exactly while the last change is older than it lasts.
        #[test]
        fn silent_exactly_after_the_gap(gaps in prop::collection::vec(1..3 * LASTS, 1..20)) {
            let mut heartbeats = seeing(0, 0);
            let (mut now_ms, mut silent) = (0, false);
            for (stamp, gap) in (1..).zip(gaps) {
                for at in [now_ms + gap / 2, now_ms + gap] {
                    silent = turned(&mut heartbeats, at).unwrap_or(silent);
                    prop_assert_eq!(silent, at - now_ms > LASTS);
                }
                now_ms += gap;
                prop_assert_eq!(heartbeats.renewed(&node(), renewal(stamp), now_ms), silent);
                silent = turned(&mut heartbeats, now_ms).unwrap_or(silent);
                prop_assert!(!silent);
            }
        }
    }
}
