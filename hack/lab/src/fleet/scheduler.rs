//! A kube-scheduler of the control plane's version with the profile of `manifests/scheduler.yaml`, with Ebb's extender or
//! without.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use serde::Deserialize as _;
use serde_json::{Value, json};

use super::Fleet;
use crate::cluster::{Cluster, Program};
use crate::ebb_install::{EBB, root};

/// Longest wait for the certificate that the controller makes for the scheduler.
const LIMIT: Duration = Duration::from_secs(30);
/// Calls per second to the API server, and in a burst: more than it can make, so that no client's limit is measured.
const QPS: u32 = 5000;

/// Whom the scheduler asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extender {
    /// Nobody; everything else of the profile is the same.
    None,
    /// Ebb, at this address.
    At(SocketAddr),
}

impl Fleet {
    /// Starts the scheduler. It ends with the fleet, or before by `stop`.
    ///
    /// # Errors
    /// When its configuration cannot be made.
    pub async fn scheduler(&self, extender: Extender) -> anyhow::Result<Program> {
        let cluster = self.cluster();
        let certificates = match extender {
            Extender::None => None,
            Extender::At(_) => Some(client_certificate(&self.client, cluster.dir()).await?),
        };
        let kubeconfig = cluster.dir().join("certificates/scheduler.kubeconfig");
        let mut config = profile()?;
        config["leaderElection"] = json!({"leaderElect": false});
        config["clientConnection"] = json!({"kubeconfig": kubeconfig, "qps": QPS, "burst": QPS});
        match (extender, certificates) {
            (Extender::At(address), Some(folder)) => {
                let extender = &mut config["extenders"][0];
                extender["urlPrefix"] = json!(format!("https://{address}/scheduler"));
                for (key, file) in [
                    ("caFile", "ca.crt"),
                    ("certFile", "tls.crt"),
                    ("keyFile", "tls.key"),
                ] {
                    extender["tlsConfig"][key] = json!(folder.join(file));
                }
            }
            _ => config["extenders"] = json!([]),
        }
        start(cluster, &config, &kubeconfig)
    }
}

fn start(cluster: &Cluster, config: &Value, kubeconfig: &Path) -> anyhow::Result<Program> {
    let path = cluster.dir().join("fleet-scheduler.yaml");
    std::fs::write(&path, serde_yaml_ng::to_string(config)?)
        .with_context(|| format!("writing {}", path.display()))?;
    let kubeconfig = kubeconfig.display();
    let mut command = Command::new(cluster.programs().join("kube-scheduler"));
    command
        .arg(format!("--config={}", path.display()))
        .arg(format!("--authentication-kubeconfig={kubeconfig}"))
        .arg(format!("--authorization-kubeconfig={kubeconfig}"))
        .arg("--bind-address=127.0.0.1")
        .arg(format!(
            "--cert-dir={}",
            cluster.dir().join("fleet-scheduler").display()
        ))
        .current_dir(cluster.dir());
    for variable in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        command.env_remove(variable);
    }
    cluster.spawn("ebb-scheduler", command)
}

/// The scheduler's configuration as users install it.
fn profile() -> anyhow::Result<Value> {
    let path = root().join("manifests/scheduler.yaml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    for document in serde_yaml_ng::Deserializer::from_str(&text) {
        let object = Value::deserialize(document)?;
        if let Some(config) = object.pointer("/data/config.yaml").and_then(Value::as_str) {
            return Ok(serde_yaml_ng::from_str(config)?);
        }
    }
    anyhow::bail!("{} has no ConfigMap with a config.yaml", path.display())
}

/// Writes the certificate that the controller made for the scheduler to files; their folder.
async fn client_certificate(client: &Client, dir: &Path) -> anyhow::Result<PathBuf> {
    let secrets = Api::<Secret>::namespaced(client.clone(), EBB);
    let found = async {
        loop {
            if let Some(secret) = secrets.get_opt("ebb-scheduler-client").await? {
                return Ok::<_, kube::Error>(secret);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let secret = tokio::time::timeout(LIMIT, found)
        .await
        .context("the controller made no Secret ebb-scheduler-client")??;
    let folder = dir.join("scheduler-client");
    std::fs::create_dir_all(&folder)?;
    for (key, value) in secret.data.unwrap_or_default() {
        std::fs::write(folder.join(key), value.0)?;
    }
    Ok(folder)
}
