//! `burst`: pods that exactly fill the cluster's GPUs, made all at once, with the leading controller killed again and
//! again if wanted. At the end the books are made from the bound pods alone.
//!
//! A killed replica is started again only when the Lease has run out, so that another one must take over: one that is
//! back at once takes its own Lease and leads again, which is the easier case.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use tokio::task::JoinSet;

use crate::bench::report::{Figure, Report};
use crate::ebb_install::{EBB, ebb_program};
use crate::fleet::binds::BindWatch;
use crate::fleet::books::{Books, audit};
use crate::fleet::objects::{self, Ask, GIB, Nodes};
use crate::fleet::replica::{Binds, Replica};
use crate::fleet::scheduler::Extender;
use crate::fleet::service::Service;
use crate::fleet::{Fleet, progress};

/// Bytes of each GPU that pods can have.
const USABLE: u64 = 24 * GIB;
/// GPUs of each node.
const GPUS: u32 = 8;
/// What exactly fills one node: two pods with a card of their own, the other six cards shared.
const FILL: [(usize, Ask); 3] = [
    (
        2,
        Ask {
            bytes: USABLE,
            exclusive: true,
        },
    ),
    (
        6,
        Ask {
            bytes: USABLE / 2,
            exclusive: false,
        },
    ),
    (
        12,
        Ask {
            bytes: USABLE / 4,
            exclusive: false,
        },
    ),
];
/// Longest wait for all pods of the burst.
const STEP: Duration = Duration::from_secs(300);
/// So long a leader leads before it is killed.
const LEADS: Duration = Duration::from_secs(3);
/// A kubelet sees within about this time that a container has ended, and the endpoint goes.
const SEEN: Duration = Duration::from_secs(1);
/// So long a killed one is away: longer than the Lease lasts.
const DOWN: Duration = Duration::from_secs(7);
/// How often it is looked at who leads.
const LOOK: Duration = Duration::from_millis(20);

/// Arguments of the soak.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Args {
    /// Nodes of the cluster; each has 8 GPUs and is filled by 20 pods.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub nodes: u16,
    /// Kill the leading controller (SIGKILL) when it has led for 3 s, again and again.
    #[arg(long)]
    pub kill_leader: bool,
    /// Stop killing after so many.
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "kill_leader")]
    pub most_kills: usize,
}

/// What the burst came to.
#[derive(Debug)]
pub struct Outcome {
    /// Pods that were made.
    pub pods: usize,
    /// From the first pod that was made to the last that was bound.
    pub took: Duration,
    /// Who has what in the end.
    pub books: Books,
    /// How binds ended, as the controllers count; a killed one up to shortly before.
    pub binds: Binds,
    /// Every kill while pods waited.
    pub kills: Vec<Kill>,
    /// How long a Lease lasts.
    pub lease: Duration,
    gpus: usize,
}

/// From the kill of a leader …
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    /// … until another replica said that it leads.
    pub to_leader: Duration,
    /// … until the first bind after that.
    pub to_bind: Duration,
}

impl Outcome {
    /// Whether every pod is bound, every GPU exactly full, and nothing promised twice.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check(&self) -> anyhow::Result<()> {
        let books = &self.books;
        anyhow::ensure!(
            books.faults.is_empty(),
            "double bookings or worse: {:?}",
            books.faults
        );
        anyhow::ensure!(
            books.bound == self.pods && books.waiting == 0 && books.full_gpus == self.gpus,
            "{} of {} pods are bound, {} wait; {} of {} GPUs are full",
            books.bound,
            self.pods,
            books.waiting,
            books.full_gpus,
            self.gpus
        );
        Ok(())
    }

    /// Binds that landed where planned, in percent of those that were taken.
    #[must_use]
    pub fn planned(&self) -> f64 {
        percent(self.binds.planned, self.binds.planned + self.binds.elsewhere)
    }

    /// Binds that were refused and tried again, in percent of all.
    #[must_use]
    pub fn refused(&self) -> f64 {
        percent(self.binds.refused, self.binds.all())
    }
}

