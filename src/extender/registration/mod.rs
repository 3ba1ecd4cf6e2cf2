//! How kube-scheduler gets to know the extender: `ebb scheduler` writes what it has to be given.
//!
//! - `deployment`: a kube-scheduler of Ebb's own, with everything around it. It works where the cluster's scheduler
//!   cannot be changed; `manifests/scheduler.yaml` is its output.
//! - `config`: the configuration of the cluster's own scheduler, with Ebb's profile and extender in it, for the
//!   names, the address and the certificates of the Ebb that is installed.
//!
//! The texts are in [`text`]; here is what is asked of the cluster for them.

pub mod text;

use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::{Secret, Service};
use kube::{Api, Client};

use self::text::{Credentials, Image, Inline, Installed, Namespace, Release};
use crate::api::names;
use crate::cluster::client;

/// Longest wait for an answer of the API server.
const LIMIT: Duration = Duration::from_secs(10);

/// Arguments of `ebb scheduler`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// A kube-scheduler of Ebb's own with everything it needs, as YAML for `kubectl apply -f -`.
    Deployment(Deployment),
    /// The KubeSchedulerConfiguration that adds Ebb to the cluster's own scheduler.
    Config(Config),
}

#[derive(Debug, clap::Args)]
struct Deployment {
    /// Namespace that Ebb is installed in.
    #[arg(long, default_value = names::NAMESPACE)]
    namespace: Namespace,
    /// Version of kube-scheduler, not newer than the API server. Left out, the cluster of KUBECONFIG is asked for its own.
    #[arg(long, value_name = "vX.Y.Z")]
    kubernetes_version: Option<Release>,
    /// Image of kube-scheduler in place of the one Kubernetes publishes.
    #[arg(long, conflicts_with = "kubernetes_version")]
    image: Option<Image>,
    /// Pods; one of them leads.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=9))]
    replicas: u8,
}

#[derive(Debug, clap::Args)]
struct Config {
    /// Namespace that Ebb is installed in.
    #[arg(long, default_value = names::NAMESPACE)]
    namespace: Namespace,
    /// Kubeconfig of the scheduler, as a path on its machine. With a configuration file kube-scheduler takes it from
    /// there only; leave it out where the scheduler runs as a pod with a ServiceAccount.
    #[arg(long, value_name = "PATH")]
    scheduler_kubeconfig: Option<String>,
    /// Folder on the scheduler's machine with ca.crt, tls.crt and tls.key, as of the Secret ebb-scheduler-client. Left
    /// out, the certificates stand in the configuration itself: it is a secret then, and has to be made again before
    /// they end.
    #[arg(long, value_name = "PATH")]
    certificates: Option<String>,
}

/// Prints what was asked for.
///
/// # Errors
/// When the cluster has to be asked and does not answer, or has no Ebb; with what to do about it.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let text = match args.command {
        Command::Deployment(args) => {
            let image = match (args.image, args.kubernetes_version) {
                (Some(image), _) => image,
                (None, Some(release)) => Image::of(&release),
                (None, None) => Image::of(&release_of().await?),
            };
            text::deployment(&args.namespace, &image, args.replicas)
        }
        Command::Config(args) => {
            let client = client::connect().await?;
            let installed = Installed {
                cluster_ip: cluster_ip(&client, &args.namespace).await?,
                credentials: match args.certificates {
                    Some(folder) => Credentials::Files(folder),
                    None => Credentials::Inline(certificates(&client, &args.namespace).await?),
                },
            };
            text::config(&args.namespace, &installed, args.scheduler_kubeconfig.as_deref())
        }
    };
    print!("{text}");
    Ok(())
}

async fn release_of() -> anyhow::Result<Release> {
    let version = async { anyhow::Ok(limited(client::connect().await?.apiserver_version()).await?) };
    let version = version
        .await
        .context("cannot ask the cluster for its version; say --kubernetes-version")?;
    let release = version.git_version.parse::<Release>();
    release.map_err(|error| anyhow::anyhow!("{error}; say --kubernetes-version"))
}

async fn cluster_ip(client: &Client, namespace: &Namespace) -> anyhow::Result<std::net::IpAddr> {
    let services: Api<Service> = Api::namespaced(client.clone(), namespace.as_str());
    let service = limited(services.get(names::CONTROLLER)).await.with_context(|| {
        let name = names::CONTROLLER;
        format!("cannot read the Service {namespace}/{name}: install Ebb first, or say --namespace")
    })?;
    let ip = service.spec.and_then(|spec| spec.cluster_ip).unwrap_or_default();
    let name = names::CONTROLLER;
    ip.parse()
        .with_context(|| format!("the Service {namespace}/{name} has no cluster IP, but {ip:?}"))
}

async fn certificates(client: &Client, namespace: &Namespace) -> anyhow::Result<Inline> {
    let name = names::SCHEDULER_CLIENT_SECRET;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace.as_str());
    let secret = limited(secrets.get(name)).await.with_context(|| {
        format!("cannot read the Secret {namespace}/{name}: the controller makes it when it starts; you may need more rights")
    })?;
    let field = |key: &str| match secret.data.as_ref().and_then(|data| data.get(key)) {
        Some(bytes) => Ok(bytes.0.clone()),
        None => bail!("the Secret {namespace}/{name} has no {key}: delete it, the controller makes it anew"),
    };
    Ok(Inline {
        ca: field("ca.crt")?,
        certificate: field("tls.crt")?,
        key: field("tls.key")?,
    })
}

async fn limited<T>(asked: impl Future<Output = kube::Result<T>>) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(LIMIT, asked).await;
    let limit = LIMIT.as_secs();
    Ok(answer.with_context(|| format!("the API server did not answer within {limit} s"))??)
}
