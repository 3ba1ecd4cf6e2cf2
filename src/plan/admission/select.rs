//! Which ScalePolicy counts for a workload.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::api::scale_policy::ScalePolicySpec;
use crate::plan::gating::Labels;

/// A ScalePolicy by name.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it says.
    pub spec: &'a ScalePolicySpec,
}

/// The policy that counts: of those that select the workload, the one with the highest priority, then the first by
/// name.
#[must_use]
pub fn policy<'a>(
    policies: impl IntoIterator<Item = Policy<'a>>,
    namespace_labels: &Labels,
    workload_labels: &Labels,
) -> Option<Policy<'a>> {
    policies
        .into_iter()
        .filter(|policy| {
            selects(&policy.spec.namespace_selector, namespace_labels)
                && selects(&policy.spec.workload_selector, workload_labels)
        })
        .min_by(|a, b| {
            let priority = b.spec.priority.cmp(&a.spec.priority);
            priority.then_with(|| a.name.cmp(b.name))
        })
}

/// Whether a selector matches labels; an empty one matches all. An operator that Kubernetes does not have matches
/// nothing, rather than too much.
#[must_use]
pub fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    let exact = selector
        .match_labels
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    exact
        && selector.match_expressions.iter().flatten().all(|expression| {
            let value = labels.get(&expression.key);
            let values = expression.values.as_deref().unwrap_or_default();
            match expression.operator.as_str() {
                "In" => value.is_some_and(|value| values.contains(value)),
                "NotIn" => value.is_none_or(|value| !values.contains(value)),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

/// What is wrong with a selector, if anything: the operators and the number of their values.
#[must_use]
pub fn problem(selector: &LabelSelector) -> Option<String> {
    selector
        .match_expressions
        .iter()
        .flatten()
        .find_map(|expression| {
            let empty = expression.values.as_ref().is_none_or(Vec::is_empty);
            let (key, operator) = (&expression.key, &expression.operator);
            match operator.as_str() {
                "In" | "NotIn" if empty => Some(format!("`{key}` {operator} needs at least one value")),
                "Exists" | "DoesNotExist" if !empty => Some(format!("`{key}` {operator} takes no values")),
                "In" | "NotIn" | "Exists" | "DoesNotExist" => None,
                _ => Some(format!(
                    "`{key}` has the operator `{operator}`: write In, NotIn, Exists or DoesNotExist"
                )),
            }
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn spec(value: serde_json::Value) -> ScalePolicySpec {
        serde_json::from_value(value).unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn priority_then_name() {
        let (low, high) = (spec(json!({})), spec(json!({"priority": 5})));
        let policies = [
            Policy {
                name: "z",
                spec: &high,
            },
            Policy {
                name: "a",
                spec: &low,
            },
            Policy {
                name: "m",
                spec: &high,
            },
        ];
        let none = Labels::new();
        assert_eq!(policy(policies, &none, &none).unwrap().name, "m");
    }

    #[test]
    fn both_selectors_have_to_match() {
        let spec = spec(json!({
            "namespaceSelector": {"matchLabels": {"team": "a"}},
            "workloadSelector": {"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["prod"]}]},
        }));
        let policies = || {
            [Policy {
                name: "p",
                spec: &spec,
            }]
        };
        let (a, b) = (labels(&[("team", "a")]), labels(&[("team", "b")]));
        let prod = labels(&[("tier", "prod")]);
        assert!(policy(policies(), &a, &Labels::new()).is_some());
        assert!(policy(policies(), &a, &prod).is_none());
        assert!(policy(policies(), &b, &Labels::new()).is_none());
    }

    #[test]
    fn adversarial_unknown_operator_matches_nothing() {
        let selector: LabelSelector = serde_json::from_value(json!({
            "matchExpressions": [{"key": "a", "operator": "Matches", "values": ["."]}],
        }))
        .unwrap();
        assert!(!selects(&selector, &labels(&[("a", "b")])));
        assert!(problem(&selector).unwrap().contains("Matches"));
    }
}
