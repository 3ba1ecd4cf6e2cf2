//! What the group has promised and what it has: decisions without IO.

use std::collections::{BTreeMap, HashMap};

/// How the group fails.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Failure {
    /// Not at all.
    #[default]
    None,
    /// No capacity: asking for a node is answered 503.
    Stockout,
    /// Asking is accepted, but the node stays booting for ever.
    Undelivered,
}

/// Where a node is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Asked for, not registered.
    Booting,
    /// Registered.
    Ready,
    /// Being taken away.
    Leaving,
}

/// A node of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it is in its life.
    pub state: NodeState,
    /// The request that it answers.
    pub request_id: String,
}

/// The answer to a request for a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A node of this name is to be booted.
    Boot(String),
    /// This request was seen before.
    Again,
    /// No more nodes than this.
    Full(usize),
}

/// The answer to a request to take a node away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It had not booted: nothing is left of it.
    Cancelled,
    /// It has to be taken away.
    Remove,
    /// It is being taken away already.
    Again,
    /// There is none.
    Unknown,
}

/// The group's books.
#[derive(Debug)]
pub struct Ledger {
    name: String,
    max: usize,
    last: u64,
    members: BTreeMap<String, Member>,
    /// Every request ever answered: a repeated one adds nothing, even when its node is gone.
    requests: HashMap<String, String>,
}

impl Ledger {
    /// The books of an empty group.
    pub fn new(name: impl Into<String>, max: usize) -> Self {
        Self {
            name: name.into(),
            max,
            last: 0,
            members: BTreeMap::new(),
            requests: HashMap::new(),
        }
    }

    /// Somebody asks for a node.
    pub fn ask(&mut self, request_id: &str) -> Asked {
        if self.requests.contains_key(request_id) {
            return Asked::Again;
        }
        if self.members.len() >= self.max {
            return Asked::Full(self.max);
        }
        self.last += 1;
        let name = format!("{}-{}", self.name, self.last);
        self.requests.insert(request_id.to_owned(), name.clone());
        let member = Member {
            state: NodeState::Booting,
            request_id: request_id.to_owned(),
        };
        self.members.insert(name.clone(), member);
        Asked::Boot(name)
    }

    /// A node has registered; false when it was taken away in the meantime.
    pub fn ready(&mut self, name: &str) -> bool {
        match self.members.get_mut(name) {
            Some(member) if member.state == NodeState::Booting => {
                member.state = NodeState::Ready;
                true
            }
            _ => false,
        }
    }

    /// Somebody wants a node taken away.
    pub fn remove(&mut self, name: &str) -> Removed {
        match self.members.get_mut(name) {
            None => Removed::Unknown,
            Some(member) => match member.state {
                NodeState::Booting => {
                    self.members.remove(name);
                    Removed::Cancelled
                }
                NodeState::Ready => {
                    member.state = NodeState::Leaving;
                    Removed::Remove
                }
                NodeState::Leaving => Removed::Again,
            },
        }
    }

    /// A node is gone.
    pub fn gone(&mut self, name: &str) {
        self.members.remove(name);
    }

    /// All nodes.
    pub fn members(&self) -> &BTreeMap<String, Member> {
        &self.members
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_request_is_one_node_whatever_happens_to_it() {
        let mut ledger = Ledger::new("g", 2);
        assert_eq!(ledger.ask("a"), Asked::Boot("g-1".into()));
        assert_eq!(ledger.ask("a"), Asked::Again);
        assert!(ledger.ready("g-1"));
        assert_eq!(ledger.remove("g-1"), Removed::Remove);
        assert_eq!(ledger.remove("g-1"), Removed::Again);
        ledger.gone("g-1");
        assert_eq!(ledger.ask("a"), Asked::Again);
        assert_eq!(ledger.ask("b"), Asked::Boot("g-2".into()));
        assert_eq!(ledger.remove("g-1"), Removed::Unknown);
    }

    #[test]
    fn race_of_removal_and_boot_leaves_nothing() {
        let mut ledger = Ledger::new("g", 1);
        ledger.ask("a");
        assert_eq!(ledger.ask("b"), Asked::Full(1));
        assert_eq!(ledger.remove("g-1"), Removed::Cancelled);
        assert!(!ledger.ready("g-1"));
        assert_eq!(ledger.ask("b"), Asked::Boot("g-2".into()));
    }

    proptest! {
        #[test]
        fn names_are_never_reused_and_the_maximum_holds(steps in prop::collection::vec((0..4u8, 0..12u8), 0..200)) {
            let mut ledger = Ledger::new("g", 3);
            let mut seen = std::collections::HashSet::new();
            for (what, which) in steps {
                let name = format!("g-{which}");
                match what {
                    0 => if let Asked::Boot(name) = ledger.ask(&which.to_string()) {
                        prop_assert!(seen.insert(name));
                    },
                    1 => { ledger.ready(&name); }
                    2 => { ledger.remove(&name); }
                    _ => ledger.gone(&name),
                }
                prop_assert!(ledger.members().len() <= 3);
            }
        }
    }
}
