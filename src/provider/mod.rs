//! Who adds and removes nodes: one trait, one file each.

pub mod http;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A node that a group is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AddRequest {
    /// Name of the group at the provider.
    pub group: String,
    /// The same id twice adds one node.
    pub request_id: String,
    /// Labels that the node shall carry.
    pub labels: BTreeMap<String, String>,
    /// Why, for the provider's own log.
    pub reason: String,
}

/// A node as the provider sees it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProviderNode {
    /// Name of its Node object, also before that exists; empty while the provider does not know it.
    #[serde(default)]
    pub name: String,
    /// How far it is.
    pub state: NodeState,
    /// The request that it was added for, if Ebb asked for it.
    #[serde(default)]
    pub request_id: String,
}

/// How far a node is at the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It comes.
    Booting,
    /// It runs.
    Ready,
    /// It goes.
    Leaving,
}

/// Why a provider did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// The policy's provider settings cannot work.
    #[error("the provider cannot be used: {0}")]
    Settings(String),
    /// No answer; the provider may have acted.
    #[error("the provider did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The connection failed.
    #[error("cannot reach the provider: {0}")]
    Unreachable(String),
    /// It answered with an error.
    #[error("the provider answered {status}: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The answer's text, cut short.
        message: String,
    },
    /// It answered something that cannot be read.
    #[error("the provider's answer cannot be read: {0}")]
    Unreadable(String),
}

/// Adds and removes nodes. Every call is idempotent.
pub trait Provider: Send + Sync {
    /// Asks for one node.
    fn add(&self, request: &AddRequest) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// The nodes of a group.
    fn list(&self, group: &str) -> impl Future<Output = Result<Vec<ProviderNode>, ProviderError>> + Send;

    /// Asks to remove one node. One that the provider does not know (any more) is as good as removed.
    fn remove(
        &self,
        group: &str,
        node: &str,
        reason: &str,
    ) -> impl Future<Output = Result<(), ProviderError>> + Send;
}
