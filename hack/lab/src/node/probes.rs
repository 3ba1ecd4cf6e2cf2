//! Startup, readiness and liveness probes: when they run and what they decide.

use super::call;
use super::container::Instance;
use k8s_openapi::api::core::v1::{ExecAction, Probe};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};

/// The most that is kept of what a probe or hook prints.
const OUTPUT: usize = 10 * 1024;

/// Which of the three a probe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Holds the other two until the container has started.
    Startup,
    /// Decides whether the pod gets traffic.
    Readiness,
    /// Decides whether the container is killed and started again.
    Liveness,
}

impl Kind {
    /// The word in messages.
    pub fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }
}

/// Counts results in a row against the two thresholds.
#[derive(Debug)]
pub struct Counter {
    success: u32,
    failure: u32,
    last: Option<bool>,
    run: u32,
}

impl Counter {
    /// A counter with the thresholds of `probe`.
    pub fn new(probe: &Probe) -> Self {
        let threshold = |value: Option<i32>, default: u32| {
            value
                .and_then(|v| u32::try_from(v).ok())
                .unwrap_or(default)
                .max(1)
        };
        Self {
            success: threshold(probe.success_threshold, 1),
            failure: threshold(probe.failure_threshold, 3),
            last: None,
            run: 0,
        }
    }

    /// Takes one result; answers a verdict once enough in a row agree.
    pub fn observe(&mut self, ok: bool) -> Option<bool> {
        if self.last == Some(ok) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(ok);
            self.run = 1;
        }
        let needed = if ok { self.success } else { self.failure };
        (self.run >= needed).then_some(ok)
    }
}

/// When a probe runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    delay: Duration,
    period: Duration,
    timeout: Duration,
}

impl Timing {
    /// The timing of `probe`, defaults filled in.
    pub fn new(probe: &Probe) -> Self {
        let seconds = |value: Option<i32>, default: u64| {
            Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default))
        };
        Self {
            delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10).max(Duration::from_secs(1)),
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
        }
    }

    /// The pause before the first probe on a node that is up for `age`: a kubelet that has just
    /// started spreads the probes of all its pods over their period.
    pub fn jitter(&self, age: Duration, random: f64) -> Duration {
        if self.period > age {
            self.period.mul_f64(random.clamp(0.0, 1.0))
        } else {
            Duration::ZERO
        }
    }
}

/// A number in [0, 1), good enough to spread probes.
pub fn random() -> f64 {
    let bits = u32::try_from(RandomState::new().hash_one(0) >> 32).unwrap_or(0);
    f64::from(bits) / (f64::from(u32::MAX) + 1.0)
}

/// Runs `probe` on and on, calling `verdict` with each verdict and the last message, until that answers false.
pub async fn series(
    instance: &Instance,
    kind: Kind,
    probe: &Probe,
    mut verdict: impl FnMut(bool, &str) -> bool + Send,
) {
    let timing = Timing::new(probe);
    let mut counter = Counter::new(probe);
    tokio::time::sleep(timing.jitter(instance.node_age(), random())).await;
    let mut ticks = tokio::time::interval(timing.period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        // The kubelet counts whole seconds since the start and skips the tick, it does not wait for the delay's end.
        if instance.started.elapsed() < timing.delay {
            continue;
        }
        let result = once(instance, probe, timing.timeout).await;
        let message = result.as_ref().err().map_or("", String::as_str);
        if result.is_err() {
            instance.event(
                "Warning",
                "Unhealthy",
                format!("{} probe failed: {message}", kind.title()),
            );
        }
        if let Some(ok) = counter.observe(result.is_ok())
            && !verdict(ok, message)
        {
            return;
        }
    }
}

async fn once(instance: &Instance, probe: &Probe, timeout: Duration) -> Result<(), String> {
    let began = Instant::now();
    let action = async {
        if let Some(action) = &probe.exec {
            exec(instance, action).await.map(drop)
        } else if let Some(action) = &probe.http_get {
            call::http(&instance.container, &instance.pod_ip, action).await
        } else if let Some(action) = &probe.tcp_socket {
            let host = action
                .host
                .as_deref()
                .filter(|host| !host.is_empty())
                .unwrap_or(&instance.pod_ip);
            call::tcp(host, call::port(&instance.container, &action.port)?).await
        } else if let Some(action) = &probe.grpc {
            let port =
                u16::try_from(action.port).map_err(|_| format!("invalid port number: {}", action.port))?;
            call::grpc(&instance.pod_ip, port, action.service.as_deref().unwrap_or("")).await
        } else {
            Err("missing probe handler".to_owned())
        }
    };
    match tokio::time::timeout(timeout, action).await {
        Ok(result) => result,
        Err(_) => Err(format!(
            "command or request timed out after {:?}",
            began.elapsed().max(timeout)
        )),
    }
}

/// Runs a command beside the container's process; its output, bounded.
///
/// # Errors
/// The output, when the command fails.
pub async fn exec(instance: &Instance, action: &ExecAction) -> Result<String, String> {
    let command = action.command.clone().unwrap_or_default();
    let (status, output) = Arc::clone(&instance.runtime)
        .exec(instance, &command, OUTPUT)
        .await
        .map_err(|e| e.to_string())?;
    if status.success() {
        Ok(output)
    } else {
        Err(if output.is_empty() {
            status.to_string()
        } else {
            output
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn probe(success: i32, failure: i32) -> Probe {
        Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            ..Probe::default()
        }
    }

    #[test]
    fn verdicts_need_enough_in_a_row() {
        let mut counter = Counter::new(&probe(2, 3));
        let verdicts: Vec<_> = [false, false, true, true, false, false, false, false]
            .map(|ok| counter.observe(ok))
            .into();
        assert_eq!(
            verdicts,
            [None, None, None, Some(true), None, None, Some(false), Some(false)]
        );
    }

    #[test]
    fn defaults_are_the_apis() {
        let timing = Timing::new(&Probe::default());
        assert_eq!(
            (
                timing.period.as_secs(),
                timing.timeout.as_secs(),
                timing.delay.as_secs()
            ),
            (10, 1, 0)
        );
        let zero = Timing::new(&Probe {
            period_seconds: Some(0),
            timeout_seconds: Some(-1),
            ..Probe::default()
        });
        assert_eq!((zero.period.as_secs(), zero.timeout.as_secs()), (1, 1));
    }

    #[test]
    fn only_a_young_node_spreads_its_probes() {
        let timing = Timing::new(&Probe::default());
        assert_eq!(timing.jitter(Duration::from_secs(60), 0.9), Duration::ZERO);
        assert_eq!(timing.jitter(Duration::from_secs(1), 0.5), Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn a_verdict_is_what_was_just_seen(results in prop::collection::vec(any::<bool>(), 0..64), s in 1..5, f in 1..5) {
            let mut counter = Counter::new(&probe(s, f));
            let mut streak = 0;
            let mut last = None;
            for ok in results {
                streak = if last == Some(ok) { streak + 1 } else { 1 };
                last = Some(ok);
                let due = streak >= if ok { s } else { f };
                prop_assert_eq!(counter.observe(ok), due.then_some(ok));
            }
        }
    }
}
