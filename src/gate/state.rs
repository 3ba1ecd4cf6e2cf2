//! What all requests of a gate share: the routing table, the doors, the connections to replicas.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::RwLock;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::hold::Door;
use super::metrics::{Metrics, Outcome};
use super::probe::Checks;
use super::problem::Problem;
use super::table::Table;
use super::upstream::Pool;
use super::wake::Scaler;
use crate::api::units::PodUid;
use crate::api::workload::WorkloadRef;

/// One gate.
pub struct Gate {
    table: ArcSwap<Table>,
    doors: RwLock<HashMap<WorkloadRef, Arc<Door>>>,
    /// Wakes workloads.
    pub scaler: Arc<dyn Scaler>,
    /// Connections to replicas.
    pub pool: Arc<Pool>,
    /// Its numbers.
    pub metrics: Metrics,
    /// Client connections and tunnels, which a stopping gate waits for.
    pub tracker: TaskTracker,
    started: Instant,
}

impl Gate {
    /// A gate that knows no route yet.
    #[must_use]
    pub fn new(scaler: Arc<dyn Scaler>, metrics: Metrics) -> Arc<Gate> {
        Arc::new(Gate {
            table: ArcSwap::default(),
            doors: RwLock::default(),
            scaler,
            pool: Arc::new(Pool::default()),
            metrics,
            tracker: TaskTracker::new(),
            started: Instant::now(),
        })
    }

    /// Milliseconds since this gate started.
    #[must_use]
    pub fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The routes and facts now.
    pub fn table(&self) -> arc_swap::Guard<Arc<Table>> {
        self.table.load()
    }

    /// Takes in a new table: every door is told what is known of its workload now.
    pub fn set_table(self: &Arc<Self>, table: Table) {
        let table = Arc::new(table);
        self.table.store(table.clone());
        for (workload, facts) in &table.workloads {
            self.door(workload).observe(&facts.seen);
        }
        for door in self.doors() {
            if !table.workloads.contains_key(&door.workload) {
                door.dismiss(&Problem::new(
                    Outcome::NoRoute,
                    "the workload, or the Service that led to it, was deleted meanwhile",
                ));
            }
        }
        // A door that somebody else still has in hand stays: a request may be on its way to it.
        self.doors.write().retain(|workload, door| {
            table.workloads.contains_key(workload) || Arc::strong_count(door) > 1 || !door.idle()
        });
    }

    /// The door of a workload.
    pub fn door(self: &Arc<Self>, workload: &WorkloadRef) -> Arc<Door> {
        if let Some(door) = self.doors.read().get(workload) {
            return door.clone();
        }
        self.doors
            .write()
            .entry(workload.clone())
            .or_insert_with(|| Door::new(workload.clone(), self))
            .clone()
    }

    /// All doors.
    #[must_use]
    pub fn doors(&self) -> Vec<Arc<Door>> {
        self.doors.read().values().cloned().collect()
    }

    /// The version at which the watch shows a workload at 0.
    pub(super) fn zero_at(&self, workload: &WorkloadRef) -> Option<String> {
        let table = self.table();
        let facts = table.workloads.get(workload)?;
        (facts.seen.desired == 0 && !facts.resource_version.is_empty())
            .then(|| facts.resource_version.clone())
    }

    /// Replicas to wake a workload to.
    pub(super) fn wake_to(&self, workload: &WorkloadRef) -> u32 {
        self.table()
            .workloads
            .get(workload)
            .map_or(1, |facts| facts.wake_to)
    }

    /// Where a pod is and how to ask it whether it is ready.
    pub(super) fn checks(&self, workload: &WorkloadRef, pod: &PodUid) -> Option<(IpAddr, Arc<Checks>)> {
        let table = self.table();
        let facts = table.workloads.get(workload)?;
        let ip = facts.seen.pods.iter().find(|seen| seen.uid == *pod)?.ip?;
        Some((ip, facts.checks.get(pod)?.clone()))
    }
}
