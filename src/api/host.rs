//! CPU and memory of the machine: what a pod asks of its node beside GPUs, and what a node has.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PodSpec;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::units::{Bytes, MilliCpu};

/// CPU and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host {
    /// CPU.
    pub cpu: MilliCpu,
    /// Memory.
    pub memory: Bytes,
}

impl Host {
    /// More than any pod asks; for a node that does not say what it has.
    pub const UNLIMITED: Host = Host {
        cpu: MilliCpu(u64::MAX),
        memory: Bytes(u64::MAX),
    };

    /// Reads both quantities. One that is missing or makes no sense counts as 0: the API server has checked them, and
    /// kube-scheduler has the last word on both.
    #[must_use]
    pub fn read(cpu: Option<&str>, memory: Option<&str>) -> Host {
        Host {
            cpu: cpu.and_then(|text| text.parse().ok()).unwrap_or_default(),
            memory: memory.and_then(|text| text.parse().ok()).unwrap_or_default(),
        }
    }

    /// Whether `asked` is no more than this, in both.
    #[must_use]
    pub fn holds(self, asked: Host) -> bool {
        self.cpu >= asked.cpu && self.memory >= asked.memory
    }

    /// What is left without `other`; 0 where that would be negative.
    #[must_use]
    pub fn saturating_sub(self, other: Host) -> Host {
        Host {
            cpu: MilliCpu(self.cpu.0.saturating_sub(other.cpu.0)),
            memory: self.memory.saturating_sub(other.memory),
        }
    }

    /// Both together.
    #[must_use]
    pub fn saturating_add(self, other: Host) -> Host {
        Host {
            cpu: MilliCpu(self.cpu.0.saturating_add(other.cpu.0)),
            memory: self.memory.saturating_add(other.memory),
        }
    }

    fn max(self, other: Host) -> Host {
        Host {
            cpu: self.cpu.max(other.cpu),
            memory: self.memory.max(other.memory),
        }
    }
}

impl std::iter::Sum for Host {
    fn sum<I: Iterator<Item = Host>>(iter: I) -> Host {
        iter.fold(Host::default(), Host::saturating_add)
    }
}

/// What an init container asks, and how long it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    /// What it asks.
    pub host: Host,
    /// `restartPolicy: Always`: it stays beside the main containers.
    pub stays: bool,
}

/// What a pod asks in all, by Kubernetes' rule: its containers and its sidecars together, or what an init container
/// needs beside the sidecars before it where that is more; and the overhead of its runtime class.
#[must_use]
pub fn of_pod(
    containers: impl Iterator<Item = Host>,
    inits: impl Iterator<Item = Init>,
    overhead: Host,
) -> Host {
    let (mut sidecars, mut peak) = (Host::default(), Host::default());
    for init in inits {
        if init.stays {
            sidecars = sidecars.saturating_add(init.host);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars.saturating_add(init.host));
        }
    }
    let running = containers.sum::<Host>().saturating_add(sidecars);
    running.max(peak).saturating_add(overhead)
}

/// What a pod of this spec asks in all.
#[must_use]
pub fn of_spec(spec: &PodSpec) -> Host {
    let requests = |container: &k8s_openapi::api::core::v1::Container| {
        let resources = container.resources.as_ref();
        of_list(resources.and_then(|resources| resources.requests.as_ref()))
    };
    let inits = spec.init_containers.iter().flatten().map(|container| Init {
        host: requests(container),
        stays: container.restart_policy.as_deref() == Some("Always"),
    });
    of_pod(
        spec.containers.iter().map(requests),
        inits,
        of_list(spec.overhead.as_ref()),
    )
}

/// CPU and memory out of a list of quantities.
#[must_use]
pub fn of_list(list: Option<&BTreeMap<String, Quantity>>) -> Host {
    let text = |key: &str| {
        list.and_then(|list| list.get(key))
            .map(|quantity| quantity.0.as_str())
    };
    Host::read(text("cpu"), text("memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(milli: u64) -> Host {
        Host {
            cpu: MilliCpu(milli),
            memory: Bytes(0),
        }
    }

    #[test]
    fn the_larger_of_starting_and_running() {
        let init = |milli, stays| Init {
            host: cpu(milli),
            stays,
        };
        let asks = |inits: &[Init]| {
            of_pod([cpu(3), cpu(4)].into_iter(), inits.iter().copied(), cpu(1))
                .cpu
                .0
        };
        assert_eq!(asks(&[]), 8);
        assert_eq!(asks(&[init(6, false)]), 8);
        assert_eq!(asks(&[init(9, false)]), 10);
        assert_eq!(asks(&[init(2, true), init(9, false)]), 12);
        assert_eq!(asks(&[init(9, false), init(2, true)]), 10);
    }
}