/// Runs it; bars that were missed go to `missed`.
pub(super) async fn run(args: Args, missed: &mut Vec<String>) -> anyhow::Result<Report> {
    progress("starting a cluster");
    let mut fleet = Fleet::start(ebb_program()?).await?;
    let outcome = burst(&fleet, args).await;
    if outcome.as_ref().map_or(true, |outcome| outcome.check().is_err()) {
        fleet.keep_dir();
    }
    let outcome = outcome?;
    progress("");
    let version = fleet.client.apiserver_version().await?.git_version;
    let name = if args.kill_leader {
        "burst-kill-leader"
    } else {
        "burst"
    };
    let mut report = Report::new(name, BTreeMap::from([("kubernetes".to_owned(), version)]));
    #[allow(clippy::cast_precision_loss, reason = "thousands of pods")]
    let mut figure = |name, value: f64, unit| report.figures.insert(name, Figure::of(&[value], unit));
    #[allow(clippy::cast_precision_loss, reason = "thousands of pods")]
    for (name, count) in [
        ("pods", outcome.pods),
        ("bound", outcome.books.bound),
        ("double_bookings", outcome.books.faults.len()),
    ] {
        figure(name, count as f64, "");
    }
    figure("seconds", outcome.took.as_secs_f64(), "s");
    figure("binds_planned", outcome.planned(), "%");
    figure("binds_refused", outcome.refused(), "%");
    if args.kill_leader {
        #[allow(clippy::cast_precision_loss, reason = "some kills")]
        figure("kills", outcome.kills.len() as f64, "");
        let (to_leader, to_bind) = longest(&outcome.kills);
        figure(
            "longest_kill_to_leader_ms",
            to_leader.as_secs_f64() * 1000.0,
            "ms",
        );
        figure(
            "longest_kill_to_next_bind_ms",
            to_bind.as_secs_f64() * 1000.0,
            "ms",
        );
        let most = outcome.lease + Duration::from_secs(1);
        if to_bind > most {
            missed.push(format!(
                "the next bind came {to_bind:?} after a kill; {most:?} is the most"
            ));
        }
        if outcome.kills.is_empty() {
            missed.push("no leader was killed while pods waited".to_owned());
        }
    } else {
        if outcome.refused() > 1.0 {
            missed.push(format!(
                "{:.2} % of the binds were refused; 1 % is the most",
                outcome.refused()
            ));
        }
        if outcome.planned() < 95.0 {
            missed.push(format!(
                "{:.2} % of the binds went where planned; 95 % is the least",
                outcome.planned()
            ));
        }
    }
    if let Err(error) = outcome.check() {
        missed.push(error.to_string());
    }
    Ok(report)
}

/// The burst itself, on a fleet that has no nodes and no controllers yet.
///
/// # Errors
/// When something did not start, or the pods were not all bound in time.
pub async fn burst(fleet: &Fleet, args: Args) -> anyhow::Result<Outcome> {
    let nodes = Nodes {
        count: args.nodes.into(),
        gpus: GPUS,
        usable: USABLE,
    };
    progress(&format!("making {} nodes with {GPUS} GPUs each", args.nodes));
    nodes.create(&fleet.client).await?;
    let service = Service::create(fleet).await?;
    let mut replicas = Vec::new();
    for number in 0..if args.kill_leader { 3 } else { 2 } {
        let replica = fleet.controller(number).await?;
        service.add(replica.ip).await?;
        replicas.push(replica);
    }
    leader(&replicas, STEP).await?;
    let _scheduler = fleet.scheduler(Extender::At(service.extender())).await?;

    let asks = shuffled(nodes.count);
    progress(&format!("making {} pods", asks.len()));
    let binds = BindWatch::start(&fleet.client);
    let began = Instant::now();
    let mut ended = Binds::default();
    let making = objects::create_pods(&fleet.client, "pod", &asks);
    let binding = async {
        if args.kill_leader {
            kill_leaders(args, asks.len(), &replicas, &service, &binds, &mut ended).await
        } else {
            binds.reach(asks.len(), STEP).await.map(|()| Vec::new())
        }
    };
    let ((), kills) = tokio::try_join!(making, binding)?;
    let took = binds.times().last().map_or(Duration::ZERO, |last| *last - began);
    for replica in replicas
        .iter()
        .filter(|replica| replica.program.ended().is_none())
    {
        // One that has just been started again may not tell yet, and has nothing to tell.
        ended += replica.binds().await.unwrap_or_default();
    }
    Ok(Outcome {
        pods: asks.len(),
        took,
        books: audit(&objects::pods(&fleet.client).await?, &nodes.all_gpus()),
        binds: ended,
        kills,
        lease: lease(fleet).await?,
        gpus: nodes.all_gpus().len(),
    })
}

