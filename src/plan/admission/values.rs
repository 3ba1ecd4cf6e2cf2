//! The `ebb.dev/…` annotations of a managed workload: a person's own values where they wrote some, the policy's
//! elsewhere.
//!
//! Whose a value is, is seen from the version that is stored: what `ebb.dev/injected` lists there and still reads the
//! same is Ebb's, everything else is a person's. So nothing that a person applies, replaces or edits confuses it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::str::FromStr;

use crate::api::annotations as key;
use crate::api::duration::Span;
use crate::api::packing::Packing;
use crate::api::scale_policy::ScalePolicySpec;
use crate::api::settings::SettingError;
use crate::api::units::Bytes;

use super::select::Policy;

/// Annotations by key.
pub type Annotations = BTreeMap<String, String>;

const PREFIX: &str = "ebb.dev/";

/// The settings, with the policy's value of each.
type PolicyValue = fn(&ScalePolicySpec) -> String;
const SETTINGS: [(&str, PolicyValue); 8] = [
    (key::IDLE_AFTER, |p| p.idle_after.to_string()),
    (key::MIN_REPLICAS, |p| p.min_replicas.to_string()),
    (key::MAX_REPLICAS, |p| p.max_replicas.to_string()),
    (key::TARGET_IN_FLIGHT, |p| p.target_in_flight.to_string()),
    (key::PLACEMENT, |p| p.placement.to_string()),
    (key::MAX_WAIT, |p| p.cold_start.max_wait.to_string()),
    (key::QUEUE_REQUESTS, |p| p.cold_start.queue_requests.to_string()),
    (key::QUEUE_BYTES, |p| p.cold_start.queue_bytes.clone()),
];

/// The keys, of those that Ebb writes, whose present value is Ebb's and not a person's.
#[must_use]
pub fn injected(now: &Annotations, stored: Option<&Annotations>) -> BTreeSet<&'static str> {
    let base = stored.unwrap_or(now);
    let listed: BTreeSet<&str> = base
        .get(key::INJECTED)
        .map_or("", String::as_str)
        .split(',')
        .map(str::trim)
        .collect();
    writable()
        .filter(|key| listed.contains(short(key)))
        .filter(|key| match (now.get(*key), base.get(*key)) {
            (Some(now), Some(base)) => now == base,
            (Some(_), None) => false,
            (None, _) => true,
        })
        .collect()
}

fn writable() -> impl Iterator<Item = &'static str> {
    [key::MANAGED, key::POLICY]
        .into_iter()
        .chain(SETTINGS.iter().map(|(key, _)| *key))
}

fn short(key: &str) -> &str {
    key.strip_prefix(PREFIX).unwrap_or(key)
}

/// What a managed workload's annotations shall be.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// Every annotation that Ebb writes or takes away.
    pub wanted: BTreeMap<&'static str, Option<String>>,
    /// A person's values that cannot be followed, with the key whose change brought them.
    pub problems: Vec<SettingError>,
    /// Replicas at creation.
    pub initial: u32,
}

/// The annotations under a policy.
#[must_use]
pub fn managed(now: &Annotations, stored: Option<&Annotations>, policy: Policy<'_>) -> Values {
    let ours = injected(now, stored);
    let own = |key: &str| now.get(key).filter(|_| !ours.contains(key)).map(String::as_str);
    let mut wanted: BTreeMap<&'static str, Option<String>> = BTreeMap::new();
    // The policy's name is nobody's choice: who selects whom is said in the policies.
    wanted.insert(key::POLICY, Some(policy.name.to_owned()));
    if own(key::MANAGED).is_none() {
        wanted.insert(key::MANAGED, Some("true".to_owned()));
    }
    for (key, value) in SETTINGS {
        if own(key).is_none() {
            wanted.insert(key, Some(value(policy.spec)));
        }
    }
    let list: Vec<&str> = wanted.keys().map(|key| short(key)).collect();
    wanted.insert(key::INJECTED, Some(list.join(",")));
    let (problems, initial) = check(&own, policy);
    Values {
        wanted,
        problems,
        initial,
    }
}

