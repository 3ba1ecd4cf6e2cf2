//! Whether a wake that is under way cannot succeed, so that requests which wait for it are told at once.

/// What is known of one pod of a waking workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its name.
    pub name: String,
    /// Whether it serves.
    pub ready: bool,
    /// Whether it is being deleted.
    pub terminating: bool,
    /// Each container that waits: its name, reason and message.
    pub waiting: Vec<(String, String, String)>,
    /// Why no node will ever take it, if none will.
    pub never_placed: Option<String>,
}

/// What is known of a waking workload.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Replicas asked for.
    pub replicas: u32,
    /// Replicas that serve.
    pub ready: u32,
    /// A Deployment that is paused and never had a ReplicaSet: nothing will start pods.
    pub paused_before_first_rollout: bool,
    /// What refused its pods (quota, admission), as Kubernetes words it.
    pub refused: Option<String>,
    /// Its pods.
    pub pods: Vec<PodFacts>,
}

/// Reasons with which a container waits that do not pass by waiting a little.
const HOPELESS: [&str; 7] = [
    "CrashLoopBackOff",
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
];
/// Kubernetes' messages can hold whole stack traces.
const MESSAGE_LIMIT: usize = 300;

/// Why the wake cannot succeed; `None`: it may.
#[must_use]
pub fn decide(facts: &Facts) -> Option<String> {
    if facts.replicas == 0 || facts.ready > 0 {
        return None;
    }
    if facts.paused_before_first_rollout {
        return Some("its Deployment is paused and has no ReplicaSet: kubectl rollout resume".to_owned());
    }
    let pods: Vec<&PodFacts> = facts.pods.iter().filter(|pod| !pod.terminating).collect();
    if pods.is_empty() {
        return facts
            .refused
            .as_ref()
            .map(|message| format!("its pods are refused: {}", short(message)));
    }
    // As long as one pod may still come up, the wake may succeed.
    let mut first = None;
    for pod in pods {
        let failure = failure(pod)?;
        first.get_or_insert(failure);
    }
    first
}

fn failure(pod: &PodFacts) -> Option<String> {
    if pod.ready {
        return None;
    }
    if let Some(reason) = &pod.never_placed {
        return Some(format!("pod {} {reason}", pod.name));
    }
    pod.waiting
        .iter()
        .find(|(_, reason, _)| HOPELESS.contains(&reason.as_str()))
        .map(|(container, reason, message)| {
            let message = short(message);
            let colon = if message.is_empty() { "" } else { ": " };
            format!(
                "pod {}, container {container}: {reason}{colon}{message}",
                pod.name
            )
        })
}

fn short(message: &str) -> String {
    let mut text: String = message.chars().take(MESSAGE_LIMIT).collect();
    if text.len() < message.len() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(reason: &str) -> PodFacts {
        PodFacts {
            name: "a-1".to_owned(),
            waiting: vec![("server".to_owned(), reason.to_owned(), "no such image".to_owned())],
            ..PodFacts::default()
        }
    }

    fn waking(pods: Vec<PodFacts>) -> Facts {
        Facts {
            replicas: 1,
            pods,
            ..Facts::default()
        }
    }

    #[test]
    fn an_image_that_cannot_be_pulled_is_said() {
        assert_eq!(
            decide(&waking(vec![pod("ImagePullBackOff")])).as_deref(),
            Some("pod a-1, container server: ImagePullBackOff: no such image")
        );
        assert_eq!(decide(&waking(vec![pod("ContainerCreating")])), None);
    }

    #[test]
    fn one_pod_that_may_come_up_is_enough_hope() {
        assert_eq!(
            decide(&waking(vec![pod("CrashLoopBackOff"), pod("ContainerCreating")])),
            None
        );
        let serving = Facts {
            ready: 1,
            ..waking(vec![pod("CrashLoopBackOff")])
        };
        assert_eq!(decide(&serving), None);
    }

    #[test]
    fn a_quota_refusal_counts_only_without_pods() {
        let refused = Facts {
            refused: Some("exceeded quota: gpu".to_owned()),
            ..waking(Vec::new())
        };
        assert_eq!(
            decide(&refused).as_deref(),
            Some("its pods are refused: exceeded quota: gpu")
        );
        let old = Facts {
            pods: vec![pod("ContainerCreating")],
            ..refused
        };
        assert_eq!(decide(&old), None);
    }

    #[test]
    fn adversarial_long_messages_are_cut() {
        let mut long = pod("CrashLoopBackOff");
        long.waiting[0].2 = "é".repeat(10_000);
        assert!(decide(&waking(vec![long])).is_some_and(|text| text.len() < 1000));
    }
}
