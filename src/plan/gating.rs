//! Which Services go through the gates: those that select exactly one managed workload.

use std::collections::BTreeMap;

use crate::api::names;
use crate::api::workload::WorkloadRef;

/// Labels, as on a pod template or in a selector.
pub type Labels = BTreeMap<String, String>;

/// What matters about a Service.
#[derive(Clone, Copy, Debug)]
pub struct ServiceFacts<'a> {
    /// `clusterIP: None`.
    pub headless: bool,
    /// `type: ExternalName`.
    pub external_name: bool,
    /// All its ports are TCP.
    pub only_tcp: bool,
    /// Its selector, Ebb's own key included where it is there.
    pub selector: Option<&'a Labels>,
    /// Its `ebb.dev/mode` annotation.
    pub mode: Option<&'a str>,
}

/// Whether a Service goes through the gates, and why (not).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gating {
    /// It does, for this workload.
    Gate(WorkloadRef),
    /// It is none of Ebb's business.
    Leave,
    /// A person turned it off.
    Off,
    /// It selects a managed workload but cannot be gated; requests to it reach no sleeping model.
    Cannot(String),
}

/// Decides for one Service. `workloads` are the managed ones of its namespace with their template's labels.
pub fn gating<'a>(
    service: ServiceFacts<'_>,
    workloads: impl IntoIterator<Item = (&'a WorkloadRef, &'a Labels)>,
) -> Gating {
    let Some(selector) = service.selector else {
        return Gating::Leave;
    };
    let own = |key: &str| key == names::GATED_KEY;
    if selector.keys().all(|key| own(key)) {
        return Gating::Leave;
    }
    let mut selected: Vec<&WorkloadRef> = workloads
        .into_iter()
        .filter(|(_, labels)| {
            selector
                .iter()
                .all(|(key, value)| own(key) || labels.get(key) == Some(value))
        })
        .map(|(workload, _)| workload)
        .collect();
    selected.sort();
    match (selected.as_slice(), service.mode) {
        ([], _) => Gating::Leave,
        (_, Some("off")) => Gating::Off,
        (_, Some(mode)) if mode != "gate" => {
            Gating::Cannot(format!("annotation ebb.dev/mode is `{mode}`: write gate or off"))
        }
        _ if service.external_name => {
            Gating::Cannot("a Service of type ExternalName has no endpoints that a gate could stand in for".to_owned())
        }
        _ if service.headless => Gating::Cannot(
            "a headless Service hands out pod addresses, so a gate cannot stand in for sleeping pods; give it a \
             clusterIP, or set ebb.dev/mode: \"off\" to keep it as it is"
                .to_owned(),
        ),
        _ if !service.only_tcp => Gating::Cannot(
            "it has a port that is not TCP, which no gate takes and which would lead nowhere; give that port a Service \
             of its own, or set ebb.dev/mode: \"off\" to keep it as it is"
                .to_owned(),
        ),
        ([one], _) => Gating::Gate((*one).clone()),
        ([first, second, ..], _) => Gating::Cannot(format!(
            "its selector matches more than one managed workload ({} and {}); narrow the selector to one, or set \
             ebb.dev/mode: \"off\"",
            first.name, second.name
        )),
    }
}

/// The managed workloads to which a Service that is not gated leads all the same: requests that no gate sees. Not
/// those of a headless one, which every StatefulSet has for its pods' names.
pub fn past_the_gates<'a>(
    service: ServiceFacts<'_>,
    workloads: impl IntoIterator<Item = (&'a WorkloadRef, &'a Labels)>,
) -> Vec<WorkloadRef> {
    let as_if = ServiceFacts {
        mode: None,
        only_tcp: true,
        ..service
    };
    workloads
        .into_iter()
        .filter(|one| matches!(gating(as_if, [*one]), Gating::Gate(_)))
        .map(|(workload, _)| workload.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::workload::WorkloadKind;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    fn deployment(name: &str) -> WorkloadRef {
        WorkloadRef {
            kind: WorkloadKind::Deployment,
            namespace: "models".to_owned(),
            name: name.to_owned(),
        }
    }

    fn service(selector: &Labels) -> ServiceFacts<'_> {
        ServiceFacts {
            headless: false,
            external_name: false,
            only_tcp: true,
            selector: Some(selector),
            mode: None,
        }
    }

    #[test]
    fn own_key_does_not_count_in_the_match() {
        let (workload, template) = (deployment("a"), labels(&[("app", "a"), ("tier", "x")]));
        let selector = labels(&[("app", "a"), (names::GATED_KEY, "true")]);
        assert_eq!(
            gating(service(&selector), [(&workload, &template)]),
            Gating::Gate(workload.clone())
        );
    }

    #[test]
    fn adversarial_empty_selector_never_matches_everything() {
        let (workload, template) = (deployment("a"), labels(&[("app", "a")]));
        for selector in [labels(&[]), labels(&[(names::GATED_KEY, "true")])] {
            assert_eq!(
                gating(service(&selector), [(&workload, &template)]),
                Gating::Leave
            );
        }
    }

    #[test]
    fn two_workloads_behind_one_service_are_told_apart_by_nobody() {
        let (a, b, template) = (deployment("a"), deployment("b"), labels(&[("app", "both")]));
        let selector = labels(&[("app", "both")]);
        let Gating::Cannot(reason) = gating(service(&selector), [(&b, &template), (&a, &template)]) else {
            panic!("must not be gated");
        };
        assert!(reason.contains("a and b"), "{reason}");
    }

    #[test]
    fn adversarial_what_cannot_be_gated_still_leads_there() {
        let (a, b, template) = (deployment("a"), deployment("b"), labels(&[("app", "both")]));
        let (selector, other) = (labels(&[("app", "both")]), labels(&[("app", "c")]));
        let led = |facts| {
            past_the_gates(
                facts,
                [(&a, &template), (&b, &template), (&deployment("c"), &other)],
            )
        };
        for mode in [None, Some("off"), Some("direct")] {
            let facts = ServiceFacts {
                mode,
                only_tcp: mode.is_some(),
                ..service(&selector)
            };
            assert_eq!(led(facts), [a.clone(), b.clone()], "{mode:?}");
        }
        let headless = ServiceFacts {
            headless: true,
            ..service(&selector)
        };
        assert!(led(headless).is_empty());
    }

    #[test]
    fn headless_and_off_are_left() {
        let (workload, template) = (deployment("a"), labels(&[("app", "a")]));
        let selector = labels(&[("app", "a")]);
        let headless = ServiceFacts {
            headless: true,
            ..service(&selector)
        };
        assert!(matches!(
            gating(headless, [(&workload, &template)]),
            Gating::Cannot(_)
        ));
        let udp = ServiceFacts {
            only_tcp: false,
            ..service(&selector)
        };
        assert!(matches!(gating(udp, [(&workload, &template)]), Gating::Cannot(_)));
        let off = ServiceFacts {
            mode: Some("off"),
            headless: true,
            ..service(&selector)
        };
        assert_eq!(gating(off, [(&workload, &template)]), Gating::Off);
    }
}
