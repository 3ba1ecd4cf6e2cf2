//! What admission does with an object: pure functions from the object, its old version and a few facts to a
//! [`Verdict`]. `webhook` carries it out.
//!
//! | file | decides |
//! |---|---|
//! | `select` | which ScalePolicy counts for a workload |
//! | `values` | the `ebb.dev/…` annotations of a managed workload, the policy's and a person's own |
//! | `workload` | Deployments and StatefulSets |
//! | `pod` | what a GPU pod gets at its creation, and what of it is frozen after |
//! | `service` | the selector key of a gated Service |
//! | `policies` | whether a ScalePolicy or NodePolicy can be followed |
//! | `ownership` | which fields nobody may own by server-side apply |

pub mod ownership;
pub mod patch;
pub mod pod;
pub mod policies;
pub mod select;
pub mod service;
pub mod values;
pub mod workload;

#[cfg(test)]
mod tests;

use serde_json::Value;

pub use patch::Operation;

/// What is done with a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Why the request is refused, in words for the person who made it; `None`: it goes through.
    pub refusal: Option<String>,
    /// What is changed in the object.
    pub patch: Vec<Operation>,
    /// What the person is told beside.
    pub warnings: Vec<String>,
}

impl Verdict {
    /// Lets the request through as it is.
    #[must_use]
    pub fn allow() -> Self {
        Self::default()
    }

    /// Refuses the request.
    pub fn refuse(reason: impl ToString) -> Self {
        Self {
            refusal: Some(reason.to_string()),
            ..Self::default()
        }
    }

    /// Lets the request through, and says something to the person.
    #[must_use]
    pub fn warn(warnings: Vec<String>) -> Self {
        Self {
            warnings,
            ..Self::default()
        }
    }
}

/// Who makes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requester {
    /// A person, or a program that acts for one.
    Person,
    /// One of Ebb's own processes.
    Ebb,
    /// A controller of Kubernetes itself, which writes back what it read.
    Kubernetes,
}

/// An object on its way into the cluster.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// As it would be stored.
    pub object: &'a Value,
    /// As it is stored now; `None` at creation.
    pub old: Option<&'a Value>,
    /// Who asks.
    pub requester: Requester,
}

impl Request<'_> {
    /// An object that is being deleted only loses finalizers; nothing must stand in the way of that.
    #[must_use]
    pub fn is_going(&self) -> bool {
        self.object
            .pointer("/metadata/deletionTimestamp")
            .is_some_and(|time| !time.is_null())
    }
}

/// One of an object's annotations.
#[must_use]
pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get("metadata")?.get("annotations")?.get(key)?.as_str()
}

/// A map of texts inside an object, such as its labels; other values are left out.
#[must_use]
pub fn texts(object: &Value, pointer: &str) -> std::collections::BTreeMap<String, String> {
    object
        .pointer(pointer)
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}
