//! The headless twin of a gated Service: `NAME-ebb-pods`, with the selector that the Service had, for scrapers,
//! `kubectl port-forward` and `kubectl logs`, which a gated Service cannot serve.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use kube::ResourceExt;
use kube::api::ObjectMeta;

use crate::api::{annotations, names};
use crate::cluster::slices;

const TWIN_LABEL: &str = "ebb.dev/twin-of";
/// Names of Services are DNS labels.
const NAME_LIMIT: usize = 63;

/// The twin's name.
#[must_use]
pub fn name(service: &str) -> String {
    format!("{service}-ebb-pods")
}

/// Whether a Service is a twin that Ebb made.
#[must_use]
pub fn is_twin(service: &Service) -> bool {
    service.labels().contains_key(TWIN_LABEL)
}

/// The twin that a gated Service should have; `None` where its name would be too long.
#[must_use]
pub fn twin(service: &Service) -> Option<Service> {
    let name = name(&service.name_any());
    if name.len() > NAME_LIMIT {
        return None;
    }
    let spec = service.spec.as_ref()?;
    let mut selector = spec.selector.clone()?;
    selector.remove(names::GATED_KEY);
    Some(Service {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: service.namespace(),
            labels: Some(BTreeMap::from([(TWIN_LABEL.to_owned(), service.name_any())])),
            // Written before the webhook can think about it: this one is never gated.
            annotations: Some(BTreeMap::from([(annotations::MODE.to_owned(), "off".to_owned())])),
            owner_references: Some(vec![slices::owner(service)]),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            selector: Some(selector),
            ports: Some(
                spec.ports
                    .iter()
                    .flatten()
                    .map(|port| ServicePort {
                        node_port: None,
                        ..port.clone()
                    })
                    .collect(),
            ),
            ip_families: spec.ip_families.clone(),
            ip_family_policy: spec.ip_family_policy.clone(),
            ..ServiceSpec::default()
        }),
        status: None,
    })
}

/// Whether the twin in the cluster selects what it should.
#[must_use]
pub fn same(have: &Service, wanted: &Service) -> bool {
    let selector = |service: &Service| service.spec.as_ref().and_then(|spec| spec.selector.clone());
    let ports = |service: &Service| -> Vec<(Option<String>, i32)> {
        let spec = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        spec.map(|port| (port.name.clone(), port.port)).collect()
    };
    selector(have) == selector(wanted)
        && ports(have) == ports(wanted)
        && have.metadata.owner_references == wanted.metadata.owner_references
}
