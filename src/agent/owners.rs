//! A GPU has one owner. What the kubelet says that other device plugins handed out, held against the cards here. Pure.
//!
//! Two schedulers that give out the same card promise its memory twice. Ebb cannot stop the other one; it closes the
//! card to new pods, keeps those that are on it, and tells.

use super::inventory::{Card, GpuReading, Reading};
use crate::api::units::GpuId;

/// What the kubelet said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Devices that containers have; of the last answer, if now there is none: no answer gives nothing back.
    pub allocations: Vec<Allocation>,
    /// Why the kubelet cannot be asked now.
    pub trouble: Option<Trouble>,
}

/// One device that a container has from a device plugin.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Allocation {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The plugin's resource, as `nvidia.com/gpu`.
    pub resource: String,
    /// The plugin's name of the device.
    pub device: String,
}

/// Why nothing could be verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// One word for the condition.
    pub reason: &'static str,
    /// What it means and what to do.
    pub message: String,
}

const WHAT_TO_DO: &str = "a GPU has one owner: keep the other device plugin off this node \
    (nvidia.com/gpu.deploy.device-plugin=false), or take this card from one of the two";

/// Why this GPU is closed: somebody else handed it out.
#[must_use]
pub fn handed(holdings: &Holdings, index: u32, card: &Card, gpu: &GpuReading) -> Option<String> {
    let mut others = holdings
        .allocations
        .iter()
        .filter(|allocation| names(allocation, index, &card.uuid, gpu));
    let first = others.next()?;
    let more = match others.count() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let Allocation {
        namespace,
        pod,
        resource,
        ..
    } = first;
    Some(format!(
        "handed to {namespace}/{pod}{more} as {resource}: {WHAT_TO_DO}"
    ))
}

/// Whether the plugin's device is this GPU. Plugins name devices by UUID or by index (`0`, of MIG `0:1`), and add
/// `::n` where several pods share one.
fn names(allocation: &Allocation, index: u32, card: &GpuId, gpu: &GpuReading) -> bool {
    let (device, _) = allocation
        .device
        .split_once("::")
        .unwrap_or((&allocation.device, ""));
    if device == gpu.uuid.as_str() || device == card.as_str() {
        return true;
    }
    // Somebody else's "0" is not a GPU.
    if !allocation.resource.starts_with("nvidia.com/") {
        return false;
    }
    let (of_card, of_instance) = match device.split_once(':') {
        Some((card, instance)) => (card, instance.parse().ok()),
        None => (device, None),
    };
    of_card.parse() == Ok(index) && (of_instance.is_none() || of_instance == gpu.instance)
}

