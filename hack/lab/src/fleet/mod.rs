//! A large cluster on a small machine: API server, kube-scheduler and `ebb controller` are the real programs, and the GPU
//! nodes are objects that nobody runs. So thousands of nodes and pods cost what the programs under test cost.
//!
//! `objects` makes nodes and pods · `replica` runs a controller, `service` is in front of several · `scheduler` runs a
//! kube-scheduler with the profile of `manifests/` · `binds` sees which pod was bound when · `books` adds up who was
//! promised how much of which GPU · `usage` asks the kernel what a program takes.

pub mod binds;
pub mod books;
pub mod objects;
pub mod replica;
pub mod scheduler;
pub mod service;
pub mod usage;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::Context as _;
use kube::Client;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Options};
use crate::ebb_install::{EBB, MODELS, root};
use replica::Replica;

/// What the controllers of a fleet are started with beside their names.
///
/// No pod here ever becomes Ready, since nobody runs it: what waits for that is turned off in this one place.
const CONTROLLER_FLAGS: [&str; 1] = ["--one-start-per-gpu=false"];

/// A control plane that Ebb can be started on. Dropping it ends all of it.
pub struct Fleet {
    /// Somebody who may do everything.
    pub client: Client,
    ebb: PathBuf,
    /// The controllers' own ServiceAccount.
    kubeconfig: PathBuf,
    // Last, so that everything else ends before the API server does.
    cluster: Cluster,
}

impl Fleet {
    /// Brings up etcd and an API server with Ebb's kinds, roles and the namespace of the models, and nothing else that
    /// takes part in scheduling.
    ///
    /// # Errors
    /// Says what did not come up.
    pub async fn start(ebb: PathBuf) -> anyhow::Result<Self> {
        let cluster = Cluster::up(Options {
            // It taints every new Node until the node-lifecycle controller, which is stopped here, has looked at it.
            apiserver_flags: vec!["--disable-admission-plugins=TaintNodesByCondition".to_owned()],
            ..Options::default()
        })
        .await?;
        // Nodes without a kubelet would be called unreachable after 50 s, and the cluster's own scheduler only takes
        // part of the machine.
        for program in ["kube-controller-manager", "kube-scheduler"] {
            cluster
                .program(program)
                .with_context(|| format!("the cluster has no {program}"))?
                .stop()
                .await;
        }
        let manifests = root().join("manifests");
        cluster.apply_path(&manifests.join("crds.yaml")).await?;
        for file in ["00-namespace.yaml", "10-rbac.yaml"] {
            cluster.apply_path(&manifests.join(file)).await?;
        }
        let kinds = [
            "wait",
            "--for=condition=Established",
            "--timeout=30s",
            "crd",
            "--all",
        ];
        cluster.kubectl(&kinds).await?.success()?;
        // The controller that makes each namespace's ServiceAccount is stopped too.
        let models = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": MODELS}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": MODELS}},
        ]});
        cluster.apply(&models.to_string()).await?;
        let kubeconfig = controller_kubeconfig(&cluster).await?;
        Ok(Self {
            client: cluster.client(),
            ebb,
            kubeconfig,
            cluster,
        })
    }

    /// The cluster under it.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Keeps the folder with all logs when the fleet ends.
    pub fn keep_dir(&mut self) {
        self.cluster.keep_dir();
        progress(&format!("logs are kept in {}", self.cluster.dir().display()));
    }

    /// Starts the replica of that number, from 0, on an address of its own, and waits until it serves.
    ///
    /// # Errors
    /// When it does not within half a minute; with the end of its log.
    pub async fn controller(&self, number: u8) -> anyhow::Result<Replica> {
        let ip = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 21 + number));
        let name = format!("ebb-controller-{number}");
        let mut command = std::process::Command::new(&self.ebb);
        command
            .args(["controller", "--namespace", EBB, "--pod-name", &name])
            .args(["--listen-ip", &ip.to_string()])
            .args(CONTROLLER_FLAGS)
            .env("KUBECONFIG", &self.kubeconfig)
            .env_remove("EBB_LOG");
        let replica = Replica::new(self.cluster.spawn(&name, command)?, ip);
        replica.serves().await?;
        Ok(replica)
    }
}

async fn controller_kubeconfig(cluster: &Cluster) -> anyhow::Result<PathBuf> {
    let token = cluster
        .kubectl(&["-n", EBB, "create", "token", "ebb-controller", "--duration=4h"])
        .await?
        .success()?
        .stdout;
    let text = std::fs::read_to_string(cluster.kubeconfig())?;
    let mut config: Value = serde_yaml_ng::from_str(&text)?;
    config["users"][0]["user"] = json!({"token": token.trim()});
    let path = cluster.dir().join("ebb-controller.kubeconfig");
    std::fs::write(&path, serde_yaml_ng::to_string(&config)?)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// One line about what goes on: over the last one on a terminal, below it elsewhere. An empty one clears it.
pub fn progress(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = if std::io::IsTerminal::is_terminal(&out) {
        write!(out, "\r\x1b[K{text}").and_then(|()| out.flush())
    } else if text.is_empty() {
        Ok(())
    } else {
        writeln!(out, "{text}")
    };
}