/// Kills whoever leads, until all pods are bound.
async fn kill_leaders(
    args: Args,
    pods: usize,
    replicas: &[Replica],
    service: &Service,
    binds: &BindWatch,
    ended: &mut Binds,
) -> anyhow::Result<Vec<Kill>> {
    let mut kills = Vec::new();
    let mut later = JoinSet::new();
    while kills.len() < args.most_kills {
        let victim = leader(replicas, STEP).await?;
        // A small burst is killed within, not after.
        let within = (binds.count() + pods / 4).min(pods);
        tokio::select! {
            reached = binds.reach(within, STEP), if args.most_kills == 1 => reached?,
            () = tokio::time::sleep(LEADS) => {}
            all = binds.reach(pods, STEP) => all?,
        }
        if binds.count() >= pods {
            break;
        }
        *ended += victim.binds().await?;
        victim.kill().await?;
        let killed = Instant::now();
        progress(&format!(
            "{} of {pods} bound; killed {}",
            binds.count(),
            victim.program.name()
        ));
        let (back, front) = (victim.clone(), service.clone());
        later.spawn(async move {
            tokio::time::sleep(DOWN).await;
            back.program.restart().await?;
            back.serves().await?;
            front.add(back.ip).await
        });
        tokio::time::sleep(SEEN).await;
        service.remove(victim.ip).await?;
        leader(replicas, STEP).await?;
        let to_leader = killed.elapsed();
        let known = binds.count();
        if known < pods {
            binds.reach(known + 1, STEP).await?;
        }
        kills.push(Kill {
            to_leader,
            to_bind: killed.elapsed(),
        });
        progress(&format!(
            "  another led after {to_leader:.1?}, bound after {:.1?}",
            killed.elapsed()
        ));
        while let Some(back) = later.try_join_next() {
            back??;
        }
    }
    binds.reach(pods, STEP).await?;
    later.shutdown().await;
    Ok(kills)
}

/// Waits until one of them says that it leads.
async fn leader(replicas: &[Replica], limit: Duration) -> anyhow::Result<&Replica> {
    let found = async {
        loop {
            for replica in replicas
                .iter()
                .filter(|replica| replica.program.ended().is_none())
            {
                if replica.is_leading().await {
                    return replica;
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    let found = tokio::time::timeout(limit, found).await;
    found.with_context(|| format!("nobody led within {} s", limit.as_secs()))
}

async fn lease(fleet: &Fleet) -> anyhow::Result<Duration> {
    let lease = Api::<Lease>::namespaced(fleet.client.clone(), EBB)
        .get("ebb-controller")
        .await?;
    let seconds = lease.spec.and_then(|spec| spec.lease_duration_seconds);
    let seconds = seconds.context("the Lease does not say how long it lasts")?;
    Ok(Duration::from_secs(u64::try_from(seconds)?))
}

/// What fills so many nodes, in an order that is always the same and as good as any.
fn shuffled(nodes: usize) -> Vec<Ask> {
    let mut asks: Vec<Ask> = FILL
        .iter()
        .flat_map(|(count, ask)| std::iter::repeat_n(*ask, count * nodes))
        .collect();
    let mut state: u64 = 42;
    for index in (1..asks.len()).rev() {
        // Knuth's MMIX.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        #[allow(clippy::cast_possible_truncation, reason = "below the index")]
        let other = ((state >> 33) % (index as u64 + 1)) as usize;
        asks.swap(index, other);
    }
    asks
}

fn longest(kills: &[Kill]) -> (Duration, Duration) {
    let most = |of: fn(&Kill) -> Duration| kills.iter().map(of).max().unwrap_or_default();
    (most(|kill| kill.to_leader), most(|kill| kill.to_bind))
}

fn percent(part: u64, whole: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "thousands of binds")]
    let percent = part as f64 * 100.0 / whole.max(1) as f64;
    percent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_burst_exactly_fills_its_nodes() {
        let asks = shuffled(3);
        let bytes: u64 = asks.iter().map(|ask| ask.bytes).sum();
        assert_eq!(asks.len(), 60);
        assert_eq!(bytes, 3 * u64::from(GPUS) * USABLE);
        assert!(asks.iter().all(|ask| !ask.exclusive || ask.bytes == USABLE));
    }
}
