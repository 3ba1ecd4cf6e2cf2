//! A cluster for one test, and what all tests do on it.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ebb_lab::demo::failure;
use ebb_lab::demo::observe::{Observer, is_ready};
use ebb_lab::demo::timeline::Timeline;
use ebb_lab::demo::traffic::{self, Tally};
use ebb_lab::ebb_install::{MODELS, Plan, SAMPLE_MODELS, SAMPLE_SCALE_POLICY, Site};

/// Longest wait for one thing.
pub const STEP: Duration = Duration::from_secs(60);
/// Longest that one test takes.
const LIMIT: Duration = Duration::from_secs(300);

/// What a test has.
#[derive(Clone, Copy)]
pub struct Stage<'a> {
    pub site: &'a Site,
    pub timeline: &'a Timeline,
}

type Scenario<'a> = Pin<Box<dyn Future<Output = anyhow::Result<()>> + 'a>>;

/// Runs a test on a cluster with one GPU node, and explains what was the matter if it fails.
pub fn on_a_site(test: impl for<'a> FnOnce(Stage<'a>) -> Scenario<'a>) {
    on_a_site_of(|_| (), test);
}

/// The same on another site than the usual one.
pub fn on_a_site_of(change: impl FnOnce(&mut Plan), test: impl for<'a> FnOnce(Stage<'a>) -> Scenario<'a>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let timeline = Timeline::new();
        let mut plan = Plan::new(env!("CARGO_BIN_EXE_ebb"));
        change(&mut plan);
        let mut site = Site::start(plan).await.unwrap();
        let _feed = timeline.follow(site.observer.listen());
        let stage = Stage {
            site: &site,
            timeline: &timeline,
        };
        let done = tokio::time::timeout(LIMIT, test(stage)).await;
        let done = done.unwrap_or_else(|_| Err(anyhow::anyhow!("not done within {} s", LIMIT.as_secs())));
        if let Err(error) = &done {
            failure::explain(&site, &timeline);
            timeline.failed(format!("{error:#}"));
            site.keep_dir();
        }
        site.nodes.power_off().await;
        drop(site);
        if let Err(error) = done {
            panic!("{error:#}");
        }
    });
}

impl<'a> Stage<'a> {
    pub fn observer(&self) -> &'a Observer {
        &self.site.observer
    }

    /// Says which scenario is on.
    pub fn scenario(&self, attack: &str) {
        self.timeline.chapter(attack);
    }

    /// Ebb, and a policy under which nothing sleeps by itself; no node is released: scenarios say what happens.
    pub async fn install(&self) -> anyhow::Result<()> {
        self.install_with(SAMPLE_MODELS).await
    }

    /// The same with other models.
    pub async fn install_with(&self, models: &str) -> anyhow::Result<()> {
        self.site.install_ebb().await?;
        let still = SAMPLE_SCALE_POLICY.replace("idleAfter: 6s", "idleAfter: 1h");
        ensure!(
            still != SAMPLE_SCALE_POLICY,
            "the sample policy has another time than this test knows"
        );
        self.site.apply_policy(&still).await?;
        self.site.apply(models).await.map(drop)
    }

    /// Wakes a model by a request through its Service; the Service's address.
    pub async fn wake(&self, model: &str) -> anyhow::Result<SocketAddr> {
        let address = self.site.address(MODELS, model).await?;
        self.site.reachable(address, STEP).await?;
        traffic::chat(&Tally::default(), address, model, 1, STEP).await?;
        let workload = format!("{MODELS}/{model}");
        let ready = self.observer().until("the woken pod is Ready", STEP, |state| {
            state.pods_of(&workload).any(is_ready).then_some(())
        });
        ready.await?;
        Ok(address)
    }

    /// Waits until requests to an awake model are answered, `times` in a row and each on a new connection.
    pub async fn answers_steadily(
        &self,
        address: SocketAddr,
        model: &str,
        times: usize,
    ) -> anyhow::Result<()> {
        let mut last = None;
        let steady = async {
            let mut in_a_row = 0;
            while in_a_row < times {
                let limit = Duration::from_secs(5);
                match traffic::chat(&Tally::default(), address, model, 1, limit).await {
                    Ok(_) => in_a_row += 1,
                    Err(error) => {
                        in_a_row = 0;
                        last = Some(format!("{error:#}"));
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let steady = tokio::time::timeout(STEP, steady).await;
        let last = last.unwrap_or_default();
        steady.with_context(|| {
            format!("{model} does not answer steadily at {address}; the last failure: {last}")
        })
    }
}
