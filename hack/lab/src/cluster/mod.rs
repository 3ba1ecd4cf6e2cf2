//! A real Kubernetes control plane in the namespaces of `hack/isolate`.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use ebb_lab::cluster::{Cluster, Options};
//! let cluster = Cluster::up(Options::default()).await?;
//! let client = cluster.client();
//! cluster.kubectl(&["get", "namespaces"]).await?.success()?;
//! cluster.down().await;
//! # Ok(()) }
//! ```
//!
//! `namespace` gives it addresses, `certificates` its keys, `control_plane` the
//! flags of each program, `programs` starts and ends them, `kubectl` and
//! `client` talk to it, `folder` keeps its files and `record` tells
//! `hack/enter` about it. This file puts them in order.

mod certificates;
mod client;
mod control_plane;
mod folder;
mod kubectl;
mod namespace;
mod programs;
mod record;
mod up;

pub use kubectl::Output;
pub use namespace::{CONTROL_PLANE_IP, KUBERNETES_SERVICE_IP, POD_RANGE, SERVICE_RANGE};
pub use programs::{Program, STOP_LIMIT, Signal, tail};
pub use up::{Args, run};

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use certificates::Certificates;
use control_plane::ControlPlane;
use folder::Folder;
use kubectl::Kubectl;
use namespace::Namespace;
use record::Record;

/// The API server, for everything inside the isolate.
pub const API_SERVER: &str = "https://10.77.0.1:6443";

/// What a cluster is made of, and for how long one waits for it.
#[derive(Debug, Clone)]
pub struct Options {
    /// The folder with the six programs; else `EBB_CONTROLPLANE`, else what `hack/build-controlplane` built.
    pub programs: Option<PathBuf>,
    /// Keep the folder (logs, data) when the cluster ends. `EBB_LAB_KEEP=1` does the same.
    pub keep: bool,
    /// Further flags for kube-apiserver.
    pub apiserver_flags: Vec<String>,
    /// How long each step of coming up may take.
    pub step_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            programs: None,
            keep: std::env::var("EBB_LAB_KEEP").is_ok_and(|value| value == "1"),
            apiserver_flags: Vec::new(),
            // Generous: a busy machine is no failure, and a program that ends is seen at once.
            step_limit: Duration::from_secs(90),
        }
    }
}

/// A running cluster. Dropping it ends everything it started, last started first.
pub struct Cluster {
    // In the order in which they are dropped.
    record: Option<Record>,
    children: Mutex<Vec<Program>>,
    client: kube::Client,
    kubectl: Kubectl,
    kubeconfig: PathBuf,
    programs: PathBuf,
    namespace: Option<Namespace>,
    folder: Option<Folder>,
    dir: PathBuf,
    turn: Option<OwnedSemaphorePermit>,
}

impl Cluster {
    /// Brings a control plane up: etcd, kube-apiserver, kube-controller-manager, kube-scheduler and
    /// kube-proxy, all answering. A process has one at a time; a second call waits for the first to end.
    ///
    /// # Errors
    /// Outside of `hack/isolate`, without the programs, or with the tail of the log of the program that
    /// did not get ready.
    pub async fn up(options: Options) -> anyhow::Result<Self> {
        let turn = turn().await?;
        // Two crypto providers in one tree make rustls panic at first use.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let namespace = Namespace::set_up()?;
        let programs = match options.programs.clone() {
            Some(dir) => dir,
            None => control_plane::find_programs()?,
        };
        let folder = Folder::create(options.keep)?;
        let dir = folder.path().to_owned();
        let certificates = Certificates::create(&dir.join("certificates"), API_SERVER)?;
        let kubeconfig = certificates.client("admin", "lab-admin", Some("system:masters"))?;
        certificates.client("controller-manager", "system:kube-controller-manager", None)?;
        certificates.client("scheduler", "system:kube-scheduler", None)?;
        certificates.client("proxy", "system:kube-proxy", None)?;
        certificates.client("kubelet-client", "lab-apiserver", Some("system:masters"))?;

        let mut cluster = Self {
            record: None,
            children: Mutex::default(),
            client: crate::client::from_kubeconfig(&kubeconfig).await?,
            kubectl: Kubectl::new(&programs, &kubeconfig, &dir),
            kubeconfig,
            programs,
            namespace: Some(namespace),
            folder: Some(folder),
            dir,
            turn: Some(turn),
        };
        cluster.start(&certificates, &options).await?;
        cluster.record = Record::write(&cluster.dir, &cluster.kubeconfig, &cluster.programs)?;
        Ok(cluster)
    }

