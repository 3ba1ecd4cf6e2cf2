//! A control plane with Ebb's webhook in front of it, as `manifests/webhooks.yaml` installs it: through a Service, with
//! the program's own certificates, and the CA put in by the program.

use std::time::Duration;

use ebb::cluster::clock::Clock;
use ebb::cluster::ledger_feed::{self, SharedLedger};
use ebb::cluster::view::View;
use ebb::serve::certificates::Certificates;
use ebb::serve::lease::{LeaderState, Leadership};
use ebb::serve::{ca_bundle, https};
use ebb::webhook;
use ebb_lab::cluster::{Cluster, Options, Output};
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

/// The Service's stand-in for the controller's pods: this process.
const BACKEND: &str = "
apiVersion: v1
kind: Service
metadata: {name: ebb-controller, namespace: ebb-system}
spec: {ports: [{name: webhook, port: 443, targetPort: 9443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: ebb-controller-test, namespace: ebb-system, labels: {kubernetes.io/service-name: ebb-controller}}
addressType: IPv4
ports: [{name: webhook, port: 9443}]
endpoints: [{addresses: [10.77.0.1], conditions: {ready: true}}]
";

const POLICY: &str = "
apiVersion: ebb.dev/v1alpha1
kind: ScalePolicy
metadata: {name: default}
spec:
  namespaceSelector: {matchLabels: {models: 'yes'}}
  maxReplicas: 3
  bounds: {maxIdleAfter: 2h, maxReplicas: 5}
";

const NAMESPACE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: models, labels: {models: 'yes'}}
";

pub struct Installation {
    pub cluster: Cluster,
    pub view: View,
    stop: CancellationToken,
}

impl Installation {
    pub async fn up() -> Self {
        let cluster = Cluster::up(Options::default()).await.unwrap();
        let client = cluster.client();
        let stop = CancellationToken::new();
        let this = |cluster, view| Self {
            cluster,
            view,
            stop: stop.clone(),
        };
        cluster.apply(&ebb::api::crds_yaml()).await.unwrap();
        success(
            cluster
                .kubectl(&[
                    "wait",
                    "--for=condition=Established",
                    "crd",
                    "--all",
                    "--timeout=60s",
                ])
                .await,
        );
        success(cluster.kubectl(&["create", "namespace", "ebb-system"]).await);
        let ledger = SharedLedger::default();
        let hooks = ledger_feed::feed(&ledger, Clock::start());
        let view = View::start(client.clone(), hooks, stop.clone()).await.unwrap();
        let certificates = Certificates::start(client.clone(), "ebb-system", stop.clone())
            .await
            .unwrap();
        let mut registry = Registry::default();
        let router = webhook::router(webhook::Context {
            view: view.clone(),
            ledger,
            namespace: "ebb-system".to_owned(),
            runtime_class: webhook::runtime_class::follow(client.clone(), stop.clone())
                .await
                .unwrap(),
            metrics: webhook::Metrics::new(&mut registry),
        });
        let listener = tokio::net::TcpListener::bind("10.77.0.1:9443").await.unwrap();
        tokio::spawn(https::serve_https(
            listener,
            certificates.server(),
            router,
            https::Limits::default(),
            stop.clone(),
        ));
        cluster.apply(BACKEND).await.unwrap();
        cluster
            .apply(include_str!("../../manifests/webhooks.yaml"))
            .await
            .unwrap();
        ca_bundle::inject(&client, &certificates.ca().borrow().clone())
            .await
            .unwrap();
        tokio::spawn(ca_bundle::keep(client.clone(), certificates.ca(), stop.clone()));
        tokio::spawn(webhook::ownership::keep(
            client,
            Leadership::fixed(LeaderState::Leading { term: 1 }),
            stop.clone(),
        ));
        cluster.apply(NAMESPACE).await.unwrap();
        cluster.apply(POLICY).await.unwrap();
        let this = this(cluster, view);
        this.sees(|view| {
            view.scale_policies.get("", "default").is_some() && view.namespaces.get("", "models").is_some()
        })
        .await;
        // The API server takes a moment to route to a Service and to read webhook configurations: wait until a probe
        // comes back changed.
        let probe = super::deployment("probe", 1);
        within("the webhook is asked", async || {
            let output = this
                .cluster
                .kubectl_with(&["create", "--dry-run=server", "-o", "json", "-f", "-"], &probe)
                .await
                .unwrap();
            output.status.success() && output.stdout.contains("ebb.dev/managed")
        })
        .await;
        this
    }

    pub async fn down(self) {
        self.stop.cancel();
        self.cluster.down().await;
    }

    /// Waits until the view shows something.
    pub async fn sees(&self, what: impl Fn(&View) -> bool) {
        within("the view shows it", async || what(&self.view)).await;
    }

    /// Runs kubectl in the namespace of the models.
    pub async fn run(&self, arguments: &[&str], stdin: &str) -> Output {
        let mut all = vec!["--namespace", "models"];
        all.extend(arguments);
        self.cluster.kubectl_with(&all, stdin).await.unwrap()
    }

    /// The same, for what has to succeed.
    pub async fn ok(&self, arguments: &[&str], stdin: &str) -> Output {
        let output = self.run(arguments, stdin).await;
        assert!(
            output.status.success(),
            "kubectl {arguments:?}: {}",
            output.stderr
        );
        output
    }

    /// The same, for what has to be refused with these words.
    pub async fn refused(&self, arguments: &[&str], stdin: &str, words: &str) {
        let output = self.run(arguments, stdin).await;
        assert!(
            !output.status.success(),
            "kubectl {arguments:?} was taken: {}",
            output.stdout
        );
        assert!(
            output.stderr.contains(words),
            "kubectl {arguments:?}: {}",
            output.stderr
        );
    }

    /// An object, managedFields included.
    pub async fn get(&self, kind: &str, name: &str) -> Value {
        let output = self
            .ok(&["get", kind, name, "-o", "json", "--show-managed-fields"], "")
            .await;
        serde_json::from_str(&output.stdout).unwrap()
    }

    /// Moves a workload as gate and controller do: by its scale subresource.
    pub async fn scale(&self, workload: &str, replicas: u32, manager: &str) {
        let patch = format!(r#"{{"spec":{{"replicas":{replicas}}}}}"#);
        let manager = format!("--field-manager={manager}");
        self.ok(
            &[
                "patch",
                workload,
                "--subresource=scale",
                "--type=merge",
                "-p",
                &patch,
                &manager,
            ],
            "",
        )
        .await;
    }

    /// An empty patch, as the controller sends it to have the webhook look again.
    pub async fn touch(&self, kind: &str, name: &str) {
        self.ok(&["patch", kind, name, "--type=merge", "-p", "{}"], "")
            .await;
    }
}

pub fn success(output: anyhow::Result<Output>) -> Output {
    output.unwrap().success().unwrap()
}

/// Waits, bounded, until something holds.
pub async fn within(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "not in a minute: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
