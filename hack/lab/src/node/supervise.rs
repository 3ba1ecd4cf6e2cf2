//! Watching over one run of a container: probes, hooks, and its end.

use super::container::{Instance, Order, Runner};
use super::pod::PodContext;
use super::probes;
use super::process::Running;
use k8s_openapi::api::core::v1::Probe;
use nix::sys::signal::Signal;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

/// The least time between SIGTERM and SIGKILL, whatever a hook has used up.
const LEAST_GRACE: Duration = Duration::from_secs(2);

impl Runner {
    /// Watches a run to its end: its own, by a failed probe, or as ordered.
    pub(super) async fn supervise(&mut self, running: &mut Running, instance: &Arc<Instance>) -> ExitStatus {
        let (started, has_started) = watch::channel(false);
        let readiness = AbortOnDropHandle::new(tokio::spawn(readiness(
            Arc::clone(&self.cx),
            Arc::clone(instance),
            has_started,
        )));
        let verdict = {
            let judged = judge(Arc::clone(&self.cx), Arc::clone(instance), started.clone());
            let mut judged = std::pin::pin!(judged);
            tokio::select! {
                status = running.wait() => return status,
                verdict = &mut judged => Some(verdict),
                () = told_to_stop(&mut self.order) => None,
            }
        };
        let name = &self.container.name;
        let deadline = match verdict {
            Some((why, grace)) => {
                instance.event(
                    "Normal",
                    "Killing",
                    format!("Container {name} {why}, will be restarted"),
                );
                Instant::now() + grace.unwrap_or_else(|| self.cx.grace())
            }
            None => {
                instance.event("Normal", "Killing", format!("Stopping container {name}"));
                Instant::now() + self.cx.grace()
            }
        };
        let status = self.stop(running, instance, deadline).await;
        drop(readiness);
        status
    }

    /// preStop, SIGTERM, patience, SIGKILL.
    async fn stop(
        &mut self,
        running: &mut Running,
        instance: &Arc<Instance>,
        fallback: Instant,
    ) -> ExitStatus {
        let order = self.order.clone();
        let deadline = move || match *order.borrow() {
            Order::Run => fallback,
            Order::Stop(until) => until,
            Order::Kill => Instant::now(),
        };
        let mut order_seen = self.order.clone();
        let hook = self
            .container
            .lifecycle
            .as_ref()
            .and_then(|lifecycle| lifecycle.pre_stop.clone());
        if let Some(hook) = hook.filter(|_| deadline() > Instant::now()) {
            tokio::select! {
                status = running.wait() => return status,
                result = self.cx.runtime.hook(instance, &hook) => {
                    if let Err(message) = result {
                        instance.event("Warning", "FailedPreStopHook", format!("PreStopHook failed: {message}"));
                    }
                }
                () = until(&mut order_seen, &deadline) => {}
            }
        }
        let killed = *self.order.borrow() == Order::Kill;
        if !killed {
            let least = Instant::now() + LEAST_GRACE;
            let mut order = self.order.clone();
            let patient = || {
                if *self.order.borrow() == Order::Kill {
                    Instant::now()
                } else {
                    deadline().max(least)
                }
            };
            running.signal(self.stop_signal());
            tokio::select! {
                status = running.wait() => return status,
                () = until(&mut order, &patient) => {}
            }
        }
        running.kill();
        running.wait().await
    }

    fn stop_signal(&self) -> Signal {
        let wanted = self
            .container
            .lifecycle
            .as_ref()
            .and_then(|lifecycle| lifecycle.stop_signal.as_deref());
        wanted
            .and_then(|name| name.parse().ok())
            .unwrap_or(Signal::SIGTERM)
    }
}

/// Returns once `order` is no longer to run.
pub async fn told_to_stop(order: &mut watch::Receiver<Order>) {
    // A closed channel means that the pod's worker is gone, and its containers have to follow.
    let _ = order.wait_for(|order| *order != Order::Run).await;
}

/// Sleeps until `deadline`, which changes with `order`.
async fn until(order: &mut watch::Receiver<Order>, deadline: &impl Fn() -> Instant) {
    loop {
        tokio::select! {
            () = sleep_until(deadline()) => return,
            changed = order.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Runs the postStart hook, then startup and liveness probes; returns why the container has to be killed, and its grace.
async fn judge(
    cx: Arc<PodContext>,
    instance: Arc<Instance>,
    started: watch::Sender<bool>,
) -> (String, Option<Duration>) {
    let container = &instance.container;
    let grace = |probe: &Probe| {
        probe
            .termination_grace_period_seconds
            .and_then(|s| u64::try_from(s).ok())
            .map(Duration::from_secs)
    };
    if let Some(hook) = container
        .lifecycle
        .as_ref()
        .and_then(|lifecycle| lifecycle.post_start.as_ref())
        && let Err(message) = cx.runtime.hook(&instance, hook).await
    {
        instance.event(
            "Warning",
            "FailedPostStartHook",
            format!("PostStartHook failed: {message}"),
        );
        return ("failed its postStart hook".to_owned(), None);
    }
    if let Some(probe) = &container.startup_probe {
        let mut passed = false;
        probes::series(&instance, probes::Kind::Startup, probe, |ok, _| {
            passed = ok;
            false
        })
        .await;
        if !passed {
            return ("failed startup probe".to_owned(), grace(probe));
        }
    }
    let ready = container.readiness_probe.is_none();
    cx.update_running(&instance, |status| {
        status.started = Some(true);
        status.ready = ready;
    });
    let _ = started.send(true);
    if let Some(probe) = &container.liveness_probe {
        probes::series(&instance, probes::Kind::Liveness, probe, |ok, _| ok).await;
        return ("failed liveness probe".to_owned(), grace(probe));
    }
    std::future::pending().await
}

/// Runs the readiness probe for as long as the process lives, its termination included.
async fn readiness(cx: Arc<PodContext>, instance: Arc<Instance>, mut started: watch::Receiver<bool>) {
    let Some(probe) = &instance.container.readiness_probe else {
        return;
    };
    if started.wait_for(|started| *started).await.is_err() {
        return;
    }
    probes::series(&instance, probes::Kind::Readiness, probe, |ok, _| {
        cx.update_running(&instance, |status| status.ready = ok);
        true
    })
    .await;
}