    async fn start(&self, certificates: &Certificates, options: &Options) -> anyhow::Result<()> {
        let plane = ControlPlane {
            programs: &self.programs,
            dir: &self.dir,
            certificates,
            apiserver_flags: &options.apiserver_flags,
        };
        // Nothing of the control plane needs its time to end: all it holds goes away with it. The API
        // server and etcd get a moment, so that what others still write ends in an answer.
        let brief = Duration::from_millis(500);
        let limit = options.step_limit;
        let etcd = self.start_program("etcd", plane.etcd(), brief)?;
        let apiserver = self.start_program("kube-apiserver", plane.apiserver(), brief)?;
        wait_for(&[&apiserver, &etcd], "answer /readyz", limit, || {
            client::is_ready(&self.client)
        })
        .await?;

        // kube-proxy waits half a minute for the Node it runs on, and then does without. There is no
        // kubelet in here, and a Node that stays would be one more place for the scheduler to look at.
        client::create_proxy_node(&self.client).await?;
        let manager = self.start_program("kube-controller-manager", plane.controller_manager(), brief)?;
        let scheduler = self.start_program("kube-scheduler", plane.scheduler()?, brief)?;
        let proxy = self.start_program("kube-proxy", plane.proxy()?, brief)?;
        wait_for(&[&proxy], "make ClusterIPs work", limit, || {
            client::cluster_ip_works()
        })
        .await?;
        client::delete_proxy_node(&self.client).await?;
        wait_for(&[&manager], "make the default ServiceAccount", limit, || {
            client::has_default_service_account(&self.client)
        })
        .await?;
        wait_for(&[&scheduler], "answer /healthz", limit, || {
            client::scheduler_is_healthy()
        })
        .await
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A client with the administrator's rights. It has no rate limit of its own.
    #[must_use]
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// The folder with the data, certificates and logs of this cluster.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps that folder when the cluster ends: something went wrong, and its logs say what.
    pub fn keep_dir(&mut self) {
        if let Some(folder) = &mut self.folder {
            folder.keep();
        }
    }

    /// The folder with the control plane's programs, kubectl among them.
    #[must_use]
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// Runs kubectl as the administrator. A command that fails is no error: see [`Output::success`].
    ///
    /// # Errors
    /// If kubectl cannot be run or does not end.
    pub async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        self.kubectl.run(arguments, None).await
    }

    /// [`Self::kubectl`] with a text on its stdin (`-f -`).
    ///
    /// # Errors
    /// If kubectl cannot be run or does not end.
    pub async fn kubectl_with(&self, arguments: &[&str], stdin: &str) -> anyhow::Result<Output> {
        self.kubectl.run(arguments, Some(stdin)).await
    }

    /// `kubectl apply` of YAML or JSON text.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub async fn apply(&self, manifests: &str) -> anyhow::Result<Output> {
        self.kubectl_with(&["apply", "-f", "-"], manifests)
            .await?
            .success()
    }

    /// `kubectl apply` of a file or a folder.
    ///
    /// # Errors
    /// If the path is not text or the API server refuses it.
    pub async fn apply_path(&self, path: &Path) -> anyhow::Result<Output> {
        let path = path.to_str().context("the path of the manifests is no text")?;
        self.kubectl(&["apply", "-f", path]).await?.success()
    }

    /// Starts a program that ends with the cluster. Its log is `NAME.log` in [`Self::dir`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, name: &str, command: Command) -> anyhow::Result<Program> {
        self.start_program(name, command, STOP_LIMIT)
    }

    fn start_program(&self, name: &str, command: Command, stop_limit: Duration) -> anyhow::Result<Program> {
        let log = self.dir.join(format!("{name}.log"));
        let program = Program::start(name, command, log, stop_limit)?;
        self.children
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(program.clone());
        Ok(program)
    }

    /// One of the programs by name: those of the control plane (`kube-apiserver`, …) and those spawned.
    #[must_use]
    pub fn program(&self, name: &str) -> Option<Program> {
        self.children
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .find(|program| program.name() == name)
            .cloned()
    }

    /// Waits until one of the programs ends by itself, and says which and how.
    pub async fn first_end(&self) -> anyhow::Error {
        loop {
            let children = self
                .children
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            for program in children {
                if let Some(status) = program.ended() {
                    return anyhow::anyhow!(
                        "{} ended by itself ({status}); the end of its log:\n{}",
                        program.name(),
                        program.log_tail()
                    );
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Ends everything, last started first, and removes the folder unless it is kept.
    pub async fn down(self) {
        // Ending is the same code as in Drop, which blocks.
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.record.take());
        let children = std::mem::take(self.children.get_mut().unwrap_or_else(PoisonError::into_inner));
        for program in children.iter().rev() {
            program.stop_blocking();
        }
        drop(self.folder.take());
        drop(self.namespace.take());
        drop(self.turn.take());
    }
}

/// The test threads of one process take turns: they share its namespaces.
async fn turn() -> anyhow::Result<OwnedSemaphorePermit> {
    static TURN: std::sync::OnceLock<std::sync::Arc<Semaphore>> = std::sync::OnceLock::new();
    let semaphore = TURN.get_or_init(|| std::sync::Arc::new(Semaphore::new(1)));
    let turn = std::sync::Arc::clone(semaphore).acquire_owned();
    tokio::time::timeout(Duration::from_secs(1200), turn)
        .await
        .context("this process has had another cluster up for 20 minutes; one at a time")?
        .context("taking turns")
}

/// Asks until the answer is yes, every few milliseconds; gives up when a program has ended or the limit
/// has passed, with the log of the first program.
async fn wait_for<F, Fut>(programs: &[&Program], what: &str, limit: Duration, ask: F) -> anyhow::Result<()>
where
    F: Fn() -> Fut,
    Fut: Future<Output = bool>,
{
    let until = Instant::now() + limit;
    loop {
        // One answer that never comes must not take the whole time.
        if let Ok(true) = tokio::time::timeout(Duration::from_secs(5), ask()).await {
            return Ok(());
        }
        for program in programs {
            if let Some(status) = program.ended() {
                bail!(
                    "{} ended ({status}) before it could {what}; the end of its log:\n{}",
                    program.name(),
                    program.log_tail()
                );
            }
        }
        if Instant::now() > until {
            let name = programs.first().map_or("", |program| program.name());
            let log = programs.first().map(|program| program.log_tail());
            bail!(
                "{name} did not {what} within {} s; the end of its log:\n{}",
                limit.as_secs(),
                log.unwrap_or_default()
            );
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
