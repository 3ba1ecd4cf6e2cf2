//! The client for the API server, from the ServiceAccount in a pod or a kubeconfig elsewhere.
//!
//! kube's own leaves Nagle's algorithm on: a request with a body then goes out in two segments, and the second waits
//! 40 ms for the acknowledgement of the first. It also tries a 429 again up to 15 times, which is for callers to decide.

use std::time::Duration;

use anyhow::Context;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use kube::{Client, Config};

/// Makes the client of this process.
///
/// # Errors
/// When there is neither a ServiceAccount nor a kubeconfig, or it cannot be used.
pub async fn connect() -> anyhow::Result<Client> {
    let config = Config::infer()
        .await
        .context("no way to the API server: run in a pod with a ServiceAccount, or set KUBECONFIG")?;
    from_config(config)
}

/// Makes a client from a configuration.
///
/// # Errors
/// When its certificates or credentials cannot be used.
pub fn from_config(config: Config) -> anyhow::Result<Client> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(Duration::from_secs(5)));
    // A watch is silent for minutes: this is what notices that its other end is gone.
    connector.set_keepalive(Some(Duration::from_secs(15)));
    let connector = config
        .rustls_https_connector_with_connector(connector)
        .context("cannot set up TLS to the API server")?;
    let http = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(
            config
                .auth_layer()
                .context("cannot use the credentials for the API server")?,
        )
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
