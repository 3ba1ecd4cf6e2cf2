//! Who was promised how much of which GPU, from nothing but the bound pods: whether any GPU was promised twice.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use crate::demo::observe::{grant, node_of};

/// What the books say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Pods that have a node.
    pub bound: usize,
    /// Pods that have none.
    pub waiting: usize,
    /// GPUs of which every byte is promised.
    pub full_gpus: usize,
    /// Everything that must not be, in words.
    pub faults: Vec<String>,
}

#[derive(Default)]
struct Promised<'a> {
    bytes: u64,
    pods: usize,
    exclusive: Option<&'a str>,
}

/// Adds up. `gpus`: each GPU's node and the bytes that pods can have of it.
#[must_use]
pub fn audit(pods: &[Pod], gpus: &BTreeMap<String, (String, u64)>) -> Books {
    let mut books = Books::default();
    let mut promised: BTreeMap<String, Promised<'_>> = BTreeMap::new();
    for pod in pods {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let Some(node) = node_of(pod) else {
            books.waiting += 1;
            continue;
        };
        books.bound += 1;
        let Some(grant) = grant(pod) else {
            books.faults.push(format!(
                "{name} is bound to {node} without a GPU that can be read"
            ));
            continue;
        };
        let asked = asked(pod);
        let given = grant.bytes * u64::try_from(grant.uuids.len()).unwrap_or(u64::MAX);
        if asked != Some(given) {
            books
                .faults
                .push(format!("{name} was given {given} bytes and asked for {asked:?}"));
        }
        for uuid in &grant.uuids {
            match gpus.get(uuid) {
                None => books
                    .faults
                    .push(format!("{name} was given {uuid}, which no node has")),
                Some((its_node, _)) if its_node != node => books
                    .faults
                    .push(format!("{name} is on {node} with {uuid}, which is on {its_node}")),
                Some((_, usable)) => check_share(&mut books, name, &grant.share, grant.bytes, *usable),
            }
            let sum = promised.entry(uuid.clone()).or_default();
            sum.bytes += grant.bytes;
            sum.pods += 1;
            if pod.annotations().get("ebb.dev/sharing").map(String::as_str) == Some("exclusive") {
                sum.exclusive = Some(name);
            }
        }
    }
    for (uuid, sum) in promised {
        let usable = gpus.get(&uuid).map_or(0, |(_, usable)| *usable);
        if sum.bytes > usable {
            books.faults.push(format!(
                "{} bytes of {uuid} are promised to {} pods; it has {usable}",
                sum.bytes, sum.pods
            ));
        }
        if let Some(name) = sum.exclusive
            && sum.pods > 1
        {
            books.faults.push(format!(
                "{name} has {uuid} for itself, and {} others too",
                sum.pods - 1
            ));
        }
        // Whoever has a card alone takes all of it, whatever it asked for.
        books.full_gpus += usize::from(sum.bytes == usable || sum.exclusive.is_some());
    }
    books
}

/// The share is what the bytes are of the card, rounded down to four decimals.
fn check_share(books: &mut Books, name: &str, share: &str, bytes: u64, usable: u64) {
    let parts = u128::from(bytes) * 10_000 / u128::from(usable.max(1));
    let right = format!("{}.{:04}", parts / 10_000, parts % 10_000);
    if share != right {
        books
            .faults
            .push(format!("{name} was told a share of {share:?}; it has {right}"));
    }
}

fn asked(pod: &Pod) -> Option<u64> {
    let containers = pod.spec.as_ref()?.containers.iter();
    let mut limits = containers.filter_map(|container| {
        let limits = container.resources.as_ref()?.limits.as_ref()?;
        limits.get("ebb.dev/gpu-memory")
    });
    // The fleet's pods are written in bytes; the API server may show them in Gi.
    let text = &limits.next()?.0;
    match text.strip_suffix("Gi") {
        Some(gib) => gib.parse::<u64>().ok()?.checked_mul(1 << 30),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    const GIB: u64 = 1 << 30;

    fn pod(name: &str, node: Option<&str>, gpu: &str, gib: u64, share: &str, sharing: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "annotations": {
                "ebb.dev/gpu-devices": format!("runtime.nvidia.com/gpu={gpu}"),
                "ebb.dev/gpu-memory-bytes": (gib * GIB).to_string(),
                "ebb.dev/gpu-memory-share": share,
                "ebb.dev/sharing": sharing,
            }},
            "spec": {"nodeName": node, "containers": [{"name": "c", "resources": {
                "limits": {"ebb.dev/gpu-memory": format!("{gib}Gi")}}}]},
        }))
        .unwrap()
    }

    fn gpus() -> BTreeMap<String, (String, u64)> {
        [("A", "n1"), ("B", "n2")]
            .map(|(gpu, node)| (gpu.to_owned(), (node.to_owned(), 24 * GIB)))
            .into()
    }

    fn faults(pods: &[Pod]) -> Vec<String> {
        audit(pods, &gpus()).faults
    }

    #[test]
    fn books_that_are_right() {
        let pods = [
            pod("one", Some("n1"), "A", 12, "0.5000", "shared"),
            pod("two", Some("n1"), "A", 12, "0.5000", "shared"),
            pod("alone", Some("n2"), "B", 6, "0.2500", "exclusive"),
            pod("waits", None, "", 6, "", "shared"),
        ];
        let books = audit(&pods, &gpus());
        assert_eq!((books.bound, books.waiting, books.full_gpus), (3, 1, 2));
        assert_eq!(books.faults, Vec::<String>::new());
    }

    #[test]
    fn adversarial_every_kind_of_double_booking_is_found() {
        let shared = |name: &str, gib, share| pod(name, Some("n1"), "A", gib, share, "shared");
        let too_much = faults(&[shared("one", 12, "0.5000"), shared("two", 18, "0.7500")]);
        assert!(
            too_much.len() == 1 && too_much[0].contains("are promised"),
            "{too_much:?}"
        );
        let not_alone = faults(&[
            pod("alone", Some("n1"), "A", 6, "0.2500", "exclusive"),
            shared("two", 6, "0.2500"),
        ]);
        assert!(not_alone[0].contains("for itself"), "{not_alone:?}");
        let wrong_node = faults(&[pod("one", Some("n1"), "B", 6, "0.2500", "shared")]);
        assert!(wrong_node[0].contains("which is on n2"), "{wrong_node:?}");
        let unknown = faults(&[pod("one", Some("n1"), "C", 6, "0.2500", "shared")]);
        assert!(unknown[0].contains("no node has"), "{unknown:?}");
        let share = faults(&[shared("one", 6, "0.9000")]);
        assert!(share[0].contains("it has 0.2500"), "{share:?}");
        let mut bare = shared("one", 6, "0.2500");
        bare.metadata.annotations = None;
        assert!(faults(&[bare])[0].contains("without a GPU"));
        let mut more = shared("one", 6, "0.2500");
        *more
            .annotations_mut()
            .get_mut("ebb.dev/gpu-memory-bytes")
            .unwrap() = (3 * GIB).to_string();
        assert!(faults(&[more])[0].contains("asked for"));
    }
}
