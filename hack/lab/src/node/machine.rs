//! One stand-in node as a machine: addresses, power, GPU state.

use super::lock;
use super::spec::NodeSpec;
use crate::nvml_state::State;
use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// One node.
#[derive(Debug)]
pub struct Machine {
    /// What it was asked to be.
    pub spec: NodeSpec,
    /// The third byte of its addresses.
    pub index: u8,
    /// Its own address.
    pub ip: String,
    /// Cancelled when it loses power.
    pub power: CancellationToken,
    /// The workers of its pods.
    pub pods: TaskTracker,
    /// When it came up.
    pub started: Instant,
    /// Its folder: what stands for its GPUs, its `/proc`, and the kubelet's own files.
    pub dir: PathBuf,
    /// The file that stands for its GPUs.
    pub state_file: Option<PathBuf>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    used: BTreeSet<u8>,
    last: u8,
    pods: u32,
}

impl Machine {
    /// A machine with the addresses 10.77.`index`.x.
    pub fn new(spec: NodeSpec, index: u8, dir: PathBuf, state_file: Option<PathBuf>) -> Self {
        Self {
            ip: format!("10.77.{index}.1"),
            spec,
            index,
            power: CancellationToken::new(),
            pods: TaskTracker::new(),
            started: Instant::now(),
            dir,
            state_file,
            inner: Mutex::new(Inner {
                last: 1,
                ..Inner::default()
            }),
        }
    }

    /// An address for `pod`; one that was given back is used again as late as possible.
    ///
    /// # Errors
    /// The kubelet's reason and message when the node is full.
    pub fn take_address(&self, pod: &Pod) -> Result<String, (&'static str, String)> {
        let mut inner = lock(&self.inner);
        if inner.pods >= self.spec.pods {
            let message = format!(
                "Node didn't have enough resource: pods, requested: 1, used: {}, capacity: {}",
                inner.pods, self.spec.pods
            );
            return Err(("OutOfpods", message));
        }
        if pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true) {
            inner.pods += 1;
            return Ok(self.ip.clone());
        }
        let last = inner.last;
        let free = (last..=254)
            .skip(1)
            .chain(2..=last)
            .find(|byte| *byte > 1 && !inner.used.contains(byte));
        let Some(byte) = free else {
            return Err((
                "OutOfpods",
                "no address is left in the node's pod CIDR".to_owned(),
            ));
        };
        inner.pods += 1;
        inner.used.insert(byte);
        inner.last = byte;
        Ok(format!("10.77.{}.{byte}", self.index))
    }

    /// Takes an address back, with the place of its pod.
    pub fn give_address(&self, ip: &str) {
        let mut inner = lock(&self.inner);
        inner.pods = inner.pods.saturating_sub(1);
        if let Some(byte) = ip.rsplit('.').next().and_then(|byte| byte.parse::<u8>().ok()) {
            inner.used.remove(&byte);
        }
    }

    /// Where a path of the machine is: what belongs to its kubelet is in its own folder.
    pub fn host_path(&self, path: &str) -> PathBuf {
        match Path::new(path).strip_prefix("/var/lib/kubelet") {
            Ok(rest) => self.kubelet_dir().join(rest),
            Err(_) => path.into(),
        }
    }

    /// What stands for `/var/lib/kubelet`.
    pub fn kubelet_dir(&self) -> PathBuf {
        self.dir.join("kubelet")
    }

    /// Frees the GPU memory of processes that are dead, as a driver does.
    pub async fn forget_dead_gpu_processes(&self) {
        let Some(file) = self.state_file.clone() else {
            return;
        };
        // The file has a lock that a model server may hold for a moment.
        let update = tokio::task::spawn_blocking(move || State::update(&file, State::forget_dead));
        if let Ok(Err(error)) = update.await {
            tracing::warn!(node = self.spec.name, %error, "updating the GPU state");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_are_unique_and_reused_late() {
        let machine = Machine::new(
            NodeSpec {
                pods: 300,
                ..NodeSpec::system("a")
            },
            7,
            PathBuf::from("/none"),
            None,
        );
        let pod = Pod::default();
        let mut seen = BTreeSet::new();
        for _ in 0..253 {
            assert!(seen.insert(machine.take_address(&pod).unwrap()));
        }
        assert!(!seen.contains("10.77.7.1"));
        assert!(machine.take_address(&pod).is_err());
        machine.give_address("10.77.7.9");
        machine.give_address("10.77.7.20");
        assert_eq!(machine.take_address(&pod).unwrap(), "10.77.7.9");
        machine.give_address("10.77.7.9");
        assert_eq!(machine.take_address(&pod).unwrap(), "10.77.7.20");
    }

    #[test]
    fn a_full_node_refuses() {
        let machine = Machine::new(
            NodeSpec {
                pods: 1,
                ..NodeSpec::system("a")
            },
            7,
            PathBuf::from("/none"),
            None,
        );
        machine.take_address(&Pod::default()).unwrap();
        assert_eq!(machine.take_address(&Pod::default()).unwrap_err().0, "OutOfpods");
    }
}
