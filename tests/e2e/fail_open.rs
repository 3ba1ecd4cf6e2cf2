//! Parts of Ebb are taken away; an awake model goes on answering through its ClusterIP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::ensure;
use ebb_lab::demo::traffic::{self, Tally};
use ebb_lab::ebb_install::{EBB, MODELS};
use tokio_util::task::AbortOnDropHandle;

use crate::stage::{STEP, Stage};

const MODEL: &str = "tiny-chat";
/// Requests in a row that count as steady.
const STEADY: usize = 25;
/// Tokens of a stream that is open while something is taken away: about 8 s.
const STREAM: u32 = 320;

pub async fn all(stage: Stage<'_>) -> anyhow::Result<()> {
    stage.install().await?;
    let address = stage.wake(MODEL).await?;

    stage.scenario("a person turns gating off for one Service, and on again");
    mode_off(stage, address).await?;
    stage.scenario("every gate is killed at once while the controller lives");
    gates_killed(stage, address).await?;
    stage.scenario("the leader is killed: another controller goes on");
    leader_killed(stage, address).await?;
    stage.scenario("gates and controllers are told to stop");
    all_stopped(stage, address).await?;
    stage.scenario("Ebb's key is taken off by hand while its webhooks are gone");
    key_taken_off(stage, address).await
}

/// A stream that must come whole, whatever happens meanwhile. Returns once it has begun.
async fn open_stream(
    address: SocketAddr,
) -> anyhow::Result<AbortOnDropHandle<anyhow::Result<traffic::Answer>>> {
    let heard = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&heard);
    let (begun, begins) = tokio::sync::oneshot::channel();
    let mut begun = Some(begun);
    let stream = tokio::spawn(async move {
        let part = move |bytes| {
            counter.store(bytes, Relaxed);
            if let Some(begun) = begun.take() {
                let _ = begun.send(());
            }
        };
        traffic::stream(&Tally::default(), address, MODEL, STREAM, STEP, part).await
    });
    let stream = AbortOnDropHandle::new(stream);
    let _ = tokio::time::timeout(STEP, begins).await?;
    Ok(stream)
}

async fn mode_off(stage: Stage<'_>, address: SocketAddr) -> anyhow::Result<()> {
    let service = format!("service/{MODEL}");
    let stream = open_stream(address).await?;
    stage
        .site
        .kubectl(&["annotate", &service, "-n", MODELS, "ebb.dev/mode=off"])
        .await?;
    selector_has_key(stage, false).await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    stage.timeline.check("off: it answers, past the gates");
    stage
        .site
        .kubectl(&["annotate", &service, "-n", MODELS, "ebb.dev/mode-"])
        .await?;
    selector_has_key(stage, true).await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    let answer = stream.await??;
    stage.timeline.check(format!(
        "on again: it answers; the stream came whole, {} tokens",
        answer.tokens()
    ));
    Ok(())
}

