//! The Kubernetes client of everything in the lab.
//!
//! kube's own leaves Nagle's algorithm on. A request with a body then goes out in two segments, and the
//! second waits for the acknowledgement of the first: 40 ms, ten times what the API server takes.

use anyhow::Context as _;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use std::path::Path;
use std::time::Duration;

/// Makes a client for the cluster of a kubeconfig file.
///
/// # Errors
/// Says what is wrong with the file.
pub async fn from_kubeconfig(path: &Path) -> anyhow::Result<Client> {
    let file = Kubeconfig::read_from(path).with_context(|| format!("reading {}", path.display()))?;
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("using {}", path.display()))?;
    // A proxy of the machine's network is of no use inside the lab's.
    config.proxy_url = None;
    from_config(config)
}

/// Makes a client that sends at once.
///
/// # Errors
/// When the configuration's certificates cannot be used.
pub fn from_config(config: Config) -> anyhow::Result<Client> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(Duration::from_secs(5)));
    // A watch is silent for minutes: this is what notices that its other end is gone.
    connector.set_keepalive(Some(Duration::from_secs(15)));
    let connector = config
        .rustls_https_connector_with_connector(connector)
        .context("setting up TLS to the API server")?;
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("setting up authentication")?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
