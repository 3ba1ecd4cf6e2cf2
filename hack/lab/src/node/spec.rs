//! What a stand-in node looks like: its name, labels, capacity and GPUs.

use super::quantity;
use crate::nvml_state;
use std::collections::BTreeMap;
use std::str::FromStr;

/// The GPUs of a node, all alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus {
    /// How many.
    pub count: u32,
    /// Memory of each, in bytes, as the driver counts it.
    pub memory: u64,
    /// Memory of each that the driver keeps for itself.
    pub reserved: u64,
    /// The card's name as NVML tells it.
    pub card: String,
}

/// What the driver of a data-centre card keeps for itself: about half a GiB on an L4, an A100 or an H100.
pub const DRIVER_RESERVED: u64 = 512 * 1024 * 1024;

/// A taint that the node registers with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taint {
    /// The key.
    pub key: String,
    /// The value, possibly empty.
    pub value: String,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`.
    pub effect: String,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// The Node object's name.
    pub name: String,
    /// Labels besides those that every kubelet sets.
    pub labels: BTreeMap<String, String>,
    /// Taints to register with.
    pub taints: Vec<Taint>,
    /// GPUs; none makes it a system node.
    pub gpus: Option<Gpus>,
    /// CPUs, as a quantity.
    pub cpu: String,
    /// Memory, as a quantity.
    pub memory: String,
    /// How many pods it takes.
    pub pods: u32,
}

impl NodeSpec {
    /// A node without GPUs and with the usual capacity.
    pub fn system(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            labels: BTreeMap::new(),
            taints: Vec::new(),
            gpus: None,
            cpu: "16".to_owned(),
            memory: "64Gi".to_owned(),
            pods: 110,
        }
    }

    /// A node with `count` GPUs of `memory` bytes each.
    pub fn gpu(name: impl Into<String>, count: u32, memory: u64, card: impl Into<String>) -> Self {
        let gpus = Gpus {
            count,
            memory,
            reserved: DRIVER_RESERVED,
            card: card.into(),
        };
        Self {
            gpus: Some(gpus),
            ..Self::system(name)
        }
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// All labels of the Node object: the kubelet's, GPU feature discovery's and its own.
    pub fn all_labels(&self) -> BTreeMap<String, String> {
        let mut labels: BTreeMap<String, String> = [
            ("kubernetes.io/hostname", self.name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", arch()),
            ("beta.kubernetes.io/os", "linux"),
            ("beta.kubernetes.io/arch", arch()),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
        if let Some(gpus) = &self.gpus {
            labels.insert("nvidia.com/gpu.present".to_owned(), "true".to_owned());
            labels.insert("nvidia.com/gpu.count".to_owned(), gpus.count.to_string());
            // GPU feature discovery writes MiB and replaces what a label value may not hold.
            labels.insert(
                "nvidia.com/gpu.memory".to_owned(),
                (gpus.memory >> 20).to_string(),
            );
            labels.insert("nvidia.com/gpu.product".to_owned(), gpus.card.replace(' ', "-"));
        }
        labels.extend(self.labels.clone());
        labels
    }

    /// The node's GPUs as its driver sees them, or `None` on a system node.
    pub fn gpu_state(&self) -> Option<nvml_state::State> {
        let gpus = self.gpus.as_ref()?;
        Some(nvml_state::State::new(
            &self.name,
            gpus.count,
            gpus.memory,
            gpus.reserved,
            &gpus.card,
        ))
    }
}

/// The architecture as Go names it.
pub(super) fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl FromStr for Taint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || format!("taint {text:?}: write KEY=VALUE:EFFECT or KEY:EFFECT");
        let (name, effect) = text.rsplit_once(':').ok_or_else(bad)?;
        if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) || name.is_empty() {
            return Err(bad());
        }
        let (key, value) = name.split_once('=').unwrap_or((name, ""));
        Ok(Self {
            key: key.to_owned(),
            value: value.to_owned(),
            effect: effect.to_owned(),
        })
    }
}

impl FromStr for NodeSpec {
    type Err = String;

    /// Reads `NAME` or `NAME=key:value,…` with the keys `gpus`, `gpu-memory`, `gpu-reserved`,
    /// `card`, `label`, `taint`, `cpu`, `memory` and `pods`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, settings) = text.split_once('=').unwrap_or((text, ""));
        if name.is_empty() {
            return Err(format!("node {text:?} has no name"));
        }
        let mut spec = Self::system(name);
        let mut gpus = Gpus {
            count: 0,
            memory: 24 << 30,
            reserved: DRIVER_RESERVED,
            card: "NVIDIA L4".to_owned(),
        };
        for setting in settings.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = setting
                .split_once(':')
                .ok_or_else(|| format!("node {name}: {setting:?} is not KEY:VALUE"))?;
            let number = || {
                value
                    .parse::<u32>()
                    .map_err(|_| format!("node {name}: {key} {value:?} is no number"))
            };
            match key {
                "gpus" => gpus.count = number()?,
                "gpu-memory" => gpus.memory = quantity::bytes(value)?,
                "gpu-reserved" => gpus.reserved = quantity::bytes(value)?,
                "card" => gpus.card = value.to_owned(),
                "label" => {
                    let (key, value) = value
                        .split_once('=')
                        .ok_or_else(|| format!("node {name}: label {value:?} is not KEY=VALUE"))?;
                    spec.labels.insert(key.to_owned(), value.to_owned());
                }
                "taint" => spec.taints.push(value.parse()?),
                "cpu" => {
                    quantity::milli(value)?;
                    spec.cpu = value.to_owned();
                }
                "memory" => {
                    quantity::bytes(value)?;
                    spec.memory = value.to_owned();
                }
                "pods" => spec.pods = number()?,
                other => {
                    return Err(format!(
                        "node {name}: no setting {other:?}; there are gpus, gpu-memory, gpu-reserved, card, label, taint, cpu, memory, pods"
                    ));
                }
            }
        }
        spec.gpus = (gpus.count > 0).then_some(gpus);
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_gpu_node_is_read_from_its_text() {
        let spec: NodeSpec =
            "a=gpus:2,gpu-memory:24Gi,card:NVIDIA L4,label:x/y=z,taint:k=v:NoSchedule,pods:7"
                .parse()
                .unwrap();
        assert_eq!(spec.pods, 7);
        assert_eq!(
            spec.taints[0],
            Taint {
                key: "k".into(),
                value: "v".into(),
                effect: "NoSchedule".into()
            }
        );
        let labels = spec.all_labels();
        assert_eq!(labels["nvidia.com/gpu.product"], "NVIDIA-L4");
        assert_eq!(labels["nvidia.com/gpu.memory"], "24576");
        assert_eq!(labels["x/y"], "z");
        let state = spec.gpu_state().unwrap();
        assert_eq!(state.devices.len(), 2);
        assert_eq!(state.devices[1].usable(), (24 << 30) - (512 << 20));
    }

    #[test]
    fn a_bare_name_is_a_system_node() {
        let spec: NodeSpec = "sys".parse().unwrap();
        assert_eq!(spec, NodeSpec::system("sys"));
        assert!(spec.gpu_state().is_none());
    }

    #[test]
    fn wrong_texts_say_what_is_wrong() {
        for text in [
            "",
            "a=gpus",
            "a=gpus:x",
            "a=colour:red",
            "a=taint:k",
            "a=label:k",
            "a=gpu-memory:lots",
        ] {
            assert!(text.parse::<NodeSpec>().is_err(), "{text}");
        }
    }
}