/// Waits until the Service's selector has Ebb's key, or has it no more.
async fn selector_has_key(stage: Stage<'_>, wanted: bool) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + STEP;
    loop {
        let service = format!("service/{MODEL}");
        let selector = stage
            .site
            .kubectl(&["get", &service, "-n", MODELS, "-o", "jsonpath={.spec.selector}"])
            .await?;
        if selector.contains("ebb.dev/gated") == wanted {
            return Ok(());
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "the selector is {selector}, wanted with Ebb's key: {wanted}"
        );
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

/// Kills the processes of all containers of Ebb's pods whose names start with `prefix`.
fn kill(stage: Stage<'_>, prefix: &str) -> anyhow::Result<usize> {
    let mut killed = 0;
    for (pod, log) in stage.site.logs(EBB, prefix) {
        let Ok(pid) = std::fs::read_to_string(log.with_extension("pid")) else {
            continue;
        };
        let status = std::process::Command::new("kill")
            .args(["-KILL", pid.trim()])
            .status()?;
        ensure!(status.success(), "{pod} could not be killed");
        killed += 1;
    }
    ensure!(killed > 0, "no process of {prefix} was found");
    Ok(killed)
}

async fn gates_killed(stage: Stage<'_>, address: SocketAddr) -> anyhow::Result<()> {
    let killed = kill(stage, "ebb-gate")?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    stage.timeline.check(format!("{killed} gates killed: it answers"));
    stage.site.ebb_ready(STEP).await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    stage.timeline.check("the gates are back: it answers");
    Ok(())
}

async fn leader_killed(stage: Stage<'_>, address: SocketAddr) -> anyhow::Result<()> {
    let holder = [
        "get",
        "lease",
        "ebb-controller",
        "-n",
        EBB,
        "-o",
        "jsonpath={.spec.holderIdentity}",
    ];
    let leader = stage.site.kubectl(&holder).await?;
    let pod = leader.split('_').next().unwrap_or_default().to_owned();
    // Its process would be back at once and lead again: the pod goes, without a word to the process.
    let delete = [
        "delete",
        "pod",
        &pod,
        "-n",
        EBB,
        "--grace-period=0",
        "--force",
        "--wait=false",
    ];
    stage.site.kubectl(&delete).await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    let deadline = tokio::time::Instant::now() + STEP;
    loop {
        let now = stage.site.kubectl(&holder).await?;
        if !now.is_empty() && !now.starts_with(&pod) {
            stage.timeline.check(format!("{now} leads now"));
            break;
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "nobody took over from {leader}"
        );
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    // The new leader schedules: a model that sleeps wakes.
    stage.wake("code").await?;
    stage.timeline.check("a sleeping model woke under the new leader");
    stage.site.ebb_ready(STEP).await
}

async fn all_stopped(stage: Stage<'_>, address: SocketAddr) -> anyhow::Result<()> {
    let stream = open_stream(address).await?;
    stage
        .site
        .kubectl(&[
            "scale",
            "deployment/ebb-gate",
            "deployment/ebb-controller",
            "-n",
            EBB,
            "--replicas=0",
        ])
        .await?;
    stage
        .observer()
        .until("gates and controllers are gone", STEP, |state| {
            let there = |name: &String| {
                name.starts_with("ebb-system/ebb-gate") || name.starts_with("ebb-system/ebb-controller")
            };
            (!state.pods.keys().any(there)).then_some(())
        })
        .await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    let answer = stream.await??;
    stage.timeline.check(format!(
        "none is left: it answers; the stream came whole, {} tokens",
        answer.tokens()
    ));
    let up = [
        "scale",
        "deployment/ebb-gate",
        "deployment/ebb-controller",
        "-n",
        EBB,
        "--replicas=2",
    ];
    stage.site.kubectl(&up).await?;
    stage.site.ebb_ready(STEP).await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    stage.timeline.check("they are back: it answers");
    Ok(())
}

async fn key_taken_off(stage: Stage<'_>, address: SocketAddr) -> anyhow::Result<()> {
    // As somebody does who uninstalls in the wrong order, or in an emergency.
    stage
        .site
        .kubectl(&["scale", "deployment/ebb-controller", "-n", EBB, "--replicas=0"])
        .await?;
    stage
        .observer()
        .until("the controllers are gone", STEP, |state| {
            (!state
                .pods
                .keys()
                .any(|name| name.starts_with("ebb-system/ebb-controller")))
            .then_some(())
        })
        .await?;
    for kind in ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"] {
        stage
            .site
            .kubectl(&["delete", kind, "ebb", "--ignore-not-found"])
            .await?;
    }
    let remove = r#"[{"op":"remove","path":"/spec/selector/ebb.dev~1gated"}]"#;
    let service = format!("service/{MODEL}");
    stage
        .site
        .kubectl(&["patch", &service, "-n", MODELS, "--type=json", "-p", remove])
        .await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    stage
        .site
        .kubectl(&["delete", "deployment/ebb-gate", "-n", EBB, "--wait=true"])
        .await?;
    stage.answers_steadily(address, MODEL, STEADY).await?;
    stage
        .timeline
        .check("without gates, controllers and webhooks: it answers");
    Ok(())
}
