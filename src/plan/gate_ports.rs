//! Which gate port each port of each gated Service has: unique over the cluster, and the same for as long as the
//! Service lives, since gates listen on it and slices point at it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// The ports of one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// `namespace/name`.
    pub service: String,
    /// When it was created, milliseconds since the epoch: of two that claim one port, the older keeps it.
    pub created_ms: i64,
    /// Keys of its ports: their names, or numbers where they have none.
    pub ports: Vec<String>,
    /// What it has now.
    pub have: BTreeMap<String, u16>,
}

/// What every Service shall have, by `namespace/name`. A Service that got no port for some key is told in `full`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignment {
    /// Key → gate port, by Service.
    pub ports: BTreeMap<String, BTreeMap<String, u16>>,
    /// Services for which the range had no port left.
    pub full: BTreeSet<String>,
}

/// Assigns the ports of all gated Services.
#[must_use]
pub fn assign(wishes: &[Wish], range: RangeInclusive<u16>) -> Assignment {
    let mut order: Vec<&Wish> = wishes.iter().collect();
    order.sort_by(|a, b| (a.created_ms, &a.service).cmp(&(b.created_ms, &b.service)));
    let mut taken = BTreeSet::new();
    let mut result = Assignment::default();
    // First everyone keeps what is theirs, so that a new Service never takes a port that another one still has.
    for wish in &order {
        let mut kept = BTreeMap::new();
        for key in &wish.ports {
            if let Some(port) = wish.have.get(key)
                && range.contains(port)
                && taken.insert(*port)
            {
                kept.insert(key.clone(), *port);
            }
        }
        result.ports.insert(wish.service.clone(), kept);
    }
    for wish in &order {
        let Some(ports) = result.ports.get_mut(&wish.service) else {
            continue;
        };
        for key in &wish.ports {
            if ports.contains_key(key) {
                continue;
            }
            match free(&range, &taken, &format!("{}/{key}", wish.service)) {
                Some(port) => {
                    taken.insert(port);
                    ports.insert(key.clone(), port);
                }
                None => {
                    result.full.insert(wish.service.clone());
                }
            }
        }
    }
    result
}

/// The first free port from a place that the name gives: a port that was just given up is not the next one handed
/// out, and a Service that is made anew gets the same one again.
fn free(range: &RangeInclusive<u16>, taken: &BTreeSet<u16>, name: &str) -> Option<u16> {
    let (first, last) = (u32::from(*range.start()), u32::from(*range.end()));
    let size = last.checked_sub(first)? + 1;
    let start = fnv1a(name) % size;
    (0..size)
        .filter_map(|step| u16::try_from(first + (start + step) % size).ok())
        .find(|port| !taken.contains(port))
}

/// FNV-1a: the same on every machine and in every version, which std's hasher does not promise.
fn fnv1a(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wish(service: &str, created_ms: i64, ports: &[&str], have: &[(&str, u16)]) -> Wish {
        Wish {
            service: service.to_owned(),
            created_ms,
            ports: ports.iter().map(|p| (*p).to_owned()).collect(),
            have: have.iter().map(|(k, p)| ((*k).to_owned(), *p)).collect(),
        }
    }

    #[test]
    fn a_copied_annotation_gives_way_to_the_older_service() {
        let wishes = [
            wish("models/copy", 2, &["http"], &[("http", 20_001)]),
            wish("models/first", 1, &["http"], &[("http", 20_001)]),
        ];
        let got = assign(&wishes, 20_000..=29_999);
        assert_eq!(got.ports["models/first"]["http"], 20_001);
        assert_ne!(got.ports["models/copy"]["http"], 20_001);
    }

    #[test]
    fn a_full_range_is_told() {
        let got = assign(&[wish("a/a", 0, &["x", "y", "z"], &[])], 5..=6);
        assert_eq!(got.ports["a/a"].len(), 2);
        assert!(got.full.contains("a/a"));
    }

    fn any_wishes() -> impl Strategy<Value = Vec<Wish>> {
        proptest::collection::btree_map(
            "[a-c]/[a-f]",
            (
                0i64..3,
                proptest::collection::btree_set("[pqrs]", 0..4),
                proptest::collection::btree_map("[pqrs]", 95u16..125, 0..4),
            ),
            0..8,
        )
        .prop_map(|map| {
            map.into_iter()
                .map(|(service, (created_ms, ports, have))| Wish {
                    service,
                    created_ms,
                    ports: ports.into_iter().collect(),
                    have,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn unique_in_range_and_stable(mut wishes in any_wishes()) {
            let got = assign(&wishes, 100..=119);
            let mut seen = BTreeSet::new();
            for port in got.ports.values().flat_map(BTreeMap::values) {
                prop_assert!((100..=119).contains(port));
                prop_assert!(seen.insert(*port), "{} twice", port);
            }
            for wish in &mut wishes {
                if !got.full.contains(&wish.service) {
                    prop_assert_eq!(got.ports[&wish.service].len(), wish.ports.len());
                }
                wish.have = got.ports[&wish.service].clone();
            }
            // What was assigned stays, also beside a newcomer that is first by name and age.
            let newcomer = Wish { service: "0/0".to_owned(), created_ms: -1, ports: vec!["p".to_owned()], have: BTreeMap::new() };
            wishes.push(newcomer);
            let again = assign(&wishes, 100..=119);
            for (service, ports) in &got.ports {
                prop_assert_eq!(&again.ports[service], ports);
            }
        }
    }
}
