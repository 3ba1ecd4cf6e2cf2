//! The cgroups of a node's processes, as its `/proc` would tell them.
//!
//! Containers are plain processes here, and making cgroups takes rights that a laptop's user has not. What a kubelet
//! with systemd's driver and a runtime would have made of them is written to `proc/PID/cgroup` in the node's folder;
//! containers with `hostPID` find that folder in `HOST_PROC`, the variable by which monitoring agents are told where
//! the machine's `/proc` is.

use k8s_openapi::api::core::v1::Pod;
use std::path::{Path, PathBuf};

/// Says where the machine's `/proc` is.
pub const HOST_PROC: &str = "HOST_PROC";

/// The stand-in for a node's `/proc`, in its folder.
pub fn proc_dir(node_dir: &Path) -> PathBuf {
    node_dir.join("proc")
}

/// Puts a process into the cgroup of its pod.
pub fn enter(node_dir: &Path, pid: i32, pod: &Pod) -> std::io::Result<()> {
    let dir = proc_dir(node_dir).join(pid.to_string());
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("cgroup"), format!("0::{}\n", path(pid, pod)))
}

/// Takes a process that has ended out of it.
pub fn leave(node_dir: &Path, pid: i32) {
    let _ = std::fs::remove_dir_all(proc_dir(node_dir).join(pid.to_string()));
}

fn path(pid: i32, pod: &Pod) -> String {
    let class = pod.status.as_ref().and_then(|status| status.qos_class.as_deref());
    // Systemd nests slices by their dashes, so a UID has underscores.
    let uid = pod.metadata.uid.as_deref().unwrap_or_default().replace('-', "_");
    let class = match class {
        Some("Guaranteed") => "",
        Some("Burstable") => "burstable-",
        _ => "besteffort-",
    };
    let parent = match class.strip_suffix('-') {
        Some(class) => format!("/kubepods-{class}.slice"),
        None => String::new(),
    };
    format!("/kubepods.slice{parent}/kubepods-{class}pod{uid}.slice/cri-containerd-{pid:064x}.scope")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_cgroup_has_the_kubelets_name() {
        let pod = |class: &str| -> Pod {
            serde_json::from_value(
                serde_json::json!({"metadata": {"uid": "a-b"}, "status": {"qosClass": class}}),
            )
            .unwrap()
        };
        let start = |class| path(7, &pod(class)).split("/cri-").next().unwrap().to_owned();
        assert_eq!(start("Guaranteed"), "/kubepods.slice/kubepods-poda_b.slice");
        assert_eq!(
            start("Burstable"),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice"
        );
        assert_eq!(
            start("BestEffort"),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda_b.slice"
        );
    }
}