/// What to take away from a workload that is not managed (any more).
#[must_use]
pub fn unmanaged(now: &Annotations, stored: Option<&Annotations>) -> BTreeMap<&'static str, Option<String>> {
    let mut wanted: BTreeMap<&'static str, Option<String>> =
        injected(now, stored).into_iter().map(|key| (key, None)).collect();
    wanted.insert(key::INJECTED, None);
    wanted
}

/// Checks a person's own values, in themselves, against the policy's bounds and against each other.
fn check<'a>(own: &impl Fn(&str) -> Option<&'a str>, policy: Policy<'_>) -> (Vec<SettingError>, u32) {
    let mut problems = Vec::new();
    let spec = policy.spec;
    let bounds = &spec.bounds;
    let mut problem = |key: &'static str, value: &str, problem: String| {
        problems.push(SettingError {
            key,
            value: value.to_owned(),
            problem,
        });
    };
    if let Some(text) = own(key::MANAGED)
        && text != "true"
    {
        problem(
            key::MANAGED,
            text,
            "write \"false\" to keep Ebb away, or leave it out".to_owned(),
        );
    }
    if let Some((text, span)) = read::<Span>(own, key::IDLE_AFTER, &mut problem)
        && let Some(bound) = bounds.max_idle_after
        && span > bound
    {
        problem(
            key::IDLE_AFTER,
            text,
            format!("ScalePolicy {} allows at most {bound}", policy.name),
        );
    }
    read::<Span>(own, key::MAX_WAIT, &mut problem);
    read::<Packing>(own, key::PLACEMENT, &mut problem);
    within(own, key::TARGET_IN_FLIGHT, 1..=100_000, &mut problem);
    within(own, key::QUEUE_REQUESTS, 1..=1_000_000, &mut problem);
    if let Some((text, Bytes(0))) = read::<Bytes>(own, key::QUEUE_BYTES, &mut problem) {
        problem(
            key::QUEUE_BYTES,
            text,
            "no request fits into 0 bytes: write 64Mi".to_owned(),
        );
    }
    let min = within(own, key::MIN_REPLICAS, 0..=1000, &mut problem);
    let max = within(own, key::MAX_REPLICAS, 1..=1000, &mut problem);
    let initial = within(own, key::INITIAL_REPLICAS, 0..=1000, &mut problem);
    if let Some(bound) = bounds.max_replicas {
        for (key, count) in [(key::MIN_REPLICAS, min), (key::MAX_REPLICAS, max)] {
            if let Some(count) = count.filter(|count| *count > bound) {
                problem(
                    key,
                    &count.to_string(),
                    format!("ScalePolicy {} allows at most {bound}", policy.name),
                );
            }
        }
    }
    let source = |own: Option<u32>| match own {
        Some(_) => "the workload's own".to_owned(),
        None => format!("from ScalePolicy {}", policy.name),
    };
    let (low, high) = (min.unwrap_or(spec.min_replicas), max.unwrap_or(spec.max_replicas));
    if low > high {
        let (key, value) = match min {
            Some(_) => (key::MIN_REPLICAS, low),
            None => (key::MAX_REPLICAS, high),
        };
        problem(
            key,
            &value.to_string(),
            format!(
                "at least {low} ({}) and at most {high} replicas ({}) cannot both be",
                source(min),
                source(max)
            ),
        );
    }
    let initial = initial.unwrap_or(spec.initial_replicas).max(low).min(high);
    (problems, initial)
}

fn read<'a, T>(
    own: &impl Fn(&str) -> Option<&'a str>,
    key: &'static str,
    problem: &mut impl FnMut(&'static str, &str, String),
) -> Option<(&'a str, T)>
where
    T: FromStr,
    T::Err: Display,
{
    let text = own(key)?;
    match text.parse() {
        Ok(value) => Some((text, value)),
        Err(error) => {
            let error: T::Err = error;
            problem(key, text, error.to_string());
            None
        }
    }
}

fn within<'a>(
    own: &impl Fn(&str) -> Option<&'a str>,
    key: &'static str,
    range: std::ops::RangeInclusive<u32>,
    problem: &mut impl FnMut(&'static str, &str, String),
) -> Option<u32> {
    let text = own(key)?;
    match text.parse::<u32>().ok().filter(|count| range.contains(count)) {
        Some(count) => Some(count),
        None => {
            problem(
                key,
                text,
                format!("write a whole number from {} to {}", range.start(), range.end()),
            );
            None
        }
    }
}
