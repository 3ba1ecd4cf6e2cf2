//! The books: what every node has left, whoever places. What does not fit is refused here and ends the run, so that no
//! packer can look good by a mistake.

use anyhow::ensure;
use ebb_lab::bench::chance::Chance;

use super::lists::{Arrivals, Kind, Lists, Machine, WHOLE};

/// A place for a pod: the node's position, and those of the GPUs on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node.
    pub machine: usize,
    /// The GPUs.
    pub gpus: Vec<usize>,
}

/// Places pods.
pub trait Packer {
    /// Where a pod of this kind goes. `fitting`: the nodes where it fits, in order of their names; never empty.
    fn place(
        &mut self,
        cluster: &Cluster,
        kinds: &[Kind],
        kind: usize,
        fitting: &[usize],
        chance: &mut Chance,
    ) -> Place;

    /// A pod has come, whether it fits or not.
    fn came(&mut self, _kind: usize) {}

    /// The pod that came last was given this place.
    fn placed(&mut self, _kinds: &[Kind], _kind: usize, _place: &Place) {}
}

/// The nodes as they are now.
pub struct Cluster {
    /// In the order of their names.
    pub machines: Vec<Machine>,
}

impl Cluster {
    /// A cluster that nobody uses.
    pub fn new(machines: &[Machine]) -> Cluster {
        Cluster {
            machines: machines.to_vec(),
        }
    }

    /// What kube-scheduler's own filters ask: CPU, memory, the type of card.
    fn passes(&self, machine: usize, kind: &Kind) -> bool {
        let machine = &self.machines[machine];
        machine.cpu_milli >= kind.cpu_milli
            && machine.memory_mib >= kind.memory_mib
            && kind.takes_card(&machine.card)
    }

    /// Positions of the node's GPUs that have room for one part of the request.
    pub fn roomy<'c>(&'c self, machine: usize, kind: &'c Kind) -> impl Iterator<Item = usize> + 'c {
        let gpus = &self.machines[machine].gpus;
        (0..gpus.len()).filter(|gpu| gpus[*gpu] >= kind.gpu_milli)
    }

    fn fits(&self, machine: usize, kind: &Kind) -> bool {
        self.passes(machine, kind) && self.roomy(machine, kind).count() >= kind.gpus as usize
    }

    /// Lets the pods come until they have asked for all GPUs, and returns the percentage that is not allocated then.
    ///
    /// # Errors
    /// When the packer gives a pod what is not there.
    pub fn replay(
        &mut self,
        lists: &Lists,
        arrivals: &Arrivals,
        packer: &mut dyn Packer,
        seed: u64,
    ) -> anyhow::Result<f64> {
        let all = lists.gpus() as u64 * u64::from(WHOLE);
        let mut chance = Chance::new(!seed);
        let (mut arrived, mut allocated) = (0, 0);
        for &number in &arrivals.pods {
            if arrived >= all {
                break;
            }
            let kind = &lists.kinds[number];
            arrived += kind.asks();
            packer.came(number);
            let fitting: Vec<usize> = (0..self.machines.len())
                .filter(|machine| self.fits(*machine, kind))
                .collect();
            if fitting.is_empty() {
                continue;
            }
            let place = packer.place(self, &lists.kinds, number, &fitting, &mut chance);
            self.give(kind, &place)?;
            packer.placed(&lists.kinds, number, &place);
            allocated += kind.asks();
        }
        #[expect(clippy::cast_precision_loss, reason = "some million thousandths")]
        let unallocated = (all - allocated) as f64 * 100.0 / all as f64;
        Ok(unallocated)
    }

    fn give(&mut self, kind: &Kind, place: &Place) -> anyhow::Result<()> {
        ensure!(
            self.passes(place.machine, kind),
            "{place:?} has not what {kind:?} asks of its host"
        );
        ensure!(
            place.gpus.len() == kind.gpus as usize,
            "{place:?} is not for {kind:?}"
        );
        let machine = &mut self.machines[place.machine];
        machine.cpu_milli -= kind.cpu_milli;
        machine.memory_mib -= kind.memory_mib;
        for (position, gpu) in place.gpus.iter().enumerate() {
            ensure!(!place.gpus[..position].contains(gpu), "{place:?} has a GPU twice");
            ensure!(
                machine.gpus[*gpu] >= kind.gpu_milli,
                "{place:?} has not what {kind:?} asks of a GPU"
            );
            machine.gpus[*gpu] -= kind.gpu_milli;
        }
        Ok(())
    }
}
