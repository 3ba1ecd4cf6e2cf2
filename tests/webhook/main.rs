//! Admission on a real API server: what people do with their manifests, and what becomes of it.
#![allow(clippy::unwrap_used, missing_docs)]

mod apply;
mod installation;
mod pods;
mod services;
mod workloads;

/// A manifest as a person writes it.
fn deployment(name: &str, replicas: u32) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: models, labels: {{app: {name}}}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      containers:
        - name: model
          image: lab/model:1
          ports: [{{name: http, containerPort: 8000}}]
          resources: {{limits: {{ebb.dev/gpu-memory: 18Gi}}}}
"
    )
}

fn stateful_set(name: &str, replicas: u32) -> String {
    deployment(name, replicas)
        .replace("kind: Deployment", "kind: StatefulSet")
        .replace(
            "spec:\n  replicas",
            &format!("spec:\n  serviceName: {name}\n  replicas"),
        )
}

fn service(name: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: models}}
spec:
  selector: {{app: {name}}}
  ports: [{{name: http, port: 80, targetPort: http}}]
"
    )
}

/// Adds annotations to a manifest.
fn annotated(manifest: &str, annotations: &str) -> String {
    manifest.replacen(
        "namespace: models",
        &format!("namespace: models, annotations: {{{annotations}}}"),
        1,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn admission_on_a_real_api_server() {
    let ebb = installation::Installation::up().await;
    workloads::created_asleep(&ebb).await;
    workloads::own_values(&ebb).await;
    workloads::opting_out_and_in(&ebb).await;
    workloads::policy_change(&ebb).await;
    workloads::what_is_not_ours(&ebb).await;
    apply::everything_clean(&ebb, "deployment").await;
    apply::everything_clean(&ebb, "statefulset").await;
    apply::by_hand(&ebb).await;
    services::gated(&ebb).await;
    services::clean_applies(&ebb).await;
    services::left_alone(&ebb).await;
    pods::gated(&ebb).await;
    pods::created(&ebb).await;
    pods::refused(&ebb).await;
    pods::frozen(&ebb).await;
    workloads::policies(&ebb).await;
    ebb.down().await;
}