/// The `Verified` condition: status, reason, message.
#[must_use]
pub fn verified(reading: Option<&Reading>, holdings: &Holdings) -> (&'static str, &'static str, String) {
    let cards = || (0_u32..).zip(reading.iter().flat_map(|reading| &reading.cards));
    let handed = cards().find_map(|(index, card)| {
        let card = card.as_ref().ok()?;
        let handed = |gpu: &GpuReading| handed(holdings, index, card, gpu);
        let why = card.gpus.iter().find_map(handed)?;
        Some(format!("GPU {index}: {why}"))
    });
    match (handed, &holdings.trouble) {
        (Some(message), _) => ("False", "HandedOut", message),
        (None, Some(trouble)) => ("Unknown", trouble.reason, trouble.message.clone()),
        (None, None) => (
            "True",
            "OneOwner",
            "the kubelet says that no device plugin hands out these GPUs".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::units::Bytes;

    fn gpu(uuid: &str, instance: Option<u32>) -> GpuReading {
        GpuReading {
            uuid: uuid.into(),
            instance,
            name: "NVIDIA A100".to_owned(),
            memory_total: Bytes(40 << 30),
            memory_reserved: Bytes(0),
            memory_used: None,
            processes: None,
            utilization: None,
            fault: None,
        }
    }

    fn whole(uuid: &str) -> Card {
        Card {
            uuid: uuid.into(),
            gpus: vec![gpu(uuid, None)],
        }
    }

    fn split(uuid: &str, instances: [&str; 2]) -> Card {
        let gpus = (0..).zip(instances);
        Card {
            uuid: uuid.into(),
            gpus: gpus.map(|(index, uuid)| gpu(uuid, Some(index))).collect(),
        }
    }

    fn has(resource: &str, device: &str) -> Holdings {
        let allocation = Allocation {
            namespace: "default".to_owned(),
            pod: "train-0".to_owned(),
            resource: resource.to_owned(),
            device: device.to_owned(),
        };
        Holdings {
            allocations: vec![allocation],
            trouble: None,
        }
    }

    /// Indices of the closed cards, or for MIG of the closed instances.
    fn closed(holdings: &Holdings, cards: &[Card]) -> Vec<String> {
        let mut closed = Vec::new();
        for (index, card) in (0..).zip(cards) {
            let handed = |gpu: &&GpuReading| handed(holdings, index, card, gpu).is_some();
            closed.extend(card.gpus.iter().filter(handed).map(|gpu| gpu.uuid.to_string()));
        }
        closed
    }

    #[test]
    fn every_way_in_which_plugins_name_a_device() {
        let cards = [whole("GPU-a"), whole("GPU-b"), split("GPU-c", ["MIG-x", "MIG-y"])];
        for (resource, device, expected) in [
            ("nvidia.com/gpu", "GPU-b", vec!["GPU-b"]),
            ("nvidia.com/gpu.shared", "GPU-a::3", vec!["GPU-a"]),
            ("nvidia.com/gpu", "1", vec!["GPU-b"]),
            ("nvidia.com/mig-3g.20gb", "MIG-y", vec!["MIG-y"]),
            ("nvidia.com/mig-3g.20gb", "2:1", vec!["MIG-y"]),
            // The whole card, although MIG is on: all of its instances.
            ("nvidia.com/gpu", "GPU-c", vec!["MIG-x", "MIG-y"]),
            ("nvidia.com/gpu", "2", vec!["MIG-x", "MIG-y"]),
            // Another vendor's scheduler that names our card, and one that only has the same number.
            ("example.com/vgpu", "GPU-a", vec!["GPU-a"]),
            ("example.com/nic", "1", vec![]),
            ("nvidia.com/gpu", "GPU-elsewhere", vec![]),
            ("nvidia.com/gpu", "", vec![]),
        ] {
            assert_eq!(
                closed(&has(resource, device), &cards),
                expected,
                "{resource} {device}"
            );
        }
    }

    #[test]
    fn it_is_told_with_what_to_do_and_no_answer_is_not_a_yes() {
        let reading = Reading {
            driver_version: String::new(),
            cards: vec![Ok(whole("GPU-a"))],
        };
        let mut holdings = has("nvidia.com/gpu", "GPU-a");
        holdings.allocations.push(Allocation {
            pod: "train-1".to_owned(),
            ..holdings.allocations[0].clone()
        });
        let (status, _, message) = verified(Some(&reading), &holdings);
        assert_eq!(status, "False");
        assert!(message.starts_with("GPU 0: handed to default/train-0 and 1 more as nvidia.com/gpu"));
        assert!(message.contains("device-plugin=false"), "{message}");
        let silent = Holdings {
            allocations: Vec::new(),
            trouble: Some(Trouble {
                reason: "NoSocket",
                message: "no socket".to_owned(),
            }),
        };
        assert_eq!(verified(Some(&reading), &silent).0, "Unknown");
        assert_eq!(verified(Some(&reading), &Holdings::default()).0, "True");
        // What was handed out before the kubelet fell silent still is.
        holdings.trouble = silent.trouble;
        assert_eq!(verified(Some(&reading), &holdings).0, "False");
    }
}
