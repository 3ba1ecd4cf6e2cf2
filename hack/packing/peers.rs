//! What Ebb is measured beside, as in the simulator published with Weng et al., "Beware of Fragmentation: Scheduling
//! GPU-Sharing Workloads with Fragmentation Gradient Descent" (USENIX ATC'23). Equal scores go to the first node by name.

use std::cmp::Reverse;
use std::collections::HashMap;

use ebb_lab::bench::chance::Chance;

use super::cluster::{Cluster, Packer, Place};
use super::lists::{Kind, Lists, Machine, WHOLE};

/// Kinds of pods that make up this part of the list, the most frequent first, are what FGD expects to come.
const TYPICAL: f64 = 0.95;

/// Any node where the pod fits, and any GPUs there.
pub struct Random;

impl Packer for Random {
    fn place(
        &mut self,
        cluster: &Cluster,
        kinds: &[Kind],
        kind: usize,
        fitting: &[usize],
        chance: &mut Chance,
    ) -> Place {
        let machine = fitting[chance.below(fitting.len())];
        let mut gpus: Vec<usize> = cluster.roomy(machine, &kinds[kind]).collect();
        while gpus.len() > kinds[kind].gpus as usize {
            gpus.swap_remove(chance.below(gpus.len()));
        }
        Place { machine, gpus }
    }
}

/// The node with the least CPU and GPU left beside the pod, each as a part of the largest node's, and the tightest GPUs.
pub struct BestFit;

impl Packer for BestFit {
    fn place(
        &mut self,
        cluster: &Cluster,
        kinds: &[Kind],
        kind: usize,
        fitting: &[usize],
        _: &mut Chance,
    ) -> Place {
        // 128 cores and 8 GPUs, weighed alike: 1/128,000 and 1/8,000 in thousandths.
        let left = |machine: &usize| {
            let machine = &cluster.machines[*machine];
            machine.cpu_milli + machine.gpus.iter().map(|free| u64::from(*free) * 16).sum::<u64>()
        };
        let machine = *fitting
            .iter()
            .min_by_key(|machine| left(machine))
            .expect("some node fits");
        Place {
            machine,
            gpus: tightest(cluster, machine, &kinds[kind]),
        }
    }
}

fn tightest(cluster: &Cluster, machine: usize, kind: &Kind) -> Vec<usize> {
    let mut gpus: Vec<usize> = cluster.roomy(machine, kind).collect();
    gpus.sort_by_key(|gpu| cluster.machines[machine].gpus[*gpu]);
    gpus.truncate(kind.gpus as usize);
    gpus
}

/// Fragmentation gradient descent: the node where the pod adds least to what the typical pods cannot use.
pub struct Fgd {
    typical: Vec<(Kind, f64)>,
    /// By node and kind: score and GPUs, until the node changes.
    known: Vec<HashMap<usize, (u8, Vec<usize>)>>,
}

impl Fgd {
    /// Knows the whole list beforehand, as the published one does.
    pub fn new(lists: &Lists, cluster: &Cluster) -> Fgd {
        let mut counts: HashMap<Kind, usize> = HashMap::new();
        for pod in &lists.pods {
            // It has no eye for memory.
            let kind = Kind {
                memory_mib: 0,
                ..lists.kinds[*pod].clone()
            };
            *counts.entry(kind).or_default() += 1;
        }
        let mut counts: Vec<(Kind, usize)> = counts.into_iter().collect();
        counts.sort_by(|a, b| (Reverse(a.1), &a.0).cmp(&(Reverse(b.1), &b.0)));
        #[expect(clippy::cast_precision_loss, reason = "some thousand pods")]
        let part = |count: usize| count as f64 / lists.pods.len() as f64;
        let mut covered = 0;
        let mut typical = Vec::new();
        for (kind, count) in counts {
            if part(covered) >= TYPICAL {
                break;
            }
            covered += count;
            typical.push((kind, part(count)));
        }
        for (_, weight) in &mut typical {
            *weight /= part(covered);
        }
        Fgd {
            typical,
            known: vec![HashMap::new(); cluster.machines.len()],
        }
    }

    /// Thousandths of GPUs that the typical pods cannot use, in expectation.
    fn fragments(&self, machine: &Machine) -> f64 {
        let all: u32 = machine.gpus.iter().sum();
        if all == 0 {
            return 0.0;
        }
        let of = |kind: &Kind| {
            let roomy = machine
                .gpus
                .iter()
                .filter(|free| **free >= kind.gpu_milli)
                .count();
            let runs = kind.gpus > 0
                && machine.cpu_milli >= kind.cpu_milli
                && roomy >= kind.gpus as usize
                && kind.takes_card(&machine.card);
            if runs {
                machine.gpus.iter().filter(|free| **free < kind.gpu_milli).sum()
            } else {
                all
            }
        };
        self.typical
            .iter()
            .map(|(kind, weight)| weight * f64::from(of(kind)))
            .sum()
    }

    /// The best score on one node, 0 to 100, and the GPUs for it.
    fn score(&self, cluster: &Cluster, machine: usize, kind: &Kind) -> (u8, Vec<usize>) {
        let before = self.fragments(&cluster.machines[machine]);
        let options: Vec<Vec<usize>> = if kind.gpus == 1 && kind.gpu_milli < WHOLE {
            cluster.roomy(machine, kind).map(|gpu| vec![gpu]).collect()
        } else {
            vec![tightest(cluster, machine, kind)]
        };
        let mut best: Option<(u8, Vec<usize>)> = None;
        for gpus in options {
            let mut after = cluster.machines[machine].clone();
            after.cpu_milli -= kind.cpu_milli;
            for gpu in &gpus {
                after.gpus[*gpu] -= kind.gpu_milli;
            }
            let less = (before - self.fragments(&after)) / f64::from(WHOLE);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and 100"
            )]
            let score = (100.0 / (1.0 + (-less).exp())) as u8;
            if best.as_ref().is_none_or(|(known, _)| score > *known) {
                best = Some((score, gpus));
            }
        }
        best.unwrap_or_default()
    }
}

impl Packer for Fgd {
    fn place(
        &mut self,
        cluster: &Cluster,
        kinds: &[Kind],
        kind: usize,
        fitting: &[usize],
        _: &mut Chance,
    ) -> Place {
        for machine in fitting {
            if !self.known[*machine].contains_key(&kind) {
                let scored = self.score(cluster, *machine, &kinds[kind]);
                self.known[*machine].insert(kind, scored);
            }
        }
        let score = |machine: &&usize| self.known[**machine][&kind].0;
        let machine = *fitting
            .iter()
            .min_by_key(|machine| Reverse(score(machine)))
            .expect("some node fits");
        Place {
            machine,
            gpus: self.known[machine][&kind].1.clone(),
        }
    }

    fn placed(&mut self, _: &[Kind], _: usize, place: &Place) {
        self.known[place.machine].clear();
    }
}
