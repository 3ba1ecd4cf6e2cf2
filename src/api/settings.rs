//! The values a managed workload runs by, as its `ebb.dev/…` annotations say. The webhook writes the policy's
//! values there, so that everyone who reads the workload sees the same, and nobody else reads policies for it.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::annotations as key;
use super::duration::Span;
use super::units::{Bytes, Replicas};

/// What a managed workload runs by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The ScalePolicy these came from.
    pub policy: String,
    /// Time without a request after which it sleeps.
    pub idle_after: Span,
    /// Never below.
    pub min_replicas: Replicas,
    /// Never above.
    pub max_replicas: Replicas,
    /// Requests in flight per replica.
    pub target_in_flight: u32,
    /// Longest hold of a request.
    pub max_wait: Span,
    /// Held requests.
    pub queue_requests: u32,
    /// Bytes of held requests.
    pub queue_bytes: Bytes,
}

/// An annotation that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {key}: `{value}` cannot be used: {problem}")]
pub struct SettingError {
    /// The annotation's key.
    pub key: &'static str,
    /// What stands there.
    pub value: String,
    /// What is wrong with it, and what to write.
    pub problem: String,
}

impl Settings {
    /// Reads a workload's annotations. `None` when Ebb does not manage it.
    ///
    /// # Errors
    /// The first annotation that is missing or cannot be read.
    pub fn read(annotations: &BTreeMap<String, String>) -> Result<Option<Settings>, SettingError> {
        if annotations.get(key::MANAGED).map(String::as_str) != Some("true") {
            return Ok(None);
        }
        Ok(Some(Settings {
            policy: value(annotations, key::POLICY)?,
            idle_after: value(annotations, key::IDLE_AFTER)?,
            min_replicas: Replicas(value(annotations, key::MIN_REPLICAS)?),
            max_replicas: Replicas(value(annotations, key::MAX_REPLICAS)?),
            target_in_flight: value(annotations, key::TARGET_IN_FLIGHT)?,
            max_wait: value(annotations, key::MAX_WAIT)?,
            queue_requests: value(annotations, key::QUEUE_REQUESTS)?,
            queue_bytes: value(annotations, key::QUEUE_BYTES)?,
        }))
    }
}

fn value<T>(annotations: &BTreeMap<String, String>, key: &'static str) -> Result<T, SettingError>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    let text = annotations.get(key).ok_or_else(|| SettingError {
        key,
        value: String::new(),
        problem: "it is missing; remove ebb.dev/managed and apply the workload again to have it written"
            .to_owned(),
    })?;
    text.parse().map_err(|error: T::Err| SettingError {
        key,
        value: text.clone(),
        problem: error.to_string(),
    })
}
