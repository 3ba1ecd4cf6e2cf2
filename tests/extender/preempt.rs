//! Pods of higher priority: kube-scheduler picks whom to evict, and the extender keeps it from evicting for nothing.

use anyhow::ensure;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::hall::{GIB, Hall};

const LOW: &str = "low";
const HIGH: &str = "high";

/// Twelve cards, each wholly taken by one pod of low priority: one of them goes, and only one.
pub async fn room_is_made(hall: &Hall) -> anyhow::Result<()> {
    let classes: Api<PriorityClass> = Api::all(hall.site.client.clone());
    for (name, value) in [(LOW, 10), (HIGH, 1000)] {
        let class = json!({"metadata": {"name": name}, "value": value});
        classes
            .create(&PostParams::default(), &serde_json::from_value(class)?)
            .await?;
    }
    let names: Vec<String> = (0..12).map(|index| format!("low-{index}")).collect();
    try_join_all(names.iter().map(|name| create(hall, name, LOW, 40 * GIB))).await?;
    for name in &names {
        hall.bound(name).await?;
    }
    create(hall, "high", HIGH, 40 * GIB).await?;
    hall.bound("high").await?;
    let left = low(hall).await?.len();
    ensure!(left == 11, "{left} of 12 are left");
    hall.check_reservations()?;
    hall.clear().await
}

/// Sixty shares of 8 GiB, and one that needs a whole card's 40: five of them add up to it on any node, and help only if
/// they are on the same card.
pub async fn nobody_goes_for_nothing(hall: &Hall) -> anyhow::Result<()> {
    let names: Vec<String> = (0..60).map(|index| format!("low-{index}")).collect();
    try_join_all(names.iter().map(|name| create(hall, name, LOW, 8 * GIB))).await?;
    for name in &names {
        hall.bound(name).await?;
    }
    create(hall, "high", HIGH, 40 * GIB).await?;
    // By now the scheduler has asked whom to evict: it does before it tells.
    let told = hall.refused("high").await;
    let left = low(hall).await?.len();
    match told {
        Ok(told) => ensure!(left == 60, "{left} of 60 are left, and it still waits: {told}"),
        // The five it picked were on one card.
        Err(_) => {
            hall.bound("high").await?;
            ensure!(left == 55, "{left} of 60 are left");
        }
    }
    hall.clear().await
}

async fn low(hall: &Hall) -> anyhow::Result<Vec<Pod>> {
    let pods = hall.pods().list(&ListParams::default()).await?;
    let low = |pod: &Pod| pod.name_any().starts_with("low-");
    Ok(pods.into_iter().filter(low).collect())
}

async fn create(hall: &Hall, name: &str, class: &str, bytes: u64) -> anyhow::Result<Pod> {
    let pod = json!({
        "metadata": {"name": name},
        "spec": {
            "schedulerName": "ebb-scheduler",
            "priorityClassName": class,
            "containers": [{"name": "model", "image": "none.invalid/model:1",
                "resources": {"limits": {"ebb.dev/gpu-memory": bytes.to_string()}}}],
        },
    });
    Ok(hall
        .pods()
        .create(&PostParams::default(), &serde_json::from_value(pod)?)
        .await?)
}
