//! Whose process it is: the pod's UID out of `/proc/PID/cgroup`. Pure.
//!
//! The kubelet makes one cgroup per pod and puts its UID in the name: `pod<uid>` with the cgroupfs driver,
//! `kubepods-burstable-pod<uid>.slice` with systemd's, where dashes become underscores. Cgroup v2 has one line, v1 one
//! per controller. A reader in a cgroup namespace of its own sees paths that begin with `/..` and lack the parents
//! that it shares, so nothing but the pod's own part can be relied on.

use crate::api::units::PodUid;

/// The pod that a process with this `/proc/PID/cgroup` belongs to; nothing for a process of the machine itself.
#[must_use]
pub fn pod_uid(text: &str) -> Option<PodUid> {
    // `hierarchy:controllers:path`; a systemd path of the containerd kind has colons of its own.
    let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.flat_map(|path| path.split(['/', ':'])).find_map(of_part)
}

fn of_part(part: &str) -> Option<PodUid> {
    let uid = match part.strip_suffix(".slice") {
        // Behind the last dash, since a UID has none here; what is before it depends on the class and on who nests whom.
        Some(slice) => {
            let (parent, last) = slice.rsplit_once('-')?;
            let (_, class) = parent.rsplit_once("kubepods")?;
            matches!(class, "" | "-burstable" | "-besteffort").then_some(last)?
        }
        None => part,
    };
    let uid = uid.strip_prefix("pod")?.replace('_', "-");
    is_uid(&uid).then(|| PodUid::from(uid.as_str()))
}

/// A UUID, or the hash that a static pod has in its place.
fn is_uid(text: &str) -> bool {
    let hex = |part: &str| {
        part.bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    matches!(lengths.as_slice(), [32] | [8, 4, 4, 4, 12]) && groups.into_iter().all(hex)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
    use super::*;
    use proptest::prelude::*;

    const UID: &str = "0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10";

    fn found(text: &str) -> Option<String> {
        pod_uid(text).map(|uid| uid.to_string())
    }

    /// Lines as kubelets, runtimes and kernels write them.
    #[test]
    fn lines_of_the_real_world() {
        for line in [
            // v2, systemd driver, containerd: guaranteed, burstable, best effort.
            "0::/kubepods.slice/kubepods-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice/cri-containerd-9a1c.scope",
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice/cri-containerd-9a1c.scope",
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice/crio-9a1c.scope/container",
            // v2, cgroupfs driver.
            "0::/kubepods/pod0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10/9a1c",
            "0::/kubepods/burstable/pod0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10/9a1c",
            // v1: one line per controller, the useful one not first.
            "12:rdma:/\n4:memory:/kubepods/besteffort/pod0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10/9a1c\n1:name=systemd:/kubepods/besteffort/pod0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10/9a1c",
            // A kubelet with systemd's driver over a containerd without it.
            "5:cpuset:/system.slice/containerd.service/kubepods-besteffort-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice:cri-containerd:9a1c",
            // kind: a node that is a container.
            "0::/docker/77aa/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice/cri-containerd-9a1c.scope",
            "0::/kubelet/kubepods/burstable/pod0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10/9a1c",
            // Read from within another pod's cgroup namespace: of the same class, and of another.
            "0::/../../kubepods-burstable-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice/cri-containerd-9a1c.scope",
            "0::/../../pod0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10/9a1c",
            "0::/../../../kubepods-besteffort.slice/kubepods-besteffort-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice/cri-containerd-9a1c.scope",
        ] {
            assert_eq!(found(line).as_deref(), Some(UID), "{line}");
        }
        // A static pod.
        let hash = "0::/kubepods/burstable/pod5b0e4a7c8f3d2e1a9b6c5d4e3f2a1b0c/9a1c";
        assert_eq!(found(hash).as_deref(), Some("5b0e4a7c8f3d2e1a9b6c5d4e3f2a1b0c"));
    }

    #[test]
    fn processes_of_no_pod() {
        for line in [
            "",
            "0::/",
            "0::/init.scope",
            "0::/user.slice/user-1000.slice/session-3.scope",
            "0::/system.slice/docker-0f3b7a5e2f4c4b579a661f5f1a3f6f10.scope",
            "0::/machine.slice/libpod_pod_0f3b7a5e2f4c4b579a661f5f1a3f6f100f3b7a5e2f4c4b579a661f5f1a3f6f10.slice/x",
            // Names that a person could give a slice, and a pod without a name.
            "0::/user.slice/my-pod0f3b7a5e_2f4c_4b57_9a66_1f5f1a3f6f10.slice/x.scope",
            "0::/podcast/episode",
            "0::/kubepods.slice/kubepods-pod.slice",
            "0::/kubepods/pod",
            "not a cgroup line",
        ] {
            assert_eq!(found(line), None, "{line}");
        }
    }

    fn around() -> impl Strategy<Value = (String, bool)> {
        let class = prop_oneof![Just(""), Just("burstable"), Just("besteffort")];
        let before = prop_oneof![
            Just(""),
            Just("/.."),
            Just("/../.."),
            Just("/docker/77aa"),
            Just("/system.slice/k3s.service")
        ];
        (class, before, any::<bool>(), any::<bool>(), "[a-z0-9]{1,12}").prop_map(
            |(class, before, systemd, bare, container)| {
                let text = match (systemd, class, bare) {
                    (true, "", _) => format!("{before}/kubepods.slice/kubepods-podUID.slice/cri-{container}.scope"),
                    (true, class, true) => format!("{before}/kubepods-{class}-podUID.slice/cri-{container}.scope"),
                    (true, class, false) => format!(
                        "{before}/kubepods.slice/kubepods-{class}.slice/kubepods-{class}-podUID.slice/crio-{container}.scope"
                    ),
                    (false, "", _) => format!("{before}/kubepods/podUID/{container}"),
                    (false, _, true) => format!("{before}/podUID/{container}"),
                    (false, class, false) => format!("{before}/kubepods/{class}/podUID/{container}"),
                };
                (text, systemd)
            },
        )
    }

    proptest! {
        #[test]
        fn any_uid_is_found_wherever_it_stands(
            uid in "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
            (path, systemd) in around(),
            noise in prop::collection::vec("[0-9]{1,2}:[a-z_,=]{0,12}:(/|/user\\.slice|/init\\.scope)", 0..5),
            at in 0..5_usize,
        ) {
            let written = if systemd { uid.replace('-', "_") } else { uid.clone() };
            let mut lines = noise;
            lines.insert(at.min(lines.len()), format!("0::{}", path.replace("UID", &written)));
            prop_assert_eq!(found(&lines.join("\n")), Some(uid));
        }

        #[test]
        fn adversarial_no_text_makes_it_panic_or_name_what_is_no_uid(text in "(\\PC|/|:|\n|pod|kubepods|-|\\.slice){0,40}") {
            if let Some(uid) = pod_uid(&text) {
                prop_assert!(is_uid(uid.as_str()));
            }
        }
    }
}
