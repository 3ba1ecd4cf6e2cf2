//! Which replica of a workload the next request goes to: the one with the fewest in flight, ties in turn.

/// Picks among `candidates` (key and requests in flight) the least loaded one that is below `limit`. Ties go round:
/// to the first key after `last`, the one picked before. Keys must come without repetition, in any order.
pub fn pick<'a, K: Ord>(
    candidates: impl IntoIterator<Item = (&'a K, u32)>,
    limit: u32,
    last: Option<&K>,
) -> Option<&'a K> {
    candidates
        .into_iter()
        .filter(|(_, in_flight)| *in_flight < limit)
        .min_by_key(|(key, in_flight)| (*in_flight, last.is_some_and(|last| *key <= last), *key))
        .map(|(key, _)| key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ties_go_round() {
        let (keys, mut last, mut seen) = ([1, 2, 3], None, Vec::new());
        for _ in 0..7 {
            last = pick(keys.iter().map(|k| (k, 0)), 1, last);
            seen.extend(last.copied());
        }
        assert_eq!(seen, [1, 2, 3, 1, 2, 3, 1]);
    }

    #[test]
    fn nobody_below_the_limit_is_nobody() {
        assert_eq!(pick([(&1, 4), (&2, 5)], 4, None), None);
        assert_eq!(pick([(&1, 0)], 0, None), None);
        assert_eq!(pick(std::iter::empty::<(&u8, u32)>(), 4, None), None);
    }

    proptest! {
        #[test]
        fn nobody_is_less_loaded_than_the_one_picked(
            loads in proptest::collection::btree_map(0u8..20, 0u32..6, 0..12),
            limit in 0u32..8,
            last in proptest::option::of(0u8..20),
        ) {
            let picked = pick(loads.iter().map(|(k, n)| (k, *n)), limit, last.as_ref());
            let least = loads.values().filter(|n| **n < limit).min();
            prop_assert_eq!(picked.map(|key| &loads[key]), least);
        }

        #[test]
        fn load_spreads_evenly(replicas in 1u32..9, requests in 0u32..60) {
            let mut loads = vec![0u32; replicas as usize];
            let keys: Vec<usize> = (0..loads.len()).collect();
            let mut last = None;
            for _ in 0..requests {
                let key = *pick(keys.iter().map(|k| (k, loads[*k])), u32::MAX, last.as_ref())
                    .expect("no limit, so somebody is picked");
                loads[key] += 1;
                last = Some(key);
            }
            let (least, most) = (loads.iter().min(), loads.iter().max());
            prop_assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1));
        }
    }
}
