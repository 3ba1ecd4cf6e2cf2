//! The `Ready` condition of a policy.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The conditions with `Ready` as it is now. The time of the last transition moves only with the status.
#[must_use]
pub fn with_ready(
    before: &[Condition],
    result: Result<&str, &str>,
    generation: i64,
    now: Timestamp,
) -> Vec<Condition> {
    let (status, reason, message) = match result {
        Ok(message) => ("True", "Followed", message),
        Err(message) => ("False", "CannotBeFollowed", message),
    };
    let since = before
        .iter()
        .find(|condition| condition.type_ == "Ready" && condition.status == status)
        .map_or_else(|| Time(now), |condition| condition.last_transition_time.clone());
    let mut conditions: Vec<Condition> = before
        .iter()
        .filter(|condition| condition.type_ != "Ready")
        .cloned()
        .collect();
    conditions.push(Condition {
        type_: "Ready".to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: since,
        observed_generation: Some(generation),
    });
    conditions
}
