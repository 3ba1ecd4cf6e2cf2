//! The Service in front of several controllers, as the scheduler reaches them: a real ClusterIP, whose endpoints follow
//! the replicas as the kubelet's readiness would have them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::sync::Mutex;

use super::Fleet;
use crate::ebb_install::EBB;

const NAME: &str = "ebb-controller";
const PORT: u16 = 9444;
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 44);

/// The Service. Clones are one.
#[derive(Clone)]
pub struct Service {
    slices: Api<EndpointSlice>,
    /// Held over the write, so that the last change is the last write.
    ready: Arc<Mutex<BTreeSet<IpAddr>>>,
}

impl Service {
    /// Makes it, without endpoints.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn create(fleet: &Fleet) -> anyhow::Result<Self> {
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "namespace": EBB},
            "spec": {"clusterIP": ADDRESS, "ports": [{"name": "extender", "port": PORT}]}});
        fleet.cluster().apply(&service.to_string()).await?;
        Ok(Self {
            slices: Api::namespaced(fleet.client.clone(), EBB),
            ready: Arc::default(),
        })
    }

    /// Where the scheduler asks.
    #[must_use]
    pub fn extender(&self) -> SocketAddr {
        SocketAddr::new(ADDRESS.into(), PORT)
    }

    /// A replica is ready from now on.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn add(&self, ip: IpAddr) -> anyhow::Result<()> {
        let mut ready = self.ready.lock().await;
        ready.insert(ip);
        self.write(&ready).await
    }

    /// A replica is not ready any more.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn remove(&self, ip: IpAddr) -> anyhow::Result<()> {
        let mut ready = self.ready.lock().await;
        ready.remove(&ip);
        self.write(&ready).await
    }

    async fn write(&self, ready: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
        let endpoint = |ip: &IpAddr| json!({"addresses": [ip], "conditions": {"ready": true}});
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": NAME, "labels": {"kubernetes.io/service-name": NAME}},
            "endpoints": ready.iter().map(endpoint).collect::<Vec<_>>(),
            "ports": [{"name": "extender", "port": PORT, "protocol": "TCP"}],
        });
        let how = PatchParams::apply("ebb-lab").force();
        self.slices.patch(NAME, &how, &Patch::Apply(&slice)).await?;
        Ok(())
    }
}
